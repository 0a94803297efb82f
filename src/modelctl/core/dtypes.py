"""One table of dtypes: torch's name, a short name for people, safetensors' tag, the item size.

Item sizes are those of torch's storages, in bytes. ``float4_e2m1fn_x2`` packs two values in an
item; safetensors counts the values, torch the items, and so do shapes here. A dtype whose elements
are counted one by one but stored together (two in a byte, 32 with their scale) has items of
several elements.
"""

from __future__ import annotations

from typing import Any, NamedTuple


class DType(NamedTuple):
    """A dtype: ``name`` is torch's, ``short`` is for tables, ``tag`` is safetensors' or None;
    an item of ``itemsize`` bytes holds ``per_item`` elements."""

    name: str
    short: str
    itemsize: int
    tag: str | None
    kind: str  # "float", "int", "bool", "complex", "bits" or "quantized"
    per_item: int = 1

    @property
    def is_floating(self) -> bool:
        """True for the dtypes that a parameter can have: floating and complex ones."""
        return self.kind in ("float", "complex")

    @property
    def is_in_torch(self) -> bool:
        """Whether torch has it: a dtype of torch counts items."""
        return self.per_item == 1

    def nbytes(self, numel: int) -> int:
        """Bytes of so many elements in a row: of whole items, the last one perhaps not full."""
        return -(-numel // self.per_item) * self.itemsize

    def __str__(self) -> str:
        return self.name


_TABLE = [
    DType("float64", "f64", 8, "F64", "float"),
    DType("float32", "f32", 4, "F32", "float"),
    DType("float16", "f16", 2, "F16", "float"),
    DType("bfloat16", "bf16", 2, "BF16", "float"),
    DType("float8_e5m2", "f8e5m2", 1, "F8_E5M2", "float"),
    DType("float8_e4m3fn", "f8e4m3", 1, "F8_E4M3", "float"),
    DType("float8_e5m2fnuz", "f8e5m2fnuz", 1, "F8_E5M2FNUZ", "float"),
    DType("float8_e4m3fnuz", "f8e4m3fnuz", 1, "F8_E4M3FNUZ", "float"),
    DType("float8_e8m0fnu", "f8e8m0", 1, "F8_E8M0", "float"),
    DType("float4_e2m1fn_x2", "f4x2", 1, "F4", "float"),
    DType("float6_e2m3fn", "f6e2m3", 3, "F6_E2M3", "float", 4),
    DType("float6_e3m2fn", "f6e3m2", 3, "F6_E3M2", "float", 4),
    DType("int64", "i64", 8, "I64", "int"),
    DType("int32", "i32", 4, "I32", "int"),
    DType("int16", "i16", 2, "I16", "int"),
    DType("int8", "i8", 1, "I8", "int"),
    DType("uint64", "u64", 8, "U64", "int"),
    DType("uint32", "u32", 4, "U32", "int"),
    DType("uint16", "u16", 2, "U16", "int"),
    DType("uint8", "u8", 1, "U8", "int"),
    DType("bool", "bool", 1, "BOOL", "bool"),
    DType("complex128", "c128", 16, None, "complex"),
    DType("complex64", "c64", 8, "C64", "complex"),
    DType("complex32", "c32", 4, None, "complex"),
    DType("bcomplex32", "bc32", 4, None, "complex"),
    DType("bits8", "b8", 1, None, "bits"),
    DType("bits16", "b16", 2, None, "bits"),
    DType("bits1x8", "b1x8", 1, None, "bits"),
    DType("bits2x4", "b2x4", 1, None, "bits"),
    DType("bits4x2", "b4x2", 1, None, "bits"),
    DType("qint8", "qi8", 1, None, "quantized"),
    DType("quint8", "qu8", 1, None, "quantized"),
    DType("qint32", "qi32", 4, None, "quantized"),
    DType("quint4x2", "qu4x2", 1, None, "quantized"),
    DType("quint2x4", "qu2x4", 1, None, "quantized"),
]

BY_NAME = {d.name: d for d in _TABLE}
BY_TAG = {d.tag: d for d in _TABLE if d.tag is not None}

# torch.<Class>, as it is named in persistent ids; UntypedStorage has no dtype and counts bytes.
BY_STORAGE_CLASS = {
    "DoubleStorage": BY_NAME["float64"],
    "FloatStorage": BY_NAME["float32"],
    "HalfStorage": BY_NAME["float16"],
    "BFloat16Storage": BY_NAME["bfloat16"],
    "LongStorage": BY_NAME["int64"],
    "IntStorage": BY_NAME["int32"],
    "ShortStorage": BY_NAME["int16"],
    "CharStorage": BY_NAME["int8"],
    "ByteStorage": BY_NAME["uint8"],
    "BoolStorage": BY_NAME["bool"],
    "ComplexDoubleStorage": BY_NAME["complex128"],
    "ComplexFloatStorage": BY_NAME["complex64"],
    "QInt8Storage": BY_NAME["qint8"],
    "QInt32Storage": BY_NAME["qint32"],
    "QUInt8Storage": BY_NAME["quint8"],
    "QUInt4x2Storage": BY_NAME["quint4x2"],
    "QUInt2x4Storage": BY_NAME["quint2x4"],
}
STORAGE_CLASS = {d.name: name for name, d in BY_STORAGE_CLASS.items()}

# How numpy reads the elements of a dtype that it has, little-endian.
AS_NUMPY = {f"float{8 * n}": f"<f{n}" for n in (2, 4, 8)} | {
    "complex64": "<c8",
    "complex128": "<c16",
    "bool": "u1",
}
AS_NUMPY |= {f"{u}int{8 * n}": f"<{u or 'i'}{n}" for n in (1, 2, 4, 8) for u in ("", "u")}


def array(raw: bytes, dtype: DType) -> Any:
    """The elements as an array of the dtype itself, bfloat16 as float32; None for a dtype that
    numpy has not. Writable: of bytes of its own."""
    import numpy as np

    if dtype.name == "bfloat16":
        return (np.frombuffer(raw, "<u2").astype("<u4") << 16).view("<f4")
    code = "?" if dtype.name == "bool" else AS_NUMPY.get(dtype.name)
    return None if code is None else np.frombuffer(bytearray(raw), code)
