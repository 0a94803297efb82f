"""Tensors of a file as new torch tensors: without unpickling anything."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from ...core.dtypes import BY_NAME
from ...core.nodes import Composite, Global
from ...core.tensors import TensorRef
from ...errors import UnreadableError
from .reader import Reader, torch_dtype

_ALIGN = 16
_FROM_TYPE = Global("torch._tensor", "_rebuild_from_type_v2")
_WRAPPER = Global("torch._utils", "_rebuild_wrapper_subclass")
_BYTE = BY_NAME["uint8"]


def to_tensors(
    refs: Mapping[Any, TensorRef], device: torch.device | str = "cpu"
) -> dict[Any, Tensor]:
    """Tensors for references, by the same keys.

    What is the same view of the same storage is one tensor. Different views of one storage share
    their memory where reading it all costs no more than reading each; else each is a copy. What
    has no gaps keeps its strides (channels_last).

    Raises:
        UnreadableError: the file's data.
        UnsupportedError: a dtype that this torch lacks.
    """
    where = torch.device(device)
    views: dict[int, dict[Any, TensorRef]] = {}
    for ref in refs.values():
        views.setdefault(id(ref.storage), {}).setdefault(ref.identity, ref)
    made: dict[Any, Tensor] = {}
    with Reader() as reader:
        for group in views.values():
            made.update(_sharing(group, where, reader) or {})
            for key, ref in group.items():
                if key not in made:
                    made[key] = torch.empty(ref.shape, dtype=torch_dtype(ref), device=where)
                    reader.read(ref, made[key])
    return {name: made[ref.identity] for name, ref in refs.items()}


SPARSE = {
    name: getattr(torch, name)
    for name in ("sparse_coo", "sparse_csr", "sparse_csc", "sparse_bsr", "sparse_bsc")
}


def sparse_tensor(node: Composite, parts: Mapping[str, Tensor]) -> Tensor:
    """A sparse tensor of a file, of its parts: indices and values.

    Raises:
        UnreadableError: indices that the shape has no place for.
    """
    *indices, values = parts.values()
    known: dict[str, Any] = {"check_invariants": True}
    try:
        if node.layout == "sparse_coo":
            known["is_coalesced"] = _is_coalesced(node)
            return torch.sparse_coo_tensor(indices[0], values, node.shape, **known)
        inner, outer = indices
        known.update(size=node.shape, layout=SPARSE[node.layout])
        return torch.sparse_compressed_tensor(inner, outer, values, **known)
    except (RuntimeError, ValueError, TypeError) as e:
        raise UnreadableError(f"a {node.layout} tensor that can't be: {e}") from None


def _is_coalesced(node: Composite) -> bool:
    while node.args and isinstance(node.args[0], Composite):  # a Parameter of one
        node = node.args[0]
    data = node.args[1]
    return len(data) > 3 and data[3] is True


def _sharing(
    group: Mapping[Any, TensorRef], device: torch.device, reader: Reader
) -> dict[Any, Tensor] | None:
    """Views over one piece of memory, strided as in the file, for references to one storage.

    None where that is not needed (one contiguous tensor) or would read gaps.
    """
    refs = [ref for ref in group.values() if ref.numel]
    if not refs or (len(refs) == 1 and refs[0].is_contiguous) or any(ref.bits for ref in refs):
        return None
    start = min(ref.start for ref in refs) // _ALIGN * _ALIGN
    stop = max(ref.start + ref.span for ref in refs)
    aligned = all(ref.start % ref.dtype.itemsize == 0 for ref in refs)
    if not aligned or stop - start > sum(ref.nbytes for ref in refs) + _ALIGN:
        return None
    raw = torch.empty(stop - start, dtype=torch.uint8, device=device)
    whole = refs[0].replace(
        dtype=_BYTE, shape=(stop - start,), stride=(1,), base=start, offset=0, rebuild=None
    )
    reader.read(whole, raw)
    storage = raw.untyped_storage()
    return {
        key: torch.empty(0, dtype=torch_dtype(ref), device=device).set_(
            storage, (ref.start - start) // ref.dtype.itemsize, ref.shape, ref.stride
        )
        for key, ref in group.items()
        if ref.numel
    }


# ------------------------------------------------------------------ subclasses


def is_declared(cls: type) -> bool:
    """Whether the program itself has declared a subclass of Tensor that wraps others safe to load
    (``torch.serialization.add_safe_globals``, as torchao does), and it is restored without code of
    its own."""
    return (
        issubclass(cls, Tensor)
        and hasattr(cls, "__tensor_flatten__")
        and getattr(cls, "__setstate__", None) is Tensor.__setstate__
        and cls in torch.serialization.get_safe_globals()
    )


def declared(node: Composite) -> type[Tensor] | None:
    """The declared subclass that a wrapped tensor of a file is of; else None."""
    if node.func != _FROM_TYPE or len(node.args) != 4 or node.args[0] != _WRAPPER:
        return None
    _, cls, _, state = node.args
    named = isinstance(cls, Global) and isinstance(state, dict)
    for one in torch.serialization.get_safe_globals() if named else ():
        if isinstance(one, type) and (one.__module__, one.__qualname__) == (cls.module, cls.name):
            return one if is_declared(one) else None
    return None


def wrapping_tensor(cls: type[Tensor], node: Composite, state: Mapping[str, Any]) -> Tensor:
    """A tensor of a declared subclass, over what it wraps."""
    make = Tensor._make_wrapper_subclass
    tensor: Tensor = make(cls, torch.Size(node.shape), dtype=getattr(torch, node.dtype.name))
    tensor.__dict__.update(state)
    return tensor
