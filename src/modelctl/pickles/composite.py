"""torch's rebuild functions for tensors that are no strided view of one storage
(docs/formats.md#tensors-in-a-pickle): sparse, quantized, nested, meta and wrapped ones stay the
recipe that they are, and are listed."""

from __future__ import annotations

from typing import Any

from ..core.dtypes import BY_NAME, DType
from ..core.nodes import Composite, Global, Obj, attributes, mapping
from ..core.tensors import StorageRef, TensorRef

_UTILS = "torch._utils"
_JAGGED = Global("torch.nested._internal.nested_tensor", "_rebuild_njt")
_SPARSE_PARTS = {
    "sparse_coo": ("indices", "values"),
    "sparse_csr": ("crow_indices", "col_indices", "values"),
    "sparse_csc": ("ccol_indices", "row_indices", "values"),
    "sparse_bsr": ("crow_indices", "col_indices", "values"),
    "sparse_bsc": ("ccol_indices", "row_indices", "values"),
}


def composite(func: Global, args: tuple[Any, ...]) -> Composite | None:
    """The composite tensor that calling ``func`` would give, or None where it is none.

    Raises:
        TypeError, ValueError, IndexError, AttributeError, KeyError: arguments that the function
            does not take.
    """
    if func.module in ("torch._tensor", "torch.tensor") and func.name == "_rebuild_from_type_v2":
        return _from_type(func, args)
    if func == _JAGGED:
        return _jagged(func, args)
    if func.module != _UTILS:
        return None
    make = _MAKERS.get(func.name)
    return None if make is None else make(func, args)


def _last(name: Any) -> str:
    """The last part of a name; of nothing else, which might spell out to gigabytes."""
    if not isinstance(name, str | Global):
        raise TypeError
    return str(name).rpartition(".")[2]


def _sparse(func: Global, args: tuple[Any, ...]) -> Composite:
    layout, data = args[0], args[1]
    if isinstance(layout, Obj):  # torch.serialization._get_layout("torch.sparse_coo")
        layout = layout.args[0]
    name = _last(layout)
    names = _SPARSE_PARTS[name]
    parts = dict(zip(names, data, strict=False))
    if len(parts) < len(names) or not all(isinstance(one, TensorRef) for one in parts.values()):
        raise TypeError
    values = parts["values"]
    return Composite(
        func, args, dtype=values.dtype, shape=_shape(data[len(names)]), layout=name, parts=parts
    )


def _quantized(func: Global, args: tuple[Any, ...]) -> Composite:
    storage, _, size, _, params, *_ = args
    if not isinstance(storage, StorageRef) or storage.dtype is None:
        raise TypeError
    scheme = _last(params[0])
    parts = {
        name: part
        for name, part in zip(("scale", "zero_point"), params[1:3], strict=False)
        if isinstance(part, TensorRef)
    }
    shape = _shape(size)
    return Composite(func, args, dtype=storage.dtype, shape=shape, layout=scheme, parts=parts)


def _meta(func: Global, args: tuple[Any, ...]) -> Composite:
    dtype, size, *_ = args
    return Composite(func, args, dtype=_dtype(dtype), shape=_shape(size), layout="meta")


def _nested(func: Global, args: tuple[Any, ...]) -> Composite:
    names = ("values", "sizes", "strides", "offsets")
    parts = {n: p for n, p in zip(names, args, strict=False) if isinstance(p, TensorRef)}
    values = parts["values"]
    return Composite(
        func, args, dtype=values.dtype, shape=values.shape, layout="nested", parts=parts
    )


def _jagged(func: Global, args: tuple[Any, ...]) -> Composite:
    names = ("values", "offsets", "lengths")
    found = mapping(args[0]) or {}
    parts = {name: found[name] for name in names if isinstance(found.get(name), TensorRef)}
    values = parts["values"]
    return Composite(
        func, args, dtype=values.dtype, shape=values.shape, layout="jagged", parts=parts
    )


def _wrapper(func: Global, args: tuple[Any, ...]) -> Composite:
    cls, dtype, size, *_ = args
    return Composite(func, args, dtype=_dtype(dtype), shape=_shape(size), layout=_last(cls))


def _from_cpu(func: Global, args: tuple[Any, ...]) -> Composite:
    data, dtype, device, *_ = args
    shape = data.shape if isinstance(data, TensorRef) else ()
    parts = {"data": data} if isinstance(data, TensorRef) else {}
    layout = f"on {device}"[:40] if isinstance(device, str) else "on another device"
    return Composite(func, args, dtype=_dtype(dtype), shape=shape, layout=layout, parts=parts)


def _parameter(func: Global, args: tuple[Any, ...]) -> Composite | None:
    data = args[0]
    if not isinstance(data, Composite):
        return None
    parts, layout = data.parts, data.layout
    return Composite(func, args, dtype=data.dtype, shape=data.shape, layout=layout, parts=parts)


def _from_type(func: Global, args: tuple[Any, ...]) -> Composite | None:
    """A wrapper subclass (DTensor, …): what it wraps is in its state."""
    inner, cls, inner_args, state = args
    if not isinstance(inner, Global) or type(inner_args) is not tuple:
        return None
    made = composite(inner, inner_args)
    if made is None:
        return None
    parts: dict[str, Any] = {}
    for part in state if isinstance(state, tuple) else (state,):
        found = attributes(part) if isinstance(part, Obj) else mapping(part)
        parts.update((str(k), v) for k, v in (found or {}).items() if isinstance(v, TensorRef))
    layout = _last(cls)
    return Composite(func, args, dtype=made.dtype, shape=made.shape, layout=layout, parts=parts)


def _shape(size: Any) -> tuple[int, ...]:
    if isinstance(size, Obj):  # torch.Size((…,))
        size = size.args[0]
    if isinstance(size, TensorRef) or not isinstance(size, tuple | list):
        raise TypeError
    if not all(type(n) is int and n >= 0 for n in size):
        raise ValueError
    return tuple(size)


def _dtype(node: Any) -> DType:
    if isinstance(node, Global) and node.module == "torch" and node.name in BY_NAME:
        return BY_NAME[node.name]
    raise TypeError


_MAKERS = {
    "_rebuild_sparse_tensor": _sparse,
    "_rebuild_sparse_csr_tensor": _sparse,
    "_rebuild_qtensor": _quantized,
    "_rebuild_meta_tensor_no_storage": _meta,
    "_rebuild_nested_tensor": _nested,
    "_rebuild_wrapper_subclass": _wrapper,
    "_rebuild_device_tensor_from_cpu_tensor": _from_cpu,
    "_rebuild_device_tensor_from_numpy": _from_cpu,
    "_rebuild_xla_tensor": _from_cpu,
    "_rebuild_parameter": _parameter,
    "_rebuild_parameter_with_state": _parameter,
}
