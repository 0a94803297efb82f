"""What the shell offers while a command is typed."""

from __future__ import annotations

import os

import typer


def complete_names(ctx: typer.Context, incomplete: str) -> list[str]:
    """The tensors and modules of SRC that begin so, for the shell's completion."""
    source = ctx.params.get("src")
    sources = source if isinstance(source, list | tuple) else [source]
    # a half-typed line leaves what was not parsed in ctx.args
    known_sources = [one for one in (*sources, *ctx.args) if one and os.path.exists(one)]
    if not known_sources:
        return []
    from .. import files
    from ..inspection.ls import list_names

    try:
        with files.open(known_sources[0]) as ckpt:
            names = list_names(ckpt)
    except Exception:  # a shell that completes is no place for errors
        return []
    known: dict[str, None] = {}
    for name in names:
        # up to the next dot: modules first, then what is in them
        end = name.find(".", len(incomplete))
        if name.startswith(incomplete):
            known[name if end < 0 else name[:end]] = None
    return list(known)


def complete_paths(incomplete: str) -> list[str]:
    """The files and folders that begin so: the output is text, since a slash at its end counts."""
    folder, name = os.path.split(incomplete)
    try:
        with os.scandir(folder or ".") as found:
            return sorted(
                os.path.join(folder, entry.name) + ("/" if entry.is_dir() else "")
                for entry in found
                if entry.name.startswith(name)
            )
    except OSError:
        return []
