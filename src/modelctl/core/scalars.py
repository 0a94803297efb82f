"""Numpy scalars in a tree, as plain numbers."""

from __future__ import annotations

import struct
from typing import Any

from .nodes import Global, Obj

# numpy's codes of plain numbers, as struct writes them
_SCALARS = {"f8": "d", "f4": "f", "f2": "e", "i8": "q", "i4": "i", "i2": "h", "i1": "b"} | {
    "u8": "Q",
    "u4": "I",
    "u2": "H",
    "u1": "B",
    "b1": "?",
}


def plain_number(node: Any) -> Any:
    """A numpy scalar (``numpy.float64`` of an lr or a metric) as the Python number that it is; any
    other node as it is."""
    if not (isinstance(node, Obj) and isinstance(node.func, Global) and node.func.name == "scalar"):
        return node
    dtype, *rest = node.args or (None,)
    code = dtype.args[0] if isinstance(dtype, Obj) and dtype.args else None
    if code not in _SCALARS or len(rest) != 1 or not isinstance(rest[0], bytes):
        return node
    order = ">" if isinstance(dtype.state, tuple) and dtype.state[1:2] == (">",) else "<"
    form = struct.Struct(order + _SCALARS[code])
    return form.unpack(rest[0])[0] if form.size == len(rest[0]) else node
