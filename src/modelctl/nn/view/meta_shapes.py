"""What operators give on ``meta``, for those that most networks are made of.

Torch works that out in Python, for up to a millisecond a call; these rules take some microseconds.
Each answers only where it is sure: plain contiguous tensors of one dtype whose shapes fit. Where it
gives None torch is asked, errors included. tests/nn/view/test_meta_shapes.py compares them with
torch.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

aten: Any = torch.ops.aten


def result(op: Any, args: Sequence[Any], kwargs: Any) -> Any:
    """What the operator gives for these arguments on meta; None where that isn't known here."""
    rule = _RULES.get(op)
    return rule(*args, **kwargs) if rule is not None else None


def _new(like: Tensor, shape: Any, dtype: Any = None) -> Tensor:
    # new_empty and empty_like are Python on meta
    return torch.empty(shape, dtype=dtype or like.dtype, device="meta")


def _empty_like(x: Tensor) -> Any:
    """None where torch would give it other strides."""
    if x.is_contiguous():
        return torch.empty(x.shape, dtype=x.dtype, device="meta")
    if x.dim() == 4 and x.is_contiguous(memory_format=torch.channels_last):
        return torch.empty_strided(x.shape, x.stride(), dtype=x.dtype, device="meta")
    return None


def _like(x: Tensor, *_: Any, **__: Any) -> Any:
    return _empty_like(x) if x.is_floating_point() else None


def _softmax(x: Tensor, dim: int, other: Any = None) -> Any:
    """``other``: another dtype, or whether half goes to float."""
    known = not other and x.dim() > 0 and -x.dim() <= dim < x.dim()
    return _like(x) if known and x.is_contiguous() else None


def _in_place(x: Tensor, *_: Any, **__: Any) -> Any:
    return x if x.is_floating_point() else None


def _binary(a: Tensor, b: Any, **__: Any) -> Any:
    if not isinstance(b, Tensor):
        return _like(a)
    return _empty_like(a) if _same(a, b) and a.shape == b.shape else None


def _binary_in_place(a: Tensor, b: Any, **__: Any) -> Any:
    if not isinstance(b, Tensor):
        return _in_place(a)
    return a if _same(a, b) and a.shape == b.shape else None


def _same(*tensors: Tensor) -> bool:
    """One floating dtype, all contiguous, all on meta."""
    dtype = tensors[0].dtype
    return dtype.is_floating_point and all(
        one.dtype == dtype and one.is_contiguous() and one.is_meta for one in tensors
    )


def _batch_norm(
    x: Tensor, weight: Any, bias: Any, mean: Any, var: Any, training: bool, *_: Any
) -> Any:
    if x.dim() < 2 or not x.is_floating_point():
        return None
    if any(one is not None and one.shape != x.shape[1:2] for one in (weight, bias, mean, var)):
        return None
    dtype = x.dtype if weight is None else weight.dtype
    out = _empty_like(x)
    stats = _new(x, (x.shape[1] if training else 0,), dtype)
    return None if out is None else (out, stats, _empty_like(stats))


def _layer_norm(x: Tensor, shape: Sequence[int], weight: Any, bias: Any, eps: float) -> Any:
    dims = len(shape)
    if list(x.shape[-dims:]) != list(shape) or not _same(x):
        return None
    if any(one is not None and list(one.shape) != list(shape) for one in (weight, bias)):
        return None
    short = _new(x, (*x.shape[:-dims], *(1 for _ in shape)))
    return _empty_like(x), short, _empty_like(short)


def _convolution(
    x: Tensor,
    weight: Tensor,
    bias: Any,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    transposed: bool,
    output_padding: Sequence[int],
    groups: int,
) -> Any:
    dims = weight.dim() - 2
    if transposed or dims < 1 or x.dim() != dims + 2 or not _same(x, weight) or groups < 1:
        return None
    if x.shape[1] != weight.shape[1] * groups or weight.shape[0] % groups or 0 in x.shape:
        return None
    if bias is not None and (bias.shape != weight.shape[:1] or bias.dtype != x.dtype):
        return None
    if min(*stride, *dilation, *padding, *weight.shape) < 0 or min(*stride, *dilation) < 1:
        return None
    sizes = [
        (x.shape[2 + i] + 2 * _at(padding, i) - _at(dilation, i) * (weight.shape[2 + i] - 1) - 1)
        // _at(stride, i)
        + 1
        for i in range(dims)
    ]
    if min(sizes) < 1:
        return None
    return _new(x, (x.shape[0], weight.shape[0], *sizes))


