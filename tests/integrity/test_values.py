"""What is wrong with values, by their bits: compared with torch, over all there are of 8 and 16."""

from __future__ import annotations

import numpy as np
import pytest

from modelctl.core.dtypes import BY_NAME
from modelctl.integrity.values import Values, has_special, look


def counted(raw: bytes, name: str) -> Values:
    torch = pytest.importorskip("torch")
    values = torch.frombuffer(bytearray(raw), dtype=torch.uint8).view(getattr(torch, name))
    parts = torch.view_as_real(values) if values.is_complex() else values
    wide = parts.to(torch.float64)
    return Values(int(wide.isnan().sum()), int(wide.isinf().sum()), not bool((wide != 0).any()))


@pytest.mark.parametrize("name", ["float16", "bfloat16"])
def test_all_of_16_bits(name: str) -> None:
    raw = np.arange(1 << 16, dtype="<u2").tobytes()
    assert look([raw], BY_NAME[name]) == counted(raw, name)
    for at in range(0, len(raw), 512):
        some = raw[at : at + 512]
        assert look([some], BY_NAME[name]) == counted(some, name)


@pytest.mark.parametrize(
    "name", ["float8_e4m3fn", "float8_e5m2", "float8_e4m3fnuz", "float8_e5m2fnuz"]
)
def test_all_of_8_bits(name: str) -> None:
    for value in range(256):
        raw = bytes([value])
        assert look([raw], BY_NAME[name]) == counted(raw, name)


@pytest.mark.parametrize("name", ["float32", "float64", "complex64", "complex128"])
def test_wide_ones(name: str) -> None:
    special = [0.0, -0.0, 1.0, -1.0, np.inf, -np.inf, np.nan, -np.nan, 1e-45, 3e38]
    rng = np.random.default_rng(0)
    code = "<f8" if name in ("float64", "complex128") else "<f4"
    for _ in range(200):
        raw = rng.choice(special, 8).astype(code).tobytes()
        assert look([raw], BY_NAME[name]) == counted(raw, name)


def test_pieces_that_are_cut_anywhere() -> None:
    raw = np.array([1, np.nan, np.inf, 0, 2], "<f4").tobytes()
    for size in range(1, len(raw) + 1):
        pieces = [raw[at : at + size] for at in range(0, len(raw), size)]
        assert look(pieces, BY_NAME["float32"]) == Values(1, 1, False)


def test_which_have_any() -> None:
    named = {name for name, dtype in BY_NAME.items() if has_special(dtype)}
    assert named >= {"float32", "bfloat16", "float8_e4m3fn", "complex64"}
    assert not named & {"int64", "bool", "float4_e2m1fn_x2", "qint8", "float6_e2m3fn"}
