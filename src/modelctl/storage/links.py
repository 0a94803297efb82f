"""A second name for a file: one that leads to the old or to the new file, never to nothing."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

from ..errors import WriteError
from .locks import Lock
from .targets import confirm


def point(link: Path, name: str, *, hard: bool = False) -> None:
    """Let ``link`` stand for the file ``name`` in its folder, in place of what it stood for.

    A symbolic link without a folder, so that the folder can be moved; where there are none, a
    hard link, else a copy. With ``hard`` no symbolic one: it stays whole when the file is removed.
    What ``link`` led to before is not touched.

    Raises:
        WriteError: it can't be; what stood there is intact.
        DurabilityError: it was done, but the disk did not confirm it.
    """
    # always the same, so that what a killed one left is in the way of nobody for long
    temp = link.parent / f".{link.name}.modelctl-new"
    try:
        with Lock(link.parent, link.name, link):
            _remove(temp)
            try:
                _make(temp, name, hard)
                os.replace(temp, link)
            finally:
                _remove(temp)  # it still stands where both were hard links to one file
    except OSError as e:
        raise WriteError(f"{link}: not updated: {e.strerror or e}; {name} stands beside it") from e
    confirm(link.parent, link)


def _make(temp: Path, name: str, hard: bool) -> None:
    ways: list[tuple[Callable[[Any, Path], None], Any]] = [(os.link, temp.parent / name)]
    if not hard:
        ways.insert(0, (os.symlink, name))
    for way, what in ways:
        with suppress(OSError, NotImplementedError):
            way(what, temp)
            return
    with open(temp.parent / name, "rb") as source, open(temp, "xb") as copy:
        shutil.copyfileobj(source, copy)
        copy.flush()
        os.fsync(copy.fileno())


def _remove(path: Path) -> None:
    with suppress(FileNotFoundError):
        os.unlink(path)
