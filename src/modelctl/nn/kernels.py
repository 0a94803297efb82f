"""What torch's meta kernels do slowly, or let pass that no device does."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

aten: Any = torch.ops.aten

# What comes out is like the first tensor that goes in. Torch works that out in Python, op by op,
# for milliseconds each; they are most of the operators of most networks.
_LIKE_INPUT = frozenset(
    {
        aten.hardswish,
        aten.hardsigmoid,
        aten.silu,
        aten.gelu,
        aten.relu,
        aten.sigmoid,
        aten.tanh,
        aten.elu,
        aten.leaky_relu,
        aten._softmax,
        aten._safe_softmax,
    }
)
_LIKE_INPUT_IN_PLACE = frozenset(
    {aten.hardswish_, aten.hardsigmoid_, aten.hardtanh_, aten.silu_, aten.relu_, aten.leaky_relu_}
)
# meta does not mind that dtypes differ here
_SAME_DTYPE = frozenset({aten.mm, aten.addmm, aten.bmm, aten.baddbmm, aten.mv, aten.addmv})
_SMALL = 64 << 20


def tensors_in(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, list | tuple):
        for one in value:
            yield from tensors_in(one)
    elif isinstance(value, Mapping):
        for one in value.values():
            yield from tensors_in(one)


def each(value: Any, change: Callable[[Tensor], Tensor]) -> Any:
    """The same lists, tuples and mappings with other tensors in them."""
    if isinstance(value, Tensor):
        return change(value)
    if isinstance(value, list | tuple):
        return type(value)(each(one, change) for one in value)
    if isinstance(value, dict):
        return {name: each(one, change) for name, one in value.items()}
    return value


def for_real(func: Any, args: Any, kwargs: Any) -> None:
    """What failed on meta once more on small zeros: the errors of the real kernels are the ones
    that people know, and say more."""
    tensors = [*tensors_in(args), *tensors_in(kwargs)]
    if sum(one.numel() * one.element_size() for one in tensors) > _SMALL:
        return

    def zeros(one: Tensor) -> Tensor:
        return torch.zeros(one.shape, dtype=one.dtype) if one.is_meta else one

    args, kwargs = each((args, kwargs), zeros)
    func(*args, **kwargs)


def raise_if_mixed(func: Any, inputs: list[Tensor], args: Any, kwargs: Any) -> None:
    """Where meta is content, and no device would be, the error of the real kernel."""
    packet = func._overloadpacket
    if packet in _SAME_DTYPE and len({one.dtype for one in inputs}) > 1:
        args, kwargs = each((args, kwargs), lambda one: torch.zeros([1] * one.dim()).to(one.dtype))
        func(*args, **kwargs)
    if packet is aten.convolution and args[6] and args[0].shape[1] != args[1].shape[0]:
        for_real(func, args, kwargs)


def like_input(func: Any, args: Any) -> Any:
    packet = func._overloadpacket
    if packet in _LIKE_INPUT and func._overloadname == "default" and args[0].is_floating_point():
        return torch.empty_like(args[0])
    if packet in _LIKE_INPUT_IN_PLACE:
        return args[0]
    if func is aten.native_batch_norm.default and args[0].dim() > 1:
        stats = args[0].shape[1] if args[5] else 0
        return torch.empty_like(args[0]), args[0].new_empty(stats), args[0].new_empty(stats)
    if func is aten.native_layer_norm.default:
        x, dims = args[0], len(args[1])
        if list(x.shape[-dims:]) == list(args[1]):
            short = (*x.shape[:-dims], *(1 for _ in args[1]))
            return torch.empty_like(x), x.new_empty(short), x.new_empty(short)
    return None
