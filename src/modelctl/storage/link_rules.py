"""Symbolic links: which ones are followed, and what an edit in place may replace.

Reading follows the link that the user names, and what files name among themselves inside one cache
of the Hugging Face hub. Writing replaces a link, never what it leads to, unless the user says so;
inside such a cache, where a file is shared and stands for its hash, nothing is edited in place.
"""

from __future__ import annotations

import os
from collections.abc import Iterable
from itertools import pairwise
from pathlib import Path
from shlex import quote

from ..errors import RefusedError

_CACHED = ("models--", "datasets--", "spaces--")


def in_one_cache(link: Path) -> bool:
    """``models--*/snapshots/…/name`` that leads to a blob of the same ``models--*`` folder."""
    here = link.parent.resolve()
    trees = [above for above in here.parents if above.name.startswith(_CACHED)]
    return bool(trees) and link.resolve().parent == trees[0] / "blobs"


def edited_in_place(path: str | os.PathLike[str], *, follow_links: bool) -> str:
    """The file, or the folder, that an edit in place of ``path`` changes: with ``follow_links``
    what a link leads to.

    Raises:
        RefusedError: a link that is not to be followed; in a cache of the Hugging Face hub.
    """
    name = os.fspath(path).rstrip("/" + os.sep) or os.fspath(path)
    real = os.path.realpath(name)
    elsewhere = f"-o {quote(os.path.basename(name))}"
    if _is_cached(os.path.abspath(name)) or _is_cached(real):
        raise RefusedError(
            f"{name}: in a cache of the Hugging Face hub, whose files are shared and stand for "
            "their hashes: not edited in place",
            hint=f"{elsewhere} writes a file of your own",
        )
    if not os.path.islink(name):
        return os.fspath(path)
    if not follow_links:
        raise RefusedError(
            f"{name}: a link to {real}, which others may use: not edited in place",
            # an output that is a link to a folder is written into that folder
            hint=(
                _own_folder(name)
                if os.path.isdir(name)
                else f"{elsewhere} --overwrite puts a file in the link's place"
            )
            + f"; --follow-symlinks edits {real}",
        )
    return real


def check_members(paths: Iterable[str | os.PathLike[str]], folder: str) -> None:
    """Files that are about to be replaced together in a folder, which may not be links.

    Raises:
        RefusedError: one of them is; in a cache of the Hugging Face hub.
    """
    for path in paths:
        edited_in_place(path, follow_links=True)
        if os.path.islink(path):
            raise RefusedError(
                f"{os.fspath(path)}: a link to {os.path.realpath(path)}, so this folder is not "
                "edited in place",
                hint=_own_folder(folder),
            )


def _own_folder(name: str) -> str:
    return f"-o {quote(name.rstrip('/') + '-new/')} writes a folder of your own"


def other_names(paths: Iterable[str | os.PathLike[str]]) -> dict[str, int]:
    """Those of the files that have other names, too (hard links), and how many others."""
    found = {}
    for path in paths:
        try:
            names = os.lstat(path).st_nlink
        except OSError:
            continue
        if names > 1 and os.path.isfile(path) and not os.path.islink(path):
            found[os.fspath(path)] = names - 1
    return found


def _is_cached(path: str) -> bool:
    parts = Path(path).parts
    return any(
        part.startswith(_CACHED) and below in ("snapshots", "blobs")
        for part, below in pairwise(parts)
    )
