"""Checkpoints of some size: many small tensors among large ones, as in a ResNet."""

from __future__ import annotations

from functools import cache
from pathlib import Path

import pytest

torch = pytest.importorskip("torch")


def state_dict() -> dict[str, torch.Tensor]:
    """320 tensors, 64 MB: blocks of four large ones and a dozen small."""
    generator = torch.Generator().manual_seed(0)
    made = {}
    for block in range(20):
        for n in range(4):
            made[f"layer{block}.conv{n}.weight"] = torch.randn(448, 448, generator=generator)
            for name in ("weight", "bias", "running_mean"):
                made[f"layer{block}.bn{n}.{name}"] = torch.randn(448, generator=generator)
    return made


@cache
def _made() -> dict[str, torch.Tensor]:
    return state_dict()


def pt(folder: Path) -> bytes:
    torch.save(_made(), folder / "made.pt")
    return (folder / "made.pt").read_bytes()


def legacy(folder: Path) -> bytes:
    torch.save(_made(), folder / "legacy.pt", _use_new_zipfile_serialization=False)
    return (folder / "legacy.pt").read_bytes()


def safetensors() -> bytes:
    from safetensors.torch import save

    return save(_made())
