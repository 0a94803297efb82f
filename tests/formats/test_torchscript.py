"""TorchScript of torch up to 1.4, whose classes list their parameters and not their buffers."""

from __future__ import annotations

import re
import zipfile
from pathlib import Path

import pytest
import torch

import modelctl as mc

SAMPLE = Path(__file__).parents[2] / "sample_models" / "torchscript.pt"


@pytest.fixture
def old(tmp_path: Path) -> Path:
    """The sample with its lists of buffers taken out."""
    path = tmp_path / "old.pt"
    taken = 0
    with zipfile.ZipFile(SAMPLE) as zipped, zipfile.ZipFile(path, "w") as out:
        for info in zipped.infolist():
            data = zipped.read(info)
            if info.filename.endswith(".py"):
                data, n = re.subn(rb"(?m)^  __buffers__ = .*\n", b"", data)
                taken += n
            out.writestr(info.filename, data)
    assert taken
    return path


def test_what_is_no_parameter_is_a_buffer(old: Path, tmp_path: Path) -> None:
    with mc.open(SAMPLE) as ckpt:
        want = {name: (ref.role, ref.tobytes()) for name, ref in ckpt.state_dict().items()}
    with mc.open(old) as ckpt:
        found = {name: (ref.role, ref.tobytes()) for name, ref in ckpt.state_dict().items()}
        mc.save(mc.convert(ckpt, weights_only=True), tmp_path / "state.pt")
    assert any(role == "buffer" for role, _ in want.values())
    assert found == want
    assert set(torch.load(tmp_path / "state.pt")) == set(want)
