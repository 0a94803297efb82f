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
from ..core.storages import Source
from ..errors import UsageError
from ..storage.far.urls import url_of
from ..storage.layout import Layout
from ..storage.outputs import Group, OutPlace
from ..storage.streams import is_stream, stdout
from ..storage.targets import PathLike
from .base import Writable, WritableFolder, WritableFormat, no_state_dict
from .folders import Folder
from .registry import for_writing, known, of_suffix, writable
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
        place: the file, the folder, or ``-``.
        shards: what the shards are called; None: no shards.
        max_shard_size: the most bytes in a shard.
    """

    format: Writable
    place: OutPlace
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
        if is_stream(self.place):
            return
        if not self.is_folder:
            self.place.check_file(overwrite=overwrite)
            return
        self.place.check_folder()
        for name in self._replaced():
            self.place.member(name).check_file(overwrite=overwrite)

    def _replaced(self) -> list[str]:
        """What stands in the folder and makes room for the new one."""
        if self.shards is not None:
            return superseded(self.place, self.shards)
        assert isinstance(self.format, WritableFolder)
        return self.format.occupied(self.taken)

    def staged(
        self, *, overwrite: bool, sources: Iterable[Source]
    ) -> AbstractContextManager[Group]:
        """The group of files that the output is on its way in, or stdout.

        Raises:
            WriteError: something stands there that is not to be replaced.
            UsageError: stdout is a terminal.
        """
        if is_stream(self.place):
            return stdout(sources)
        self.check(overwrite=overwrite)
        if not self.is_folder:
            return self.place.staged_file(overwrite=overwrite, sources=sources)
        return self.place.staged_files(overwrite=overwrite, sources=sources)

    @property
    def taken(self) -> list[str]:
        """The names in the folder that it goes to, as it is now."""
        return self.place.names if self.is_folder else []

    def layout(self, ckpt: Checkpoint, taken: Sequence[str]) -> Layout:
        """What it will be: the files that are to stand there, or a file alone. ``taken`` are the
        names that the folder has already.

        Raises:
            RefusedError, UnsupportedError: as :meth:`WritableFormat.layout`.
        """
        if isinstance(self.format, WritableFolder):
            own = ckpt.origin.path if ckpt.origin is not None else ""
            same = bool(own) and self.place.holds(own, as_folder=ckpt.folder is not None)
            return self.format.layout(ckpt, taken, in_place=same)
        assert isinstance(self.format, WritableFormat)
        if self.shards is None:
            # torch names what is in its zip after the file, and a link's target is another name
            name = "" if is_stream(self.place) else self.place.filename
            return Layout([self.format.layout(ckpt, name)])
        old = superseded(self.place, self.shards)
        return shards_layout(
            ckpt, self.format, self.shards, self.max_shard_size, taken=taken, old=old
        )


def destination(
    path: PathLike,
    to: str | None = None,
    shard_size: int | str | None = None,
    *,
    of_folder: WritableFolder | None = None,
) -> Destination:
    """What ``path`` names as an output, by its suffix: a file, a folder for shards (one that is
    there, or ends with a slash, or with ``shard_size`` has no suffix), or the index of shards;
    ``-`` is stdout, for one file.

    Args:
        to: the name of the format, where the suffix is not to say it.
        shard_size: the most bytes in a shard, as a number or a text (``"5GB"``, the default).
        of_folder: what it was read from where that is a folder with more in it: it stays one.

    Raises:
        UsageError: no such format, no size, or a name that does not say what is meant.
    """
    place = out_place(path)
    limit = parse_size(MAX_SHARD_SIZE if shard_size is None else shard_size)
    if is_stream(place) and shard_size is not None:
        raise UsageError("stdout takes one file, no shards", hint="-o FOLDER/")
    if to is not None and isinstance(for_writing(to, place.name), WritableFolder):
        if is_stream(place):
            raise UsageError(f"stdout takes one file, {to} is a folder", hint="-o FOLDER/")
        if shard_size is not None:
            raise UsageError(f"{to} has no shards of a size to choose")
        return Destination(for_writing(to, place.name), place.bare)
    if is_stream(place):
        return Destination(for_writing(to, place.name), place)
    name = place.filename
    there = names_by_index(place) if name.endswith(".json") else None
    if there is not None:
        fmt = for_writing(None, there.suffix)
        _check_index(place, to, fmt)
        return Destination(fmt, place.folder, _sharded(fmt, there), limit)
    if name.endswith(INDEX):
        stem, suffix = os.path.splitext(name.removesuffix(INDEX))
        fmt = for_writing(None, suffix) if suffix else for_writing(to or "safetensors", place.name)
        _check_index(place, to, fmt)
        names = stem or "model", suffix or fmt.suffixes[0]
        return Destination(fmt, place.folder, _sharded(fmt, names), limit)
    is_folder = place.is_folder
    as_it_was = of_folder if to is None and shard_size is None else None
    if as_it_was is not None and (is_folder or of_suffix(place.name) is None):
        return Destination(as_it_was, place.bare)
    if not is_folder and shard_size is not None:  # a folder that is to be, if it has no suffix
        is_folder = of_suffix(place.name) is None
    if is_folder:
        fmt = for_writing(to or "safetensors", place.name)
        return Destination(fmt, place.bare, _sharded(fmt, _shard_names(fmt)), limit)
    if shard_size is not None:
        other = os.path.join(os.path.dirname(place.name), name.partition(".")[0], "")
        raise UsageError(
            f"{place.name}: one file has no shards",
            hint=f"-o {quote(other)} writes a folder of them",
        )
    return Destination(for_writing(to, place.name), place)


def folder_of(ckpt: Checkpoint) -> WritableFolder | None:
    """What a checkpoint was read from where that is a folder with more in it, which an output
    stays; None for all else."""
    if ckpt.folder is None:
        return None
    found = known(ckpt.origin.format) if ckpt.origin is not None else None
    return found if isinstance(found, WritableFolder) else Folder()


def out_place(path: PathLike) -> OutPlace:
    """The place that a path or a URL names; what is far is imported where it is asked for.

    Raises:
        UsageError: an empty path, or none; a URL that nothing is written to.
        MissingExtraError: what writes this kind of URL is not installed.
    """
    if isinstance(path, OutPlace):
        return path
    url = url_of(path)
    if url is None:
        return OutPlace(path)
    from ..storage.far.outputs import far_out_place

    return far_out_place(url)


def _check_index(place: OutPlace, to: str | None, fmt: Writable) -> None:
    if to not in (None, fmt.name):
        raise UsageError(f"{place.name}: an index of {fmt.name} files, not of {to}")


def _sharded(fmt: Writable, names: tuple[str, ...] | None) -> ShardNames:
    if _shard_names(fmt) is None or names is None:
        can = ", ".join(one.name for one in writable(all=True) if _shard_names(one) is not None)
        raise UsageError(f"{fmt.label} is not written in shards", hint=f"{can} are")
    return ShardNames(*names)


def _shard_names(fmt: Writable) -> tuple[str, str] | None:
    return fmt.shard_names if isinstance(fmt, WritableFormat) else None
