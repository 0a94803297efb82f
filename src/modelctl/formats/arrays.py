"""Plain pickles of numpy arrays, as detectron2's model zoo has them (``{"model": {name: array}}``).
Read only: each array is a tensor of its bytes, nothing is called."""

from __future__ import annotations

from math import prod
from typing import Any

from ..core.checkpoint import Checkpoint, Origin
from ..core.dtypes import BY_NAME, DType
from ..core.nodes import Global, Obj
from ..core.notes import warning
from ..core.storages import MemoryStorage
from ..core.tensors import TensorRef
from ..core.tree import containers, rebuild
from ..errors import UnreadableError, UnsupportedError
from ..pickles.interpreter import MAX_SIZE, unpickle
from ..storage.places import Place
from .base import Format

_NUMPY = ("numpy.core.", "numpy._core.")
# numpy's codes of dtypes, as its pickles have them
_DTYPES = {
    **{f"f{n}": f"float{8 * n}" for n in (2, 4, 8)},
    **{f"i{n}": f"int{8 * n}" for n in (1, 2, 4, 8)},
    **{f"u{n}": f"uint{8 * n}" for n in (1, 2, 4, 8)},
    "c8": "complex64",
    "c16": "complex128",
    "b1": "bool",
}


class PickledArrays(Format):
    """A pickle by itself, with numpy arrays for tensors."""

    name = "pickle"
    label = "pickle of arrays"

    def sniff(self, place: Place) -> bool:
        head = place.head
        is_pickle = head[:1] == b"\x80" and head[1:2] in (b"\2", b"\3", b"\4", b"\5")
        return is_pickle and (b"numpy" in head or self._elsewhere(place))

    def _elsewhere(self, place: Place) -> bool:
        """Whether it ends as a pickle does, and names numpy further in than its head."""
        if place.size > MAX_SIZE or place.source.read(place.size - 1, 1) != b".":
            return False
        return b"numpy" in place.source.read(0, place.size)

    def read(self, place: Place) -> Checkpoint:
        if place.size > MAX_SIZE:
            raise UnsupportedError(f"{place.name}: a plain pickle of more than {MAX_SIZE:,} bytes")
        data = place.source.read(0, place.size)
        try:
            root, end, findings = unpickle(data, persistent_load=None)
            found = containers(root)
            arrays = {key: _tensor(node) for key, (node, _) in found.items() if _is_array(node)}
        except UnreadableError as e:
            raise e.located(place.name) from None
        after = len(data) - end
        return Checkpoint(
            rebuild(root, {key: ref for key, ref in arrays.items() if ref is not None}),
            Origin(place.name, self.name, self.label, place.size),
            outside="the plain pickle, whose arrays are read as tensors,",
            warnings=(warning(f"{after:,} bytes after the pickle"),) if after else (),
            findings=tuple(findings),
        )


def _is_array(node: Any) -> bool:
    if not isinstance(node, Obj) or not isinstance(node.func, Global):
        return False
    return node.func.module.startswith(_NUMPY) and node.func.name in ("_reconstruct", "_frombuffer")


def _tensor(node: Obj) -> TensorRef | None:
    """The tensor that an array is; None where there is no such dtype (objects, texts)."""
    if node.func.name == "_reconstruct":  # called for an empty array, and then given a state
        if not isinstance(node.state, tuple) or len(node.state) != 5:
            return None
        _, shape, kind, columns_first, data = node.state
        order = "F" if columns_first else "C"
    else:  # its bytes, as protocol 5 has them
        if len(node.args) != 4:
            return None
        data, kind, shape, order = node.args
    dtype = _dtype(kind)
    if isinstance(data, Obj):  # a bytearray, or no bytes at all
        data = data.args[0] if data.args else b""
    if isinstance(data, str):  # of Python 2
        try:
            data = data.encode("latin-1")
        except UnicodeEncodeError:
            return None
    if dtype is None or not isinstance(data, bytes) or not isinstance(shape, tuple):
        return None
    if not all(type(size) is int and size >= 0 for size in shape):
        raise UnreadableError("an array of no shape")
    if prod(shape) * dtype.itemsize != len(data):
        raise UnreadableError(f"an array of {list(shape)} {dtype.name} in {len(data):,} bytes")
    stride = tuple(prod(shape[:i]) for i in range(len(shape))) if order == "F" else None
    return TensorRef(dtype, shape, MemoryStorage(data), 0, stride)


def _dtype(kind: Any) -> DType | None:
    """The dtype of little-endian numbers; None for all else."""
    if not isinstance(kind, Obj) or kind.func != Global("numpy", "dtype") or not kind.args:
        return None
    code, state = kind.args[0], kind.state
    swapped = isinstance(state, tuple) and len(state) > 1 and state[1] == ">"
    if not isinstance(code, str) or swapped:
        return None
    return BY_NAME.get(_DTYPES.get(code, ""))
