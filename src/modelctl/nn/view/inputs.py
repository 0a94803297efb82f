"""What a forward is tried on: from shapes, or from tensors that are given."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from numbers import Integral
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ...errors import UsageError
from ..model_names import is_lazy
from .kernels import each
from .values import SMALL

Sizes = int | Sequence[Any] | Mapping[str, Sequence[int]]
Dtypes = torch.dtype | Sequence[torch.dtype] | Mapping[str, torch.dtype] | None

_MOST = 1 << 56  # elements


class Inputs(NamedTuple):
    """What a forward gets, and whether a batch dimension was added."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    batch: int | None = None

    def doubled(self) -> Inputs:
        """The same twice, along the first dimension."""

        def twice(tensor: Tensor) -> Tensor:
            return torch.cat([tensor, tensor]) if tensor.dim() else tensor

        return Inputs(each(self.args, twice), each(self.kwargs, twice))


def from_shapes(
    model: nn.Module,
    sizes: Sizes,
    dtypes: Dtypes,
    batch: int | None,
    device: torch.device,
    kwargs: Mapping[str, Any],
) -> list[Inputs]:
    """Inputs of these shapes to try in turn: with a batch dimension added, and as they are.

    Raises:
        UsageError: not shapes, a batch or dtypes, or not as many dtypes.
    """
    if batch is not None and (not _is_dim(batch) or batch < 0):
        raise UsageError(f"batch_size is a number from 0, or None, not {batch!r}")
    named = isinstance(sizes, Mapping)
    shapes: dict[Any, tuple[int, ...]] = (
        {name: _shape(one) for name, one in sizes.items()}
        if isinstance(sizes, Mapping)
        else dict(enumerate(_shapes(sizes)))
    )
    kinds = _dtypes(dtypes, list(shapes), _dtype_of(model))

    def made(lead: tuple[int, ...]) -> Inputs:
        tensors = {
            name: _tensor(_shape((*lead, *shape)), kinds[name], device)
            for name, shape in shapes.items()
        }
        given = _own(kwargs, device)
        if named:
            return Inputs((), {**tensors, **given}, *lead)
        return Inputs((*tensors.values(),), given, *lead)

    return [made(()) if batch is None else made((batch,)), *([] if batch is None else [made(())])]


def from_data(data: Any, device: torch.device, kwargs: Mapping[str, Any]) -> Inputs:
    """The tensors that are given, on the device; a mapping gives keyword inputs, a tuple or list
    positional ones."""
    given = _own(kwargs, device)
    if isinstance(data, Mapping):
        return Inputs((), {**_moved(dict(data), device), **given})
    args = tuple(data) if isinstance(data, list | tuple) else (data,)
    return Inputs(_moved(args, device), given)


def _own(kwargs: Mapping[str, Any], device: torch.device) -> dict[str, Any]:
    moved: dict[str, Any] = _moved(dict(kwargs), device)
    return moved


def _moved(value: Any, device: torch.device) -> Any:
    """Copies; what is to go to ``meta`` and is small keeps its values until then: lengths,
    positions and masks that a forward looks at."""
    if isinstance(value, Tensor):
        small = value.numel() * value.element_size() <= SMALL and value.layout == torch.strided
        keep = device.type == "meta" and small and not value.is_meta
        moved = value.detach().to("cpu" if keep else device)
        return moved if moved.is_meta else moved.clone()
    if isinstance(value, tuple) and hasattr(value, "_fields"):
        return type(value)(*(_moved(one, device) for one in value))
    if isinstance(value, list | tuple):
        return type(value)(_moved(one, device) for one in value)
    if isinstance(value, dict):
        return {key: _moved(one, device) for key, one in value.items()}
    return value


def _shapes(sizes: Any) -> list[tuple[int, ...]]:
    if _is_shape(sizes) or not isinstance(sizes, list | tuple):
        return [_shape(sizes)]
    return [_shape(one) for one in sizes]


def _is_shape(value: Any) -> bool:
    return (
        isinstance(value, Sequence)
        and not isinstance(value, str | bytes)
        and all(map(_is_dim, value))
    )


def _is_dim(value: Any) -> bool:
    return isinstance(value, Integral) and not isinstance(value, bool)


def _shape(value: Any) -> tuple[int, ...]:
    dims = (value,) if _is_dim(value) else value
    if not _is_shape(dims):
        raise UsageError(
            f"{value!r} is not a shape",
            hint="(3, 224, 224) is; a list of shapes for several inputs; input_data= for tensors",
        )
    shape = tuple(int(dim) for dim in dims)
    elements = 1
    for dim in shape:
        elements *= dim
    if min(shape, default=1) < 0 or elements > _MOST:
        raise UsageError(f"no tensor has the shape {list(shape)}")
    return shape


def _dtypes(dtypes: Dtypes, names: list[Any], default: torch.dtype) -> dict[Any, torch.dtype]:
    if dtypes is None or isinstance(dtypes, torch.dtype):
        return dict.fromkeys(names, dtypes or default)
    given = dtypes.values() if isinstance(dtypes, Mapping) else dtypes
    if not isinstance(given, Iterable) or not all(isinstance(one, torch.dtype) for one in given):
        raise UsageError(
            f"dtypes is a torch.dtype, one for each input or a mapping, not {dtypes!r}"
        )
    if isinstance(dtypes, Mapping):
        unknown = [name for name in dtypes if name not in names]
        if unknown:
            raise UsageError(f"dtypes names '{unknown[0]}', which is not among the inputs")
        return {name: dtypes.get(name, default) for name in names}
    if len(dtypes) != len(names):
        raise UsageError(f"{len(dtypes)} dtypes for {len(names)} inputs: give one for each")
    return dict(zip(names, dtypes, strict=True))


def _dtype_of(model: nn.Module) -> torch.dtype:
    """The model's own floating dtype: what its inputs have to be."""
    for tensor in model.parameters():
        if tensor.is_floating_point() and not is_lazy(tensor):
            return tensor.dtype
    return torch.get_default_dtype()


def _tensor(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    if device.type == "meta":
        return torch.empty(shape, dtype=dtype, device=device)
    if not dtype.is_floating_point:
        return torch.zeros(shape, dtype=dtype, device=device)
    numbers = torch.Generator().manual_seed(0)
    return torch.randn(shape, generator=numbers).to(device, dtype)
