"""A checkpoint written by a thread: what it holds, who hears of an error, what a kill leaves."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import torch
from torch import nn, optim

import modelctl.nn as mnn
from modelctl.errors import RefusedError, WriteError
from modelctl.nn.training import save as saving
from tests.nn.training.loops import equal
from tests.storage.faults import leftovers

ROW = "epoch-{epoch:03d}.pt"


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(5, 4)
        self.head = nn.Linear(4, 5, bias=False)
        self.head.weight = self.embed.weight
        self.norm = nn.BatchNorm1d(5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.norm(self.head(self.embed(x)))


def built() -> dict:
    model = Tied()
    optimizer = optim.AdamW(model.parameters(), lr=0.1)
    return {
        "model": model,
        "optimizer": optimizer,
        "scheduler": mnn.warmup_cosine(optimizer, 2, 10),
    }


def step(model, optimizer, scheduler) -> None:
    model(torch.arange(5)).square().sum().backward()
    optimizer.step()
    optimizer.zero_grad()
    scheduler.step()


@pytest.fixture
def gate(monkeypatch):
    """Holds the writing until it is set."""
    opened, real = threading.Event(), torch.save

    def held(*args, **options):
        assert opened.wait(60)
        return real(*args, **options)

    monkeypatch.setattr(saving.torch, "save", held)
    yield opened
    opened.set()


def test_it_holds_what_was_when_it_was_called(tmp_path, gate):
    parts = built()
    step(**parts)
    gate.set()
    mnn.save_checkpoint(tmp_path / "then.pt", **parts, step=1, losses=torch.ones(2))
    gate.clear()
    losses = torch.ones(2)
    future = mnn.save_checkpoint(
        tmp_path / "file.pt", **parts, step=1, losses=losses, asynchronous=True
    )
    assert not future.done()
    step(**parts)
    torch.rand(3)
    with torch.no_grad():
        parts["model"].embed.weight.zero_()
        losses.zero_()
    gate.set()
    assert future.result() == tmp_path / "file.pt"
    one, other = (torch.load(tmp_path / name, weights_only=True) for name in ("then.pt", "file.pt"))
    assert equal(one, other)
    assert one["model"]._metadata == other["model"]._metadata
    model = other["model"]
    assert model["embed.weight"].data_ptr() == model["head.weight"].data_ptr()
    assert abs((tmp_path / "then.pt").stat().st_size - (tmp_path / "file.pt").stat().st_size) < 99


def test_every_kind_of_value_comes_as_without(tmp_path):
    """MultiStepLR has a Counter; views, sparse and conjugated tensors of one's own."""
    model = nn.Linear(2, 2)
    optimizer = optim.SGD(model.parameters(), lr=1.0)
    scheduler = optim.lr_scheduler.MultiStepLR(optimizer, [2, 2, 5])
    base = torch.arange(6.0)
    values = {
        "views": [base[1:3], base.reshape(2, 3).T, (base[0], nn.Parameter(base[4:]))],
        "sparse": torch.eye(3).to_sparse(),
        "conjugated": torch.tensor([1 + 2j]).conj(),
        "empty": torch.empty(0, 3),
        "half": torch.ones(2, dtype=torch.bfloat16),
    }
    found = []
    for asynchronous in (False, True):
        path = tmp_path / f"{asynchronous}.pt"
        parts = {"model": model, "optimizer": optimizer, "scheduler": scheduler}
        mnn.save_checkpoint(path, **parts, extra=values, rng=False, asynchronous=asynchronous)
        mnn.resume(path, **parts)
        found.append(torch.load(path, weights_only=True))
    one, other = found
    assert type(other["scheduler"]["milestones"]) is type(one["scheduler"]["milestones"])
    assert other["scheduler"] == one["scheduler"]
    for a, b in zip(_tensors(one["extra"]), _tensors(other["extra"]), strict=True):
        assert (type(a), a.dtype, a.layout) == (type(b), b.dtype, b.layout)
        assert torch.equal(a.to_dense(), b.to_dense())
    first, second, _ = other["extra"]["views"]
    assert first.untyped_storage().data_ptr() == second.untyped_storage().data_ptr()


