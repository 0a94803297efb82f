"""What a user names: a file, a folder or stdin, as formats see it. Only places know paths."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from functools import cached_property
from pathlib import Path
from shlex import quote
from typing import TypeVar

from ..core.storages import Source
from ..errors import ModelctlError, UnreadableError, UnsupportedError, UsageError
from .containers.zipdir import STORED, Member, ZipDirectory
from .far.urls import is_far
from .link_rules import in_one_cache
from .source import FileSource, Window
from .streams import is_stream, stdin

HEAD = 4096
T = TypeVar("T")


def named(path: str | os.PathLike[str]) -> None:
    """Raises UsageError for an empty path, which would be the current folder: most often a
    variable of the shell that is not set; and for what is no path."""
    if not isinstance(path, str | os.PathLike):
        raise UsageError(
            f"a {type(path).__name__} is no path of a file or folder",
            hint="a state_dict that is in memory goes to model.load_state_dict()",
        )
    if not os.fspath(path):
        raise UsageError("an empty path: it names no file", hint="is a variable of yours not set?")


def is_there(path: str | os.PathLike[str]) -> bool:
    """Whether there is anything to open: a link that leads nowhere is something; what is far is
    asked when it is opened."""
    return is_stream(path) or is_far(path) or os.path.lexists(path)


class Place:
    """A file or a folder, here, or ``-``: stdin; what was opened of it stays open until it is
    closed.

    Attributes:
        name: what errors and reports call it.
        is_folder: whether it is a folder; it has :meth:`names` then, and no :attr:`source`.
        sources: all files that were opened, its own first.
    """

    def __init__(
        self,
        path: str | os.PathLike[str],
        *,
        follow_links: bool = False,
        source: Source | None = None,
        of: Place | None = None,
    ) -> None:
        """The place that ``path`` names.

        Raises:
            UsageError: an empty path, or none.

        Args:
            follow_links: follow symbolic links among the files that this place names, wherever
                they lead; otherwise inside one cache of the Hugging Face hub only.
            source: its bytes, where they are no file's by themselves.
            of: the place that it is a part of, which closes what is opened here, too.
        """
        named(path)
        self._path = Path(path)
        self._is_stdin = is_stream(path)
        self._follow_links = follow_links
        self.sources: list[Source] = [] if of is None else of.sources
        self._places: dict[Path, Place] = {} if of is None else of._places
        self._source = source
        self.name = str(path) if source is None else source.name
        self.is_folder = source is None and not self._is_stdin and os.path.isdir(path)

    # ------------------------------------------------------------------ a file

    @property
    def source(self) -> Source:
        """The bytes of a file, opened when they are first asked for.

        Raises:
            ModelctlError: there is no such file, or it can't be opened.
        """
        if self._source is None:
            self._source = stdin() if self._is_stdin else FileSource(self._path)
            self.sources.append(self._source)
        return self._source

    @property
    def size(self) -> int:
        """Bytes of a file."""
        return self.source.size

    @cached_property
    def head(self) -> bytes:
        """The first 4 KiB of a file; nothing of a folder."""
        return b"" if self.is_folder else self.source.read(0, min(HEAD, self.size))

    @cached_property
    def zip(self) -> ZipDirectory | None:
        """The directory of a zip, read once; None where it is none.

        Raises:
            UnreadableError: it is broken.
        """
        return ZipDirectory(self.source) if self.head[:4] == b"PK\3\4" else None

    @property
    def zips(self) -> list[ZipDirectory]:
        """The directories of zips that were read so far: its own, and those of what it names."""
        places = {id(one): one for one in (self, *self._places.values())}.values()
        return [one.zip for one in places if "zip" in vars(one) and one.zip is not None]

    def window(self, offset: int, size: int, member: str) -> Place:
        """A range of the file as a place of its own."""
        return self.holding(Window(self.source, offset, size, member))

    def zipped(self, member: Member) -> Place:
        """A member of a zip as a place of its own.

        Raises:
            UnsupportedError: it is compressed.
        """
        if member.method != STORED:
            raise UnsupportedError(
                f"{self.name}, {member.name}: compressed, so it can't be read in place",
                hint=f"unpack it: unzip {quote(self.name)} {quote(member.name)}",
            )
        return self.window(member.offset, member.size, member.name)

    def holding(self, source: Source) -> Place:
        """A place for bytes that were made of this one's: unpacked, or a part of them."""
        return Place(self._path, follow_links=self._follow_links, source=source, of=self)

    # ------------------------------------------------------------------ its neighbours

    @property
    def filename(self) -> str:
        """Its last part: what a file that names others is called itself."""
        return self._path.name

    @cached_property
    def names(self) -> list[str]:
        """The names in a folder, sorted."""
        return sorted(os.listdir(self._path)) if self.is_folder else []

    def member(self, name: str) -> Place:
        """The file of that name in a folder: what the user meant by the folder."""
        return self._file(self._path / name)

    def leads_to(self, name: str) -> str:
        """The name in the same folder that a link there leads to; nothing of what is none."""
        path = self._path / name
        target = os.readlink(path) if path.is_symlink() else ""
        return "" if os.path.dirname(target) else target

    def inside(self, name: str) -> Place:
        """A file of a folder that goes along with what the user meant.

        Raises:
            ModelctlError: a link that is not followed.
        """
        path = self._path / name
        if not self._follow_links and path.is_symlink() and not in_one_cache(path):
            raise ModelctlError(
                f"{path}: a symbolic link, which is not followed here", hint="--follow-symlinks"
            )
        return self._file(path)

    def beside(self, name: str) -> Place:
        """A file that this one names, beside it.

        Raises:
            UnreadableError: not a plain name, or this file's own; this is stdin.
            ModelctlError: a link that is not followed.
        """
        if self._is_stdin:
            raise UnreadableError(
                f"names {name!r:.200}, and nothing lies beside stdin",
                path=self.name,
                hint="call it by its name, or its folder",
            )
        plain = name not in ("", ".", "..") and not any(sign in name for sign in "/\\\0")
        try:
            os.fsencode(name)
        except UnicodeEncodeError:  # a lone surrogate: no file is called so
            plain = False
        if not plain or name == self._path.name:
            raise UnreadableError(
                f"names {name!r:.200}: not a plain file name beside it", path=self.name
            )
        path = self._path.parent / name
        if not self._follow_links and path.is_symlink() and not in_one_cache(path):
            raise ModelctlError(
                f"{path}: a symbolic link, which is not followed here", hint="--follow-symlinks"
            )
        return self._file(path)

    def together(self, read: Callable[[Place], T], places: Sequence[Place]) -> list[T]:
        """What ``read`` makes of each of the places, which belong to this one; of what is far, of
        several at once."""
        return [read(one) for one in places]

    def _file(self, path: Path) -> Place:
        """A file that belongs to it, opened once however often it is looked at."""
        if path not in self._places:
            self._places[path] = Place(path, follow_links=self._follow_links, of=self)
        return self._places[path]

    def close(self) -> None:
        """Close what was opened of it."""
        for source in self.sources:
            source.close()
