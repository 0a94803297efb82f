"""Damaged files: cut off at every byte, with wrong bytes: read, or refused with a word of ours."""

from __future__ import annotations

import contextlib
import io
import random
from pathlib import Path

import pytest

import modelctl
from modelctl.errors import ModelctlError

torch = pytest.importorskip("torch")
KINDS = ("zip", "legacy", "safetensors")


def read_all(path: Path) -> None:
    with modelctl.open(path) as ckpt:
        for ref in ckpt.tensors().values():
            ref.tobytes()


@pytest.fixture(scope="module")
def small() -> dict[str, bytes]:
    from safetensors.torch import save

    state = {"a.weight": torch.arange(6.0).reshape(2, 3).t(), "b": torch.tensor([True])}
    made = {}
    for name, new in (("zip", True), ("legacy", False)):
        buffer = io.BytesIO()
        torch.save({"model": state, "epoch": 3}, buffer, _use_new_zipfile_serialization=new)
        made[name] = buffer.getvalue()
    flat = {name: tensor.contiguous() for name, tensor in state.items()}
    made["safetensors"] = save(flat, {"format": "pt"})
    return made


@pytest.mark.parametrize("kind", KINDS)
def test_every_prefix_is_refused(kind: str, small: dict[str, bytes], tmp_path: Path) -> None:
    data, path = small[kind], tmp_path / "f"
    path.write_bytes(data)
    read_all(path)
    for end in range(len(data)):
        path.write_bytes(data[:end])
        with pytest.raises(ModelctlError):
            read_all(path)


@pytest.mark.parametrize("kind", KINDS)
def test_wrong_bytes(kind: str, small: dict[str, bytes], tmp_path: Path) -> None:
    """Never another exception than ours, whichever byte is wrong."""
    data, path = small[kind], tmp_path / "f"
    rng = random.Random(kind)
    for _ in range(1500):
        wrong = bytearray(data)
        for _ in range(rng.choice((1, 1, 1, 2, 5))):
            byte = rng.choice((0, 1, 0x7F, 0x80, 0xFF, rng.randrange(256)))
            wrong[rng.randrange(len(data))] = byte
        path.write_bytes(wrong)
        with contextlib.suppress(ModelctlError):
            read_all(path)


@pytest.mark.parametrize("kind", ["legacy", "safetensors"])
def test_every_bit_of_the_head(kind: str, small: dict[str, bytes], tmp_path: Path) -> None:
    data, path = small[kind], tmp_path / "f"
    for at in range(min(len(data), 900)):
        for bit in (0, 3, 6, 7):
            wrong = bytearray(data)
            wrong[at] ^= 1 << bit
            path.write_bytes(wrong)
            with contextlib.suppress(ModelctlError):
                read_all(path)
