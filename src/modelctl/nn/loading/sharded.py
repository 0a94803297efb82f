"""Tensors whose memory is not all of their values: DTensors, of which each rank holds a part, and
other subclasses, into which nothing is loaded."""

from __future__ import annotations

import sys
from collections.abc import Iterable
from math import prod
from typing import Any, TypeGuard, TypeVar, cast

import torch
from torch import Tensor, nn

from ...core.tensors import TensorRef
from ...errors import UnsupportedError, UsageError
from ..model_names import is_lazy

_PLAIN = torch.Tensor.__torch_dispatch__
_STRIDED = "_StridedShard"


def is_sharded(tensor: object) -> TypeGuard[Tensor]:
    """Whether it is a DTensor. Who has none does not pay for importing what makes them."""
    if type(tensor) in (Tensor, nn.Parameter):  # most
        return False
    cls: Any = getattr(_module(), "DTensor", ())
    return isinstance(tensor, cls)


def _module() -> Any:
    names = ("torch.distributed.tensor", "torch.distributed._tensor")  # torch 2.4
    found = (sys.modules.get(name) for name in names)
    return next((one for one in found if hasattr(one, "DTensor")), None)


def check_kind(name: str, tensor: Tensor, device: torch.device | None) -> None:
    """Raises UnsupportedError where what is written into a tensor's memory would not be its values:
    it would be reported as loaded, and nothing would have changed. Raises UsageError where it
    would have to leave the device of its mesh."""
    if is_lazy(tensor):
        return
    if is_sharded(tensor):
        _check_placements(name, tensor)
        if device not in (None, tensor.device) and not tensor.is_meta:
            raise UsageError(
                f"'{name}' of the model is sharded, and stays on its {tensor.device}: it can't go "
                f"to {device}",
                hint="leave device= out; each rank's part goes where its mesh is",
            )
        name, tensor = f"{name} (this rank's part)", local(tensor)
    reason = None
    if type(tensor).__torch_dispatch__ is not _PLAIN:
        reason = f"a {type(tensor).__module__}.{type(tensor).__qualname__}"
    elif tensor.layout != torch.strided:
        reason = str(tensor.layout).removeprefix("torch.")
    elif tensor.is_quantized:
        reason = "quantized"
    elif tensor.is_nested:
        reason = "nested"
    if reason is not None:
        raise UnsupportedError(
            f"'{name}' of the model is {reason}: only plain tensors and DTensors are loaded into",
            hint="load before the model is quantized or wrapped; or model.load_state_dict(load("
            "path)), which leaves it to the tensor itself",
        )
    needed = tensor.element_size() * prod(tensor.shape)
    if not tensor.is_meta and tensor.untyped_storage().nbytes() < needed:
        raise UnsupportedError(
            f"'{name}' of the model has no memory now: something has freed it",
            hint="FullyShardedDataParallel does: load before wrapping, or inside "
            "FullyShardedDataParallel.summon_full_params(model)",
        )


def local(tensor: Tensor) -> Tensor:
    """This rank's part of a DTensor; shares its memory."""
    with torch.no_grad():
        found: Tensor = cast(Any, tensor).to_local()
        return found.detach()


def _check_placements(name: str, tensor: Any) -> None:
    placements = tensor.placements
    odd = [one for one in placements if not (_splits(one) or one.is_replicate())]
    if odd:
        raise UnsupportedError(
            f"'{name}' of the model is {type(odd[0]).__name__} over its ranks: which of the file's "
            "values are whose is not known (of a sum, no rank has them)",
            hint="redistribute it to Shard or Replicate first",
        )
    split = [one.dim for one in placements if _splits(one)]
    if len({*split}) < len(split) and not hasattr(_module().placement_types, _STRIDED):
        raise UnsupportedError(
            f"'{name}' of the model is sharded twice over one dimension ({list(placements)}): this "
            f"torch ({torch.__version__}) does not say in which order",
            hint="upgrade torch: 2.5 does",
        )
    if _in_mesh(tensor):
        shape, _ = _placed(tensor)
        if shape != tuple(local(tensor).shape) or not _is_box(tensor):
            raise UnsupportedError(
                f"'{name}' of the model: {list(placements)} on {tensor.device_mesh} is no box of "
                f"{list(tensor.shape)} that this torch can tell",
                hint="shard evenly, or load before the model is sharded",
            )