def _tensors(node) -> list:
    if isinstance(node, torch.Tensor):
        return [node]
    inner = node.values() if isinstance(node, dict) else node
    return [tensor for one in inner for tensor in _tensors(one)]


def test_the_next_one_waits_and_rows_are_kept(tmp_path):
    parts = built()
    for epoch in range(1, 6):
        mnn.save_checkpoint(
            tmp_path / ROW,
            **parts,
            epoch=epoch,
            acc=-epoch,
            keep_last=2,
            keep_best=("acc", "max", 1),
            asynchronous=True,
        )
    assert mnn.resume(tmp_path, **built()).epoch == 5  # waits
    names = sorted(path.name for path in tmp_path.iterdir())
    assert names == ["best.pt", *(f"epoch-00{i}.pt" for i in (1, 4, 5)), "latest.pt"]


def test_an_error_reaches_the_next_save_once(tmp_path, monkeypatch):
    parts = built()
    mnn.save_checkpoint(tmp_path / "file.pt", **parts, epoch=1)
    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", _full)
        mnn.save_checkpoint(tmp_path / "file.pt", **parts, epoch=2, asynchronous=True)
        with pytest.raises(WriteError, match="No space left"):
            mnn.save_checkpoint(tmp_path / "file.pt", **parts, epoch=3)
        assert torch.load(tmp_path / "file.pt", weights_only=True)["epoch"] == 1
        future = mnn.save_checkpoint(tmp_path / "file.pt", **parts, epoch=2, asynchronous=True)
        with pytest.raises(WriteError, match="No space left"):
            future.result()
    mnn.save_checkpoint(tmp_path / "file.pt", **parts, epoch=3)
    assert torch.load(tmp_path / "file.pt", weights_only=True)["epoch"] == 3
    assert leftovers(tmp_path) == []


def _full(fd: int) -> None:
    raise OSError(28, "No space left on device")


def test_what_is_refused_is_refused_at_once(tmp_path):
    with pytest.raises(RefusedError, match=r"extra\.x"):
        mnn.save_checkpoint(tmp_path / "file.pt", **built(), x=object(), asynchronous=True)


PROGRAM = """
import os, sys, torch
import modelctl.nn as mnn
from modelctl.nn.training import save as saving
way, path = sys.argv[1:]
model = torch.nn.Linear(2, 2)
mnn.save_checkpoint(path, model=model, epoch=1)
real = torch.save
def slow(whole, stream):
    real(whole, stream)
    if way == "killed":
        print("written", flush=True)
        sys.stdin.read()
    if way == "failing":
        raise OSError(28, "No space left on device")
saving.torch.save = slow
mnn.save_checkpoint(path, model=model, epoch=2, asynchronous=True)
"""


@pytest.mark.skipif(os.name != "posix", reason="signals of POSIX")
@pytest.mark.parametrize(("way", "epoch"), [("killed", 1), ("failing", 1), ("whole", 2)])
def test_an_exit_waits_and_a_kill_leaves_the_last_one(tmp_path: Path, way: str, epoch: int):
    path = tmp_path / "file.pt"
    command = [sys.executable, "-c", PROGRAM, way, str(path)]
    with subprocess.Popen(
        command,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    ) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        if way == "killed":
            assert process.stdout.readline() == "written\n"
            process.send_signal(signal.SIGKILL)
        said = process.stderr.read()
    assert torch.load(path, weights_only=True)["epoch"] == epoch
    assert ("the last asynchronous save failed" in said) == (way == "failing")
    mnn.save_checkpoint(path, model=torch.nn.Linear(2, 2), epoch=3)
    assert leftovers(tmp_path) == []
