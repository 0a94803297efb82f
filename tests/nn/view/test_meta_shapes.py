"""The shape rules against torch's own meta kernels, and against real ones."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from modelctl.nn.view.meta_shapes import result

aten: Any = torch.ops.aten
sizes = st.integers(1, 5)


def meta(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


def facts(value: Any) -> Any:
    """What a rule has to get right; of statistics that nobody reads only how many there are."""
    if isinstance(value, tuple):
        return (facts(value[0]), len(value))
    return value.shape, value.dtype, value.stride(), value.device


def check(op: Any, *args: Any, known: bool = True, **kwargs: Any) -> None:
    """Where the rule answers, it answers as torch does; ``known``: it has to answer."""
    try:
        expected = op(*args, **kwargs)
    except (RuntimeError, IndexError, ValueError):
        assert result(op, args, kwargs) is None
        return
    found = result(op, args, kwargs)
    assert found is not None or not known
    if found is not None:
        assert facts(found) == facts(expected)


@settings(max_examples=150, deadline=None)
@given(
    dims=st.integers(1, 3),
    n=sizes,
    groups=st.integers(1, 3),
    per_group=sizes,
    out=sizes,
    data=st.data(),
)
def test_convolutions(
    dims: int, n: int, groups: int, per_group: int, out: int, data: st.DataObject
) -> None:
    def several(low: int, high: int) -> list[int]:
        return data.draw(st.lists(st.integers(low, high), min_size=dims, max_size=dims))

    x = meta(n, groups * per_group, *several(1, 9))
    weight = meta(
        groups * out, per_group + data.draw(st.sampled_from([0, 0, 0, 1])), *several(1, 4)
    )
    bias = data.draw(st.sampled_from([None, meta(groups * out), meta(groups * out + 1)]))
    tail = [several(1, 3), several(0, 2), several(1, 2), False, [0] * dims, groups]
    check(aten.convolution.default, x, weight, bias, *tail, known=False)


def test_a_convolution_that_fits_is_answered() -> None:
    tail = [[2, 2], [3, 3], [1, 1], False, [0, 0], 1]
    found = result(aten.convolution.default, (meta(2, 3, 9, 9), meta(4, 3, 7, 7), None, *tail), {})
    assert found.shape == (2, 4, 5, 5)
    last = meta(2, 3, 9, 9).to(memory_format=torch.channels_last)
    assert result(aten.convolution.default, (last, meta(4, 3, 7, 7), None, *tail), {}) is None


@settings(max_examples=100, deadline=None)
@given(a=st.lists(sizes, min_size=1, max_size=3), b=st.lists(sizes, min_size=1, max_size=3))
def test_products(a: list[int], b: list[int]) -> None:
    check(aten.mm.default, meta(*a), meta(*b), known=len(a) == len(b) == 2)
    check(aten.bmm.default, meta(*a), meta(*b), known=len(a) == len(b) == 3)
    check(aten.addmm.default, meta(b[-1]), meta(*a), meta(*b), known=len(a) == len(b) == 2)


@settings(max_examples=100, deadline=None)
@given(
    shape=st.lists(sizes, min_size=1, max_size=4),
    others=st.lists(sizes, max_size=3),
    dim=st.integers(-5, 5),
)
def test_cat_and_mean(shape: list[int], others: list[int], dim: int) -> None:
    parts = [meta(*shape)]
    for size in others:
        changed = list(shape)
        changed[dim % len(shape)] = size
        parts.append(meta(*changed))
    check(aten.cat.default, parts, dim)
    check(aten.cat.default, [*parts, meta(*shape, 1)], dim, known=False)
    for keepdim in (False, True):
        check(aten.mean.dim, meta(*shape), [dim], keepdim)
        check(aten.mean.dim, meta(*shape), [0, dim], keepdim, known=False)


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("shape", [(2, 3), (2, 3, 4), (2, 3, 4, 5), (2, 3, 4, 5, 6), (3,)])
def test_norms(shape: tuple[int, ...], training: bool) -> None:
    four, three = [meta(3)] * 4, [meta(4)] * 2
    check(aten.native_batch_norm.default, meta(*shape), *four, training, 0.1, 1e-5, known=False)
    check(aten.native_batch_norm.default, meta(*shape), *[None] * 4, True, 0.1, 1e-5, known=False)
    found = result(aten.native_batch_norm.default, (meta(2, 3, 4), *four, training, 0.1, 1e-5), {})
    assert found[0].shape == (2, 3, 4)
    wrong = (meta(2, 5, 4), *four, training, 0.1, 1e-5)
    assert result(aten.native_batch_norm.default, wrong, {}) is None
    check(aten.native_layer_norm.default, meta(*shape), [shape[-1]], None, None, 1e-5)
    check(aten.native_layer_norm.default, meta(2, 4), [4], *three, 1e-5)
    check(aten.native_layer_norm.default, meta(2, 5), [4], *three, 1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.int64, torch.bool])
def test_elementwise(dtype: torch.dtype) -> None:
    known = dtype.is_floating_point
    x = meta(2, 3, dtype=dtype)
    for name in ("relu", "gelu", "silu", "sigmoid", "tanh", "elu", "hardswish", "hardsigmoid"):
        check(getattr(aten, name).default, x, known=known)
    for name in ("add", "sub", "mul", "div"):
        op = getattr(aten, name).Tensor
        for other in (x, meta(3, dtype=dtype), meta(2, 3), meta(3, 2).t(), meta(1, 1, 1)):
            check(op, x, other, known=False)
        assert (result(op, (x, x), {}) is not None) == known
        check(getattr(aten, name).Scalar, x, 2.5, known=known)
        in_place = getattr(aten, f"{name}_").Tensor
        assert (result(in_place, (x, x), {}) is x) == known
        assert result(in_place, (x, meta(3, dtype=dtype)), {}) is None
    assert (result(aten.relu_.default, (x,), {}) is x) == known


def test_other_operators_are_torchs() -> None:
    assert result(aten.softmax.int, (meta(2, 3), 0), {}) is None


def test_softmax() -> None:
    assert result(aten._softmax.default, (meta(2, 3), 2, False), {}) is None
    for dim in (-2, -1, 0, 1):
        check(aten._softmax.default, meta(2, 3), dim, False)
        if hasattr(aten, "_safe_softmax"):  # since torch 2.5
            check(aten._safe_softmax.default, meta(2, 3), dim)
            check(aten._safe_softmax.default, meta(2, 3), dim, torch.float64, known=False)
    check(aten._softmax.default, meta(2, 3).t(), 1, False, known=False)
