"""Flat groups: parameters one after the other in vectors, of which each rank has a piece."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import partial
from itertools import accumulate
from math import prod
from typing import Any

from ...core.dtypes import BY_NAME, DType
from ...core.numbers import numbers
from ...core.tensors import TensorRef
from ...errors import UnreadableError
from ...storage.chunked import Chunk, ChunkedStorage
from ...storage.values import ValuesStorage, Widened
from .metadata import torch_size

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


def own(value: Any) -> Any:
    """A value of one parameter's state, with bytes of its own where it is a tensor: steps are
    counted on in place."""
    if not isinstance(value, TensorRef):
        return value
    return value.replace(storage=ValuesStorage(value), offset=0, base=0, stride=None)


def check_steps(values: Iterable[Any]) -> None:
    """Raises UnreadableError where the optimizers of ranks did not take as many steps."""
    said = {step for step in map(_step, values) if step is not None}
    if len(said) > 1:
        steps = ", ".join(f"{step:.15g}" for step in sorted(said))
        raise UnreadableError(f"files of different saves: the optimizer's step is {steps}")


def _step(value: Any) -> float | None:
    """How many steps an optimizer took; None where it does not say."""
    if isinstance(value, TensorRef) and value.numel == 1:
        found = numbers(value.tobytes(), value.dtype)
        value = None if found is None else found.item()
    return float(value) if type(value) in (int, float) and abs(value) < 1 << 53 else None


def shapes_of(group: Mapping[Any, Any] | None) -> dict[str, tuple[int, ...]]:
    if group is None or not all(isinstance(name, str) for name in group):
        raise UnreadableError("its parameters have no names")
    found = {}
    for name, size in group.items():
        try:
            found[name] = torch_size(size)
        except UnreadableError as e:
            raise UnreadableError(f"the shape of {name!r:.200}: {e.reason}") from None
    return found


def paddings_of(node: Any, group: int, parameters: int) -> list[int]:
    """What fills up each parameter of a group, where a save says so."""
    if node is None:
        return [0] * parameters
    of_group = node[group] if isinstance(node, list) and group < len(node) else None
    if (
        not isinstance(of_group, list)
        or len(of_group) != parameters
        or not all(type(n) is int and 0 <= n < 1 << 60 for n in of_group)
    ):
        raise UnreadableError(f"its param_alignment_paddings of group {group} are none")
    return of_group
