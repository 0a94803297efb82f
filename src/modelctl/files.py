"""Open a checkpoint, save a checkpoint: place -> format -> checkpoint -> layout -> place."""

from __future__ import annotations

import gc
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

from .core.checkpoint import Checkpoint
from .core.cutting import without_removed
from .core.notes import Note
from .core.records import METADATA, add_history, write_records
from .core.storages import Source
from .core.tree import find_path
from .errors import LossError
from .formats.base import Writable, WritableFormat
from .formats.destination import Destination, destination, folder_of, out_place
from .formats.registry import about_ranks, detect, for_writing, salvage
from .pickles.left_out import without_calls
from .storage.far.urls import shown, url_of
from .storage.layout import Layout
from .storage.places import Place

PathLike = str | os.PathLike[str]
# Called with the bytes written since the last call, and how many there will be in all.
Progress = Callable[[int, int], object]


class Saved(NamedTuple):
    """What :func:`save` wrote: the file (of shards the index; what is far by its URL, a ``str``),
    its format, all bytes and files, and what there is to say of it."""

    path: Path | str
    format: str
    bytes_written: int
    files: int = 1
    notes: Sequence[Note] = ()


def open(path: PathLike, *, key: str | None = None, follow_symlinks: bool = False) -> Checkpoint:
    """Open a checkpoint: its structure is read, its tensors are not, and nothing is run.

    The content decides on the format, never the suffix; ``"-"`` is stdin. A URL is read where it
    lies, in ranges: ``https://``, ``hf://org/repo[@revision][/file]``, and what fsspec knows, as
    ``s3://``. ``key`` is the dotted
    path of the state_dict inside, where the one that is found isn't meant. Links among the shards
    that an index names are followed inside one cache of the Hugging Face hub, others with
    ``follow_symlinks``.

    Raises:
        UnreadableError: damaged, cut off, or no checkpoint; says where.
        UnsupportedError: sound, but of a kind that is not read yet.
        NoMatchError: ``key`` is not the path of a state_dict.
    """
    return read_place(place_of(path, follow_links=follow_symlinks), key)


def read_place(place: Place, key: str | None = None) -> Checkpoint:
    """The checkpoint at a place, as :func:`open` gives it, which closes the place, too."""
    try:
        with _no_collector():
            ckpt = detect(place).read(place)
        ckpt = ckpt.replace(
            resources=(*place.sources, _Later(place)),
            read=ckpt.root,
            warnings=(*ckpt.warnings, *about_ranks(place, ckpt)),
        )
        if key is not None:
            ckpt = ckpt.replace(key=find_path(ckpt.root, key) or tuple(key.split(".")))
            _ = ckpt.sections
        return ckpt
    except BaseException:
        place.close()
        raise


def read_torn(place: Place) -> Checkpoint | None:
    """What is whole of a file whose end is missing: a checkpoint of which some tensors can't be
    read; None where no format knows how to tell. It closes the place, too.

    Raises:
        UnreadableError: it is cut off in its structure.
    """
    try:
        ckpt = salvage(place)
    except BaseException:
        place.close()
        raise
    if ckpt is None:
        place.close()
        return None
    return ckpt.replace(resources=(*place.sources, _Later(place)), read=ckpt.root)


class _Later:
    """What of a place is opened when it is written."""

    bytes_read = 0

    def __init__(self, place: Place) -> None:
        self.close = place.close


def place_of(path: PathLike, *, follow_links: bool = False) -> Place:
    """The place that a path or a URL names; what is far is imported where it is asked for."""
    url = url_of(path)
    if url is None:
        return Place(path, follow_links=follow_links)
    from .storage.far.place import far_place

    return far_place(url)


@contextmanager
def _no_collector() -> Iterator[None]:
    """Without the cycle collector: beside a large tree it finds nothing, in quadratic time."""
    if not gc.isenabled():
        yield
        return
    gc.disable()
    try:
        yield
    finally:
        gc.enable()


