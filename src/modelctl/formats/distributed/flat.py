"""Flat groups: parameters one after the other in vectors, of which each rank has a piece."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from itertools import accumulate
from math import prod

from ...core.dtypes import BY_NAME, DType
from ...core.tensors import TensorRef, Widened
from ...errors import UnreadableError
from ...storage.chunked import Chunk, ChunkedStorage

# So many elements, and what gives them as a vector.
Piece = tuple[int, Callable[[], TensorRef]]


class Flat:
    """Vectors as one: the groups of a rank, or the pieces of one group, of all ranks.

    Raises:
        UnreadableError: there are none, or one is no vector.
    """

    def __init__(self, parts: Sequence[object]) -> None:
        self.parts = [one for one in parts if isinstance(one, TensorRef) and len(one.shape) == 1]
        if not parts or len(self.parts) != len(parts):
            raise UnreadableError("a flat group that is no vector")
        self._ends = list(accumulate(part.numel for part in self.parts))

    @property
    def dtype(self) -> DType:
        return self.parts[0].dtype

    @property
    def numel(self) -> int:
        return self._ends[-1]

    def cut(self, start: int, size: int) -> Iterator[Piece]:
        """``size`` elements from ``start`` on, in the vectors in which they lie.

        Raises:
            UnreadableError: it ends before.
        """
        index = bisect_right(self._ends, start)
        while size:
            if index == len(self.parts):
                raise UnreadableError(f"{size:,} elements are missing at the end of a flat group")
            part = self.parts[index]
            low = start - self._ends[index] + part.numel
            n = min(part.numel - low, size)
            if n:
                yield n, partial(_view, part, low, n)
            start, size, index = start + n, size - n, index + 1


def _view(vector: TensorRef, start: int, size: int) -> TensorRef:
    step = vector.stride[0]
    return vector.replace(shape=(size,), offset=vector.offset + start * step, stride=(step,))


def joined(dtype: DType, shape: tuple[int, ...], pieces: Iterable[Piece], where: str) -> TensorRef:
    """A tensor of pieces one after the other, without what is too much at their end.

    Raises:
        UnreadableError: they are too few.
    """
    numel, at = prod(shape), 0
    chunks = []
    for size, find in pieces:
        n = min(size, numel - at)
        if n:
            chunks.append(
                Chunk((at,), (n,), find if n == size else partial(_first, find, n), where)
            )
        at += n
    if at != numel:
        raise UnreadableError(f"{numel - at:,} of {numel:,} elements are missing")
    return TensorRef(dtype, shape, ChunkedStorage(dtype, (numel,), chunks))


def _first(find: Callable[[], TensorRef], size: int) -> TensorRef:
    return _view(find(), 0, size)


def in_fp32(ref: TensorRef) -> TensorRef:
    """What was saved in half precision, in fp32; everything else as it is."""
    if ref.dtype.name not in ("bfloat16", "float16"):
        return ref
    return TensorRef(BY_NAME["float32"], ref.shape, Widened(ref))
