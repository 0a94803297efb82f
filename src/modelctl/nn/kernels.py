"""What torch's meta kernels let pass that no device does, and real errors for theirs."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

aten: Any = torch.ops.aten

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
