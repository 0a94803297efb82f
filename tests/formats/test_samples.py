"""The samples: one in every container, each opened and summarised by the command line."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from modelctl.cli import run

SAMPLES = Path(__file__).parents[2] / "sample_models"
# format, kind, tensors, parameters, buffer elements; the net has 129 and 9
EXPECTED = {
    "cnn-ddp.pt": ("torch", "training checkpoint", 47, 19922, 247),
    "cnn-legacy.pth": ("torch-legacy", "state_dict", 47, 19922, 247),
    "cnn.safetensors": ("safetensors", "state_dict", 47, 19922, 247),
    "layer3-adamw.pt": ("torch", "optimizer", 0, 0, 0),
    "whole-module.pt": ("torch", "whole module", 8, 129, 9),
    # TorchScript does not know that a buffer isn't persistent
    "torchscript.pt": ("torchscript", "whole module", 9, 129, 10),
    "exported.pt2": ("torch-export", "state_dict", 8, 129, 9),
    "sharded-safetensors": ("sharded", "state_dict", 8, 129, 9),
    "sharded-bin": ("sharded", "state_dict", 8, 129, 9),
    "torch-0.1.pt": ("torch-tar", "state_dict", 8, 129, 9),
    "allennlp.tar.gz": (None, "checkpoint", 8, 129, 9),
    "lightning.ckpt": ("torch", "training checkpoint", 8, 129, 9),
    "sb3-agent.zip": ("archive", "training checkpoint", 4, 58, 0),
    "odd-tensors.pt": ("torch", "state_dict", 11, 65, 13),
}


def test_every_sample_is_expected_and_in_the_readme() -> None:
    suffixes = {".py", ".md", ".toml"}
    files = {
        one.name
        for one in SAMPLES.iterdir()
        if one.suffix not in suffixes and one.name != "__pycache__"
    }
    assert files == set(EXPECTED)
    listed = re.findall(r"^\| `([^`]+?)/?` \|", (SAMPLES / "README.md").read_text(), re.M)
    assert set(listed) == files | {"transfer.toml"}


@pytest.mark.parametrize("name", EXPECTED)
def test_summary(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    format_, kind, tensors, params, buffers = EXPECTED[name]
    assert run(["summary", str(SAMPLES / name), "--format", "json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert format_ in (None, found["source"]["format"])
    totals = found["totals"]
    assert (found["source"]["kind"], totals["tensors"]) == (kind, tensors)
    assert (totals["params_unique"], totals["buffers"]) == (params, buffers)


@pytest.mark.parametrize("name", EXPECTED)
def test_every_command_that_looks(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    for command in (["summary", "--depth", "all"], ["ls", "--section", "all"], ["show"]):
        assert run([command[0], str(SAMPLES / name), *command[1:]]) == 0, command
        printed = capsys.readouterr()
        assert printed.out
        assert "Traceback" not in printed.err


@pytest.mark.parametrize("name", EXPECTED)
def test_no_sample_names_a_place_of_the_machine_that_made_it(name: str) -> None:
    place = re.compile(rb"/(?:home|root|tmp|Users|usr|work)/|site-packages")
    files = [SAMPLES / name] if (SAMPLES / name).is_file() else (SAMPLES / name).iterdir()
    for file in files:
        assert not place.search(file.read_bytes()), file
