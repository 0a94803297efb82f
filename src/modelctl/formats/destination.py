"""Where an output goes, and what it will be there."""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence
from contextlib import AbstractContextManager
from shlex import quote
from typing import NamedTuple

from ..core.checkpoint import Checkpoint
from ..core.notes import Loss
from ..core.sections import is_state_dict
from ..errors import UsageError
from ..storage.far.urls import check_output
from ..storage.layout import Layout
from ..storage.places import named
from ..storage.source import FileSource
from ..storage.staging import FileGroup, check_file, check_folder
from ..storage.streams import Stdout, is_stream, stdout
from ..storage.torchrun.group import SharedGroup, staged_by_all
from .base import Writable, WritableFolder, WritableFormat, no_state_dict
from .folders import Folder
from .registry import for_writing, of_suffix, writable
from .shards.writing import (
    INDEX,
    MAX_SHARD_SIZE,
    ShardNames,
    names_by_index,
    parse_size,
    shards_layout,
    superseded,
)


class Destination(NamedTuple):
    """A file of a format, a folder of shards of that format, one of a format of folders, or
    stdout.

    Attributes:
        format: what is written.
        path: the file, the folder, or ``-``.
        shards: what the shards are called; None: no shards.
        max_shard_size: the most bytes in a shard.
    """

    format: Writable
    path: str
    shards: ShardNames | None = None
    max_shard_size: int = 0

    def losses(self, ckpt: Checkpoint) -> list[Loss]:
        """What of the checkpoint it can't hold."""
        lost = self.format.losses(ckpt)
        if self.shards is not None and not is_state_dict(ckpt.root):
            text = f"shards hold one flat state_dict, this is a {ckpt.sections.kind}"
            return [Loss(text, no_state_dict(ckpt))]
        return lost

    @property
    def is_folder(self) -> bool:
        """Whether it is several files of a folder."""
        return self.shards is not None or isinstance(self.format, WritableFolder)

    def check(self, *, overwrite: bool) -> None:
        """Looks whether the output can stand there, as far as that shows before it is written.

        Raises:
            WriteError: something stands there that is not to be replaced, or there is no folder
                to write to.
        """
        if is_stream(self.path):
            return
        if not self.is_folder:
            check_file(self.path, overwrite=overwrite)
            return
        check_folder(self.path)
        for name in self._replaced():
            check_file(os.path.join(self.path, name), overwrite=overwrite)

    def _replaced(self) -> list[str]:
        """What stands in the folder and makes room for the new one."""
        if self.shards is not None:
            return superseded(self.path, self.shards)
        assert isinstance(self.format, WritableFolder)
        return self.format.occupied(self.taken)

    def staged(
        self, *, overwrite: bool, sources: Iterable[FileSource]
    ) -> AbstractContextManager[FileGroup | SharedGroup | Stdout]:
        """The group of files that the output is on its way in, or stdout.

        Raises:
            WriteError: something stands there that is not to be replaced.
            UsageError: stdout is a terminal.
        """
        if is_stream(self.path):
            return stdout()
        self.check(overwrite=overwrite)
        return staged_by_all(
            self.path, is_folder=self.is_folder, overwrite=overwrite, sources=sources
        )

    @property
    def taken(self) -> list[str]:
        """The names in the folder that it goes to, as it is now."""
        is_there = self.is_folder and os.path.isdir(self.path)
        return os.listdir(self.path) if is_there else []

    def layout(self, ckpt: Checkpoint, taken: Sequence[str]) -> Layout:
        """What it will be: the files that are to stand there, or a file alone. ``taken`` are the
        names that the folder has already.

        Raises:
            RefusedError, UnsupportedError: as :meth:`WritableFormat.layout`.
        """
        if isinstance(self.format, WritableFolder):
            there = os.path.realpath(self.path)
            own = ckpt.origin.path if ckpt.origin is not None else ""
            if ckpt.folder is not None and not os.path.isdir(own):
                own = os.path.dirname(own) or "."
            same = bool(own) and os.path.realpath(own) == there
            return self.format.layout(ckpt, taken, in_place=same)
        assert isinstance(self.format, WritableFormat)
        if self.shards is None:
            # torch names what is in its zip after the file, and a link's target is another name
            name = "" if is_stream(self.path) else os.path.basename(self.path)
            return Layout([self.format.layout(ckpt, name)])
        old = superseded(self.path, self.shards)
        return shards_layout(
            ckpt, self.format, self.shards, self.max_shard_size, taken=taken, old=old
        )


