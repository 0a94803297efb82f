"""timm's schedulers keep their values by group, as torch's do: they follow the groups, too."""

from __future__ import annotations

import warnings
from pathlib import Path

import pytest
import torch
from torch import nn

import modelctl.nn as mnn

scheduler = pytest.importorskip("timm.scheduler")
RULES = {"0": {"lr": 0.3}, "1": {"lr": 0.01}, "2": {"lr": 0.05}}
WARM = {"warmup_t": 3, "warmup_lr_init": 1e-4}
KINDS = {
    "cosine": lambda o: scheduler.CosineLRScheduler(o, t_initial=30, **WARM),
    "step": lambda o: scheduler.StepLRScheduler(o, decay_t=4, decay_rate=0.5, **WARM),
    "multistep": lambda o: scheduler.MultiStepLRScheduler(o, decay_t=[4, 6, 8], **WARM),
    "poly": lambda o: scheduler.PolyLRScheduler(o, t_initial=30, **WARM),
    "tanh": lambda o: scheduler.TanhLRScheduler(o, t_initial=30, **WARM),
}


def build(rules, kind, lr=0.02):
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 2))
    optimizer = torch.optim.SGD(mnn.param_groups(model, rules, lr=lr))
    return model, optimizer, KINDS[kind](optimizer)


def lrs(optimizer):
    return {group["param_names"][0]: group["lr"] for group in optimizer.param_groups}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("order", [("2", "0", "1"), ("1", "0", "2")])
def test_groups_in_another_order(kind, order, tmp_path: Path):
    model, optimizer, schedule = build(RULES, kind)
    schedule.step(2)
    mnn.save_checkpoint(
        tmp_path / "c.pt", model=model, optimizer=optimizer, scheduler=schedule, epoch=2
    )
    expected = []
    for epoch in range(3, 8):
        schedule.step(epoch)
        expected.append(lrs(optimizer))
    model, optimizer, schedule = build({key: RULES[key] for key in order}, kind)
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # nothing differs
        mnn.resume(tmp_path / "c.pt", model=model, optimizer=optimizer, scheduler=schedule)
    for epoch in range(3, 8):
        schedule.step(epoch)
        assert lrs(optimizer) == expected[epoch - 3]


@pytest.mark.parametrize("kind", KINDS)
def test_a_thawed_group_joins_the_schedule(kind):
    """Its lr is what it would be, had it been there from the start."""
    model, optimizer, schedule = build(RULES, kind)
    schedule.step(5)
    expected = lrs(optimizer)
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 2))
    mnn.freeze(model, "2")
    rules = {key: RULES[key] for key in ("0", "1")}
    optimizer = torch.optim.SGD(mnn.param_groups(model, rules, lr=0.02))
    schedule = KINDS[kind](optimizer)
    schedule.step(1)
    mnn.unfreeze(model, "2", optimizer=optimizer, scheduler=schedule, lr=0.05)
    schedule.step(5)
    assert lrs(optimizer) == pytest.approx(expected)
