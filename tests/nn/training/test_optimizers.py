"""Which saved state is whose: parameters beside the model, several optimizers."""

from __future__ import annotations

import warnings

import pytest
import torch
from torch import nn, optim
from torch.optim import lr_scheduler

import modelctl as mc
import modelctl.nn as mnn
from modelctl.errors import AmbiguousError, RefusedError

from .loops import equal

# ------------------------------------------------------------------ not the model's


class Outside:
    """A model, and two parameters beside it in its optimizer: a temperature and a loss weight."""

    def __init__(self, order=1, groups=1, named=False, outside=2):
        self.net = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
        self.others = [nn.Parameter(torch.ones(())) for _ in range(outside)]
        first, second = ([*part.named_parameters(str(i))] for i, part in enumerate(self.net))
        first, second = first[::order], second[::order]
        first[1:1] = [(f"beside.{i}", p) for i, p in enumerate(self.others)]
        parts = [part if named else [p for _, p in part] for part in (first, second)][::order]
        given = [{"params": part} for part in parts] if groups > 1 else parts[0] + parts[1]
        self.optimizer = optim.Adam(given, lr=0.1)

    def step(self):
        loss = self.net(torch.randn(3, 4)).square().sum()
        for i, one in enumerate(self.others):
            loss = loss * one ** (i + 1)
        loss.backward()
        self.optimizer.step()
        return self

    def same(self, other):
        ours, theirs = ([*one.net.parameters(), *one.others] for one in (self, other))
        return all(
            equal(self.optimizer.state[a], other.optimizer.state[b])
            for a, b in zip(ours, theirs, strict=True)
        )


@pytest.mark.parametrize("groups", [1, 2])
@pytest.mark.parametrize("named", [False, True])
def test_what_is_not_the_models_costs_no_name(tmp_path, groups, named):
    old = Outside(groups=groups, named=named).step()
    mnn.save_checkpoint(tmp_path / "a.pt", model=old.net, optimizer=old.optimizer)
    new = Outside(-1, groups, named)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        mnn.resume(tmp_path / "a.pt", model=new.net, optimizer=new.optimizer)
    assert ["(2) got the state" in str(w.message) for w in caught] == [True][named:]
    assert new.same(old)
    plain = Outside(groups=groups, named=named)
    saved = torch.load(tmp_path / "a.pt", weights_only=True)["optimizer"]
    plain.optimizer.load_state_dict(saved)
    assert plain.same(old)
    few = Outside(outside=1, named=named)
    refused = "lacks: beside" if named else "in their places"
    with pytest.raises(RefusedError, match=refused) as e:
        mnn.resume(tmp_path / "a.pt", model=few.net, optimizer=few.optimizer)
    assert e.value.hint
    few = Outside(outside=1)
    state = mnn.resume(
        tmp_path / "a.pt", model=few.net, optimizer=few.optimizer, on_mismatch="skip"
    )
    assert len(state.fresh) == 1
    assert len(state.dropped) == 2


# ------------------------------------------------------------------ several optimizers


def two(lr=0.1):
    net = nn.ModuleDict({"g": nn.Linear(2, 2), "d": nn.Linear(2, 2)})
    return net, [optim.Adam(net[key].parameters(), lr=lr) for key in "gd"]


def test_several_are_told_apart_by_what_they_hold(tmp_path):
    path = tmp_path / "a.pt"
    net, made = two()
    for one in net.values():
        one(torch.randn(3, 2)).sum().backward()
    for one in made:
        one.step()
    mnn.save_checkpoint(path, model=net, optimizer=made)
    other, (g, d) = two()
    mnn.resume(path, model=other, optimizer=[d, g])
    for one, old in zip((g, d), made, strict=True):
        assert equal(one.state_dict()["state"], old.state_dict()["state"])
        assert len(one.param_groups) == 1
    schedulers = [lr_scheduler.StepLR(one, 2) for one in made]
    mnn.save_checkpoint(path, model=net, optimizer=made, scheduler=schedulers)
    with pytest.raises(RefusedError, match="another order") as e:
        mnn.resume(path, model=net, optimizer=made[::-1], scheduler=schedulers)
    assert "order that was saved" in e.value.hint
    mnn.resume(path, model=net, optimizer=made, scheduler=schedulers)


def test_several_over_the_same_parameters_go_by_place(tmp_path):
    net, _ = two()
    made = [optim.Adam(net.parameters(), lr=lr) for lr in (0.1, 0.2)]
    mnn.save_checkpoint(tmp_path / "a.pt", model=net, optimizer=made)
    mnn.resume(tmp_path / "a.pt", model=net, optimizer=made)
    assert [one.param_groups[0]["lr"] for one in made] == [0.1, 0.2]


