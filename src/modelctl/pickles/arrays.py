"""numpy's arrays in a pickle, as tensors (docs/formats.md#numpy-arrays): each is a tensor of its
bytes, and keeps the recipe that it is written back by. Nothing is called."""

from __future__ import annotations

from collections.abc import Collection, Iterable
from math import prod
from typing import Any

from ..core.dtypes import BY_NAME, DType
from ..core.nodes import Global, Obj, mapping
from ..core.storages import MemoryStorage, Storage
from ..core.tensors import Rebuild, SwappedStorage, TensorRef
from ..core.tree import Containers, containers, rebuild
from ..errors import UnreadableError

_NUMPY = ("numpy.core.", "numpy._core.")
# An array is called for empty and then given a state; or made of its bytes, as protocol 5 does.
_CALLED, _OF_BYTES, _SCALAR = "_reconstruct", "_frombuffer", "scalar"
# numpy's codes of dtypes, as its pickles have them
_DTYPES = {
    **{f"f{n}": f"float{8 * n}" for n in (2, 4, 8)},
    **{f"i{n}": f"int{8 * n}" for n in (1, 2, 4, 8)},
    **{f"u{n}": f"uint{8 * n}" for n in (1, 2, 4, 8)},
    "c8": "complex64",
    "c16": "complex128",
    "b1": "bool",
}


def names_arrays(names: Iterable[tuple[str, str]]) -> bool:
    """Whether what a pickle names may be arrays."""
    return any(name in (_CALLED, _OF_BYTES) and module.startswith(_NUMPY) for module, name in names)


def with_arrays(root: Any) -> Any:
    """The tree with a :class:`TensorRef` for each array of numbers, and for each numpy scalar in a
    mapping that holds such arrays and nothing else but tensors. Where torch's own tensors are there
    as well, arrays count only as a state_dict of their own: others are results and statistics that
    no model has. The states of numpy's random number generators stay what they are.

    Raises:
        UnreadableError: an array whose shape is not that of its bytes.
    """
    found = containers(root)
    generators = _generators(found)
    made: dict[int, Any] = {}
    for key, (node, _) in found.items():
        if key not in generators and _is(node, _CALLED, _OF_BYTES):
            made[key] = _array(node)
    made = {key: ref for key, ref in made.items() if ref is not None}
    if any(type(one) is TensorRef for _, inner in found.values() for one in inner):
        weights = _weights(found, made)
        made = {key: ref for key, ref in made.items() if key in weights}
    scalars: dict[int, TensorRef] = {}
    for node, _ in found.values() if made else ():
        scalars.update(_scalars((mapping(node) or {}).values(), made))
    return rebuild(root, made | scalars)


def as_tensors(root: Any) -> Any:
    """The tree with torch's own tensors in the place of arrays."""
    refs = [one for _, inner in containers(root).values() for one in inner if is_array(one)]
    return rebuild(root, {id(ref): ref.replace(rebuild=None) for ref in refs})


def is_array(node: Any) -> bool:
    """Whether it is a tensor that was a numpy array or scalar in the pickle."""
    return isinstance(node, TensorRef) and node.rebuild is not None and bool(node.rebuild.array)


def as_tensor(node: Any) -> TensorRef | None:
    """One array of a pickle, as :func:`with_arrays` has it; None where it is no array of numbers.

    Raises:
        UnreadableError: its shape is not that of its bytes.
    """
    return _array(node) if _is(node, _CALLED, _OF_BYTES) else None


def _is(node: Any, *names: str) -> bool:
    if not isinstance(node, Obj) or not isinstance(node.func, Global):
        return False
    return node.func.name in names and node.func.module.startswith(_NUMPY)


def _generators(found: Containers) -> set[int]:
    """Ids of what is in the states of random number generators."""
    inside: set[int] = set()
    for node, _ in found.values():
        if isinstance(node, dict) and "bit_generator" in node:
            inside.update(containers(node))
    return inside


def _weights(found: Containers, arrays: dict[int, Any]) -> set[int]:
    """Ids of the arrays in mappings that are state_dicts by the names in them."""
    inside: set[int] = set()
    for node, _ in found.values():
        entries = mapping(node) or {}
        own = {id(value) for value in entries.values()} & arrays.keys()
        if own and all(
            id(value) in own or isinstance(value, TensorRef) or _is(value, _SCALAR)
            for value in entries.values()
        ):
            names = [name for name in entries if isinstance(name, str)]
            inside |= own if any(name.endswith((".weight", ".bias")) for name in names) else set()
    return inside


def _scalars(values: Collection[Any], arrays: dict[int, Any]) -> dict[int, TensorRef]:
    if not any(id(value) in arrays for value in values):
        return {}
    made: dict[int, TensorRef] = {}
    for value in values:
        if _is(value, _SCALAR):
            ref = _scalar(value)
            if ref is None:
                return {}
            made[id(value)] = ref
        elif id(value) not in arrays and not isinstance(value, TensorRef):
            return {}
    return made


def _array(node: Obj) -> TensorRef | None:
    """The tensor that an array is; None where there is no such dtype (objects, texts)."""
    if node.func.name == _CALLED:
        if not isinstance(node.state, tuple) or len(node.state) != 5:
            return None
        _, shape, kind, columns_first, data = node.state
        order = "F" if columns_first else "C"
    else:
        if len(node.args) != 4:
            return None
        data, kind, shape, order = node.args
    if isinstance(data, Obj):  # a bytearray, or no bytes at all
        data = data.args[0] if data.args else b""
    if isinstance(data, str):  # of Python 2
        try:
            data = data.encode("latin-1")
        except UnicodeEncodeError:
            return None
    return _tensor(node, kind, shape, order, data)


def _scalar(node: Obj) -> TensorRef | None:
    kind, data = node.args if len(node.args) == 2 else (None, None)
    return _tensor(node, kind, (), "C", data)


def _tensor(node: Obj, kind: Any, shape: Any, order: Any, data: Any) -> TensorRef | None:
    dtype = _dtype(kind)
    if dtype is None or not isinstance(data, bytes) or not isinstance(shape, tuple):
        return None
    if not all(type(size) is int and size >= 0 for size in shape):
        raise UnreadableError("an array of no shape")
    if prod(shape) * dtype.itemsize != len(data):
        raise UnreadableError(f"an array of {list(shape)} {dtype.name} in {len(data):,} bytes")
    storage: Storage = MemoryStorage(data)
    if dtype.itemsize > 1 and kind.state[1:2] == (">",):
        storage = SwappedStorage(storage, dtype.itemsize // (2 if dtype.kind == "complex" else 1))
    stride = tuple(prod(shape[:i]) for i in range(len(shape))) if order == "F" else None
    return TensorRef(dtype, shape, storage, 0, stride, rebuild=Rebuild(array=node))


def _dtype(kind: Any) -> DType | None:
    """The dtype of numbers; None for all else."""
    if not isinstance(kind, Obj) or kind.func != Global("numpy", "dtype") or not kind.args:
        return None
    code = kind.args[0]
    if not isinstance(code, str) or not isinstance(kind.state, tuple):
        return None
    return BY_NAME.get(_DTYPES.get(code, ""))
