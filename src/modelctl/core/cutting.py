"""Storages without the bytes of tensors that an edit removed.

What views one storage shares it in torch's formats, so that a removed tensor would leave its bytes
behind: as large as before, and still there for whoever looks.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from ..errors import DamagedError
from .nodes import Composite
from .notes import Note, warning
from .storages import Run, Slice, Storage
from .tensors import StorageRef, TensorRef
from .text import count
from .tree import containers, rebuild

Span = tuple[int, int]
# Tensors that take this much less than the storage that they keep alive are worth a word.
_WASTE_RATIO, _WASTE_BYTES = 4, 1 << 20


class PartStorage(Storage):
    """The bytes of a storage from ``start`` to ``stop``, as a storage of their own."""

    __slots__ = ("inner", "start")

    def __init__(self, inner: Storage, start: int, stop: int) -> None:
        super().__init__(stop - start, inner.location)
        self.inner, self.start = inner, start
        self.compared = inner.compared

    @property
    def seekable(self) -> bool:  # type: ignore[override]
        return self.inner.seekable

    def read(self, start: int, size: int) -> bytes:
        return self.inner.read(self.start + start, size)

    def runs(self, start: int = 0, stop: int | None = None) -> list[Run] | None:
        stop = self.nbytes if stop is None else stop
        return self.inner.runs(self.start + start, self.start + stop)

    def slices(self, start: int = 0, stop: int | None = None) -> list[Slice]:
        stop = self.nbytes if stop is None else stop
        return self.inner.slices(self.start + start, self.start + stop)

    def chunks(self, start: int = 0, stop: int | None = None) -> Iterator[bytes]:
        stop = self.nbytes if stop is None else stop
        yield from self.inner.chunks(self.start + start, self.start + stop)

    def check(self) -> None:
        """All of the storage that this is a part of."""
        try:
            self.inner.check()
        except DamagedError as e:
            raise DamagedError(self.inner, e.path, e.offset) from None
        self.compared = True

    def checked(self, start: int = 0, stop: int | None = None) -> Iterator[bytes | memoryview]:
        self.check()
        yield from self.chunks(start, stop)


def without_removed(root: Any, before: Any) -> tuple[Any, list[Note]]:
    """A tree whose storages end with the tensors that are left, where ``before`` had more of them.

    Of such a storage, what lies before the first and behind the last tensor that views it is cut
    off: how these lie to each other stays as it was, and ties stay ties. Storages of which
    nothing was removed are left alone, however much of them is not viewed.

    Returns:
        The tree, and what is to be said of bytes that lie between tensors that stay.
    """
    had = _views(before)
    if all(len(refs) == 1 for refs in had.values()):  # most files: a storage each
        return root, []
    changes: dict[int, Any] = {}
    kept, storages = 0, 0
    for key, refs in _views(root).items():
        spans = {_span(ref) for ref in refs}
        gone = {_span(ref) for ref in had.get(key, ())} - spans
        if not gone or any(not isinstance(ref, TensorRef) for ref in refs):
            continue
        tensors = [ref for ref in refs if isinstance(ref, TensorRef)]
        storage = tensors[0].storage
        start, stop = _cut(tensors, spans)
        left = _uncovered(gone, spans, start, stop)
        kept, storages = kept + left, storages + bool(left)
        if (start, stop) == (0, storage.nbytes):
            continue
        part = PartStorage(storage, start, stop)
        for ref in tensors:
            at = ref.start - start
            offset, base = divmod(at, ref.dtype.itemsize)
            changes[id(ref)] = ref.replace(storage=part, offset=offset, base=base)
    notes = []
    if kept:
        notes.append(
            warning(
                f"{kept:,} bytes of removed tensors stay, between tensors that share "
                f"{count(storages, 'storage')} with them",
                "--to safetensors leaves them out",
            )
        )
    return (rebuild(root, changes) if changes else root), notes


def wasted(tensors: Mapping[str, TensorRef]) -> Iterator[Note]:
    """A warning for each tensor whose storage is far larger than all that views it: torch keeps
    the rest, in memory and in its files."""
    views: dict[int, dict[Any, int]] = {}  # of each storage, tied ones once
    for ref in tensors.values():
        views.setdefault(id(ref.storage), {})[ref.identity] = ref.nbytes
    for name, ref in tensors.items():
        kept = ref.storage.nbytes
        if kept > _WASTE_RATIO * ref.nbytes and kept - ref.nbytes > _WASTE_BYTES:
            used = sum(views[id(ref.storage)].values())
            if kept > _WASTE_RATIO * used:
                yield warning(
                    f"'{name}' uses {used:,} of the {kept:,} bytes that it keeps alive",
                    "'modelctl convert --to safetensors' leaves the rest out",
                )


def _views(root: Any) -> dict[int, list[TensorRef | StorageRef | None]]:
    """What views each storage, by its ``id``; None for what may not be changed: the parts of a
    tensor that is no plain one."""
    found: dict[int, list[TensorRef | StorageRef | None]] = {}
    if isinstance(root, TensorRef):
        return {id(root.storage): [root]}
    seen: set[int] = set()
    for node, inner in containers(root).values():
        for child in inner:
            if isinstance(child, TensorRef | StorageRef) and id(child) not in seen:
                seen.add(id(child))
                found.setdefault(id(child.storage), []).append(child)
        if isinstance(node, Composite):
            for ref in node.parts.values():
                found.setdefault(id(ref.storage), []).append(None)
    return found


def _span(ref: TensorRef | StorageRef | None) -> Span:
    return (ref.start, ref.start + ref.span) if isinstance(ref, TensorRef) else (-1, -1)


def _cut(tensors: Sequence[TensorRef], spans: set[Span]) -> Span:
    """From where to where tensors need their storage, in whole items of each."""
    step = math.lcm(*(ref.dtype.itemsize for ref in tensors))
    full = tensors[0].storage.nbytes
    used = [span for span in spans if span[0] < span[1]] or [(0, 0)]
    start = min(start for start, _ in used)
    if any((ref.start - start) % ref.dtype.itemsize for ref in tensors):
        start -= start % step
    stop = max(stop for _, stop in used)
    stop += -(stop - start) % step
    if any(ref.start < start for ref in tensors) or stop > full:  # an empty one, an odd end
        return 0, full
    return start, stop


def _uncovered(gone: set[Span], spans: set[Span], start: int, stop: int) -> int:
    """Bytes of what is gone that lie between ``start`` and ``stop``, and that nothing else has."""
    events = sorted(
        [(max(a, start), 1, 0) for a, b in gone if b > start and a < stop]
        + [(min(b, stop), -1, 0) for a, b in gone if b > start and a < stop]
        + [(a, 0, 1) for a, b in spans if b > a]
        + [(b, 0, -1) for a, b in spans if b > a]
    )
    total = at = removed = used = 0
    for place, more_removed, more_used in events:
        if removed and not used:
            total += place - at
        at, removed, used = place, removed + more_removed, used + more_used
    return total
