"""Open a checkpoint, save a checkpoint: detect the format, stage the output, replace."""

from __future__ import annotations

import gc
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

from .core.checkpoint import Checkpoint
from .core.records import METADATA, add_history, write_records
from .core.sections import is_state_dict
from .core.tree import find_path
from .errors import LossError, WriteError
from .formats import destination, detect, for_writing
from .formats.shards.reading import find_in_folder
from .formats.shards.writing import MAX_SHARD_SIZE, parse_size, superseded, write_shards
from .storage.source import FileSource
from .storage.staging import staged, staged_files

__all__ = ["Saved", "open", "save", "staged", "staged_files"]

PathLike = str | os.PathLike[str]


class Saved(NamedTuple):
    """What :func:`save` wrote: the file (of shards the index), its format, all bytes and files."""

    path: Path
    format: str
    bytes_written: int
    files: int = 1


def open(path: PathLike, *, key: str | None = None, follow_symlinks: bool = False) -> Checkpoint:
    """Open a checkpoint: its structure is read, its tensors are not, and nothing is run.

    The content decides on the format, never the suffix. ``key`` is the dotted path of the
    state_dict inside, where the one that is found isn't meant. Links among the shards that an
    index names are followed inside one cache of the Hugging Face hub, others with
    ``follow_symlinks``.

    Raises:
        UnreadableError: damaged, cut off, or no checkpoint; says where.
        UnsupportedError: sound, but of a kind that is not read yet.
        NoMatchError: ``key`` is not the path of a state_dict.
    """
    source = FileSource(find_in_folder(path) if os.path.isdir(path) else path)
    source.follow_links = follow_symlinks
    try:
        with _no_collector():
            ckpt = detect(source).read(source)
        if key is not None:
            ckpt = ckpt.replace(key=find_path(ckpt.root, key) or tuple(key.split(".")))
            _ = ckpt.sections
        return ckpt
    except BaseException:
        source.close()
        raise


@contextmanager
def _no_collector() -> Iterator[None]:
    """Without the cycle collector: while a tree is built it finds nothing, in quadratic time."""
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
    progress: Callable[[int, int], object] | None = None,
) -> Saved:
    """Write a checkpoint, whole or not at all; the old file is intact until the new one stands.

    The format is ``to``, or what the suffix of ``path`` says. A folder, or the name of an index
    (``model.safetensors.index.json``), takes shards of at most ``max_shard_size`` (``"5GB"``,
    decimal) and their index; where all fits into one, that one. Tensors that were not changed
    are copied from the files they lie in, which may include ``path`` itself.

    Args:
        history: lines to add to what the file says was done to it.
        progress: called with the bytes written since the last call, and about how many there
            will be in all.

    Raises:
        LossError: the format can't hold a part of the checkpoint.
        RefusedError: it holds a call that unpickling the output would run.
        UsageError: no format is named.
        WriteError: the output can't be written; nothing was changed.
        DurabilityError: it was written whole, but its directory could not be synced.
    """
    place = destination(os.fspath(path), to, max_shard_size is not None)
    fmt = place.format
    if history:
        ckpt = add_history(ckpt, history)
    if fmt.name != "safetensors" and ckpt.sections.models and not ckpt.sections.models[0].is_module:
        extra = {key: text for key, text in ckpt.metadata.items() if key != "format"}
        if extra:
            ckpt = write_records(ckpt, {METADATA: extra})
    check_losses(ckpt, path, to, max_shard_size)
    expected = fmt.size(ckpt)
    options: dict[str, Any] = {
        "overwrite": overwrite,
        "expected": expected,
        "sources": [source for source in ckpt.resources if isinstance(source, FileSource)],
        "progress": None if progress is None else lambda done: progress(done, expected),
    }
    if place.shards is None:
        with staged(place.path, **options) as sink:
            fmt.write(ckpt, sink, os.path.basename(place.path))
        return Saved(Path(place.path), fmt.name, sink.position)
    limit = parse_size(MAX_SHARD_SIZE if max_shard_size is None else max_shard_size)
    old = superseded(Path(place.path), *place.shards)
    if old and not overwrite:
        raise WriteError(
            f"{os.path.join(place.path, old[0])}: exists already", hint="--overwrite replaces it"
        )
    with staged_files(place.path, **options) as group:
        written = write_shards(ckpt, group, fmt, place.shards, limit, old)
    return Saved(Path(place.path, written.name), fmt.name, written.nbytes, written.files)


def save_parts(
    parts: Mapping[str, Checkpoint],
    folder: PathLike,
    *,
    to: str = "torch",
    overwrite: bool = False,
    progress: Callable[[int, int], object] | None = None,
) -> dict[str, Saved]:
    """Write checkpoints as files of one folder (``model.pt``, ``optimizer.pt``, …), all or none.

    With ``to="safetensors"`` those that it can hold are written so.

    Raises:
        RefusedError, UsageError, WriteError, DurabilityError: as :func:`save`.
    """
    places = {}
    for name, part in parts.items():
        fmt = for_writing(to, name)
        if fmt.losses(part):
            fmt = for_writing("torch", name)
        places[name] = (fmt, name + fmt.suffixes[0])
    total = sum(fmt.size(parts[name]) for name, (fmt, _) in places.items())
    saved = {}
    with staged_files(
        folder,
        overwrite=overwrite,
        expected=total,
        sources=[
            one for one in next(iter(parts.values())).resources if isinstance(one, FileSource)
        ],
        progress=None if progress is None else lambda done: progress(done, total),
    ) as group:
        for name, (fmt, file) in places.items():
            with group.open(file) as sink:
                fmt.write(parts[name], sink, file)
            saved[name] = Saved(Path(folder, file), fmt.name, sink.position)
    return saved


def check_losses(
    ckpt: Checkpoint,
    path: PathLike,
    to: str | None = None,
    max_shard_size: int | str | None = None,
) -> None:
    """What :func:`save` would refuse, before anything is written.

    Raises:
        LossError: the format can't hold a part of the checkpoint.
        UsageError: no format is named.
    """
    place = destination(os.fspath(path), to, max_shard_size is not None)
    if ckpt.outside is not None:
        raise LossError(
            f"{path}: {ckpt.outside} can't be written, and would be lost",
            hint="'modelctl convert --weights-only' keeps the model's tensors alone",
        )
    lost = place.format.losses(ckpt)
    if place.shards is not None and not is_state_dict(ckpt.root):
        lost = [f"shards hold one flat state_dict, this is a {ckpt.sections.kind}"]
    if lost:
        more = f" (and {len(lost) - 1} more)" if len(lost) > 1 else ""
        whole = "one flat state_dict" in lost[0]
        raise LossError(
            f"{path}: {lost[0]}{more}",
            hint="'modelctl convert --weights-only' keeps the model's tensors alone, or write .pt"
            if whole
            else "write it as .pt, or drop what does not fit",
        )
