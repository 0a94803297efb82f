"""What an optimizer keeps of a parameter need not have its shape: what the parameter is in the file
says whose state it is."""

from __future__ import annotations

import warnings

import pytest
import torch
from torch import nn, optim

import modelctl.nn as mnn
from modelctl.errors import RefusedError
from tests.nn.nets import same

# Draw numbers from a generator of their own that no state_dict has.
DRAWS = {"adahessian"}
# Compile themselves, which takes long.
COMPILED = {"kron", "kronw"}


class Odd(optim.Optimizer):
    """Keeps one number, or a row, under names that others use for the parameter's shape."""

    def __init__(self, params, lr=0.1, *, low_rank=False):
        super().__init__(params, {"lr": lr, "betas": (0.9, 0.99), "eps": 1e-8, "weight_decay": 0})
        self.low_rank = low_rank

    @torch.no_grad()
    def step(self, closure=None):
        for group in self.param_groups:
            for p in group["params"]:
                state = self.state[p]
                grad = p.grad
                thin = self.low_rank and grad.ndim == 2
                kept = grad.mean(0, keepdim=True) if thin else grad
                if not state:
                    state["exp_avg"] = torch.zeros_like(kept)
                    state["exp_avg_sq"] = torch.zeros(()) if not thin else torch.zeros_like(kept)
                state["exp_avg"].mul_(0.9).add_(kept)
                square = kept.square() if thin else kept.square().sum()
                state["exp_avg_sq"].mul_(0.9).add_(square)
                p.sub_(group["lr"] * state["exp_avg"] / (state["exp_avg_sq"].sqrt() + 1))


def net(classes=3):
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.Flatten(), nn.Linear(16, 4), nn.Linear(4, classes))


def step(model, optimizer, seed):
    torch.manual_seed(seed)
    inputs = torch.randn(2, 3, 4, 4)
    second = getattr(optimizer, "is_second_order", False) or "hess" in type(optimizer).__name__

    def closure():
        optimizer.zero_grad()
        loss = model(inputs).square().sum()
        loss.backward(create_graph=second)
        return loss

    with torch.enable_grad():
        closure()
    optimizer.step(closure)


def trained(make, path, *, names=True):
    model = net()
    optimizer = make(model)
    for seed in (1, 2):
        step(model, optimizer, seed)
    mnn.save_checkpoint(path, model=model, optimizer=optimizer)
    if not names:
        whole = torch.load(path, weights_only=True)
        for group in whole["optimizer"]["param_groups"]:
            del group["param_names"]
        torch.save(whole, path)
    return model, optimizer


def goes_on(make, path, *, names=True, exact=True):
    """The next step after resume is that of the training that was not interrupted, and with
    another head all but its state is kept."""
    model, optimizer = trained(make, path, names=names)
    step(model, optimizer, 3)
    again = net()
    resumed = make(again)
    mnn.resume(path, model=again, optimizer=resumed)
    step(again, resumed, 3)
    assert not exact or same(model.state_dict(), again.state_dict())
    other = net(5)
    onto = make(other)
    state = mnn.resume(path, model=other, optimizer=onto, on_mismatch="skip")
    assert state.fresh == state.dropped == ("3.weight", "3.bias")
    for parameter in other[3].parameters():
        assert parameter not in onto.state or make(other).state.get(parameter)
    before = [p.clone() for p in other.parameters()]
    step(other, onto, 3)
    assert any(not torch.equal(a, b) for a, b in zip(before, other.parameters(), strict=True))


@pytest.mark.parametrize("low_rank", [False, True])
def test_a_state_of_another_shape_is_its_parameters(tmp_path, low_rank):
    goes_on(lambda m: Odd(m.parameters(), low_rank=low_rank), tmp_path / "a.pt")


def test_one_number_says_nothing_about_places(tmp_path):
    """Without names the momentum beside it proves the places."""
    model, optimizer = trained(lambda m: Odd(m.parameters()), tmp_path / "a.pt", names=False)
    again = net()
    resumed = Odd(again.parameters())
    mnn.resume(tmp_path / "a.pt", model=again, optimizer=resumed)
    step(model, optimizer, 3)
    step(again, resumed, 3)
    assert same(model.state_dict(), again.state_dict())


