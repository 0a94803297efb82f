"""The kernels under a watched forward: what those of meta let pass, and whole-layer ones off."""

from __future__ import annotations

import sys
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
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
    if isinstance(value, tuple) and hasattr(value, "_fields"):
        return type(value)(*(each(one, change) for one in value))
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
    if packet is aten.convolution and _does_not_fit(*args[:7]):
        for_real(func, args, kwargs)
    if packet is aten.embedding and (args[1].is_floating_point() or args[1].is_complex()):
        for_real(func, args, kwargs)


def _does_not_fit(
    given: Tensor,
    weight: Tensor,
    _: Tensor | None,
    __: list[int],
    padding: list[int],
    dilation: list[int],
    transposed: bool,
) -> bool:
    """Whether an input has other channels than a transposed convolution takes, or is smaller than a
    kernel, which meta minds since torch 2.5."""
    if transposed:
        return given.shape[1] != weight.shape[0]
    dims = weight.dim() - 2
    padding, dilation = (one * dims if len(one) == 1 else one for one in (padding, dilation))
    return any(
        size + 2 * added < apart * (kernel - 1) + 1
        for size, kernel, added, apart in zip(
            given.shape[-dims:], weight.shape[2:], padding, dilation, strict=True
        )
    )


@contextmanager
def plain_kernels(device: torch.device) -> Iterator[None]:
    """Where values are computed: no kernels that do a whole layer at once, whose matrix products
    nobody sees. A layer costs the same in eval and train mode then."""
    backends: Any = torch.backends
    mha = getattr(backends, "mha", None)
    before = mha.get_fastpath_enabled() if mha is not None else False
    try:
        if mha is not None:
            mha.set_fastpath_enabled(False)
        if device.type == "meta":
            with _flex_attention_on_meta():
                yield
        else:
            with _no_onednn(), backends.cudnn.flags(enabled=False):
                yield
    finally:
        if mha is not None:
            mha.set_fastpath_enabled(before)


@contextmanager
def _flex_attention_on_meta() -> Iterator[None]:
    """It looks at the device, and compiles, before it calls its operator: meta would do."""
    module: Any = sys.modules.get("torch.nn.attention.flex_attention")
    check = getattr(module, "_validate_device", None)
    if check is None:
        yield
        return
    anything: Any = torch
    compiles = anything.compile
    module._validate_device = lambda *_: None
    anything.compile = lambda function, **_: function
    try:
        yield
    finally:
        module._validate_device, anything.compile = check, compiles


@contextmanager
def nothing_compiled() -> Iterator[None]:
    """Compiled functions run as what they were compiled from."""
    stance: Any = getattr(torch.compiler, "set_stance", None)
    if stance is None or "torch._dynamo" not in sys.modules:  # which takes seconds to import
        yield
        return
    with stance("force_eager"):
        yield


@contextmanager
def _no_onednn() -> Iterator[None]:
    """``torch.backends.mkldnn.flags`` without its warning of Intel GPUs that are not here."""
    mkldnn: Any = torch.backends.mkldnn

    def set_flags(*flags: Any) -> Any:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return mkldnn.set_flags(*flags)

    before = set_flags(False)
    try:
        yield
    finally:
        set_flags(*before)
