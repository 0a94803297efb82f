"""Bytes as numbers: the elements of tensors, and numpy's scalars in a tree.

numpy is imported where it is needed: most of what modelctl does reads no element.
"""

from __future__ import annotations

import struct
from functools import cache
from typing import Any

from .dtypes import AS_NUMPY, DType
from .nodes import Global, Obj
from .tensors import TensorRef

# numpy's codes of plain numbers, as struct writes them
_SCALARS = {"f8": "d", "f4": "f", "f2": "e", "i8": "q", "i4": "i", "i2": "h", "i1": "b"} | {
    "u8": "Q",
    "u4": "I",
    "u2": "H",
    "u1": "B",
    "b1": "?",
}


# Of fp8: bits of the exponent, its bias, and what has no number (OCP's OFP8, arXiv 2206.02915)
_FLOAT8 = {
    "float8_e5m2": (5, 15, "ieee"),
    "float8_e4m3fn": (4, 7, "fn"),
    "float8_e5m2fnuz": (5, 16, "fnuz"),
    "float8_e4m3fnuz": (4, 8, "fnuz"),
    "float8_e8m0fnu": (8, 127, "scale"),
}


def numbers(raw: bytes | memoryview, dtype: DType) -> Any:
    """The elements as an array: floating ones and bool as float64, complex ones as complex128,
    integers as they are; None for a dtype without arithmetic here (packed, quantized)."""
    import numpy as np

    if dtype.name in _FLOAT8:
        return _float8(dtype.name)[np.frombuffer(raw, "u1")]

    if dtype.name == "bfloat16":
        wide = np.frombuffer(raw, "<u2").astype("<u4") << 16
        return wide.view("<f4").astype("f8")
    if dtype.name == "complex32":
        return np.frombuffer(raw, "<f2").astype("f8").view("c16")
    code = AS_NUMPY.get(dtype.name)
    if code is None:
        return None
    values = np.frombuffer(raw, code)
    if dtype.kind == "int":
        return values
    return values.astype("c16" if dtype.kind == "complex" else "f8")


@cache
def _float8(name: str) -> Any:
    """The value of each byte."""
    import numpy as np

    width, bias, special = _FLOAT8[name]
    codes = np.arange(256)
    if special == "scale":  # a power of two, without a sign
        return np.where(codes == 255, np.nan, np.ldexp(1.0, codes - bias))
    fraction_bits = 7 - width
    exponent = (codes >> fraction_bits) & ((1 << width) - 1)
    fraction = (codes & ((1 << fraction_bits) - 1)) / (1 << fraction_bits)
    size = np.where(
        exponent == 0, np.ldexp(fraction, 1 - bias), np.ldexp(1 + fraction, exponent - bias)
    )
    if special == "ieee":
        top = exponent == (1 << width) - 1
        size = np.where(top, np.where(fraction == 0, np.inf, np.nan), size)
    elif special == "fn":
        size[[0x7F, 0xFF]] = np.nan
    else:
        size[0x80] = np.nan
    return np.where(codes >> 7, -size, size)


def only_value(ref: TensorRef) -> Any:
    """The one value of a tensor that has one (``step`` of Adam), as Python's; else None."""
    values = numbers(ref.tobytes(), ref.dtype) if ref.numel == 1 else None
    if values is None:
        return None
    value = values[0].item()
    return bool(value) if ref.dtype.kind == "bool" else value


def bits_differ(x: bytes | memoryview, y: bytes | memoryview, dtype: DType) -> int:
    """How many elements of two pieces of equal length are not the same, bit for bit."""
    import numpy as np

    if len(x) % dtype.itemsize or len(x) != len(y):
        raise ValueError("pieces that are not cut at elements")
    bits, rest = divmod(8 * dtype.itemsize, dtype.per_item)
    if dtype.per_item > 1 and not rest:  # several in an item, with nothing beside them
        wrong = np.frombuffer(x, "u1") ^ np.frombuffer(y, "u1")
        return int(np.unpackbits(wrong, bitorder="little").reshape(-1, bits).any(axis=1).sum())
    raw_x, raw_y = (np.frombuffer(raw, dtype=f"V{dtype.itemsize}") for raw in (x, y))
    return int((raw_x != raw_y).sum())


def gap(u: Any, v: Any) -> Any:
    """\\|u - v\\| of two arrays, of integers without rounding or overflow before the end."""
    import numpy as np

    if u.dtype.kind not in "iu":
        return np.abs(u - v)
    wide = u.astype("u8") - v.astype("u8")  # modulo 2**64
    return np.where(u >= v, wide, -wide).astype("f8")


def plain_number(node: Any) -> Any:
    """A numpy scalar (``numpy.float64`` of an lr or a metric) as the Python number that it is; any
    other node as it is."""
    if isinstance(node, TensorRef) and node.rebuild is not None and not node.shape:
        node = node if node.rebuild.array is None else node.rebuild.array
    if not (isinstance(node, Obj) and isinstance(node.func, Global) and node.func.name == "scalar"):
        return node
    dtype, *rest = node.args or (None,)
    code = dtype.args[0] if isinstance(dtype, Obj) and dtype.args else None
    if code not in _SCALARS or len(rest) != 1 or not isinstance(rest[0], bytes):
        return node
    order = ">" if isinstance(dtype.state, tuple) and dtype.state[1:2] == (">",) else "<"
    form = struct.Struct(order + _SCALARS[code])
    return form.unpack(rest[0])[0] if form.size == len(rest[0]) else node
