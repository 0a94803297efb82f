"""What becomes of the files of a source in an output of its own."""

from __future__ import annotations

import os
from collections.abc import Iterator
from shlex import quote

from ..core.checkpoint import Checkpoint
from ..core.notes import Note, info, warning
from ..core.storages import Source
from ..core.text import count, some
from ..files import Saved
from ..formats.base import Writable
from ..formats.folders import Folder, is_part
from ..formats.registry import for_writing, known, writable
from ..storage.far.urls import is_far
from .naming import is_sharded, is_written_folder, opened


def about_files(
    before: Checkpoint, saved: Saved, *, chosen: bool, into_folder: bool
) -> Iterator[Note]:
    """Shards that became more or fewer, a format that the folder chose, what stayed behind.

    Args:
        chosen: whether the user named the format.
        into_folder: whether the output is a folder, or an index in one.
    """
    if saved.format == Folder.name or (
        before.folder is not None
        and before.origin is not None
        # it went along
        and is_written_folder(before)
        and saved.format == before.origin.format
    ):
        return
    parts = before.folder.files.values() if before.folder is not None else ()
    others = before.folder.beside if before.folder is not None else ()
    beside = [name for name in others if name not in parts]
    if beside:
        stay = "stays" if len(beside) == 1 else "stay"
        yield info(f"{some(beside, 4)} {stay} in the folder alone")
    old = _shards(before)
    new = max(saved.files - 1, 1)
    if old and (new != len(old) or saved.files == 1):
        became = count(new, "shard") if saved.files > 1 else "one file"
        yield info(f"{count(len(old), 'shard')} became {became}: --max-shard-size says how large")
    was = _format(before, old)
    if into_folder and not chosen and was is not None and was.name != saved.format:
        label = for_writing(saved.format, "").label
        yield info(f"{was.label} became {label}, which a folder takes: --to {was.name} keeps it")


def about_optimizers(before: Checkpoint) -> Iterator[Note]:
    """Optimizers in files of their own beside the weights (Trainer's, Accelerate's, those of
    ``split``), which no edit of the weights reaches."""
    if (
        before.origin is None
        or is_far(before.origin.path)
        or os.path.isdir(before.origin.path)
        or before.sections.optimizers
        or before.sections.optimizer_objects
    ):
        return
    folder, own = os.path.split(before.origin.path)
    try:
        names = sorted(os.listdir(folder or "."))
    except OSError:  # not here
        return
    suffixes = tuple(suffix for one in writable(all=True) for suffix in one.suffixes)
    found = [
        name
        for name in names
        if "optim" in name.lower() and name.endswith(suffixes) and name != own
    ]
    if found:
        if is_part(found[0]) and own.startswith("model."):
            way_out = f"name the folder: {quote(folder or '.')}"
        else:
            weights, optimizer = (quote(os.path.join(folder, name)) for name in (own, found[0]))
            merged = f"modelctl merge --model {weights} --optimizer {optimizer} -o whole.pt"
            way_out = f"put them together first: {merged}"
        yield warning(
            f"{some(found)} beside {own} is not read: it stays as it was, out of step with what "
            "is renamed or removed here",
            way_out,
        )


def _shards(ckpt: Checkpoint) -> list[str]:
    """The files of a checkpoint in shards, without their index."""
    if not is_sharded(ckpt) or ckpt.origin is None:
        return []
    beside = () if ckpt.folder is None else ckpt.folder.beside
    far = [one.name for one in ckpt.resources if isinstance(one, Source) and one.costly]
    names = [str(one.path) for one in opened(ckpt)]
    names += [name for name in far if name.rpartition("/")[2] not in beside]
    return [name for name in names if name != ckpt.origin.path]


def _format(ckpt: Checkpoint, shards: list[str]) -> Writable | None:
    """What it was read as, where that can be written."""
    if shards:
        fits = (one for one in writable(all=True) if shards[0].endswith(one.suffixes))
        return next(fits, None)
    found = known(ckpt.origin.format) if ckpt.origin is not None else None
    return found if isinstance(found, Writable) and found.by_name else None
