"""A copy is what torch loads of the original, whatever container it came from."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

import modelctl as mc
from modelctl.errors import LossError

from .files import Found, each
from .made import Made, bare


def same(a: Any, b: Any) -> None:
    """Equal in type, order, strides, metadata and bits."""
    assert type(a) is type(b)
    if isinstance(a, torch.Tensor):
        assert (a.dtype, a.shape, a.stride(), a.requires_grad) == (
            *(b.dtype, b.shape, b.stride(), b.requires_grad),
        )
        assert bare(a) == bare(b)
    elif isinstance(a, dict):
        assert list(a) == list(b)
        assert getattr(a, "_metadata", None) == getattr(b, "_metadata", None)
        for key in a:
            same(a[key], b[key])
    elif isinstance(a, list | tuple):
        assert len(a) == len(b)
        for one, other in zip(a, b, strict=True):
            same(one, other)
    elif isinstance(a, float):
        assert a == b or (a != a and b != b)
    else:
        assert a == b


def load(path: Path, **options: Any) -> Any:
    return torch.load(path, weights_only=True, map_location="cpu", **options)


@each(lambda card: card.plain)
def test_torch_loads_the_copy_as_the_original(file: Made | Found, tmp_path: Path) -> None:
    with mc.open(file.path) as ckpt:
        mc.save(ckpt, tmp_path / "copy.pt")
    original = load(file.path)
    for mmap in (False, True):
        same(original, load(tmp_path / "copy.pt", mmap=mmap))


@each()
def test_a_copy_has_the_same_tensors(file: Made | Found, tmp_path: Path) -> None:
    with mc.open(file.path) as ckpt:
        if ckpt.outside is not None:
            with pytest.raises(LossError, match="would be lost"):
                mc.save(ckpt, tmp_path / "copy.pt")
            return
        mc.save(ckpt, tmp_path / "copy.pt")
    with mc.open(tmp_path / "copy.pt") as copy:
        file.check(copy)
