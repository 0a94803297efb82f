"""Bytes as numbers, against torch's and numpy's."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from modelctl.core.dtypes import BY_NAME, DType
from modelctl.core.numbers import bits_differ, gap, numbers, only_value
from modelctl.core.storages import MemoryStorage
from modelctl.core.tensors import TensorRef, TensorSpec

KNOWN = [
    *("float64", "float32", "float16", "bfloat16", "int64", "int32", "int16", "int8"),
    *("uint64", "uint32", "uint16", "uint8", "bool", "complex32", "complex64", "complex128"),
    *("float8_e5m2", "float8_e4m3fn", "float8_e5m2fnuz", "float8_e4m3fnuz", "float8_e8m0fnu"),
]


@pytest.mark.parametrize("name", BY_NAME)
def test_as_torch_reads_them(name: str) -> None:
    raw = bytes(range(256)) if name != "bool" else bytes([0, 1] * 32)
    found = numbers(raw, BY_NAME[name])
    assert (found is not None) == (name in KNOWN)
    if found is None or not hasattr(torch, name):
        return
    tensor = torch.frombuffer(bytearray(raw), dtype=getattr(torch, name))
    wide = {"float": torch.float64, "complex": torch.complex128, "bool": torch.float64}
    kind = BY_NAME[name].kind
    expected = tensor.to(wide[kind]) if kind in wide else tensor
    np.testing.assert_array_equal(found, expected.numpy())
    assert found.dtype == expected.numpy().dtype


def ref(raw: bytes, name: str, shape: tuple[int, ...] = ()) -> TensorRef:
    return TensorRef(BY_NAME[name], shape, MemoryStorage(raw))


def test_only_value() -> None:
    assert only_value(ref(np.float32(0.5).tobytes(), "float32")) == 0.5
    assert only_value(ref(b"\x01", "bool", (1, 1))) is True
    assert only_value(ref(b"\x01", "uint8")) == 1
    assert only_value(ref(bytes(8), "float32", (2,))) is None
    assert only_value(ref(b"\x01", "float8_e5m2")) == 2.0**-16
    assert only_value(ref(b"\x01", "quint8")) is None
    assert type(only_value(ref((2**63).to_bytes(8, "little"), "uint64"))) is int


def test_bits_and_gaps() -> None:
    f4 = BY_NAME["float32"]
    zeros, signed = np.zeros(2, "<f4"), np.array([0.0, -0.0], "<f4")
    assert bits_differ(zeros.tobytes(), signed.tobytes(), f4) == 1
    for x, y in ((bytes(4), bytes(8)), (bytes(3), bytes(3))):
        with pytest.raises(ValueError, match="cut"):
            bits_differ(x, y, f4)
    low, high = np.array([-(2**63), 0]), np.array([2**63 - 1, 5])
    assert [int(n) for n in gap(low, high)] == [2**64, 5]  # as a float, at the end
    assert gap(np.array([1.5]), np.array([4.0])).tolist() == [2.5]


# ---------------------------------------------------------------------- bytes of n elements


@pytest.mark.parametrize("dtype", [one for one in BY_NAME.values() if one.is_in_torch], ids=str)
def test_bytes_of_plain_dtypes(dtype: DType) -> None:
    for numel in (0, 1, 7, 2**40 + 1):
        assert dtype.nbytes(numel) == numel * dtype.itemsize


def test_bytes_of_packed_and_block_dtypes() -> None:
    packed = DType("int4", "i4", 1, None, "int", per_item=2)
    assert [packed.nbytes(n) for n in (0, 1, 2, 3)] == [0, 1, 1, 2]
    blocks = DType("q4_0", "q4_0", 18, None, "quantized", per_item=32)  # 16 bytes and a scale
    assert [blocks.nbytes(n) for n in (0, 32, 64)] == [0, 18, 36]
    assert TensorSpec(blocks, (4, 64)).nbytes == 4 * 36
    assert TensorRef(packed, (3, 3), MemoryStorage(b"")).nbytes == 5
    assert BY_NAME["float4_e2m1fn_x2"].nbytes(3) == 3  # items of two values, counted as such
