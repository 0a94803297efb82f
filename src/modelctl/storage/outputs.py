"""Where an output goes, as destinations and edits see it: only places know paths."""

from __future__ import annotations

import os
from collections.abc import Iterable
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Protocol

from ..core.storages import Source
from .far.urls import said, shown
from .layout import Layout
from .places import named
from .sink import Progress
from .source import FileSource
from .staging import check_file, check_folder, staged_file, staged_files
from .targets import PathLike, check_makeable, made_folder
from .torchrun.ranks import joined

_SLASHES = "/" + os.sep


class Group(Protocol):
    """Files on their way, which appear together or not at all."""

    @property
    def names(self) -> list[str]:
        """What stands already where they go."""

    def carry_out(self, layout: Layout, progress: Progress | None = None) -> None:
        """Write all files of a layout."""


class OutPlace(os.PathLike[str]):
    """A file or a folder of this machine that an output goes to, which may be there or not; or
    ``-``, which nothing is asked of.

    Attributes:
        path: as it was said.
        name: what errors and reports call it.
        said_folder: whether it is a folder by its trailing slash.
    """

    def __init__(self, path: PathLike) -> None:
        """Raises UsageError for an empty path, or none."""
        named(path)
        self.path = said(path)
        self.name = shown(path)
        self.said_folder = self.path.endswith(tuple(_SLASHES))

    def __fspath__(self) -> str:
        return self.path

    @property
    def is_folder(self) -> bool:
        """Whether it is a folder: one that is there, or one by its trailing slash."""
        return self.said_folder or os.path.isdir(self.path)

    @property
    def is_there(self) -> bool:
        """Whether anything stands there, and be it a link that leads nowhere."""
        return os.path.lexists(self.path)

    @property
    def names(self) -> list[str]:
        """The names in the folder, as it is now; none where there is no folder."""
        return sorted(os.listdir(self.path)) if os.path.isdir(self.path) else []

    @property
    def filename(self) -> str:
        """Its last part; nothing of what ends with a slash."""
        return os.path.basename(self.path)

    @property
    def folder(self) -> OutPlace:
        """The folder that it is in."""
        return OutPlace(os.path.dirname(self.path.rstrip(_SLASHES)) or ".")

    @property
    def bare(self) -> OutPlace:
        """The same without its trailing slash."""
        return OutPlace(self.path.rstrip(_SLASHES) or self.path)

    @property
    def result(self) -> Path | str:
        """What Python gets of it: a path, of a URL its text."""
        return Path(self.path)

    @property
    def key(self) -> str:
        """What two names of one place have in common."""
        return os.path.realpath(self.path)

    def member(self, name: str) -> OutPlace:
        """A name in the folder."""
        return OutPlace(os.path.join(self.path, name))

    def read(self) -> bytes:
        """All of the file. Raises OSError."""
        return Path(self.path).read_bytes()

    def holds(self, read_from: str, *, as_folder: bool) -> bool:
        """Whether a checkpoint was read from this folder, whose files may then go on in use.

        Args:
            as_folder: whether a file of it stands for the folder.
        """
        if as_folder and not os.path.isdir(read_from):
            read_from = os.path.dirname(read_from) or "."
        return bool(read_from) and os.path.realpath(read_from) == self.key

    # ------------------------------------------------------------------ writing

    def check_file(self, *, overwrite: bool) -> None:
        """Raises WriteError where no file can stand there."""
        check_file(self.path, overwrite=overwrite)

    def check_folder(self) -> None:
        """Raises WriteError where no files can be written to such a folder."""
        check_folder(self.path)

    @property
    def is_missing(self) -> bool:
        """Whether it is a folder that is still to be made. Raises WriteError: a file is in the
        way."""
        return bool(check_makeable(self.path))

    def made(self) -> AbstractContextManager[None]:
        """The folder is there for the block, its parents too."""
        return made_folder(self.path)

    def staged_file(
        self, *, overwrite: bool, sources: Iterable[Source]
    ) -> AbstractContextManager[Group]:
        """What takes a layout of one file, as :func:`staged_file`."""
        return self._staged(False, overwrite, sources)

    def staged_files(
        self, *, overwrite: bool, sources: Iterable[Source]
    ) -> AbstractContextManager[Group]:
        """What takes a layout of files of this folder, as :func:`staged_files`."""
        return self._staged(True, overwrite, sources)

    def _staged(
        self, is_folder: bool, overwrite: bool, sources: Iterable[Source]
    ) -> AbstractContextManager[Group]:
        read = [one for one in sources if isinstance(one, FileSource)]
        ranks = joined()
        if ranks is None:
            stage = staged_files if is_folder else staged_file
            return stage(self.path, overwrite=overwrite, sources=read)
        from .torchrun.group import shared

        return shared(ranks, self.path, is_folder=is_folder, overwrite=overwrite, sources=read)
