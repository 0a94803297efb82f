"""A member that is longer than the storage in it: its checksum is that of the whole member."""

from __future__ import annotations

import zlib
from pathlib import Path

import pytest

import modelctl as mc
from modelctl.errors import DamagedError

from ...hostile.build.containers import BIAS, torch_zip

BEHIND = b"what lies behind"


def longer(folder: Path, data: bytes) -> Path:
    whole = BIAS + BEHIND
    path = folder / "longer.pt"
    path.write_bytes(torch_zip(data_1={"data": data, "lies": {"crc": zlib.crc32(whole)}}))
    return path


@pytest.mark.parametrize("suffix", [".pt", ".safetensors"])
@pytest.mark.parametrize("at", [0, 15, 16, 31])
def test_damage_gets_no_fresh_checksum(suffix: str, at: int, tmp_path: Path) -> None:
    data = bytearray(BIAS + BEHIND)
    data[at] ^= 1
    out = tmp_path / f"out{suffix}"
    with (
        mc.open(longer(tmp_path, bytes(data))) as ckpt,
        pytest.raises(DamagedError, match=r"longer\.pt.*CRC-32"),
    ):
        mc.save(mc.rename(ckpt, ["bias=b"]), out)
    assert not out.exists()


@pytest.mark.parametrize("suffix", [".pt", ".safetensors"])
def test_a_whole_one_is_written(suffix: str, tmp_path: Path) -> None:
    out = tmp_path / f"out{suffix}"
    with mc.open(longer(tmp_path, BIAS + BEHIND)) as ckpt:
        assert [note.text for note in ckpt.warnings] == ["a/data/1 is 16 bytes too long"]
        mc.save(mc.rename(ckpt, ["bias=b"]), out)
    assert BEHIND not in out.read_bytes()
    with mc.open(out) as ckpt:
        assert ckpt.tensors()["b"].tobytes() == BIAS
        assert ckpt.warnings == ()
