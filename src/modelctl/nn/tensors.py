"""Bytes of a file to torch tensors, and where tensors go: without unpickling anything."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from ..core.dtypes import BY_NAME
from ..core.tensors import TensorRef
from ..errors import UnreadableError, UnsupportedError, UsageError

Device = str | int | torch.device | None

# A tensor that goes to a device, or to another dtype, passes through this much host memory.
STAGE = 16 << 20
_ALIGN = 16
_BYTE = BY_NAME["uint8"]


def resolve_device(device: Device) -> torch.device | None:
    """A torch device; ``"auto"`` is cuda where there is one, else mps, else cpu.

    Raises:
        UsageError: not the name of a device.
    """
    if device is None:
        return None
    if device == "auto":
        mps = getattr(torch.backends, "mps", None)
        name = "mps" if mps is not None and mps.is_available() else "cpu"
        return torch.device("cuda" if torch.cuda.is_available() else name)
    try:
        return torch.device(device)
    except RuntimeError as e:
        reason = str(e).splitlines()[0]
        raise UsageError(f"{device!r} is no device: {reason}") from None


def torch_dtype(ref: TensorRef) -> torch.dtype:
    """The torch dtype of a reference. Raises UnsupportedError where this torch lacks it."""
    found = getattr(torch, ref.dtype.name, None)
    if not isinstance(found, torch.dtype):
        raise UnsupportedError(
            f"this torch ({torch.__version__}) has no dtype {ref.dtype.name}",
            hint="upgrade torch, or 'modelctl cast' the file",
        )
    return found


def read_into(ref: TensorRef, dest: Tensor) -> None:
    """Copy a tensor of a file into a tensor with as many elements, converting the dtype.

    Straight into the memory of a contiguous CPU tensor of the same dtype; else through a
    staging buffer of 16 MiB, or, where one of the two is not contiguous, a temporary tensor.
    """
    dtype = torch_dtype(ref)
    plain = dest.is_contiguous() and not _bits(ref)
    if not dest.numel():
        return
    if plain and dest.device.type == "cpu" and dest.dtype == dtype:
        _fill(ref, _memory(dest))
    elif plain and ref.is_contiguous and ref.storage.extent() is not None:
        _staged(ref, dest.view(-1), dtype)
    else:
        dest.copy_(to_tensor(ref).reshape(dest.shape))


def _staged(ref: TensorRef, flat: Tensor, dtype: torch.dtype) -> None:
    item = ref.dtype.itemsize
    most = min(ref.numel, STAGE // item)
    stage = torch.empty(most, dtype=dtype, pin_memory=flat.is_cuda)
    memory = _memory(stage)
    for at in range(0, ref.numel, most):
        n = min(most, ref.numel - at)
        window = ref.replace(shape=(n,), stride=(1,), offset=ref.offset + at)
        _fill(window, memory[: n * item])
        flat[at : at + n].copy_(stage[:n])


def _bits(ref: TensorRef) -> dict[str, bool]:
    return (ref.rebuild.bits if ref.rebuild is not None else None) or {}


def _memory(tensor: Tensor) -> memoryview:
    """The bytes of a contiguous CPU tensor, writable."""
    size = tensor.element_size()
    raw = torch.empty(0, dtype=torch.uint8).set_(
        tensor.untyped_storage(), tensor.storage_offset() * size, (tensor.numel() * size,), (1,)
    )
    array: Any = raw.numpy()
    return memoryview(array)


def _fill(ref: TensorRef, out: memoryview) -> None:
    """Read exactly the bytes of a tensor, row-major, into ``out``."""
    extent = ref.storage.extent()
    if extent is not None and ref.is_contiguous and hasattr(os, "preadv"):
        source, at, done = extent.source, extent.offset + ref.start, 0
        while done < len(out):
            try:
                n = os.preadv(source.fileno(), [out[done:]], at + done)
            except OSError as e:
                raise UnreadableError(
                    f"can't be read: {e.strerror}", path=source.name, offset=at + done
                ) from e
            if n == 0:
                raise UnreadableError(
                    "the file ends inside a tensor", path=source.name, offset=at + done
                )
            source.bytes_read += n
            done += n
        return
    at = 0
    for piece in ref.chunks():
        out[at : at + len(piece)] = piece
        at += len(piece)


def to_tensor(ref: TensorRef) -> Tensor:
    """A new contiguous CPU tensor with the values of a reference."""
    tensor = torch.empty(ref.shape, dtype=torch_dtype(ref))
    bits = _bits(ref)
    if tensor.numel():
        _fill(ref.replace(rebuild=None) if bits else ref, _memory(tensor))
    if bits.get("conj"):
        tensor = tensor.conj().resolve_conj()
    if bits.get("neg"):
        tensor = tensor.neg()
    return tensor


def to_tensors(refs: Mapping[Any, TensorRef], device: Device = "cpu") -> dict[Any, Tensor]:
    """Tensors for references, by the same keys.

    What is the same view of the same storage is one tensor. Different views of one storage share
    their memory where reading it all costs no more than reading each; else each is a copy.
    """
    where = resolve_device(device) or torch.device("cpu")
    views: dict[int, dict[Any, TensorRef]] = {}
    for ref in refs.values():
        views.setdefault(id(ref.storage), {}).setdefault(_key(ref), ref)
    made: dict[Any, Tensor] = {}
    for group in views.values():
        made.update(_sharing(group, where) or {})
        for key, ref in group.items():
            if key not in made:
                made[key] = to_tensor(ref).to(where)
    return {name: made[_key(ref)] for name, ref in refs.items()}


def _key(ref: TensorRef) -> Any:
    return (*ref.identity, tuple(sorted(_bits(ref))))


def _sharing(group: Mapping[Any, TensorRef], device: torch.device) -> dict[Any, Tensor] | None:
    """Views over one piece of memory, for the references to one storage that overlap."""
    refs = [ref for ref in group.values() if ref.numel]
    if len(refs) < 2 or any(_bits(ref) for ref in refs):
        return None
    start = min(ref.start for ref in refs) // _ALIGN * _ALIGN
    stop = max(ref.start + ref.span for ref in refs)
    aligned = all(ref.start % ref.dtype.itemsize == 0 for ref in refs)
    if not aligned or stop - start > sum(ref.nbytes for ref in refs) + _ALIGN:
        return None
    raw = torch.empty(stop - start, dtype=torch.uint8)
    whole = refs[0].replace(
        dtype=_BYTE, shape=(stop - start,), stride=(1,), base=start, offset=0, rebuild=None
    )
    _fill(whole, _memory(raw))
    storage = raw.to(device).untyped_storage()
    return {
        key: torch.empty(0, dtype=torch_dtype(ref), device=device).set_(
            storage, (ref.start - start) // ref.dtype.itemsize, ref.shape, ref.stride
        )
        for key, ref in group.items()
        if ref.numel
    }
