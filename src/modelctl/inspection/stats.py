"""Statistics of tensors' values, read in pieces: for ``summary --stats``."""

from __future__ import annotations

import math
from typing import NamedTuple

from ..core.numbers import numbers
from ..core.tensors import TensorRef


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


def tensor_stats(ref: TensorRef) -> Stats | None:
    """The statistics of one tensor; None for a dtype without arithmetic here (fp8, quantized,
    complex, bool). Reads all its bytes, a piece at a time.

    Raises:
        DamagedError: they are not what was saved.
        UnreadableError, UnsupportedError: its bytes can't be read as values.
    """
    import numpy as np

    if ref.dtype.kind not in ("float", "int"):
        return None
    ref.check()
    low, high, total, squares = math.inf, -math.inf, 0.0, 0.0
    nan = finite_count = zeros = count = 0
    for piece in ref.chunks():
        values = numbers(piece, ref.dtype)
        if values is None:
            return None
        values = values.astype("f8", copy=False)
        finite = values[np.isfinite(values)]
        low = min(low, float(finite.min(initial=math.inf)))
        high = max(high, float(finite.max(initial=-math.inf)))
        total += float(finite.sum())
        squares += float(np.dot(finite, finite))
        nan += int(np.isnan(values).sum())
        finite_count += len(finite)
        zeros += len(finite) - int(np.count_nonzero(finite))
        count += len(values)
    inf = count - finite_count - nan
    if not finite_count:
        return Stats(None, None, None, None, nan, inf, zeros, count)
    mean = total / finite_count
    std = math.sqrt(max(squares / finite_count - mean * mean, 0.0))
    return Stats(low, high, mean, std, nan, inf, zeros, count)
