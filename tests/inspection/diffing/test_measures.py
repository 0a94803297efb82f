"""How much values differ: against numpy in float64 (in integers, Python's own), for each dtype."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from modelctl.core.dtypes import BY_NAME
from modelctl.core.storages import MemoryStorage
from modelctl.core.tensors import TensorRef
from modelctl.inspection.diffing import measures
from modelctl.inspection.diffing.measures import Measure, Scaled, measure

FLOATS = [
    *(torch.float64, torch.float32, torch.float16, torch.bfloat16),
    *(torch.float8_e4m3fn, torch.float8_e5m2, torch.float8_e4m3fnuz, torch.float8_e5m2fnuz),
]
INTS = [
    *(torch.int8, torch.int16, torch.int32, torch.int64),
    *(torch.uint8, torch.uint16, torch.uint32, torch.uint64),
]
COMPLEX = [torch.complex32, torch.complex64, torch.complex128]


def ref(tensor: torch.Tensor) -> TensorRef:
    raw = tensor.contiguous().flatten().view(torch.uint8).numpy().tobytes()
    dtype = BY_NAME[str(tensor.dtype).removeprefix("torch.")]
    return TensorRef(dtype, tuple(tensor.shape), MemoryStorage(raw))


def measured(a: torch.Tensor, b: torch.Tensor, rtol: float = 0, atol: float = 0) -> Measure:
    return measure(ref(a), ref(b), rtol, atol, lambda done: None)


def expected(u: Any, v: Any) -> dict[str, float]:
    """From two arrays that are finite everywhere."""
    gaps = np.abs(u - v)
    sizes = np.maximum(np.abs(u), np.abs(v))
    relative = np.where(sizes > 0, gaps / np.where(sizes > 0, sizes, 1), 0)
    norms = np.linalg.norm(u), np.linalg.norm(v)
    return {
        "max_abs": gaps.max(),
        "mean_abs": gaps.mean(),
        "max_rel": relative.max(),
        "mean_rel": relative.mean(),
        "cosine": np.vdot(u, v).real / norms[0] / norms[1] if all(norms) else None,
        "relative": gaps.max() / np.abs(u).max() if np.abs(u).max() else None,
    }


def check(found: Measure, wanted: dict[str, float | None]) -> None:
    for name, value in wanted.items():
        if value is not None:
            assert getattr(found, name) == pytest.approx(float(value), rel=1e-9, abs=1e-12), name
    if wanted["cosine"] is None:
        assert found.cosine is None


numbers = st.floats(-400, 400, width=32)


@settings(max_examples=150, deadline=None)
@given(st.lists(st.tuples(numbers, numbers), min_size=1, max_size=20), st.sampled_from(FLOATS))
def test_floats(pairs: list[tuple[float, float]], dtype: torch.dtype) -> None:
    most = 224 if "float8_e4m3" in str(dtype) else 400  # beyond there are NaNs
    kept = [tuple(max(-most, min(most, one)) for one in pair) for pair in pairs]
    a, b = (torch.tensor(one, dtype=torch.float64).to(dtype) for one in zip(*kept, strict=True))
    found = measured(a, b)
    u, v = (one.double().numpy() for one in (a, b))
    check(found, expected(u, v))
    bits = [one.view(torch.uint8).numpy().reshape(len(u), -1) for one in (a, b)]
    assert found.elements == (bits[0] != bits[1]).any(axis=1).sum()
    assert (found.numel, found.pairs) == (len(u), len(u))


@settings(max_examples=150, deadline=None)
@given(st.data(), st.sampled_from(INTS))
def test_integers(data: st.DataObject, dtype: torch.dtype) -> None:
    info = torch.iinfo(dtype)
    edges = st.sampled_from([info.min, info.min + 1, info.max - 1, info.max])
    values = edges | st.integers(info.min, info.max)
    pairs = data.draw(st.lists(st.tuples(values, values), min_size=1, max_size=12))
    a, b = (torch.tensor(one, dtype=dtype) for one in zip(*pairs, strict=True))
    found = measured(a, b)
    gaps = [abs(x - y) for x, y in pairs]
    relative = [abs(x - y) / max(abs(x), abs(y)) if x != y else 0 for x, y in pairs]
    assert found.elements == sum(gap > 0 for gap in gaps)
    assert found.max_abs == float(max(gaps))
    assert found.mean_abs == pytest.approx(sum(gaps) / len(gaps), rel=1e-12)
    assert found.max_rel == pytest.approx(max(relative), rel=1e-9)
    assert found.mean_rel == pytest.approx(sum(relative) / len(gaps), rel=1e-9)
    columns = [*zip(*pairs, strict=True)]
    dot, *norms = (
        sum(x * y for x, y in zip(*one, strict=True))
        for one in (columns, [columns[0]] * 2, [columns[1]] * 2)
    )
    if all(norms):
        # of two that are orthogonal but for rounding nothing is left to compare
        assert found.cosine == pytest.approx(
            dot / math.sqrt(norms[0]) / math.sqrt(norms[1]), rel=1e-9, abs=1e-9
        )
    else:
        assert found.cosine is None


@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.tuples(*[numbers] * 4), min_size=1, max_size=12),
    st.sampled_from(COMPLEX),
)
def test_complex_numbers(
    parts: list[tuple[float, float, float, float]], dtype: torch.dtype
) -> None:
    columns = list(zip(*parts, strict=True))
    a, b = (
        torch.complex(*(torch.tensor(one, dtype=torch.float64) for one in pair)).to(dtype)
        for pair in (columns[:2], columns[2:])
    )
    check(measured(a, b), expected(*(one.to(torch.complex128).numpy() for one in (a, b))))


def test_booleans() -> None:
    a, b = torch.tensor([True, False, True]), torch.tensor([True, True, False])
    found = measured(a, b)
    assert (found.elements, found.max_abs, found.mean_abs, found.max_rel) == (2, 1, 2 / 3, 1)
    assert found.cosine == pytest.approx(0.5)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.complex64])
def test_in_pieces_as_at_once(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    generator = torch.Generator().manual_seed(0)
    a, b = (torch.randn(3, 1001, generator=generator).to(dtype) for _ in range(2))
    b[1] = a[1]  # a whole row that is the same, pieces of it, too
    wide = torch.complex128 if dtype.is_complex else torch.float64
    wanted = expected(*(one.to(wide).numpy().ravel() for one in (a, b)))
    for size in (1, 16, 1000, 1 << 15):
        monkeypatch.setattr(measures, "PIECE", size)
        found = measured(a, b)
        check(found, wanted)
        assert found.elements == int((a != b).sum())


SPECIAL = [0.0, -0.0, 1.5, -2.0, math.inf, -math.inf, math.nan]


@settings(max_examples=200, deadline=None)
@given(
    st.lists(st.tuples(*[st.sampled_from(SPECIAL)] * 2), min_size=1, max_size=8),
    st.sampled_from([torch.float64, torch.float32, torch.float16, torch.bfloat16]),
)
def test_nans_and_infinities(pairs: list[tuple[float, float]], dtype: torch.dtype) -> None:
    a, b = (torch.tensor(one).to(dtype) for one in zip(*pairs, strict=True))
    found = measured(a, b)
    nans = [(math.isnan(x), math.isnan(y)) for x, y in pairs]
    assert found.nan_a == sum(x and not y for x, y in nans)
    assert found.nan_b == sum(y and not x for x, y in nans)
    finite = [pair for pair in pairs if all(map(math.isfinite, pair))]
    assert found.pairs == len(finite)
    if any(x is not y for x, y in nans):
        assert math.isnan(found.max_abs)
    elif any(
        x != y and not (math.isnan(x) or (math.isfinite(x) and math.isfinite(y))) for x, y in pairs
    ):
        assert found.max_abs == math.inf
    if finite:
        check(
            found._replace(max_abs=0.0, largest=0.0),
            {**expected(*np.array(finite).T), "max_abs": 0.0, "relative": None},
        )
    else:
        assert (found.mean_abs, found.mean_rel, found.cosine) == (None, None, None)


def test_two_nans_are_the_same_whatever_their_bits() -> None:
    one, other = (
        np.array([bits, 0x3F800000], "<u4").view("<f4") for bits in (0x7FC00000, 0xFFC00001)
    )
    found = measured(torch.from_numpy(one), torch.from_numpy(other))
    assert (found.elements, found.nan_a, found.nan_b, found.max_abs) == (0, 0, 0, 0.0)


@pytest.mark.parametrize("power", [-1000, -540, 0, 510, 1000])
def test_a_cosine_of_any_size(power: int) -> None:
    a = torch.tensor([1.0, 2.0, -3.0], dtype=torch.float64)
    b = torch.tensor([1.0, -2.0, 0.5], dtype=torch.float64)
    wanted = float(a @ b / a.norm() / b.norm())
    assert measured(a * 2.0**power, b).cosine == pytest.approx(wanted)
    assert measured(a * 2.0**power, b * 2.0**power).cosine == pytest.approx(wanted)
    parts = [measured(a * 2.0**power, b * 2.0**power), measured(a * 2.0**-20, b)]
    together = torch.cat([a * 2.0**power, a * 2.0**-20]), torch.cat([b * 2.0**power, b])
    assert parts[0].plus(parts[1]).cosine == pytest.approx(measured(*together).cosine)
    assert Scaled(0.0, 0).plus(Scaled(1.0, -2000)) == Scaled(1.0, -2000)


@settings(max_examples=100, deadline=None)
@given(
    st.lists(st.tuples(numbers, numbers), min_size=1, max_size=8),
    st.sampled_from([*FLOATS[:4], torch.int32, torch.int64, torch.uint8, torch.complex64]),
    st.sampled_from([*FLOATS[:4], torch.int32, torch.int64, torch.uint8, torch.complex64]),
)
def test_two_dtypes_by_value(
    pairs: list[tuple[float, float]], one: torch.dtype, other: torch.dtype
) -> None:
    a, b = (
        torch.tensor([abs(x) % 200 for x in column], dtype=torch.float64).to(dtype)
        for column, dtype in zip(zip(*pairs, strict=True), (one, other), strict=True)
    )
    u, v = (x.to(torch.complex128).numpy() for x in (a, b))
    found = measured(a, b)
    check(found, expected(u, v))
    if one != other:
        assert found.elements == (u != v).sum()


def test_large_integers_of_two_kinds() -> None:
    big = torch.tensor([2**63], dtype=torch.uint64)
    assert (
        measured(torch.tensor([-1]), torch.tensor([2**64 - 1], dtype=torch.uint64)).max_abs == 2**64
    )
    assert (
        measured(torch.tensor([5], dtype=torch.int32), torch.tensor([2**53 + 1])).max_abs
        == 2**53 - 4
    )
    assert measured(big, big.clone()).elements == 0


@pytest.mark.parametrize("name", ["quint8", "float4_e2m1fn_x2", "float6_e2m3fn", "bits8"])
def test_what_has_no_arithmetic_is_counted(name: str) -> None:
    dtype = BY_NAME[name]
    raw = bytes(range(3 * 4))
    wrong = bytes([raw[0] ^ 1, *raw[1:]])
    numel = 12 // dtype.itemsize * dtype.per_item
    refs = [TensorRef(dtype, (numel,), MemoryStorage(data)) for data in (raw, wrong)]
    found = measure(*refs, 0, 0.5, lambda done: None)
    assert (found.elements, found.known, found.close) == (1, False, False)
    wide = TensorRef(BY_NAME["float32"], (numel,), MemoryStorage(bytes(4 * numel)))
    assert measure(refs[0], wide, 0, 0, lambda done: None).known is False


def test_of_many_together() -> None:
    def parts(values: Sequence[float]) -> torch.Tensor:
        return torch.tensor(values, dtype=torch.float64)

    a, b = parts([1, 2, 3, math.nan]), parts([1.5, 2, 1, 7])
    halves = measured(a[:2], b[:2]).plus(measured(a[2:], b[2:]))
    whole = measured(a, b)
    assert math.isnan(halves.max_abs)
    assert math.isnan(whole.max_abs)
    assert halves._replace(max_abs=0) == whole._replace(max_abs=0)
