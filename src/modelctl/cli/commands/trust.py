"""The commands that say whether a file is to be trusted: scan, hash, verify."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

from ...errors import ModelctlError, UsageError
from .. import options as o
from ..output import Output, say, write_json
from ..signature import Argument, Command, Option, looks


def scan(
    out: Output,
    src: Annotated[
        list[Path], Argument("PATH…", "What to look at: files, folders with all in them, URLs.")
    ],
    strict: Annotated[
        bool, Option("Somebody's own classes, and other oddities, are findings, too: exit code 1.")
    ] = False,
) -> int:
    """What the pickles in files would run, wherever they lie; nothing of them is run.

    In torch's files of all times, zips, tars and what is compressed, one in another, numpy arrays,
    joblib's and plain pickles, folders of torch.distributed.checkpoint. Content decides, never
    a suffix. Each finding says in which member, at which byte, by which name.

    Exit code 0: no finding, or but suspicious ones. 1: something would run. 2: something is
    malformed or could not be scanned.

    Example: modelctl scan downloads/ --strict

    Example: modelctl scan model.pt --format sarif
    """
    from ...scanning.scan import scan as look

    found = look(src)
    if out.format == "sarif":
        from ... import __version__

        write_json(None, found.as_sarif(__version__))
    else:
        out.show(found)
    return found.exit_code(strict=strict)


@looks
def hash(
    out: Output,
    src: Annotated[
        list[Path], Argument("SRC…", "The checkpoints: files, folders or URLs. - is stdin.")
    ],
    tensors: Annotated[
        bool, Option("A line a tensor of one SRC: the manifest that verify takes.")
    ] = False,
    section: Annotated[
        Literal["model", "optimizer", "ema", "constants", "all"], Option("Whose tensors.")
    ] = "all",
    key: o.Key = None,
    follow_symlinks: o.FollowSymlinks = False,
) -> int:
    """A hash of the content: the same in every format, under every sharding, in every order.

    Of all tensors, by their names, dtypes, shapes and values; not of what is no tensor. The
    model's are named as load_state_dict would see them, all others by their full path. The hash
    of a file is the SHA-256 of its manifest: modelctl hash --tensors SRC | sha256sum

    Example: modelctl hash model.pt model.safetensors

    Example: modelctl hash --tensors model.pt > model.manifest
    """
    from ... import files
    from ...integrity.hashing import Hashes, hash_tensors

    if tensors and len(src) > 1 and out.is_table:
        raise UsageError("--tensors takes one SRC", hint="of several, --format json has all")
    found = Hashes()
    with out.progress() as progress:
        for one in src:
            try:
                with files.open(one, key=key, follow_symlinks=follow_symlinks) as ckpt:
                    found.append(hash_tensors(ckpt, section, progress))
            except ModelctlError as e:
                if len(src) == 1:
                    raise
                found.failed[str(one)] = e
                if not out.is_json:
                    say("error", e.message, out.color)
    if not out.is_table:
        out.show(found[0] if tensors and len(src) == 1 else found)
    elif tensors:
        out.lines([one.line for one in found[0].tensors])
    else:
        out.lines([one.line for one in found])
    return 2 if found.failed else 0


@looks
def verify(
    out: Output,
    src: Annotated[
        list[Path],
        Argument("SRC…", "The checkpoints, each by itself: files, folders or URLs. - is stdin."),
    ],
    manifest: Annotated[
        Path | None,
        Option("Compare every tensor with what hash --tensors wrote.", "F", complete="paths"),
    ] = None,
    salvage: Annotated[
        bool, Option("Write what is whole of one SRC to -o FILE, and say what is lost.")
    ] = False,
    output: Annotated[
        str | None,
        Option("What --salvage writes.", "FILE", flags=("--output", "-o"), complete="paths"),
    ] = None,
    to: o.To = None,
    overwrite: o.Overwrite = False,
    key: o.Key = None,
    follow_symlinks: o.FollowSymlinks = False,
) -> int:
    """Whether a checkpoint is sound: all of it is read, nothing is run.

    Structure, sizes, ranges, the CRC of every record, shards against their index, parts of
    distributed tensors, sparse indices; NaN, Inf, weights that are all zero; whether the optimizer
    belongs to the model, and the freeze record names what is there. A format without checksums
    (safetensors, torch before 1.6) shows a changed value only against a --manifest.

    Exit code 0: sound. 1: something was found. 2: it can't be read.

    --salvage keeps what is whole of a file that was cut off or changed: tensors that are there to
    their last byte, and have the CRC that the file records.

    Example: modelctl verify last.pt

    Example: modelctl verify torn.pt --salvage -o rest.pt

    Example: modelctl verify model.safetensors --manifest model.manifest
    """
    from ...integrity.verify import verify as look

    if len(src) > 1 and (manifest is not None or salvage):
        raise UsageError(f"{'--salvage' if salvage else '--manifest'} takes one SRC")
    if salvage != (output is not None) or (salvage and manifest is not None):
        raise UsageError("--salvage takes -o FILE, and no --manifest")
    if output is not None:
        from ...integrity.salvage import salvage as keep

        with out.progress() as progress:
            kept = keep(
                *(src[0], output),
                to=to,
                overwrite=overwrite,
                key=key,
                follow_symlinks=follow_symlinks,
                progress=progress,
            )
        out.show(kept)
        return kept.exit_code
    with out.progress() as progress:
        found = look(src, manifest, key=key, follow_symlinks=follow_symlinks, progress=progress)
    if len(src) == 1 and found[0].error is not None:
        raise found[0].error
    out.show(found)
    return found.exit_code


COMMANDS = (Command(scan, "Look", scan, sarif=True), verify, hash)
