"""What stands beside a checkpoint in its folder, and goes along into a new one."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Sequence
from functools import partial

from ..core.checkpoint import Folder
from ..core.notes import Note, info, warning
from ..core.storages import RunStorage, Storage
from ..core.text import count, some
from ..errors import ModelctlError
from ..storage.layout import FileLayout, LayoutBuilder
from ..storage.places import Place

_MOST = 1000


def others(
    place: Place, own: Collection[str]
) -> tuple[dict[str, Callable[[], Storage]], list[str]]:
    """The files of a folder that are not its ``own``, each to be opened when it is asked for; and
    what to say of so many that they are no checkpoint's."""
    names = [name for name in place.names if name not in own]
    if len(names) > _MOST:
        return {}, [f"{len(names):,} other files"]
    return {name: partial(_whole, place, name) for name in names}, []


def along(folder: Folder, but: Collection[str] = ()) -> tuple[list[FileLayout], list[Note]]:
    """Copies of what stands beside, for a new folder, and what there is to say of that; other
    folders and links are left behind. Not those of the parts ``but``."""
    files, left = [], [*folder.left]
    for name, opened in folder.beside.items():
        if name in but:
            continue
        try:
            files.append(copied(name, opened()))
        except ModelctlError:
            left.append(name)
    return files, [*_notes([one.name for one in files], sorted(left))]


def copied(name: str, storage: Storage) -> FileLayout:
    """A file with the bytes of another."""
    out = LayoutBuilder()
    out.copy(storage)
    return out.file(name)


def _whole(place: Place, name: str) -> Storage:
    source = place.inside(name).source
    return RunStorage(source, 0, source.size)


def _notes(along: Sequence[str], left: Sequence[str]) -> Iterator[Note]:
    if along:
        yield info(f"{count(len(along), 'file')} beside it went along: {some(along, 4)}")
    if left:
        yield warning(f"left behind: {some(left)}", "copy them where they are wanted")
