"""What is wrong with values, told by their bits: NaN, Inf, nothing but zeros.

Of IEEE 754's layouts (and of fp8's, arXiv 2209.05433 and 2206.02915) a number is special where its
exponent is all ones: then its bits, as an integer without the sign, are at least those of Inf. So
two maxima, of the bits with and without sign, say of a piece whether anything is in it.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, NamedTuple

from ..core.dtypes import DType


class _Layout(NamedTuple):
    """The bytes of a number; the bits of Inf and of the least NaN, without the sign."""

    size: int
    inf: int | None
    nan: int


_LAYOUTS = {
    "float64": _Layout(8, 0x7FF0 << 48, (0x7FF0 << 48) + 1),
    "float32": _Layout(4, 0x7F80 << 16, (0x7F80 << 16) + 1),
    "float16": _Layout(2, 0x7C00, 0x7C01),
    "bfloat16": _Layout(2, 0x7F80, 0x7F81),
    "float8_e5m2": _Layout(1, 0x7C, 0x7D),
    "float8_e4m3fn": _Layout(1, None, 0x7F),
}
_LAYOUTS |= {
    "complex128": _LAYOUTS["float64"],
    "complex64": _LAYOUTS["float32"],
    "complex32": _LAYOUTS["float16"],
}
# Those whose only NaN has the bits that elsewhere are a negative zero.
_FNUZ = ("float8_e5m2fnuz", "float8_e4m3fnuz")


def has_special(dtype: DType) -> bool:
    """Whether a dtype has a NaN that is told here."""
    return dtype.name in _LAYOUTS or dtype.name in _FNUZ


class Values(NamedTuple):
    """How many numbers are NaN and Inf (of complex ones each part by itself), and whether all are
    zero."""

    nan: int = 0
    inf: int = 0
    zero: bool = False


def look(pieces: Iterable[bytes | memoryview], dtype: DType) -> Values:
    """What is wrong with the values of a floating dtype that :func:`has_special` knows, given
    their bytes in pieces."""
    import numpy as np

    fnuz = dtype.name in _FNUZ
    layout = _LAYOUTS.get(dtype.name) or _Layout(1, None, 0x80)
    size, least = layout.size, layout.nan if layout.inf is None else layout.inf
    top = 1 << (8 * size - 1)
    signed, unsigned = np.dtype(f"<i{size}"), np.dtype(f"<u{size}")
    most = np.maximum.reduce
    nan = inf = 0
    zero, rest = True, b""
    for piece in pieces:
        if rest or len(piece) % size:
            joined = rest + bytes(piece)
            rest = joined[len(joined) - len(joined) % size :]
            piece = joined[: len(joined) - len(rest)]
        if not piece:
            continue
        bits = np.frombuffer(piece, unsigned)
        low, high = int(most(bits.view(signed))), int(most(bits))
        zero = zero and low <= 0 and high in (0, top) and not (fnuz and high)
        if fnuz:
            nan += int(np.count_nonzero(bits == top)) if high >= top else 0
        elif low >= least or high >= top + least:
            found = _special(bits & unsigned.type(top - 1), layout)
            nan, inf = nan + found[0], inf + found[1]
    return Values(nan, inf, zero)


def _special(magnitudes: Any, layout: _Layout) -> tuple[int, int]:
    """How many NaNs and Infs, given the bits of numbers without their signs."""
    import numpy as np

    nan = int(np.count_nonzero(magnitudes >= magnitudes.dtype.type(layout.nan)))
    if layout.inf is None:
        return nan, 0
    return nan, int(np.count_nonzero(magnitudes == magnitudes.dtype.type(layout.inf)))
