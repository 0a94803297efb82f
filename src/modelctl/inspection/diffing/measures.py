"""How much the values of two tensors differ, read in pieces and measured in float64."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator
from typing import Any, NamedTuple

from ...core.numbers import bits_differ, gap, numbers
from ...core.tensors import TensorRef

# Elements at once: what they take as float64, a dozen times over, stays in the cache.
PIECE = 1 << 15
# Powers of two beyond which squares come near the ends of a double.
_EXTREME = 400


class Scaled(NamedTuple):
    """``value * 2 ** power``: a sum of squares of numbers of any size."""

    value: float = 0.0
    power: int = 0

    def plus(self, other: Scaled) -> Scaled:
        if self.power == other.power:
            return Scaled(self.value + other.value, self.power)
        power = max(self.power if self.value else other.power, other.power)
        value = math.ldexp(self.value, self.power - power)
        return Scaled(value + math.ldexp(other.value, other.power - power), power)


class Measure(NamedTuple):
    """How much the values of two tensors differ, or those of many together (:meth:`plus`).

    Attributes:
        elements: how many differ: bit for bit, of two dtypes by value, with a tolerance by more
            than that. Two NaNs are the same, whatever their bits.
        numel: how many there are.
        nan_a, nan_b: how many are a NaN in A alone, and in B alone.
        max_abs: the largest absolute difference; NaN where a NaN stands against a number.
        max_rel: the largest relative difference, \\|a - b\\| / max(\\|a\\|, \\|b\\|), which is 0
            where both are equal and 2 at most; as the sums, of ``pairs``: elements that are
            finite in both.
        largest: the largest finite magnitude in A.
        close: whether all are within the tolerance.
    """

    elements: int = 0
    numel: int = 0
    nan_a: int = 0
    nan_b: int = 0
    max_abs: float = 0.0
    max_rel: float = 0.0
    largest: float = 0.0
    close: bool = True
    pairs: int = 0
    sum_abs: float = 0.0
    sum_rel: float = 0.0
    dot: Scaled = Scaled()
    norm_a: Scaled = Scaled()
    norm_b: Scaled = Scaled()
    known: bool = True

    def plus(self, other: Measure) -> Measure:
        """That of both together."""
        most = (self.max_abs, other.max_abs)
        return Measure(
            self.elements + other.elements,
            self.numel + other.numel,
            self.nan_a + other.nan_a,
            self.nan_b + other.nan_b,
            math.nan if any(map(math.isnan, most)) else max(most),
            max(self.max_rel, other.max_rel),
            max(self.largest, other.largest),
            self.close and other.close,
            self.pairs + other.pairs,
            self.sum_abs + other.sum_abs,
            self.sum_rel + other.sum_rel,
            self.dot.plus(other.dot),
            self.norm_a.plus(other.norm_a),
            self.norm_b.plus(other.norm_b),
            self.known and other.known,
        )

    @property
    def mean_abs(self) -> float | None:
        """The mean absolute difference; None where no element is finite in both."""
        return self.sum_abs / self.pairs if self.pairs else None

    @property
    def mean_rel(self) -> float | None:
        """The mean relative difference; None where no element is finite in both."""
        return self.sum_rel / self.pairs if self.pairs else None

    @property
    def relative(self) -> float:
        """The largest absolute difference, of the largest value in A."""
        if self.largest:
            return self.max_abs / self.largest
        return math.inf if self.max_abs else 0.0

    @property
    def cosine(self) -> float | None:
        """The cosine of the angle between both as vectors (of complex ones the real part); None
        where one of them is zero."""
        if self.norm_a.value <= 0 or self.norm_b.value <= 0:
            return None
        size = math.sqrt(self.norm_a.value) * math.sqrt(self.norm_b.value)
        power = self.dot.power - (self.norm_a.power + self.norm_b.power) / 2
        found = self.dot.value / size * 2.0**power if self.dot.value else 0.0
        return max(-1.0, min(1.0, found))


def measure(
    a: TensorRef, b: TensorRef, rtol: float, atol: float, told: Callable[[int], object]
) -> Measure:
    """How much two tensors of one shape differ; ``told`` hears how many bytes of A are done.

    Integers of one kind are subtracted exactly, all else in float64. Where a dtype has no
    arithmetic here only bits are compared: ``known`` is False, and of two dtypes nothing is.

    Raises:
        DamagedError: the bytes of one are not what was saved.
        UnreadableError, UnsupportedError: its bytes can't be read as values.
    """
    found = Measure()
    done = 0
    a.check()
    b.check()
    pieces = (_cut(ref.chunks(), ref.dtype.nbytes(PIECE)) for ref in (a, b))
    # to the end of both, where a damaged one says so
    for x, y in zip(*pieces, strict=True):
        found = found.plus(_of_piece(x, y, a, b, rtol, atol))
        done += len(x)
        told(done)
    return found._replace(numel=a.numel)


def _cut(chunks: Iterable[bytes], size: int) -> Iterator[memoryview]:
    """A stream in pieces of ``size`` bytes, the last one less."""
    left = b""
    for chunk in chunks:
        data = memoryview(left + chunk if left else chunk)
        whole = len(data) - len(data) % size
        for at in range(0, whole, size):
            yield data[at : at + size]
        left = bytes(data[whole:])
    if left:
        yield memoryview(left)


def _of_piece(
    x: memoryview, y: memoryview, a: TensorRef, b: TensorRef, rtol: float, atol: float
) -> Measure:
    import numpy as np

    same_dtype = a.dtype == b.dtype
    u, v = numbers(x, a.dtype), numbers(y, b.dtype)
    if u is None or v is None:
        differ = bits_differ(x, y, a.dtype) if same_dtype else 0
        return Measure(differ, close=same_dtype and not differ, known=False)
    with np.errstate(all="ignore"):
        if same_dtype and x == y:
            return _equal(u)
        by_value = u == v
        u, v = _of_one_kind(u, v)
        nan_u, nan_v = np.isnan(u), np.isnan(v)
        by_value |= nan_u & nan_v
        apart = np.where(by_value, 0.0, gap(u, v))
        u, v = (_wide(one) for one in (u, v))
        size_u, size_v = np.abs(u), np.abs(v)
        close = by_value | (np.isfinite(apart) & (apart <= atol + rtol * size_v))
        if rtol or atol:
            differ = ~close
        elif same_dtype:
            differ = _bits(x, a.dtype.itemsize) != _bits(y, b.dtype.itemsize)
            differ &= ~(nan_u & nan_v)
        else:
            differ = ~by_value
        most = math.nan if np.isnan(apart).any() else float(apart.max(initial=0.0))
        finite = np.isfinite(size_u) & np.isfinite(size_v)
        largest = float(size_u.max(where=np.isfinite(size_u), initial=0.0))
        if not finite.all():
            u, v, apart = u[finite], v[finite], apart[finite]
            size_u, size_v = size_u[finite], size_v[finite]
        sizes = np.maximum(size_u, size_v)
        relative = np.divide(apart, sizes, out=np.zeros_like(sizes), where=sizes > 0)
        relative = np.minimum(relative, 2.0)  # where the difference overflowed
        one = _scaled(u, float(size_u.max(initial=0.0)))
        other = _scaled(v, float(size_v.max(initial=0.0)))
    return Measure(
        elements=int(np.count_nonzero(differ)),
        nan_a=int(np.count_nonzero(nan_u & ~nan_v)),
        nan_b=int(np.count_nonzero(nan_v & ~nan_u)),
        max_abs=most,
        max_rel=float(relative.max(initial=0.0)),
        largest=largest,
        close=bool(close.all()),
        pairs=len(apart),
        sum_abs=float(apart.sum()),
        sum_rel=float(relative.sum()),
        dot=_dot(*one, *other),
        norm_a=_dot(*one, *one),
        norm_b=_dot(*other, *other),
    )


def _equal(u: Any) -> Measure:
    """Of a piece that is the same in both."""
    import numpy as np

    u = _wide(u)
    sizes = np.abs(u)
    finite = np.isfinite(sizes)
    if not finite.all():
        u, sizes = u[finite], sizes[finite]
    largest = float(sizes.max(initial=0.0))
    norm = _dot(*_scaled(u, largest), *_scaled(u, largest))
    return Measure(largest=largest, pairs=len(u), dot=norm, norm_a=norm, norm_b=norm)


def _of_one_kind(u: Any, v: Any) -> tuple[Any, Any]:
    """Two arrays as one dtype that holds both: what numpy promotes them to."""
    import numpy as np

    common = np.result_type(u, v)
    return u.astype(common, copy=False), v.astype(common, copy=False)


def _wide(values: Any) -> Any:
    return values if values.dtype.kind == "c" else values.astype("f8", copy=False)


def _bits(raw: memoryview, itemsize: int) -> Any:
    """Elements as unsigned integers, or as what numpy compares byte by byte."""
    import numpy as np

    return np.frombuffer(raw, f"<u{itemsize}" if itemsize <= 8 else f"V{itemsize}")


def _scaled(values: Any, most: float) -> tuple[Any, int]:
    """Values whose squares are no infinities and no zeros, and the power of two they are of."""
    import numpy as np

    power = math.frexp(most)[1]
    if abs(power) <= _EXTREME or not most:
        return values, 0
    if values.dtype.kind == "c":
        parts = np.ldexp(values.view("f8"), -power)
        return parts.view("c16"), power
    return np.ldexp(values, -power), power


def _dot(u: Any, u_power: int, v: Any, v_power: int) -> Scaled:
    # BLAS would have threads of its own for it, which wait for each other where others work
    product = u * v if u.dtype.kind != "c" and v.dtype.kind != "c" else (u.conj() * v).real
    return Scaled(float(product.sum()), u_power + v_power)
