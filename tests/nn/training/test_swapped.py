"""Files with the average in the model's place; models that were built in another order; optimizers
that find their own lr."""

from __future__ import annotations

import copy
import warnings

import pytest
import torch
from torch import nn, optim
from torch.optim.swa_utils import AveragedModel

import modelctl.nn as mnn
from modelctl.errors import AmbiguousError


def build() -> nn.Sequential:
    return nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8), nn.Linear(8, 3))


def averaged():
    """A model, its optimizer, and the average of its weights."""
    model = build()
    optimizer = optim.Adam(model.parameters())
    average = AveragedModel(copy.deepcopy(model))
    for _ in range(2):
        model(torch.randn(4, 6)).sum().backward()
        optimizer.step()
        average.update_parameters(model)
    return model, optimizer, average


def lightning(raw, average, counted, optimizer):
    return {
        "epoch": 2,
        "global_step": 8,
        "pytorch-lightning_version": "2.6.0",
        "state_dict": average,
        "current_model_state": raw,
        "averaging_state": {"n_averaged": counted},
        "optimizer_states": [optimizer],
        "lr_schedulers": [],
    }


def mmengine(raw, average, counted, optimizer):
    return {
        "meta": {"epoch": 2, "iter": 8},
        "state_dict": average,
        "ema_state_dict": {"steps": counted, **{f"module.{n}": v for n, v in raw.items()}},
        "optimizer": optimizer,
        "message_hub": {},
    }


@pytest.mark.parametrize("as_dict", [False, True], ids=["module", "state_dict"])
@pytest.mark.parametrize("layout", [lightning, mmengine])
def test_what_was_trained_goes_on_and_the_average_is_the_average(layout, as_dict, tmp_path):
    model, optimizer, average = averaged()
    whole = average.state_dict()
    counted = whole["n_averaged"]
    bare = {n.removeprefix("module."): v for n, v in whole.items() if n != "n_averaged"}
    saved = layout(model.state_dict(), bare, counted, optimizer.state_dict())
    torch.save(saved, tmp_path / "a.pt")

    other = build()
    made = optim.Adam(other.parameters())
    live = AveragedModel(build())
    filled = {n: torch.zeros_like(v) for n, v in whole.items()}
    state = mnn.resume(
        tmp_path / "a.pt", model=other, optimizer=made, ema=filled if as_dict else live
    )
    assert state.swapped is not None
    assert state.swapped[1] == "state_dict"
    for name, value in model.state_dict().items():
        assert torch.equal(other.state_dict()[name], value)
    for name, value in whole.items():
        assert torch.equal((filled if as_dict else live.state_dict())[name], value)
    assert not torch.equal(other[0].weight, live.module[0].weight)
    assert {"model", "optimizer", "ema"} <= {*state.restored}


# ------------------------------------------------------------------ another order


class Heads(nn.Module):
    def __init__(self, *heads: str, sizes=()):
        super().__init__()
        self.trunk = nn.Linear(4, 8)
        for head in heads:
            setattr(self, head, nn.Linear(8, dict(sizes).get(head, 2)))

    def forward(self, x):
        return sum(
            (1 + len(name)) * head(self.trunk(x)).pow(2).mean()
            for name, head in self.named_children()
            if name != "trunk"
        )


def moments(model, optimizer):
    return {name: optimizer.state[p]["exp_avg"] for name, p in model.named_parameters()}


def of_heads(*heads, reverse=False, sizes=()):
    model = Heads(*heads, sizes=sizes)
    params = [*model.parameters()]
    return model, optim.Adam(params[::-1] if reverse else params)


def saved_heads(path, *heads, frozen=(), **how):
    model, optimizer = of_heads(*heads, **how)
    for name in frozen:
        getattr(model, name).requires_grad_(False)
    model(torch.randn(5, 4)).backward()
    optimizer.step()
    torch.save({"model": model.state_dict(), "optimizer": optimizer.state_dict()}, path)
    return model, optimizer