def test_no_parameter_joins_an_optimizer_while_another_has_it(tmp_path):
    net, (g, d) = two()
    mnn.save_checkpoint(tmp_path / "a.pt", model=net, optimizer={"g": g, "d": d})
    with pytest.raises(RefusedError, match=r"'g' has 'g\.weight', which optimizer 'd' holds"):
        mnn.resume(tmp_path / "a.pt", model=net, optimizer={"g": d, "d": g})
    whole = [optim.Adam([*net.parameters()][:n]) for n in (3, 1)]
    mnn.save_checkpoint(tmp_path / "a.pt", model=net, optimizer=whole)
    halves = [optim.Adam([*net.parameters()][n:][:2]) for n in (0, 2)]
    with pytest.raises((AmbiguousError, RefusedError)) as e:
        mnn.resume(tmp_path / "a.pt", model=net, optimizer=halves)
    assert e.value.hint


# ------------------------------------------------------------------ what a scheduler moves


def scheduled(make, lr=0.1):
    model = nn.Linear(2, 2)
    optimizer = optim.SGD(model.parameters(), lr=lr)
    return {"model": model, "optimizer": optimizer, "scheduler": make(optimizer)}


def said(path, **parts):
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        mnn.resume(path, **parts)
    return [str(w.message) for w in caught]


def test_a_lr_that_was_only_reduced_was_not_built_otherwise(tmp_path):
    """ReduceLROnPlateau leaves no initial_lr: where the lr began is not known."""
    path = tmp_path / "a.pt"
    parts = scheduled(lr_scheduler.ReduceLROnPlateau)
    for _ in range(12):
        parts["scheduler"].step(1.0)
    mnn.save_checkpoint(path, **parts)
    again = scheduled(lr_scheduler.ReduceLROnPlateau)
    assert said(path, **again) == []
    assert again["optimizer"].param_groups[0]["lr"] == pytest.approx(0.01)
    parts["scheduler"] = None  # moved by hand: that is said
    mnn.save_checkpoint(path, **parts)
    (note,) = said(path, **{**again, **scheduled(lambda _: None)})
    assert "built with lr 0.1; used is lr 0.01" in note


def test_a_scheduler_without_its_state_takes_the_lr_back(tmp_path):
    path = tmp_path / "a.pt"
    parts = scheduled(lambda _: None, lr=0.05)
    mnn.save_checkpoint(path, **parts)
    again = scheduled(lambda one: mnn.warmup_cosine(one, 0, 1000))
    note, left = said(path, **again)
    assert "lr 0.05 holds until the scheduler's next step(): its state was not restored" in note
    assert note.endswith(
        "built over lr 0.1; build it after resume() to start from the checkpoint's"
    )
    assert left == "not in the checkpoint: scheduler; left as built"
    optimizer = again["optimizer"]
    assert optimizer.param_groups[0]["lr"] == 0.05
    optimizer.step()
    again["scheduler"].step()
    assert optimizer.param_groups[0]["lr"] == pytest.approx(0.1, rel=1e-3)  # as it said
    again = scheduled(lambda _: None)
    assert said(path, **again) == [
        "optimizer, group 0: built with lr 0.1; used is lr 0.05, from the checkpoint"
    ]
    after = mnn.warmup_cosine(again["optimizer"], 0, 1000)
    again["optimizer"].step()
    after.step()
    assert again["optimizer"].param_groups[0]["lr"] == pytest.approx(0.05, rel=1e-3)


class Clock:
    """A scheduler of someone's own, that does not show its optimizer."""

    def __init__(self, time=0):
        self.time = time

    def state_dict(self):
        return {"time": self.time}

    def load_state_dict(self, state):
        self.time = state["time"]


def test_a_scheduler_of_another_kind(tmp_path):
    parts = scheduled(lambda _: Clock(3))
    mnn.save_checkpoint(tmp_path / "a.pt", **parts)
    again = scheduled(lambda _: Clock())
    assert said(tmp_path / "a.pt", **again) == []
    assert again["scheduler"].time == 3


# ------------------------------------------------------------------ no parameter's


class Counting(optim.SGD):
    """Keeps state of its own beside that of its parameters, as MADGRAD (``k``) does."""

    def step(self, closure=None):
        done = super().step(closure)
        self.state["k"] = self.state.get("k", torch.zeros(1, dtype=torch.long)) + 1
        self.state["ema"] = {"long": float(self.state["k"])}
        return done


def test_state_of_no_parameter_is_resumed_and_kept_by_edits(tmp_path):
    def run(net, steps):
        optimizer = Counting(net.parameters(), lr=0.1, momentum=0.9)
        for _ in range(steps):
            net(torch.randn(3, 4)).sum().backward()
            optimizer.step()
        return optimizer

    net = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 2))
    old = run(net, 3)
    torch.save({"model": net.state_dict(), "optimizer": old.state_dict()}, tmp_path / "a.pt")
    fresh = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 2))
    new = run(fresh, 1)
    mnn.resume(tmp_path / "a.pt", model=fresh, optimizer=new)
    assert new.state["k"] == 3
    assert new.state["ema"] == {"long": 3.0}
    with mc.open(tmp_path / "a.pt") as ckpt:
        mc.save(mc.drop(ckpt, "1"), tmp_path / "b.pt")
    state = torch.load(tmp_path / "b.pt")["optimizer"]["state"]
    assert {*state} == {0, 1, "k", "ema"}
    assert state["k"] == 3
