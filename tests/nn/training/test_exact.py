"""Training that was interrupted goes on bit for bit as if it had not been."""

from __future__ import annotations

import os
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
import torch
from torch import optim

import modelctl as mc
import modelctl.nn as mnn
from tests.nn.nets import Net, same

from .loops import CASES, equal, main

ROOT = Path(__file__).parents[3]


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """Every case trained straight, and with a checkpoint between it and a new process."""
    folder = tmp_path_factory.mktemp("runs")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for case in CASES:
            for phase in ("straight", "first"):
                main(case, folder / case, phase)
    command = [sys.executable, "-W", "ignore", "-m", "tests.nn.training.loops", str(folder), *CASES]
    env = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, env=env)
    assert done.returncode == 0, done.stderr
    return folder


@pytest.mark.parametrize("case", CASES)
def test_resume_is_bit_exact_in_a_new_process(runs, case):
    straight, second = (
        torch.load(runs / f"{case}.{phase}", weights_only=True) for phase in ("straight", "second")
    )
    for part, expected in straight.items():
        assert equal(second[part], expected), part


@pytest.mark.parametrize("case", CASES)
def test_the_file_is_one_that_plain_torch_reads(runs, case):
    whole = torch.load(runs / case, weights_only=True)
    keys = {"model", "optimizer", "scheduler", "epoch", "step", "lr", "rng", "extra"}
    assert whole.keys() - {"ema", "scaler"} == keys
    assert equal(torch.load(runs / case, weights_only=True, mmap=True), whole)
    Net().load_state_dict(whole["model"])
    assert type(whole["lr"]) is float
    with mc.open(runs / case) as ckpt:
        assert ckpt.sections.kind == "training checkpoint"
        assert ckpt.sections.epoch == (("epoch",), 2)
        assert not ckpt.findings


def test_torch_load_state_dict_gives_the_same(runs):
    whole = torch.load(runs / "adamw", weights_only=True)
    net = Net()
    optimizer = optim.AdamW(net.named_parameters(), lr=0.01)
    mine, other = Net(), Net()
    mine_optimizer = optim.AdamW(mine.named_parameters(), lr=0.01)
    net.load_state_dict(whole["model"])
    optimizer.load_state_dict(whole["optimizer"])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        mnn.resume(runs / "adamw", model=mine, optimizer=mine_optimizer)
        state = mnn.resume(runs / "adamw", model=other)
    assert same(mine.state_dict(), net.state_dict())
    assert equal(mine_optimizer.state_dict(), optimizer.state_dict())
    assert state.restored == ("model", "rng")
    assert state.unused == ("optimizer", "scheduler", "ema")