def save(
    ckpt: Checkpoint,
    path: PathLike,
    *,
    to: str | None = None,
    overwrite: bool = False,
    max_shard_size: int | str | None = None,
    history: Sequence[str] = (),
    progress: Progress | None = None,
) -> Saved:
    """Write a checkpoint, whole or not at all; the old file is intact until the new one stands.

    The format is ``to``, or what the suffix of ``path`` says. A folder, or the name of an index
    (``model.safetensors.index.json``), takes shards of at most ``max_shard_size`` (``"5GB"``,
    decimal) and their index; where all fits into one, that one. ``"-"`` is stdout, which takes one
    file, from its start to its end. A URL (``s3://``, ``gs://``, ``az://``, what else fsspec
    writes) is a file or a folder of a store. Tensors that were not changed
    are copied from the files they lie in, which may include ``path`` itself.

    Args:
        history: lines to add to what the file says was done to it.
        progress: called with the bytes written since the last call, and how many there will be
            in all.

    Raises:
        LossError: the format can't hold a part of the checkpoint.
        RefusedError: it holds a call that unpickling the output would run.
        UsageError: no format is named.
        WriteError: the output can't be written; nothing was changed.
        DurabilityError: it was written whole, but its directory could not be synced.
    """
    target = destination(path, to, max_shard_size, of_folder=folder_of(ckpt))
    ckpt, notes = _prepared(ckpt, path, target, history)
    with _no_collector(), target.staged(overwrite=overwrite, sources=_files(ckpt)) as group:
        layout = target.layout(ckpt, group.names)
        group.carry_out(layout, _of(progress, layout))
    return _saved(target, layout, notes)


def _prepared(
    ckpt: Checkpoint, path: PathLike, target: Destination, history: Sequence[str]
) -> tuple[Checkpoint, Sequence[Note]]:
    """What of a checkpoint goes out, and what there is to say of the rest."""
    if history:
        ckpt = add_history(ckpt, history)
    models = ckpt.sections.models
    if not target.format.string_metadata and models and not models[0].is_module:
        extra = {key: text for key, text in ckpt.metadata.items() if key != "format"}
        if extra:
            ckpt = write_records(ckpt, {METADATA: extra})
    _check(ckpt, path, target)
    return _cut(ckpt, target.format)


def _saved(target: Destination, layout: Layout, notes: Sequence[Note]) -> Saved:
    place = target.place if target.shards is None else target.place.member(layout.main.name)
    return Saved(
        place.result, target.format.name, layout.nbytes, len(layout.files), (*notes, *layout.notes)
    )


def left_out(ckpt: Checkpoint, to: str) -> Sequence[Note]:
    """What there is to say of what a file of the format ``to`` would not get of a checkpoint."""
    return _cut(ckpt, for_writing(to, ""))[1]


def _cut(ckpt: Checkpoint, fmt: Writable) -> tuple[Checkpoint, Sequence[Note]]:
    """Without the bytes of tensors that were removed, where they would be written with others, and
    without values that would be made by a call."""
    if not fmt.whole_storages:
        return ckpt, ()
    root, notes = without_calls(ckpt.root) if ckpt.findings else (ckpt.root, ())
    if ckpt.read is not None and ckpt.read is not ckpt.root:
        root, more = without_removed(root, ckpt.read)
        notes = (*notes, *more)
    return ckpt.replace(root=root), notes