@pytest.mark.parametrize("sizes", [{}, {"hm": 3}], ids=["alike", "unlike"])
def test_the_files_own_order_tells_whose_state_it_is(sizes, tmp_path):
    model, optimizer = saved_heads(tmp_path / "a.pt", "hm", "wh", "reg", sizes=sizes)
    other, made = of_heads("reg", "hm", "wh", sizes=sizes)
    mnn.resume(tmp_path / "a.pt", model=other, optimizer=made)
    found, expected = moments(other, made), moments(model, optimizer)
    assert {*found} == {*expected}
    assert all(torch.equal(found[name], expected[name]) for name in found)


def test_an_order_of_its_own_goes_by_place(tmp_path):
    model, optimizer = saved_heads(tmp_path / "a.pt", "hm", "wh", reverse=True)
    other, made = of_heads("hm", "wh", reverse=True)
    mnn.resume(tmp_path / "a.pt", model=other, optimizer=made)
    found, expected = moments(other, made), moments(model, optimizer)
    assert all(torch.equal(found[name], expected[name]) for name in found)
    other, made = of_heads("wh", "hm", reverse=True)
    with pytest.raises(AmbiguousError, match="in another order than the checkpoint's"):
        mnn.resume(tmp_path / "a.pt", model=other, optimizer=made)


def test_an_order_that_changed_and_is_not_proved_is_refused(tmp_path):
    model = Heads("hm", "wh", "reg")
    some = [*model.trunk.parameters(), *model.wh.parameters()]
    optimizer = optim.Adam(some)
    model(torch.randn(5, 4)).backward()
    optimizer.step()
    saved = {"model": model.state_dict(), "optimizer": optimizer.state_dict()}
    torch.save(saved, tmp_path / "a.pt")
    other = Heads("wh", "hm", "reg")
    made = optim.Adam([*other.trunk.parameters(), *other.wh.parameters()])
    with pytest.raises(AmbiguousError, match="in another order than the checkpoint's"):
        mnn.resume(tmp_path / "a.pt", model=other, optimizer=made)
    other = Heads("hm", "wh", "reg")
    made = optim.Adam([*other.trunk.parameters(), *other.wh.parameters()])
    mnn.resume(tmp_path / "a.pt", model=other, optimizer=made)
    assert torch.equal(
        made.state[other.wh.weight]["exp_avg"], optimizer.state[model.wh.weight]["exp_avg"]
    )


# ------------------------------------------------------------------ no lr


class FindsItsOwn(optim.SGD):
    """As Adafactor in its default mode: its groups say ``lr: None``."""

    def __init__(self, params):
        super().__init__(params, lr=0.1, momentum=0.9)
        for group in self.param_groups:
            group["lr"] = None
        self.defaults["lr"] = None

    def step(self, closure=None):
        for group in self.param_groups:
            group["lr"] = 0.1
        super().step(closure)
        for group in self.param_groups:
            group["lr"] = None


@pytest.mark.parametrize("noted", [False, True])
def test_an_optimizer_that_finds_its_own_lr(noted, tmp_path):
    net = build()
    optimizer = FindsItsOwn(net.parameters())
    net(torch.randn(4, 6)).sum().backward()
    optimizer.step()
    if noted:
        saved = {"model": net.state_dict(), "optimizer": optimizer.state_dict(), "lr": 0.1}
        torch.save(saved, tmp_path / "a.pt")
    else:
        mnn.save_checkpoint(tmp_path / "a.pt", model=net, optimizer=optimizer, epoch=1)
    other = build()
    made = FindsItsOwn(other.parameters())
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        state = mnn.resume(tmp_path / "a.pt", model=other, optimizer=made, rng=not noted)
    assert state.lr is None
    assert made.param_groups[0]["lr"] is None
    buffer = made.state[other[0].weight]["momentum_buffer"]
    assert torch.equal(buffer, optimizer.state[net[0].weight]["momentum_buffer"])
