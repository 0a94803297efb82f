"""How the values of two tensors differ: equal ones are told by their bytes alone, in pieces; of
others every measure is computed in float64, a block at a time."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import NamedTuple

from ...core.numbers import bits_differ, gap, numbers
from ...core.tensors import TensorRef
from ..reading import is_far, pieces

# Elements that are looked at together: what is made of them on the way stays in the cache.
_BLOCK = 1 << 16

Advance = Callable[[int], object]


class Sums(NamedTuple):
    """What measures of a tensor, or of several, are computed from. Finite pairs are those of two
    finite numbers.

    Attributes:
        numel, elements: how many there are, and how many differ.
        nan: how many are NaN in one alone.
        finite: how many pairs are.
        apart: the sum of their absolute differences; ``most`` the largest, Inf or NaN where one
            of a pair is; None where the dtype has no arithmetic here.
        relative, of: over finite pairs whose a is not 0 the sum of \\|a - b\\| / \\|a\\|, and how
            many these are; ``most_relative`` the largest.
        dot, aa, bb: of finite pairs, the sums of a * b, a * a and b * b.
        size: the largest finite \\|a\\|.
    """

    numel: int = 0
    elements: int = 0
    nan: int = 0
    finite: int = 0
    apart: float = 0.0
    most: float | None = 0.0
    relative: float = 0.0
    of: int = 0
    most_relative: float = 0.0
    dot: float = 0.0
    aa: float = 0.0
    bb: float = 0.0
    size: float = 0.0

    def plus(self, other: Sums) -> Sums:
        """Those of both together."""
        most: float | None = None
        if self.most is not None and other.most is not None:
            most = _larger(self.most, other.most)
        summed = {
            name: getattr(self, name) + getattr(other, name)
            for name in ("numel", "elements", "nan", "finite", "apart", "relative", "of")
        }
        summed |= {name: getattr(self, name) + getattr(other, name) for name in ("dot", "aa", "bb")}
        return Sums(
            **summed,
            most=most,
            most_relative=max(self.most_relative, other.most_relative),
            size=max(self.size, other.size),
        )

    @property
    def mean_abs(self) -> float | None:
        """Of finite pairs, the mean of \\|a - b\\|."""
        return self.apart / self.finite if self.finite and self.most is not None else None

    @property
    def max_rel(self) -> float | None:
        """The largest \\|a - b\\| / \\|a\\|, as numpy.testing.assert_allclose reports it: over
        finite pairs whose a, the value before, is not 0."""
        return self.most_relative if self.of else None

    @property
    def mean_rel(self) -> float | None:
        """The mean of the same."""
        return self.relative / self.of if self.of else None

    @property
    def cosine(self) -> float | None:
        """The cosine of the angle between the two, as vectors of their finite pairs."""
        length = math.sqrt(self.aa) * math.sqrt(self.bb)
        if not length or not math.isfinite(length):
            return None
        return max(-1.0, min(1.0, self.dot / length))


def _larger(a: float, b: float) -> float:
    return math.nan if math.isnan(a) or math.isnan(b) else max(a, b)


def equal(a: TensorRef, b: TensorRef, advance: Advance | None = None) -> bool:
    """Whether two tensors of one dtype and shape have the same bytes; calls ``advance`` with the
    size of each piece that has. All of both is read, and compared with the checksums that files
    record, but where they differ; what is far is not read for it (False).

    Raises:
        DamagedError: one is not what was saved.
    """
    if is_far((a, b)):
        return False
    for x, y in _aligned(pieces(a), pieces(b)):
        if not _same(x, y):
            return False
        if advance is not None:
            advance(len(x))
    return True


def _same(x: bytes | memoryview, y: bytes | memoryview) -> bool:
    """Whether pieces are the same; a view of all of its room is compared as that is, by memcmp."""
    if not isinstance(x, memoryview):
        return x == y
    room = x.obj
    left = room if isinstance(room, bytearray) and len(room) == len(x) else bytearray(x)
    return left.__eq__(y) is True


def _aligned(
    a: Iterator[bytes | memoryview], b: Iterator[bytes | memoryview]
) -> Iterator[tuple[bytes | memoryview, bytes | memoryview]]:
    """Pieces of equal length from two streams of the same total length."""
    left: bytes | memoryview = b""
    right: bytes | memoryview = b""
    while True:
        left = left or next(a, b"")
        right = right or next(b, b"")
        if not left or not right:
            break
        if len(left) == len(right):
            yield left, right
            left = right = b""
            continue
        size = min(len(left), len(right))
        yield left[:size], right[:size]
        left, right = left[size:], right[size:]
    for rest in (a, b):  # to its end, where a damaged one says so
        for _ in rest:
            pass


def measure(
    a: TensorRef, b: TensorRef, rtol: float, atol: float, advance: Advance | None = None
) -> tuple[Sums, bool, bool]:
    """How two tensors of one shape differ, whether all is within the tolerance, as
    ``torch.allclose`` has it (two NaNs are the same), and whether all bytes are the same. All of
    both is read.

    Raises:
        DamagedError: one is not what was saved.
    """
    found, close, same = Sums(), True, a.dtype == b.dtype
    for x, y in zip(_blocks(a), _blocks(b), strict=True):
        if advance is not None:
            advance(len(x))
        more, all_close = _of_block(x, y, a, b, rtol, atol)
        found, close, same = found.plus(more), close and all_close, same and x == y
    return found, close, same


def _blocks(ref: TensorRef) -> Iterator[bytes]:
    """A tensor's bytes, so many elements at a time."""
    size = ref.dtype.nbytes(_BLOCK)
    left = bytearray()
    for piece in pieces(ref):
        left += piece
        whole = len(left) - len(left) % size
        for at in range(0, whole, size):
            yield bytes(left[at : at + size])
        del left[:whole]
    if left:
        yield bytes(left)


