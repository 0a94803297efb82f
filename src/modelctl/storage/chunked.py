"""Tensors in chunks: boxes of a tensor that lie somewhere by themselves, as ranks save their parts.

They become one storage, row-major. Nothing is put together before it is read, and then as much of
it as is asked for.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Callable, Iterator, Sequence
from math import prod
from typing import Any, NamedTuple

from ..core.dtypes import DType
from ..core.storages import CHUNK, Run, Slice, Storage, fastest_crc32
from ..core.tensors import TensorRef
from ..errors import DamagedError, UnreadableError
from .checksums import Passed, crc32_of_pieces

Box = tuple[tuple[int, int], ...]  # from where to where, in each dimension


class Chunk(NamedTuple):
    """A box of a tensor.

    Attributes:
        offsets: where it begins, in each dimension.
        sizes: its shape.
        find: gives its values as a tensor of that shape; called when they are first asked for.
        where: what errors call it.
    """

    offsets: tuple[int, ...]
    sizes: tuple[int, ...]
    find: Callable[[], TensorRef]
    where: str

    @classmethod
    def of(cls, offsets: tuple[int, ...], ref: TensorRef, where: str) -> Chunk:
        """One whose values are known already."""
        return cls(offsets, ref.shape, lambda: ref, where)

    @property
    def numel(self) -> int:
        return prod(self.sizes)

    @property
    def box(self) -> Box:
        return tuple((at, at + n) for at, n in zip(self.offsets, self.sizes, strict=True))


def placed(shape: tuple[int, ...], chunks: Sequence[Chunk]) -> list[Chunk]:
    """The chunks of a tensor in their order, each once: equal boxes are copies of one.

    Raises:
        UnreadableError: one lies outside, two overlap, or a part of the tensor is in none.
    """
    once: dict[tuple[tuple[int, ...], tuple[int, ...]], Chunk] = {}
    for chunk in chunks:
        sides = (len(chunk.offsets), len(chunk.sizes))
        if sides != (len(shape), len(shape)) or not all(
            0 <= at <= at + n <= size
            for at, n, size in zip(chunk.offsets, chunk.sizes, shape, strict=True)
        ):
            raise UnreadableError(
                f"a part of {list(chunk.sizes)} at {list(chunk.offsets)} lies outside of a tensor "
                f"of {list(shape)} ({chunk.where})"
            )
        if chunk.numel or not prod(shape):
            once.setdefault((chunk.offsets, chunk.sizes), chunk)
    found = sorted(once.values(), key=lambda chunk: chunk.offsets)
    pair = _overlapping(found)
    if pair is not None:
        raise UnreadableError(
            f"two parts of it overlap, at {list(pair[0].offsets)} and {list(pair[1].offsets)} "
            f"({pair[0].where}, {pair[1].where})"
        )
    held = sum(chunk.numel for chunk in found)
    if held != prod(shape):
        raise UnreadableError(
            f"{prod(shape) - held:,} of its {prod(shape):,} elements are in no part of it"
        )
    return found


def _overlapping(chunks: Sequence[Chunk]) -> tuple[Chunk, Chunk] | None:
    """Two chunks that share elements, of chunks sorted by where they begin."""
    open_: list[Chunk] = []  # those that reach as far as where the next one begins
    for chunk in chunks:
        if not chunk.offsets:
            if open_:
                return open_[0], chunk
            open_ = [chunk]
            continue
        start = chunk.offsets[0]
        open_ = [one for one in open_ if one.offsets[0] + one.sizes[0] > start]
        for one in open_:
            if _common(one.box, chunk.box) is not None:
                return one, chunk
        open_.append(chunk)
    return None


def _common(a: Box, b: Box) -> Box | None:
    """What two boxes have in common; None where that is nothing."""
    both = tuple(
        (max(low, other), min(high, end)) for (low, high), (other, end) in zip(a, b, strict=True)
    )
    return both if all(low < high for low, high in both) else None


def boxes(shape: Sequence[int], start: int, stop: int) -> Iterator[Box]:
    """The elements from ``start`` to ``stop`` of a row-major tensor as boxes, one after the other:
    the end of a row, whole rows, the beginning of one, in each dimension."""
    if start >= stop:
        return
    if not shape:
        yield ()
        return
    inner = prod(shape[1:])
    row, begin = divmod(start, inner)
    last, end = divmod(stop, inner)
    if begin:
        to = end if row == last else inner
        for box in boxes(shape[1:], begin, to):
            yield ((row, row + 1), *box)
        row += 1
    if row < last:
        yield ((row, last), *((0, size) for size in shape[1:]))
    if end and row <= last:
        for box in boxes(shape[1:], 0, end):
            yield ((last, last + 1), *box)


class ChunkedStorage(Storage):
    """The values of a tensor that lies in chunks, row-major.

    Where each chunk has whole rows, as where a tensor was sharded over its first dimension, its
    bytes lie in the files one chunk after the other (:meth:`runs`); else they are put together
    while they are read.
    """

    __slots__ = ("_chunks", "_found", "_starts", "dtype", "in_rows", "shape")

    def __init__(self, dtype: DType, shape: tuple[int, ...], chunks: Sequence[Chunk]) -> None:
        """
        Args:
            chunks: as :func:`placed` gives them: they cover the tensor, and don't overlap.
        """
        super().__init__(dtype.nbytes(prod(shape)))
        self.compared = False
        self.dtype, self.shape = dtype, shape
        self._chunks = tuple(chunks)
        self._found: list[TensorRef | None] = [None] * len(self._chunks)
        self.in_rows = all(chunk.sizes[1:] == shape[1:] for chunk in self._chunks)
        self._starts = [chunk.offsets[0] if shape else 0 for chunk in self._chunks]

    def part(self, index: int) -> TensorRef:
        """The values of a chunk.

        Raises:
            UnreadableError: it is not what was said of it.
        """
        found = self._found[index]
        if found is None:
            chunk = self._chunks[index]
            found = chunk.find()
            if found.dtype != self.dtype or found.shape != chunk.sizes:
                raise UnreadableError(
                    f"{chunk.where}: {found.dtype.name} of {list(found.shape)} lies there, "
                    f"{self.dtype.name} of {list(chunk.sizes)} is expected"
                )
            self._found[index] = found
        return found

    def runs(self, start: int = 0, stop: int | None = None) -> list[Run] | None:
        found: list[Run] = []
        for part in self._in_order(start, stop) or (None,):
            runs = part and part.storage.runs(part.start, part.stop)
            if runs is None:
                return None
            found += runs
        return found

    def slices(self, start: int = 0, stop: int | None = None) -> list[Slice]:
        parts = self._in_order(start, stop)
        if parts is None:
            return super().slices(start, stop)
        return [one for part in parts for one in part.storage.slices(part.start, part.stop)]

    def recorded_crc32(self) -> int | None:
        """Where each part is a storage with a checksum, that of all of them together."""
        pieces = []
        for part in self.slices():
            if part.storage.crc32 is None or part.nbytes != part.storage.nbytes:
                return None
            pieces.append((part.storage.crc32, part.nbytes))
        return crc32_of_pieces(pieces)

    def _in_order(self, start: int, stop: int | None) -> list[Slice] | None:
        """What the bytes from ``start`` to ``stop`` are, of the storages of the chunks, where they
        lie there as they are, one after the other."""
        stop = self.nbytes if stop is None else stop
        if not self.in_rows or self.dtype.nbytes(1) * prod(self.shape) != self.nbytes:
            return None
        row = self.dtype.nbytes(prod(self.shape[1:]))
        found: list[Slice] = []
        for index in self._reaching(start // row, -(-stop // row)) if start < stop else ():
            ref = self.part(index)
            if not ref.is_contiguous or ref.bits:
                return None
            at = self._starts[index] * row
            low, high = max(start - at, 0), min(stop - at, ref.nbytes)
            found.append(Slice(ref.storage, ref.start + low, ref.start + high))
        return found

    def _reaching(self, low: int, high: int) -> list[int]:
        """The chunks with some of the rows from ``low`` to ``high``."""
        if not self.shape:
            return [0]
        last = bisect_right(self._starts, high - 1)
        return [
            index
            for index in range(last)
            if self._starts[index] + self._chunks[index].sizes[0] > low
        ]

    def read(self, start: int, size: int) -> bytes:
        return bytes(self._read(start, size, None))

    def _read(self, start: int, size: int, passed: Passed | None) -> bytes | memoryview:
        item = self.dtype.itemsize
        first, last = start // item, -(-(start + size) // item)
        found = [self._box(box, passed) for box in boxes(self.shape, first, last)]
        data = found[0] if len(found) == 1 else b"".join(found)
        return data[start - first * item :][:size]

    def _box(self, wanted: Box, passed: Passed | None) -> bytes | memoryview:
        """The values of a box, row-major."""
        import numpy as np

        out: Any = None
        for index in self._reaching(*(wanted[0] if wanted else (0, 1))):
            chunk = self._chunks[index]
            common = _common(chunk.box, wanted)
            if common is None:
                continue
            data = self._of_chunk(index, common, passed)
            if common == wanted:
                return data
            # as bytes: what lies in a row is moved at once
            steps = [1] * (len(wanted) - 1) + [self.dtype.itemsize]
            if out is None:
                sizes = [high - low for low, high in wanted]
                out = np.empty([n * step for n, step in zip(sizes, steps, strict=True)], "u1")
            where = tuple(
                slice((low - at) * step, (high - at) * step)
                for (low, high), (at, _), step in zip(common, wanted, steps, strict=True)
            )
            out[where] = np.frombuffer(data, "u1").reshape(out[where].shape)
        return b"" if out is None else memoryview(out.reshape(-1))

    def _of_chunk(self, index: int, box: Box, passed: Passed | None) -> bytes:
        """The values of a box that lies in a chunk; ``passed`` is told where they lie as they
        are."""
        ref, offsets = self.part(index), self._chunks[index].offsets
        first = sum(
            (low - at) * step for (low, _), at, step in zip(box, offsets, ref.stride, strict=True)
        )
        sizes = tuple(high - low for low, high in box)
        start = ref.offset + first
        view = TensorRef(
            *(ref.dtype, sizes, ref.storage, start, ref.stride), base=ref.base, rebuild=ref.rebuild
        )
        try:
            data = view.tobytes()
        except DamagedError as e:
            raise DamagedError(self, e.path, e.offset) from None
        if passed is not None and view.is_contiguous and not view.bits and len(data):
            part = Slice(view.storage, view.start, view.start + len(data))
            passed.add(part, fastest_crc32()(data, 0), self)
        return data

    def check(self) -> None:
        if self.compared:
            return
        for index in range(len(self._chunks)):
            try:
                self.part(index).storage.check()
            except DamagedError as e:
                raise DamagedError(self, e.path, e.offset) from None
        self.compared = True

    def checked(self, start: int = 0, stop: int | None = None) -> Iterator[bytes | memoryview]:
        stop = self.nbytes if stop is None else stop
        if self.compared or (start, stop) != (0, self.nbytes):
            self.check()
            yield from self.chunks(start, stop)
            return
        if not self.in_rows:
            yield from self._in_blocks()
            return
        for index in range(len(self._chunks)):
            ref = self.part(index)
            try:
                ref.check()
                yield from ref.chunks()
            except DamagedError as e:
                raise DamagedError(self, e.path, e.offset) from None
        self.compared = True

    def _in_blocks(self) -> Iterator[bytes | memoryview]:
        """All bytes, put together of the chunks, each of which is read once, for its checksum,
        too."""
        passed = Passed()
        row = self.dtype.nbytes(prod(self.shape[1:])) or 1
        size = CHUNK // row * row or CHUNK  # whole rows, which lie in a chunk one after the other
        for at in range(0, self.nbytes, size):
            yield self._read(at, min(size, self.nbytes - at), passed)
        passed.finish()
        self.check()  # what does not lie there as it is
