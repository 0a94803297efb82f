"""Open a checkpoint, save a checkpoint: detect the format, stage the output, replace."""

from __future__ import annotations

import gc
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

from .core.checkpoint import Checkpoint
from .core.records import METADATA, add_history, write_records
from .core.tree import find_path
from .errors import LossError
from .formats import detect, for_writing
from .formats.sharded import find_in_folder
from .storage.source import FileSource
from .storage.staging import staged

__all__ = ["Saved", "open", "save", "staged"]

PathLike = str | os.PathLike[str]


class Saved(NamedTuple):
    """What :func:`save` wrote: where, in which format, how many bytes."""

    path: Path
    format: str
    bytes_written: int


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
    history: Sequence[str] = (),
) -> Saved:
    """Write a checkpoint, whole or not at all; the old file is intact until the new one stands.

    The format is ``to``, or what the suffix of ``path`` says. Tensors that were not changed are
    copied from the files they lie in, which may include ``path`` itself. ``history`` adds
    lines to what the file says was done to it.

    Raises:
        LossError: the format can't hold a part of the checkpoint.
        RefusedError: it holds a call that unpickling the output would run.
        UsageError: no format is named.
        WriteError: the output can't be written; nothing was changed.
        DurabilityError: it was written whole, but its directory could not be synced.
    """
    target = os.fspath(path)
    fmt = for_writing(to, target)
    if history:
        ckpt = add_history(ckpt, history)
    if fmt.name != "safetensors" and ckpt.sections.models and not ckpt.sections.models[0].is_module:
        extra = {key: text for key, text in ckpt.metadata.items() if key != "format"}
        if extra:
            ckpt = write_records(ckpt, {METADATA: extra})
    check_losses(ckpt, target, to)
    with staged(target, overwrite=overwrite, expected=fmt.size(ckpt)) as sink:
        fmt.write(ckpt, sink, os.path.basename(target))
    return Saved(Path(target), fmt.name, sink.position)


def format_of(path: PathLike, to: str | None = None) -> str:
    """The name of the format that :func:`save` would write. Raises UsageError."""
    return for_writing(to, os.fspath(path)).name


def check_losses(ckpt: Checkpoint, path: PathLike, to: str | None = None) -> None:
    """What :func:`save` would refuse, before anything is written.

    Raises:
        LossError: the format can't hold a part of the checkpoint.
        UsageError: no format is named.
    """
    if ckpt.outside is not None:
        raise LossError(
            f"{path}: {ckpt.outside} can't be written, and would be lost",
            hint="'modelctl convert --weights-only' keeps the model's tensors alone",
        )
    lost = for_writing(to, os.fspath(path)).losses(ckpt)
    if lost:
        more = f" (and {len(lost) - 1} more)" if len(lost) > 1 else ""
        whole = "one flat state_dict" in lost[0]
        raise LossError(
            f"{path}: {lost[0]}{more}",
            hint="'modelctl convert --weights-only' keeps the model's tensors alone, or write .pt"
            if whole
            else "write it as .pt, or drop what does not fit",
        )