def destination(
    path: str,
    to: str | None = None,
    shard_size: int | str | None = None,
    *,
    of_folder: bool = False,
) -> Destination:
    """What ``path`` names as an output, by its suffix: a file, a folder for shards (one that is
    there, or ends with a slash, or with ``shard_size`` has no suffix), or the index of shards;
    ``-`` is stdout, for one file.

    Args:
        to: the name of the format, where the suffix is not to say it.
        shard_size: the most bytes in a shard, as a number or a text (``"5GB"``, the default).
        of_folder: whether it was read from a folder with more in it, which then stays one.

    Raises:
        UsageError: no such format, no size, or a name that does not say what is meant.
    """
    named(path)
    check_output(path)
    limit = parse_size(MAX_SHARD_SIZE if shard_size is None else shard_size)
    if is_stream(path) and shard_size is not None:
        raise UsageError("stdout takes one file, no shards", hint="-o FOLDER/")
    if to is not None and isinstance(for_writing(to, path), WritableFolder):
        if is_stream(path):
            raise UsageError(f"stdout takes one file, {to} is a folder", hint="-o FOLDER/")
        if shard_size is not None:
            raise UsageError(f"{to} has no shards of a size to choose")
        return Destination(for_writing(to, path), path.rstrip("/" + os.sep) or path)
    if is_stream(path):
        return Destination(for_writing(to, path), path)
    folder, name = os.path.split(path)
    there = names_by_index(path) if name.endswith(".json") else None
    if there is not None:
        fmt = for_writing(None, there.suffix)
        _check_index(path, to, fmt)
        return Destination(fmt, folder or ".", _sharded(fmt, there), limit)
    if name.endswith(INDEX):
        stem, suffix = os.path.splitext(name.removesuffix(INDEX))
        fmt = for_writing(None, suffix) if suffix else for_writing(to or "safetensors", path)
        _check_index(path, to, fmt)
        names = stem or "model", suffix or fmt.suffixes[0]
        return Destination(fmt, folder or ".", _sharded(fmt, names), limit)
    is_folder = not name or os.path.isdir(path)
    if of_folder and to is None and shard_size is None and (is_folder or of_suffix(path) is None):
        return Destination(Folder(), path.rstrip("/" + os.sep) or path)
    if not is_folder and shard_size is not None:  # a folder that is to be, if it has no suffix
        is_folder = of_suffix(path) is None
    if is_folder:
        fmt = for_writing(to or "safetensors", path)
        folder = path.rstrip("/" + os.sep) or path
        return Destination(fmt, folder, _sharded(fmt, _shard_names(fmt)), limit)
    if shard_size is not None:
        other = os.path.join(folder, name.partition(".")[0], "")
        raise UsageError(
            f"{path}: one file has no shards", hint=f"-o {quote(other)} writes a folder of them"
        )
    return Destination(for_writing(to, path), path)


def _check_index(path: str, to: str | None, fmt: Writable) -> None:
    if to not in (None, fmt.name):
        raise UsageError(f"{path}: an index of {fmt.name} files, not of {to}")


def _sharded(fmt: Writable, names: tuple[str, ...] | None) -> ShardNames:
    if _shard_names(fmt) is None or names is None:
        known = ", ".join(one.name for one in writable(all=True) if _shard_names(one) is not None)
        raise UsageError(f"{fmt.label} is not written in shards", hint=f"{known} are")
    return ShardNames(*names)


def _shard_names(fmt: Writable) -> tuple[str, str] | None:
    return fmt.shard_names if isinstance(fmt, WritableFormat) else None