def _splits(placement: object) -> bool:
    """Whether it is one of torch's own that split a dimension: a subclass may do it otherwise."""
    return type(placement).__name__ in ("Shard", _STRIDED)


def _in_mesh(tensor: Any) -> bool:
    return tensor.device_mesh.get_coordinate() is not None


def _placed(tensor: Any) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Shape and offsets of this rank's part, as torch itself has them."""
    try:
        shape, offsets = _module()._utils.compute_local_shape_and_global_offset(
            tensor.shape, tensor.device_mesh, tensor.placements
        )
    except (RuntimeError, NotImplementedError, AssertionError):
        return (), ()
    return tuple(shape), tuple(offsets)


def _is_box(tensor: Any) -> bool:
    """Whether each strided placement goes with those on its right that it stands for: else the
    part is every n-th piece of the tensor, of which torch tells the first alone."""
    how = [*zip(tensor.placements, tensor.device_mesh.shape, strict=True)]
    return all(
        type(one).__name__ != _STRIDED
        or one.split_factor
        == prod(size for other, size in how[i + 1 :] if _splits(other) and other.dim == one.dim)
        for i, (one, _) in enumerate(how)
    )


Value = TypeVar("Value", TensorRef, Tensor)


def within(value: Value, tensor: Tensor) -> Value:
    """What of a value for all of a DTensor this rank holds."""
    shape, at = _placed(tensor)
    if not _in_mesh(tensor) or 0 in shape:  # torch puts an empty part behind the end
        shape, at = (0,) * tensor.ndim, (0,) * tensor.ndim
    if isinstance(value, Tensor):
        whole = value.reshape(tensor.shape)
        return whole[tuple(slice(i, i + n) for i, n in zip(at, shape, strict=True))]
    if len(value.shape) != len(shape):  # [] and [1] fit
        value = value.replace(shape=tuple(tensor.shape), stride=None)
    first = sum(i * step for i, step in zip(at, value.stride, strict=True))
    return value.replace(shape=shape, stride=value.stride, offset=value.offset + first)


def filled(tensor: Any, device: torch.device | None, dtype: torch.dtype) -> Tensor:
    """A DTensor with memory, for one on meta: placed as that is, on the device of its mesh."""
    mesh = tensor.device_mesh
    where = device or torch.device(mesh.device_type)
    made = torch.empty_like(local(tensor), device=where, dtype=dtype)
    new: Tensor = type(tensor).from_local(
        made,
        *(mesh, tensor.placements),
        run_check=False,
        shape=tensor.shape,
        stride=tensor.stride(),
    )
    return new


def groups(tensors: Iterable[Tensor]) -> list[Any]:
    """The process groups of several ranks that share DTensors, in the order of these."""
    found: dict[str, Any] = {}
    for tensor in tensors:
        mesh: Any = cast(Any, tensor).device_mesh if is_sharded(tensor) else None
        for i in range(mesh.ndim if mesh is not None and _in_mesh(tensor) else 0):
            if mesh.size(i) > 1:
                group = mesh.get_group(i)
                found.setdefault(group.group_name, group)
    return [*found.values()]


def wraps_whole(model: nn.Module) -> bool:
    """Whether FullyShardedDataParallel is somewhere in a model: its parameters are flat, or in
    pieces that don't say of what."""
    fsdp = getattr(sys.modules.get("torch.distributed.fsdp"), "FullyShardedDataParallel", ())
    return any(isinstance(module, fsdp) for module in model.modules())