def _of_block(
    x: bytes, y: bytes, a: TensorRef, b: TensorRef, rtol: float, atol: float
) -> tuple[Sums, bool]:
    import numpy as np

    same_dtype = a.dtype == b.dtype
    numel = len(x) // a.dtype.itemsize * a.dtype.per_item
    differing = bits_differ(x, y, a.dtype) if same_dtype else 0
    u, v = numbers(x, a.dtype), numbers(y, b.dtype)
    if u is None or v is None:
        return Sums(numel, differing, most=None), not differing and same_dtype
    if u.dtype != v.dtype:
        u, v = (one.astype("f8") if one.dtype.kind in "iu" else one for one in (u, v))
    with np.errstate(all="ignore"):
        is_nan = np.isnan(u), np.isnan(v)
        alike = (u == v) | (is_nan[0] & is_nan[1])
        apart = np.where(alike, 0, gap(u, v))
        wide = [one.astype("f8") if one.dtype.kind in "iu" else one for one in (u, v)]
        before, after = np.abs(wide[0]), np.abs(wide[1])
        close = alike | (np.isfinite(apart) & (apart <= atol + rtol * after))
        within = bool(close.all())
        finite = np.isfinite(before) & np.isfinite(after)
        if not finite.all():
            wide, before, after = [one[finite] for one in wide], before[finite], after[finite]
        ends = apart[finite] if len(before) < len(apart) else apart
        ratios = ends[before > 0] / before[before > 0]
        dot = float(np.vdot(*wide).real)
    if not same_dtype or rtol or atol:
        differing = int((~alike).sum())
    most = float(apart.max()) if apart.size else 0.0
    found = Sums(
        numel=numel,
        elements=differing,
        nan=int((is_nan[0] != is_nan[1]).sum()),
        finite=len(before),
        apart=float(ends.sum()),
        most=math.nan if np.isnan(apart).any() else most,
        relative=float(ratios.sum()),
        of=len(ratios),
        most_relative=float(ratios.max(initial=0.0)),
        dot=dot,
        aa=float(np.vdot(before, before)),
        bb=float(np.vdot(after, after)),
        size=float(before.max(initial=0.0)),
    )
    return found, within