def test_places_that_nothing_proves_are_refused(tmp_path):
    trained(lambda m: Odd(m.parameters(), low_rank=True), tmp_path / "a.pt", names=False)
    again = net()
    before = {name: value.clone() for name, value in again.state_dict().items()}
    with pytest.raises(RefusedError, match=r"state of '2\.weight'.*'exp_avg' is \[1, 16\]"):
        mnn.resume(tmp_path / "a.pt", model=again, optimizer=Odd(again.parameters(), low_rank=True))
    assert same(before, again.state_dict())


def test_of_what_is_not_the_models_the_state_has_to_show_the_shape(tmp_path):
    """The file has no parameter to compare with."""

    def build(length):
        model, scale = net(), nn.Parameter(torch.ones(length, 2))
        named = [*model.named_parameters(), ("scale", scale)]
        return model, scale, named

    model, scale, named = build(3)
    for low_rank in (False, True):
        optimizer = Odd(named, low_rank=low_rank)
        scale.grad = torch.ones_like(scale)
        model(torch.ones(2, 3, 4, 4)).sum().backward()
        optimizer.step()
        mnn.save_checkpoint(tmp_path / "a.pt", model=model, optimizer=optimizer)
        again, other, same_named = build(3)
        onto = Odd(same_named, low_rank=low_rank)
        if low_rank:
            with pytest.raises(RefusedError, match="state of 'scale'"):
                mnn.resume(tmp_path / "a.pt", model=again, optimizer=onto)
            continue
        mnn.resume(tmp_path / "a.pt", model=again, optimizer=onto)
        assert torch.equal(onto.state[other]["exp_avg"], optimizer.state[scale]["exp_avg"])
        again, other, same_named = build(4)
        with pytest.raises(RefusedError, match=r"state of 'scale'.*\[4, 2\]"):
            mnn.resume(tmp_path / "a.pt", model=again, optimizer=Odd(same_named))


@pytest.mark.parametrize("names", [True, False])
def test_one_state_over_all_goes_as_a_whole(tmp_path, names):
    def make(model):
        return optim.LBFGS(model.parameters(), lr=0.05, max_iter=2)

    trained(make, tmp_path / "a.pt", names=names)
    other = net(5)
    optimizer = optim.LBFGS(other.parameters(), lr=0.5, max_iter=2)
    with pytest.warns(UserWarning, match=r"one state over all parameters, and 3\.weight, 3\.bias"):
        state = mnn.resume(tmp_path / "a.pt", model=other, optimizer=optimizer, on_mismatch="skip")
    assert not optimizer.state
    assert optimizer.param_groups[0]["lr"] == 0.05
    assert state.fresh == tuple(name for name, _ in other.named_parameters())
    assert state.dropped == (state.fresh if names else tuple(f"#{i}" for i in range(6)))
    step(other, optimizer, 3)

    again = net()
    resumed = make(again)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        mnn.resume(tmp_path / "a.pt", model=again, optimizer=resumed)
    assert resumed.state


def test_one_state_over_all_where_a_part_is_gone(tmp_path):
    trained(lambda m: optim.LBFGS(m.parameters(), max_iter=2), tmp_path / "a.pt")
    other = net()[:-1]
    optimizer = optim.LBFGS(other.parameters(), max_iter=2)
    with pytest.warns(UserWarning, match=r"3\.weight, 3\.bias changed"):
        mnn.resume(tmp_path / "a.pt", model=other, optimizer=optimizer, on_mismatch="skip")
    assert not optimizer.state


def timm_optimizers():
    timm = pytest.importorskip("timm.optim")
    found = []
    for name in timm.list_optimizers():
        try:
            timm.create_optimizer_v2(net(), opt=name, lr=1e-2)
        except AssertionError:  # needs CUDA
            continue
        found.append(name)
    return [name for name in found if name not in COMPILED]


def test_every_optimizer_of_timm(tmp_path):
    timm = pytest.importorskip("timm.optim")
    names = timm_optimizers()
    assert {"nvnovograd", "novograd", "sgdp", "madgrad", "adafactor", "lamb"} & {*names}
    for name in names:

        def make(model, name=name):
            return timm.create_optimizer_v2(model, opt=name, lr=1e-2)

        try:
            goes_on(make, tmp_path / "a.pt", exact=name not in DRAWS)
        except Exception as e:
            raise AssertionError(name) from e
