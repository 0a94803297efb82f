"""Statistics of tensors' values, read in pieces: for ``summary --stats``."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple

from ..core.numbers import numbers
from ..core.tensors import TensorRef

# Powers of two beyond which squares come near the ends of a double.
_EXTREME = 400


class Stats(NamedTuple):
    """Of the finite values: ``min``, ``max``, ``mean`` and ``std`` (population), None where there
    are none; how many are ``nan`` and ``inf``; how many are zero; ``numel`` is how many there are.
    """

    min: float | None
    max: float | None
    mean: float | None
    std: float | None
    nan: int
    inf: int
    zeros: int
    numel: int


def has_stats(ref: TensorRef) -> bool:
    """Whether a dtype may have arithmetic here."""
    return ref.dtype.kind in ("float", "int")


def tensor_stats(ref: TensorRef, advance: Callable[[int], object] | None = None) -> Stats | None:
    """The statistics of one tensor; None for a dtype without arithmetic here (packed, quantized,
    complex, bool). Reads all its bytes, a piece at a time, and calls ``advance`` with the size of
    each.

    Raises:
        DamagedError: they are not what was saved.
        UnreadableError, UnsupportedError: its bytes can't be read as values.
    """
    import numpy as np

    if not has_stats(ref):
        return None
    ref.check()
    low, high, moments = math.inf, -math.inf, _Moments()
    nan = finite_count = zeros = count = 0
    for piece in ref.chunks():
        if advance is not None:
            advance(len(piece))
        values = numbers(piece, ref.dtype)
        if values is None:
            return None
        values = values.astype("f8", copy=False)
        finite = values[np.isfinite(values)]
        low = min(low, float(finite.min(initial=math.inf)))
        high = max(high, float(finite.max(initial=-math.inf)))
        moments.add(finite)
        nan += int(np.isnan(values).sum())
        finite_count += len(finite)
        zeros += len(finite) - int(np.count_nonzero(finite))
        count += len(values)
    inf = count - finite_count - nan
    if not finite_count:
        return Stats(None, None, None, None, nan, inf, zeros, count)
    return Stats(low, high, moments.mean, moments.std, nan, inf, zeros, count)


class _Moments:
    """Mean and standard deviation of values that come in pieces, of any size: neither a sum nor a
    square overflows (Chan's update, on values scaled by a power of two where they are extreme)."""

    def __init__(self) -> None:
        self._count, self._mean, self._squares = 0, 0.0, 0.0
        self._power: int | None = None  # what is kept is in units of 2 ** power

    def add(self, values: Any) -> None:
        import numpy as np

        if not len(values):
            return
        power = math.frexp(float(np.abs(values).max()))[1]
        self._rescale(power if abs(power) > _EXTREME else 0)
        scaled = np.ldexp(values, -self._power) if self._power else values
        off = scaled - scaled[0]  # so that the mean of equal values is their value
        about = float(off.mean())
        off -= about
        mean = float(scaled[0]) + about
        before, n = self._count, len(scaled)
        gap = mean - self._mean
        self._count += n
        self._mean += gap * (n / self._count)
        self._squares += float(np.dot(off, off)) + gap * gap * (before * (n / self._count))

    def _rescale(self, power: int) -> None:
        if self._power is not None and power > self._power:
            self._mean = math.ldexp(self._mean, self._power - power)
            self._squares = math.ldexp(self._squares, 2 * (self._power - power))
        self._power = power if self._power is None else max(power, self._power)

    @property
    def mean(self) -> float:
        return math.ldexp(self._mean, self._power or 0)

    @property
    def std(self) -> float:
        return math.ldexp(math.sqrt(self._squares / self._count), self._power or 0)
