"""Whether the parts of a checkpoint agree: optimizer and model, freeze record and parameters,
tensors that share their bytes, the indices of sparse ones."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Literal, NamedTuple

from ..core.checkpoint import Checkpoint, named
from ..core.names import parameters
from ..core.nodes import Composite, children, mapping
from ..core.numbers import numbers
from ..core.records import read_freeze, unread_freeze
from ..core.sections.kinds import optimizer_entries
from ..core.sections.optimizers import Groups, may_belong, read_groups, trainable
from ..core.sections.pairing import merged
from ..core.tensors import TensorRef
from ..core.text import count, shape, some
from ..core.tree import is_leaf, is_small, path_text, walk

_CONTROL = re.compile(r"[\x00-\x1f\x7f-\x9f\u2028-\u202e\u2066-\u2069]")

Kind = Literal[
    "damaged",
    "unreadable",
    "odd",
    "nan",
    "inf",
    "zero",
    "optimizer",
    "freeze",
    "overlap",
    "sparse",
    "name",
    "cycle",
    "manifest",
]


class Fault(NamedTuple):
    """Something that is wrong with a checkpoint.

    Attributes:
        id: what kind it is, which stays (docs/safety.md#verify).
        where: the tensor, or the member or part of the file; "" for the file itself.
        text: what is wrong.
        path: the file, where it is one of several.
        offset: the byte in it, where that is known.
    """

    id: Kind
    where: str
    text: str
    path: str | None = None
    offset: int | None = None


def disagreements(ckpt: Checkpoint) -> Iterator[Fault]:
    """What of a checkpoint's parts does not go together; of values only the indices of sparse
    tensors are read."""
    yield from _optimizers(ckpt)
    yield from _freeze(ckpt)
    yield from _shared(ckpt)
    yield from _names(ckpt)
    if _holds_itself(ckpt.root):
        yield Fault("cycle", "", "something in it holds itself: what walks it naively never ends")
    nodes = named((path, node) for path, node in walk(ckpt.root) if isinstance(node, Composite))
    for name, node in nodes:
        says = _sparse(node)
        if says is not None:
            yield Fault("sparse", name, f"{node.layout}: {says}")


def _optimizers(ckpt: Checkpoint) -> Iterator[Fault]:
    sections = ckpt.sections
    for (path, node), of in zip(sections.optimizers, sections.owners, strict=True):
        where, groups = path_text(path), read_groups(node)
        state = mapping(optimizer_entries(node).get("state"))
        # some formats have numbers as text
        known = {str(id_) for ids in groups.ids for id_ in ids if isinstance(id_, str | int)}
        lost = [key for key in state or () if isinstance(key, str | int) and str(key) not in known]
        if lost and known and not groups.flat:
            names = some([str(key)[:40] for key in lost], 3)
            yield Fault("optimizer", where, f"state of what no param_group has: {names}")
        says = _apart(groups, merged(of)) if of else None
        if says is not None:
            yield Fault("optimizer", where, f"does not belong to the model: {says}")


def _apart(groups: Groups, model: Mapping[str, TensorRef]) -> str | None:
    """Why an optimizer can't be that of a model; None where it may be."""
    if may_belong(groups, model):
        return None
    # what is a parameter is told by names: anything may be one here
    there = Counter({ref.identity: ref.shape for ref in model.values()}.values())
    if groups.total > there.total():
        return (
            f"it has {count(groups.total, 'parameter')}, the model {count(there.total(), 'tensor')}"
        )
    there.subtract(one for group in groups.shapes for one in group if one is not None)
    lost = [one for one, left in there.items() if left < 0]
    if lost:
        return f"it has state of {shape(lost[0])}, which is of none of the model's tensors"
    is_sorted = [*model] == sorted(model)  # as in safetensors, so in no order of the model's
    if groups.names is None and (is_sorted or groups.total > len(trainable(model))):
        return None
    what = "names" if groups.names is not None else "order"
    return f"by the {what} of its parameters, their shapes are others than the model's"


def _freeze(ckpt: Checkpoint) -> Iterator[Fault]:
    unread = unread_freeze(ckpt)
    if unread is not None:
        yield Fault("freeze", "", unread.text)
    record = read_freeze(ckpt)
    if record is None:
        return
    model = ckpt.sections.models[0]
    there = {*parameters(model.tensors()), *model.composites(), *ckpt.packed.of}
    lost = [name for name in record.frozen if name not in there]
    if lost:
        says = f"the freeze record names {count(len(lost), 'parameter')} that the model has not"
        yield Fault("freeze", lost[0], f"{says}: {some(lost, 3)}")


def _shared(ckpt: Checkpoint) -> Iterator[Fault]:
    """Tensors that share a part of their bytes, and neither holds the other: no view of torch's
    that anybody means to save."""
    spans: dict[int, list[tuple[int, int, str]]] = {}
    for name, ref in ckpt.tensors().items():
        if ref.span and ref.is_contiguous and not ref.is_whole:
            span = (ref.start, ref.start + ref.span, name)
            spans.setdefault(id(ref.storage), []).append(span)
    for found in spans.values():
        found.sort(key=lambda one: (one[0], -one[1]))
        reached, by = -1, ""
        for start, stop, name in found:
            if start < reached < stop:
                yield Fault("overlap", name, f"shares a part of its bytes with {by}, not all")
            if stop > reached:
                reached, by = stop, name


def _names(ckpt: Checkpoint) -> Iterator[Fault]:
    """Names that act on a terminal, or as the path of a file, where somebody uses them so."""
    for name in ckpt.tensors():
        if _CONTROL.search(name):
            yield Fault("name", name, "a control character in a name")
        elif name.startswith("/") or ".." in name.replace("\\", "/").split("/"):
            yield Fault("name", name, "a name that leads out of a folder, as that of a file")


def _holds_itself(root: Any) -> bool:
    """Whether a container is inside of itself."""
    if is_leaf(root):
        return False
    inside, done = {id(root)}, set[int]()
    levels = [(id(root), children(root))]
    while levels:
        key, rest = levels[-1]
        for _, node in rest:
            at = id(node)
            if at in inside:
                return True
            if not is_leaf(node) and at not in done and not is_small(node):
                inside.add(at)
                levels.append((at, children(node)))
                break
        else:
            levels.pop()
            inside.discard(key)
            done.add(key)
    return False


# ---------------------------------------------------------------------- sparse tensors


def _sparse(node: Composite) -> str | None:
    """What is wrong with the indices of a sparse tensor, as torch's ``check_invariants`` has it;
    None where nothing is, or it is none."""
    values = node.parts.get("values")
    if values is None:
        return None
    if node.layout == "sparse_coo":
        return _coordinates(node.parts["indices"], node.shape, values)
    if node.layout in ("sparse_csr", "sparse_csc", "sparse_bsr", "sparse_bsc"):
        return _compressed(node, values)
    return None


def _coordinates(indices: TensorRef, size: Sequence[int], values: TensorRef) -> str | None:
    if len(indices.shape) != 2 or indices.shape[0] > len(size):
        return f"indices of {shape(indices.shape)}"
    rows, stored = indices.shape
    if not values.shape or values.shape[0] != stored:
        return f"{stored:,} indices for values of {shape(values.shape)}"
    if tuple(values.shape[1:]) != tuple(size[rows:]):
        return f"values of {shape(values.shape)} in a tensor of {shape(size)}"
    for row, part in _rows(indices, stored):
        if int(part.min()) < 0 or int(part.max()) >= size[row]:
            return f"an index is outside of dimension {row}, which has {size[row]:,}"
    return None


def _compressed(node: Composite, values: TensorRef) -> str | None:
    by_rows = node.layout in ("sparse_csr", "sparse_bsr")
    pointers = node.parts["crow_indices" if by_rows else "ccol_indices"]
    plain = node.parts["col_indices" if by_rows else "row_indices"]
    if len(node.shape) < 2 or not pointers.shape or not plain.shape:
        return f"indices of {shape(plain.shape)} in a tensor of {shape(node.shape)}"
    batch = len(pointers.shape) - 1
    blocks = (1, 1)
    if node.layout in ("sparse_bsr", "sparse_bsc"):
        blocks = tuple(values.shape[batch + 1 : batch + 3])  # type: ignore[assignment]
        if len(blocks) != 2 or 0 in blocks:
            return f"blocks of {shape(values.shape)}"
    sides = [n // block for n, block in zip(node.shape[batch : batch + 2], blocks, strict=True)]
    along, across = sides if by_rows else sides[::-1]
    stored = plain.shape[-1]
    if pointers.shape[-1] != along + 1:
        return f"{pointers.shape[-1]:,} pointers for {along:,}"
    if len(values.shape) <= batch or values.shape[batch] != stored:
        return f"{stored:,} indices for values of {shape(values.shape)}"
    last = 0
    for at, part in _runs(pointers, along + 1):
        if at == 0 and int(part[0]) != 0:
            return "its pointers don't begin at 0"
        steps = part[1:] < part[:-1]
        if bool(steps.any()) or (at and int(part[0]) < last):
            return "its pointers go down"
        last = int(part[-1])
        if at + len(part) == along + 1 and last != stored:
            return f"its pointers end at {last:,}, there are {stored:,} values"
    for _, part in _runs(plain, stored):
        if int(part.min()) < 0 or int(part.max()) >= across:
            return f"an index is outside of {across:,}"
    return None


def _rows(ref: TensorRef, length: int) -> Iterator[tuple[int, Any]]:
    """The numbers of a matrix in pieces, each of one row, with which row that is."""
    done = 0
    for _, part in _runs(ref, length):
        yield done // length, part
        done += len(part)


def _runs(ref: TensorRef, length: int) -> Iterator[tuple[int, Any]]:
    """The numbers of an integer tensor in pieces, each inside of one row of ``length``, with where
    in it that begins."""
    ref.check()
    at = 0
    for raw in ref.chunks() if length else ():
        part = numbers(raw, ref.dtype)
        while part is not None and len(part):
            size = min(len(part), length - at)
            yield at, part[:size]
            at = (at + size) % length
            part = part[size:]
