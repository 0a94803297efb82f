"""What a hostile case is: files, and what must happen when they are opened."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple


class Link(NamedTuple):
    """A symbolic link."""

    to: str


class Folder(NamedTuple):
    """An empty folder."""


class Fifo(NamedTuple):
    """A named pipe that nobody writes to."""


File = bytes | Link | Folder | Fifo


class Refused(NamedTuple):
    """An error with ``text`` in it. It names the file, and the ``member`` and the byte ``offset``
    in it where these are given (an offset of -1: any). What is found only when a tensor's bytes
    are read (``late``) names what it knows."""

    text: str
    member: str | None = None
    offset: int | None = None
    error: str = "UnreadableError"
    late: bool = False


class Found(NamedTuple):
    """Opened, and a finding says what unpickling the file would run or build."""

    id: str
    name: str
    level: str = "dangerous"


class Odd(NamedTuple):
    """Opened, with a warning that has ``text`` in it."""

    text: str


class Fine(NamedTuple):
    """Opened, and nothing is said about it."""


class Case(NamedTuple):
    """``opened`` is the one of ``files`` that is opened (or ``.``, the folder); ``attack`` a pickle
    that runs code wherever it is unpickled, which a test proves in a process of its own."""

    name: str
    files: Mapping[str, File]
    expect: Refused | Found | Odd | Fine
    opened: str
    attack: bytes = b""
    needs: str = "pickle"

    def write(self, folder: Path) -> Path:
        """The files in a folder of their own; where to open them."""
        for name, content in self.files.items():
            path = folder / name
            path.parent.mkdir(parents=True, exist_ok=True)
            if isinstance(content, bytes):
                path.write_bytes(content)
            elif isinstance(content, Link):
                path.symlink_to(content.to)
            elif isinstance(content, Folder):
                path.mkdir()
            else:
                os.mkfifo(path)
        return folder if self.opened == "." else folder / self.opened


def one_file(
    name: str,
    data: bytes,
    expect: Refused | Found | Odd | Fine,
    *,
    attack: bytes = b"",
    needs: str = "pickle",
    called: str = "model.pt",
) -> Case:
    """A case of one file."""
    return Case(name, {called: data}, expect, called, attack, needs)