def _at(values: Sequence[int], i: int) -> int:
    return values[i] if len(values) > 1 else values[0]


def _mm(a: Tensor, b: Tensor) -> Any:
    if a.dim() != 2 or b.dim() != 2 or a.shape[1] != b.shape[0] or a.dtype != b.dtype:
        return None
    return _new(a, (a.shape[0], b.shape[1])) if a.is_floating_point() and a.is_meta else None


def _addmm(bias: Tensor, a: Tensor, b: Tensor, **__: Any) -> Any:
    if bias.dim() != 1 or b.dim() != 2 or bias.shape[0] != b.shape[1] or bias.dtype != a.dtype:
        return None
    return _mm(a, b)


def _bmm(a: Tensor, b: Tensor) -> Any:
    fits = a.dim() == b.dim() == 3 and a.shape[0] == b.shape[0] and a.shape[2] == b.shape[1]
    if not fits or a.dtype != b.dtype or not a.is_floating_point():
        return None
    return _new(a, (a.shape[0], a.shape[1], b.shape[2]))


def _grouped_mm(a: Tensor, b: Tensor, *_: Any, **__: Any) -> Any:
    """Of experts, rows of ``a`` or columns of ``b`` by group: torch's rule has no float32."""
    if a.dtype != b.dtype or a.shape[-1] != b.shape[-2] or not a.is_meta:
        return None
    rows, columns = (a.shape[-2], b.shape[-1])
    if a.dim() == 2 and b.dim() == 2:
        return None
    if a.dim() == b.dim() == 3:
        return _new(a, (a.shape[0], rows, columns)) if a.shape[0] == b.shape[0] else None
    return _new(a, (rows, columns))


def _cat(tensors: Sequence[Tensor], dim: int = 0) -> Any:
    if not tensors or not _same(*tensors):
        return None
    first = tensors[0]
    if not -first.dim() <= dim < first.dim():
        return None
    dim %= first.dim()
    rest = (*first.shape[:dim], *first.shape[dim + 1 :])
    for one in tensors:
        if one.dim() != first.dim() or (*one.shape[:dim], *one.shape[dim + 1 :]) != rest:
            return None
    size = sum(one.shape[dim] for one in tensors)
    return _new(first, (*first.shape[:dim], size, *first.shape[dim + 1 :]))


def _mean(x: Tensor, dim: Any = None, keepdim: bool = False, *, dtype: Any = None) -> Any:
    if not dim or dtype is not None or not _same(x) or not x.dim():
        return None
    if not all(-x.dim() <= one < x.dim() for one in dim):
        return None
    gone = {one % x.dim() for one in dim}
    if len(gone) != len(dim):
        return None
    shape = [1 if i in gone else size for i, size in enumerate(x.shape) if keepdim or i not in gone]
    return _new(x, shape)


_RULES: dict[Any, Callable[..., Any]] = {
    aten.native_batch_norm.default: _batch_norm,
    aten.native_layer_norm.default: _layer_norm,
    aten.convolution.default: _convolution,
    aten.mm.default: _mm,
    aten.addmm.default: _addmm,
    aten.bmm.default: _bmm,
    **({aten._grouped_mm.default: _grouped_mm} if hasattr(aten, "_grouped_mm") else {}),
    aten.cat.default: _cat,
    aten.mean.dim: _mean,
    **{
        getattr(aten, name).default: _softmax
        for name in ("_softmax", "_safe_softmax")  # the second is of torch 2.5
        if hasattr(aten, name)
    },
    **{
        getattr(aten, name).default: _like
        for name in (
            *("relu", "gelu", "silu", "sigmoid", "tanh", "elu", "leaky_relu", "hardswish"),
            *("hardsigmoid", "hardtanh"),
        )
    },
    **{
        getattr(aten, name).default: _in_place
        for name in (
            *("relu_", "silu_", "sigmoid_", "tanh_", "elu_", "leaky_relu_", "hardswish_"),
            *("hardsigmoid_", "hardtanh_"),
        )
    },
    **{getattr(aten, name).Tensor: _binary for name in ("add", "sub", "mul", "div")},
    **{getattr(aten, name).Scalar: _like for name in ("add", "sub", "mul", "div")},
    **{getattr(aten, name).Tensor: _binary_in_place for name in ("add_", "sub_", "mul_", "div_")},
}
