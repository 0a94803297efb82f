"""Tensors of two checkpoints, storage against storage: bytes first, values where these differ."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import NamedTuple

from ...core.storages import RunStorage, Storage, fastest_crc32
from ...core.tensors import TensorRef, announce_all
from .measures import Measure, measure

# Read at once of each side; less is not worth the threads' taking turns.
_ROOM = 512 << 10
# Work that is handed to a thread, at least, where there is so much.
_BATCH = 8 << 20
# More gain nothing, and each takes memory.
_MOST_THREADS = 4

Pair = tuple[TensorRef, TensorRef]
Tell = Callable[[int], object]


class Compared(NamedTuple):
    """What two tensors are to each other: ``same`` bit for bit, else as far apart as ``measure``
    says."""

    same: bool
    measure: Measure | None = None


_SAME = Compared(True)


def compare(
    pairs: Sequence[Pair], rtol: float, atol: float, advance: Tell | None
) -> list[Compared]:
    """Each pair of tensors, which have one shape. Views that several pairs share are compared
    once; ``advance`` hears of the bytes of each pair.

    Raises:
        DamagedError: bytes that were read are not what was saved.
        UnreadableError, UnsupportedError: a tensor's bytes can't be read as values.
    """
    work: dict[tuple[int, int], list[Pair]] = {}
    for a, b in pairs:
        if a.identity != b.identity:
            work.setdefault((id(a.storage), id(b.storage)), []).append((a, b))
    groups = list(work.values())
    announce_all(ref for group in groups for pair in group for ref in pair)
    lock = threading.Lock()

    def tell(more: int) -> None:
        if advance is not None and more:
            with lock:
                advance(more)

    def one(batch: list[list[Pair]]) -> list[list[Compared]]:
        return [_group(group, rtol, atol, tell) for group in batch]

    known: dict[tuple[object, object], Compared] = {}
    for batch in _in_threads(one, _batches(groups), _threads(groups)):
        for group, found in batch:
            for (a, b), result in zip(group, found, strict=True):
                known[a.identity, b.identity] = result
    return [_SAME if a.identity == b.identity else known[a.identity, b.identity] for a, b in pairs]


def _group(group: list[Pair], rtol: float, atol: float, tell: Tell) -> list[Compared]:
    """All pairs of two storages."""
    a, b = (ref.storage for ref in group[0])
    told = _Told(sum(one.nbytes for one, _ in group), tell)
    alike = a.nbytes == b.nbytes and all(_is_laid_out_alike(*pair) for pair in group)
    if alike and _same_bytes(a, b, told.upto):
        told.upto(told.total)
        return [_SAME] * len(group)
    found: dict[tuple[object, object], Compared] = {}
    for one, other in group:
        key = one.identity, other.identity
        if key not in found:
            # of one pair that takes all of both it is known already
            may_be_same = not (alike and len(group) == 1 and one.is_whole)
            found[key] = _pair(one, other, rtol, atol, told, may_be_same)
        told.begin(one.nbytes)
    return [found[one.identity, other.identity] for one, other in group]


def _pair(
    a: TensorRef, b: TensorRef, rtol: float, atol: float, told: _Told, may_be_same: bool
) -> Compared:
    if may_be_same and a.spec == b.spec and _same_values(a, b):
        return _SAME
    return Compared(False, measure(a, b, rtol, atol, told.upto))


def _is_laid_out_alike(a: TensorRef, b: TensorRef) -> bool:
    """Whether equal bytes of their storages are equal values."""
    return (a.spec, a.start, a.stride, a.bits) == (b.spec, b.start, b.stride, b.bits)


def _same_values(a: TensorRef, b: TensorRef) -> bool:
    """Whether two tensors of one spec are equal bit for bit, in whatever order each lies."""
    a.check()
    b.check()
    return all(x == y for x, y in zip(*(_cut(ref.chunks()) for ref in (a, b)), strict=True))


def _same_bytes(a: Storage, b: Storage, told: Tell) -> bool:
    """Whether two storages of one size have the same bytes; what is equal was compared with the
    checksums, too. Stops at the first difference."""
    if type(a) is not RunStorage or type(b) is not RunStorage:
        done = 0
        for x, y in zip(*(_cut(one.checked()) for one in (a, b)), strict=True):
            if x != y:
                return False
            done += len(x)
            told(done)
        return True
    # the bytes are equal as far as they are read: one sum is that of both
    crc32 = None if a.compared and b.compared else fastest_crc32()
    crc = 0
    room = min(_ROOM, a.nbytes)
    x, y = _rooms(room)
    for at in range(0, a.nbytes, room or 1):
        size = min(room, a.nbytes - at)
        for storage, into in ((a, x), (b, y)):
            storage.source.read_into(storage.offset + at, memoryview(into)[:size])
        # bytearrays are compared as memory is, views of them one by one
        if not (x == y if size == len(x) else x[:size] == y[:size]):
            return False
        if crc32 is not None:
            crc = crc32(memoryview(x)[:size], crc)
        told(at + size)
    if crc32 is not None:
        a.compare(crc)
        b.compare(crc)
    return True


_reused = threading.local()


def _rooms(size: int) -> tuple[bytearray, bytearray]:
    """Two places of at least so many bytes, which a thread uses again and again."""
    rooms: tuple[bytearray, bytearray] | None = getattr(_reused, "rooms", None)
    if rooms is None or len(rooms[0]) < size:
        rooms = _reused.rooms = bytearray(size), bytearray(size)
    return rooms


def _cut(chunks: Iterable[bytes | memoryview]) -> Iterator[bytes]:
    """A stream in pieces of one size, the last one less."""
    left = b""
    for chunk in chunks:
        left += chunk
        whole = len(left) - len(left) % _ROOM
        for at in range(0, whole, _ROOM):
            yield left[at : at + _ROOM]
        left = left[whole:]
    if left:
        yield left


class _Told:
    """What is told of the work on a group: each byte once, however often it is read."""

    def __init__(self, total: int, tell: Tell) -> None:
        self.total, self._tell = total, tell
        self._begun = self._told = 0

    def upto(self, done: int) -> None:
        """So many bytes of what was begun are done."""
        done = min(self._begun + done, self.total)
        if done > self._told:
            self._tell(done - self._told)
            self._told = done

    def begin(self, before: int) -> None:
        """The next one, after one of so many bytes."""
        self.upto(before)
        self._begun += before


def _batches(groups: Iterable[list[Pair]]) -> Iterator[list[list[Pair]]]:
    batch: list[list[Pair]] = []
    size = 0
    for group in groups:
        batch.append(group)
        size += sum(a.nbytes for a, _ in group)
        if size >= _BATCH:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch


def _threads(groups: Iterable[list[Pair]]) -> int:
    """How many threads are worth it: of what is far, or is inflated from its start, one reads in
    order."""
    for group in groups:
        for ref in group[0]:
            runs = ref.storage.runs(0, min(1, ref.storage.nbytes))
            if runs is None or any(run.source.costly for run in runs):
                return 1
    affinity = getattr(os, "sched_getaffinity", None)  # Linux
    return min(_MOST_THREADS, len(affinity(0)) if affinity else os.cpu_count() or 1)


def _in_threads(
    do: Callable[[list[list[Pair]]], list[list[Compared]]],
    batches: Iterable[list[list[Pair]]],
    threads: int,
) -> Iterator[Iterator[tuple[list[Pair], list[Compared]]]]:
    """Each batch with what became of it, in order."""
    todo = list(batches)
    if threads == 1 or len(todo) <= 1:
        for batch in todo:
            yield zip(batch, do(batch), strict=True)
        return
    from concurrent.futures import ThreadPoolExecutor

    pool = ThreadPoolExecutor(threads, "modelctl-diff")
    try:
        for batch, found in zip(todo, pool.map(do, todo), strict=True):
            yield zip(batch, found, strict=True)
    finally:
        pool.shutdown(cancel_futures=True)
