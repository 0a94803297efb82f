"""torchrun: rank 0 writes, all resume, each with its own random numbers."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import modelctl.nn as mnn
from modelctl.errors import RefusedError
from tests.nn.nets import Net

from .loops import equal

ROOT = Path(__file__).parents[3]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    if not torch.distributed.is_available() or not torch.distributed.is_gloo_available():
        pytest.skip("this torch has no gloo")
    folder = tmp_path_factory.mktemp("ranks")
    options = ["--standalone", "--nproc-per-node", "2", "--max-restarts", "1"]
    run = [sys.executable, "-m", "torch.distributed.run", *options, "-m", "tests.nn.training.ranks"]
    env = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore"}
    done = subprocess.run([*run, str(folder)], cwd=ROOT, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return folder


@pytest.mark.parametrize("rank", [0, 1])
def test_two_processes_go_on_bit_for_bit(folder, rank):
    straight, resumed = (
        torch.load(folder / f"{what}.{rank}", weights_only=True) for what in ("straight", "resumed")
    )
    for part, expected in straight.items():
        assert equal(resumed[part], expected), part


def test_the_ranks_differ_in_their_random_numbers_alone(folder):
    ends = [torch.load(folder / f"resumed.{rank}", weights_only=True) for rank in (0, 1)]
    assert not equal(ends[0]["random"], ends[1]["random"])
    params = [{n: v for n, v in end["model"].items() if "running" not in n} for end in ends]
    assert equal(params[0], params[1])


def test_one_file_holds_all_and_goes_on_alone_too(folder):
    assert sorted(p.name for p in folder.glob("*.pt")) == [
        *("alone.pt", "every.pt", "latest.pt", "step-5.pt")
    ]
    whole = torch.load(folder / "step-5.pt", weights_only=True)
    assert len(whole["rng"]["others"]) == 1
    assert not equal(whole["rng"]["others"][0]["torch"], whole["rng"]["torch"])
    net = Net()
    with pytest.warns(UserWarning, match="generators of 2 processes were saved, 1 are here"):
        mnn.resume(folder / "step-5.pt", model=net)
    assert torch.equal(torch.get_rng_state(), whole["rng"]["torch"])
    assert not net.conv1.weight.requires_grad


def test_generators_that_are_no_list(folder, tmp_path):
    whole = torch.load(folder / "step-5.pt", weights_only=True)
    whole["rng"]["others"] = 3
    torch.save(whole, tmp_path / "a.pt")
    with pytest.raises(RefusedError, match="rng is not one"):
        mnn.resume(tmp_path / "a.pt", model=Net())
