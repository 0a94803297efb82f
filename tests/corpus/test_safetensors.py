"""Every tensor of a model by the official reader of safetensors; or a reason why not."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch
from safetensors import safe_open

import modelctl as mc
from modelctl.errors import AmbiguousError, LossError, NoMatchError

from .files import Found, each
from .made import Made

REASONS = re.compile(r"share memory|which safetensors does not know|is a \w+ tensor")


@each()
def test_its_weights_as_safetensors(file: Made | Found, tmp_path: Path) -> None:
    out = tmp_path / "copy.safetensors"
    with mc.open(file.path) as ckpt:
        try:
            model = mc.convert(ckpt, weights_only=True)
        except (NoMatchError, AmbiguousError):
            found = ckpt.sections
            assert not found.models or not found.certain or not found.models[0].entries
            return
        if not model.sections.models:  # tensors without names
            with pytest.raises(LossError, match="safetensors holds one flat state_dict"):
                mc.save(model, out)
            return
        refs = model.state_dict()
        try:
            mc.save(model, out)
        except LossError as e:
            lost = e.message
        else:
            lost = None
        if lost is not None:
            assert REASONS.search(lost)
            assert not out.exists()
            return
        with safe_open(out, "pt") as official:
            names = set(official.keys())
            metadata = official.metadata()
            assert metadata["format"] == "pt"
            for name, ref in refs.items():
                tensor = official.get_tensor(name if name in names else metadata[name])
                assert list(tensor.shape) == list(ref.shape)
                raw = tensor.contiguous().flatten().view(torch.uint8).numpy().tobytes()
                assert raw == ref.tobytes(), name
            assert names <= set(refs)


# What can't be written so, of our own: for these reasons, and no others.
LOST = {
    "dtypes": "complex128, which safetensors does not know",
    "dtypes_legacy": "complex128, which safetensors does not know",
    "strided": "share memory",
    "strided_legacy": "share memory",
}


@each(lambda card: card.id in LOST)
def test_what_it_can_not_hold(file: Made, tmp_path: Path, request: pytest.FixtureRequest) -> None:
    name = request.node.callspec.params["file"]
    with mc.open(file.path) as ckpt, pytest.raises(LossError, match=LOST[name]):
        mc.save(ckpt, tmp_path / "copy.safetensors")