def save_parts(
    parts: Mapping[str, Checkpoint],
    folder: PathLike,
    *,
    to: str = "torch",
    overwrite: bool = False,
    progress: Progress | None = None,
) -> dict[str, Saved]:
    """Write checkpoints as files of one folder (``model.pt``, ``optimizer.pt``, …), all or none.

    With ``to="safetensors"`` those that it can hold are written so.

    Raises:
        RefusedError, UsageError, WriteError, DurabilityError: as :func:`save`.
    """
    formats = _formats_of(parts, to)
    cut = {name: _cut(parts[name], fmt) for name, fmt in formats.items()}
    sources = _files(next(iter(parts.values())))
    place = out_place(folder)
    with _no_collector(), place.staged_files(overwrite=overwrite, sources=sources) as group:
        layout = Layout(
            [fmt.layout(cut[name][0], name + fmt.suffixes[0]) for name, fmt in formats.items()]
        )
        group.carry_out(layout, _of(progress, layout))
    return {
        name: Saved(place.member(file.name).result, fmt.name, file.nbytes, notes=cut[name][1])
        for (name, fmt), file in zip(formats.items(), layout.files, strict=True)
    }


def check_parts(
    parts: Mapping[str, Checkpoint],
    folder: PathLike | None,
    *,
    to: str = "torch",
    overwrite: bool = False,
) -> Sequence[Note]:
    """What :func:`save_parts` would refuse, before anything is written, and what there would be to
    say; ``folder`` is None where it is not known, or still to be made with its parents.

    Raises:
        RefusedError, UsageError, WriteError: as :func:`save_parts`.
    """
    formats = _formats_of(parts, to)
    if folder is not None:
        place = out_place(folder)
        place.check_folder()
        there = place.names
        for name in (name + fmt.suffixes[0] for name, fmt in formats.items()):
            if name in there:
                place.member(name).check_file(overwrite=overwrite)
    notes: list[Note] = []
    for name, fmt in formats.items():
        part, about = _cut(parts[name], fmt)
        with _no_collector():
            fmt.layout(part, name + fmt.suffixes[0])
        notes += about
    return notes


def _formats_of(parts: Mapping[str, Checkpoint], to: str) -> dict[str, WritableFormat]:
    formats: dict[str, WritableFormat] = {}
    for name, part in parts.items():
        wanted = for_writing(to, name)
        if not isinstance(wanted, WritableFormat) or wanted.losses(part):
            wanted = for_writing("torch", name)
        assert isinstance(wanted, WritableFormat)
        formats[name] = wanted
    return formats


def _files(ckpt: Checkpoint) -> Iterable[Source]:
    return [source for source in ckpt.resources if isinstance(source, Source)]


def _of(progress: Progress | None, layout: Layout) -> Callable[[int], object] | None:
    return None if progress is None else lambda done: progress(done, layout.nbytes)


def check_save(
    ckpt: Checkpoint,
    path: PathLike,
    to: str | None = None,
    max_shard_size: int | str | None = None,
    *,
    overwrite: bool = False,
    new_folder: bool = False,
    history: Sequence[str] = (),
) -> Saved:
    """What :func:`save` would write, or refuse, before anything is written. With ``new_folder`` the
    folder that it goes to is one that is still to be made.

    Raises:
        LossError: the format can't hold a part of the checkpoint.
        RefusedError: it holds a call that unpickling the output would run.
        UsageError: no format is named.
        WriteError: something stands there, or there is no folder to write to.
    """
    target = destination(path, to, max_shard_size, of_folder=folder_of(ckpt))
    ckpt, notes = _prepared(ckpt, path, target, history)
    if not new_folder:
        target.check(overwrite=overwrite)
    with _no_collector():
        return _saved(target, target.layout(ckpt, target.taken), notes)


def _check(ckpt: Checkpoint, path: PathLike, target: Destination) -> None:
    name = shown(path)
    if ckpt.outside is not None:
        raise LossError(
            f"{name}: {ckpt.outside} can't be written, and would be lost",
            hint="'modelctl convert --weights-only' keeps the model's tensors alone",
        )
    lost = target.losses(ckpt)
    if lost:
        more = f" (and {len(lost) - 1} more)" if len(lost) > 1 else ""
        raise LossError(f"{name}: {lost[0].text}{more}", hint=lost[0].way_out)
