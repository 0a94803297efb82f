"""Keep what is whole of a damaged checkpoint: one that was cut off, or whose bytes were changed."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

from ..core.checkpoint import Checkpoint
from ..core.nodes import Composite, is_module
from ..core.pages import Progress
from ..core.tensors import StorageRef, TensorRef
from ..core.tree import Path, get, path_text, rebuild, walk
from ..errors import RefusedError, UnreadableError, UsageError
from ..files import PathLike, place_of, read_place, read_torn, save
from ..storage.streams import is_stream
from ..surgery.carry.sections import without_parts
from .report import Salvaged, Verify
from .sections import Fault
from .verify import Look


def salvage(
    path: PathLike,
    output: PathLike,
    *,
    to: str | None = None,
    overwrite: bool = False,
    key: str | None = None,
    follow_symlinks: bool = False,
    progress: Progress | None = None,
) -> Verify:
    """Write what is whole of a checkpoint to ``output``, and say what is lost.

    Of a file of ``torch.save`` (zip or legacy) or safetensors whose end is missing, the tensors
    that are there to their last byte are kept; of any that can be read, those whose bytes have the
    checksum that the file records. A tensor that is lost goes from the mapping that it is in, of a
    whole module it becomes None; of an optimizer goes all state of a parameter whose state is not
    whole. All else stays as it is, so that ``load_state_dict(strict=False)`` takes the rest.

    Raises:
        UnreadableError: nothing is whole: it is cut off in its structure, or no checkpoint.
        RefusedError: no tensor of it is whole.
        UsageError: stdin, or no format is named.
        WriteError: the output can't be written; nothing was changed.
    """
    if is_stream(path):
        raise UsageError("stdin is read once: name a file to salvage")
    place = place_of(path, follow_links=follow_symlinks)
    faults: list[Fault] = []
    try:
        ckpt = read_place(place, key)
    except UnreadableError as e:
        place = place_of(path, follow_links=follow_symlinks)
        torn = read_torn(place)
        if torn is None:
            raise
        ckpt = torn
        faults.append(Fault("unreadable", e.member or "", e.reason, None, e.offset))
    with ckpt:
        look = Look(place, ckpt, None, progress)
        found = look.result()
        kept, lost = without_lost(ckpt, look.lost)
        if not kept.tensors():
            raise RefusedError(f"{place.name}: no tensor of it is whole: nothing is written")
        line = f"salvage: {len(lost)} lost"
        saved = save(kept, output, to=to, overwrite=overwrite, history=[line])
    salvaged = Salvaged(str(saved.path), len(kept.tensors()), lost, saved.bytes_written)
    notes = [*found.notes, *saved.notes]
    return Verify([replace(found, faults=[*faults, *found.faults], notes=notes, salvaged=salvaged)])


def without_lost(ckpt: Checkpoint, lost: set[Any]) -> tuple[Checkpoint, list[str]]:
    """The checkpoint without the tensors of these identities, and the names of what went."""
    gone = dict(_parts(ckpt, lost))
    if () in gone:
        return ckpt.replace(root=None), [path_text(())]
    in_modules = {path for path in gone if is_module(get(ckpt.root, path[:-1]))}
    root = without_parts(ckpt.root, [path for path in gone if path not in in_modules])
    root = rebuild(root, {id(gone[path]): None for path in in_modules})
    return ckpt.replace(root=root, read=root), [path_text(path) for path in gone]


def _parts(ckpt: Checkpoint, lost: set[Any]) -> Iterator[tuple[Path, Any]]:
    """What has to go: a tensor, one that is put together of several, all state of a parameter."""
    storages = {identity[0] for identity in lost}
    states = [(*path, "state") for path, _ in ckpt.sections.optimizers]
    whole: set[Path] = set()
    for path, node in walk(ckpt.root):
        if isinstance(node, Composite):
            whole.add(path)
            refs = [one for one in node.args if isinstance(one, StorageRef)]
            is_lost = any(id(one.storage) in storages for one in refs)
        elif isinstance(node, StorageRef):
            is_lost = id(node.storage) in storages
        else:
            is_lost = isinstance(node, TensorRef) and node.identity in lost
        if not is_lost:
            continue
        if path[:-1] in whole:
            path = path[:-1]
        at = next((len(one) for one in states if path[: len(one)] == one), None)
        yield (path if at is None else path[: at + 1]), node
