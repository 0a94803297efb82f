"""Only what trains is saved: small, known as such, and exact on the same base."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
from torch import nn, optim
from torch.optim.swa_utils import AveragedModel

import modelctl as mc
import modelctl.nn as mnn
from modelctl.errors import RefusedError, UsageError
from tests.nn.training.loops import equal


class Adapted(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.base = nn.Sequential(nn.Linear(8, 300), nn.BatchNorm1d(300), nn.Linear(300, 300))
        self.base.register_buffer("ids", torch.arange(4))
        self.down = nn.Linear(300, 2)
        self.norm = nn.BatchNorm1d(2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.norm(self.down(self.base(x)))


def built(seed: int = 0, **freezing) -> dict:
    torch.manual_seed(0)  # the same base
    model = Adapted()
    mnn.freeze(model, "base*", **freezing)
    torch.manual_seed(seed)
    for one in (model.down, model.norm):
        one.reset_parameters()
    ema = AveragedModel(model, use_buffers=True)
    optimizer = optim.AdamW(model.parameters(), lr=0.1)
    return {
        "model": model,
        "optimizer": optimizer,
        "scheduler": mnn.warmup_cosine(optimizer, 2, 10),
        "ema": ema,
    }


def steps(parts: dict, count: int) -> None:
    for _ in range(count):
        parts["model"](torch.randn(4, 8)).square().sum().backward()
        parts["optimizer"].step()
        parts["optimizer"].zero_grad()
        parts["scheduler"].step()
        parts["ema"].update_parameters(parts["model"])


def states(parts: dict) -> list:
    return [copy.deepcopy(one.state_dict()) for one in parts.values()]


@pytest.mark.parametrize("freezing", [{"bn_eval": True}, {}], ids=["held", "moving"])
@pytest.mark.parametrize("asynchronous", [False, True])
def test_it_goes_on_exactly(tmp_path: Path, freezing, asynchronous):
    path = tmp_path / "adapter.pt"
    parts = built(**freezing)
    steps(parts, 3)
    mnn.save_checkpoint(path, **parts, step=3, only="trainable", asynchronous=asynchronous)
    others = built(9, **freezing)
    state = mnn.resume(path, **others)
    assert state.step == 3
    assert set(state.restored) >= {"model", "optimizer", "scheduler", "ema"}
    assert "of the base: only what trains was saved" in str(state)
    assert "base.0.weight" in state.model.base
    assert equal(states(parts), states(others))
    rng = torch.get_rng_state()
    steps(others, 3)
    torch.set_rng_state(rng)
    steps(parts, 3)
    assert equal(states(parts), states(others))
    names = set(torch.load(path, weights_only=True)["model"])
    moving = {f"base.1.{name}" for name in ("running_mean", "running_var", "num_batches_tracked")}
    assert {"down.weight", "norm.weight", "norm.running_mean"} <= names
    assert names & {"base.0.weight", "base.2.weight", "base.ids"} == set()
    assert (names & moving == moving) == (freezing == {})


def test_it_is_small(tmp_path):
    parts = built(bn_eval=True)
    steps(parts, 1)
    sizes = []
    for only in (None, "trainable"):
        path = mnn.save_checkpoint(tmp_path / "file.pt", **parts, rng=False, only=only)
        sizes.append(path.stat().st_size)
    assert sizes[1] < 25_000 < 700_000 < sizes[0]


def test_load_into_keeps_the_base_and_says_so(tmp_path):
    parts = built(bn_eval=True)
    steps(parts, 2)
    path = mnn.save_checkpoint(tmp_path / "file.pt", model=parts["model"], only="trainable")
    model = built(9)["model"]
    report = mnn.load_into(model, path)
    assert equal(model.state_dict(), parts["model"].state_dict())
    assert "kept 9 of the base: only what trains was saved" in str(report)
    assert set(report.base) == set(report.missing)
    assert report.problems() == []


def test_it_is_known_as_what_it_is(tmp_path):
    path = mnn.save_checkpoint(
        tmp_path / "file.pt", model=built()["model"], only="trainable", rng=False
    )
    saved = torch.load(path, weights_only=True)["model"]
    assert saved._metadata[""]["modelctl.only"] == "trainable"
    with pytest.raises(RuntimeError, match="Missing key"):
        built()["model"].load_state_dict(saved)
    with mc.open(path) as ckpt:
        notes = [note.text for note in mc.summary(ckpt).warnings]
    assert any("only what trains" in text for text in notes)
    whole = mnn.save_checkpoint(tmp_path / "whole.pt", model=built()["model"], rng=False)
    with mc.open(whole) as ckpt:
        assert not any("only what trains" in note.text for note in mc.summary(ckpt).warnings)


def test_what_trained_and_is_not_there_is_missed(tmp_path):
    """A head that the file never had is no part of the base."""
    path = mnn.save_checkpoint(tmp_path / "file.pt", model=built()["model"], only="trainable")
    model = built()["model"]
    model.second = nn.Linear(2, 2)
    for act in (mnn.load_into, lambda model, path: mnn.resume(path, model=model)):
        with pytest.raises(RefusedError, match=r"missing in the file: second\.weight"):
            act(model, path)
    del model.second
    del model.down
    with pytest.raises(RefusedError, match=r"not in the model: down"):
        mnn.load_into(model, path)


def test_state_of_what_is_frozen_now_stays_out(tmp_path):
    parts = built()
    mnn.unfreeze(parts["model"], "base.2")
    steps(parts, 1)
    mnn.freeze(parts["model"], "base.2")
    path = mnn.save_checkpoint(tmp_path / "file.pt", **parts, only="trainable")
    saved = torch.load(path, weights_only=True)["optimizer"]
    (group,) = saved["param_groups"]
    names = dict(zip(group["params"], group["param_names"], strict=True))
    assert len(names) == 10
    assert {names[key] for key in saved["state"]} == {
        f"{one}.{kind}" for one in ("down", "norm") for kind in ("weight", "bias")
    }


def test_what_can_not_be(tmp_path):
    model = built()["model"]
    with pytest.raises(UsageError, match="'trainable' or None, not 'head'"):
        mnn.save_checkpoint(tmp_path / "file.pt", model=model, only="head")
    mnn.freeze(model, "*")
    with pytest.raises(RefusedError, match="every parameter is frozen"):
        mnn.save_checkpoint(tmp_path / "file.pt", model=model, only="trainable")
    assert not any(tmp_path.iterdir())


@pytest.mark.parametrize("suffix", [".safetensors", ".pt"])
def test_the_record_goes_through_edits_and_formats(tmp_path, suffix):
    parts = built(bn_eval=True)
    path = mnn.save_checkpoint(tmp_path / "file.pt", model=parts["model"], only="trainable")
    moved = tmp_path / f"moved{suffix}"
    with mc.open(path) as ckpt:
        renamed = mc.add_prefix(ckpt, "net.")
        mc.save(mc.convert(renamed, weights_only=True), moved)
    model = built(9)["model"]
    report = mnn.load_into(model, moved)
    assert report.prefix == "net."
    assert "base.0.weight" in report.base
    assert equal(model.state_dict(), parts["model"].state_dict())
