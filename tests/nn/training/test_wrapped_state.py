"""Optimizers whose state is a subclass of Tensor (8-bit ones keep it packed)."""

from __future__ import annotations

import pytest
import torch
from torch import nn, optim

import modelctl.nn as mnn
from modelctl.errors import RefusedError, UnsupportedError

aten = torch.ops.aten


class Packed(torch.Tensor):
    """What torchao's 8-bit optimizers keep in the place of a moment: codes and a scale."""

    @staticmethod
    def __new__(cls, codes, scale):
        return torch.Tensor._make_wrapper_subclass(cls, codes.shape, dtype=torch.float32)

    def __init__(self, codes, scale):
        self.codes, self.scale = codes, scale

    def __tensor_flatten__(self):
        return ["codes", "scale"], []

    @classmethod
    def __tensor_unflatten__(cls, inner, context, size=None, stride=None):
        return cls(**inner)

    def dense(self):
        return self.codes.float() * self.scale

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        if func in (aten.detach.default, aten.clone.default, aten._to_copy.default):
            return cls(args[0].codes.clone(), args[0].scale.clone())
        dense = [arg.dense() if isinstance(arg, cls) else arg for arg in args]
        return func(*dense, **(kwargs or {}))


class Coarse(optim.Optimizer):
    """Momentum in 8 bits."""

    def __init__(self, params, lr=0.1, momentum=0.9):
        super().__init__(params, {"lr": lr, "momentum": momentum})

    @torch.no_grad()
    def step(self, closure=None):
        for group in self.param_groups:
            for p in group["params"]:
                kept = self.state[p].get("momentum_buffer")
                new = p.grad if kept is None else group["momentum"] * kept.dense() + p.grad
                scale = new.abs().max() / 100
                codes = (new / scale).round().to(torch.int8)
                self.state[p]["momentum_buffer"] = Packed(codes, scale)
                p.sub_(group["lr"] * new)


@pytest.fixture
def declared():
    before = [*torch.serialization.get_safe_globals()]  # torch 2.4 gives its own list
    torch.serialization.add_safe_globals([Packed])
    yield
    torch.serialization.clear_safe_globals()
    torch.serialization.add_safe_globals(before)


def trained():
    torch.manual_seed(0)
    net = nn.Linear(6, 4)
    optimizer = Coarse(net.parameters())
    net(torch.randn(3, 6)).sum().backward()
    optimizer.step()
    return net, optimizer


def go_on(net, optimizer):
    torch.manual_seed(1)
    net(torch.randn(3, 6)).square().sum().backward()
    optimizer.step()
    return net.weight.detach().clone()


@pytest.mark.parametrize("ours", [True, False], ids=["save_checkpoint", "torch.save"])
def test_it_is_saved_and_goes_on(ours, tmp_path, declared):
    net, optimizer = trained()
    if ours:
        mnn.save_checkpoint(tmp_path / "a.pt", model=net, optimizer=optimizer, epoch=1)
    else:
        saved = {"model": net.state_dict(), "optimizer": optimizer.state_dict(), "epoch": 1}
        torch.save(saved, tmp_path / "a.pt")
    plain = torch.load(tmp_path / "a.pt", weights_only=True)["optimizer"]["state"][0]
    assert type(plain["momentum_buffer"]) is Packed
    other = nn.Linear(6, 4)
    made = Coarse(other.parameters())
    mnn.resume(tmp_path / "a.pt", model=other, optimizer=made, rng=ours)
    for mine, theirs in zip(other.parameters(), net.parameters(), strict=True):
        kept, expected = (
            o.state[p]["momentum_buffer"] for o, p in ((made, mine), (optimizer, theirs))
        )
        assert type(kept) is Packed
        assert torch.equal(kept.codes, expected.codes)
        assert torch.equal(kept.scale, expected.scale)
    for p in net.parameters():
        p.grad = None
    assert torch.equal(go_on(other, made), go_on(net, optimizer))


def test_what_the_program_did_not_declare_is_not_made(tmp_path):
    net, optimizer = trained()
    with pytest.raises(RefusedError, match="Packed: nothing that torch"):
        mnn.save_checkpoint(tmp_path / "a.pt", model=net, optimizer=optimizer)
    saved = {"model": net.state_dict(), "optimizer": optimizer.state_dict()}
    torch.save(saved, tmp_path / "a.pt")
    with pytest.raises(UnsupportedError, match="which is not made from a file"):
        mnn.resume(
            tmp_path / "a.pt", model=nn.Linear(6, 4), optimizer=Coarse(nn.Linear(6, 4).parameters())
        )


def test_a_model_has_plain_tensors(tmp_path, declared):
    net = nn.Linear(6, 4)
    net.register_buffer("codes", Packed(torch.ones(3, dtype=torch.int8), torch.tensor(0.5)))
    with pytest.raises(RefusedError, match=r"'model\.codes' is a Packed: only plain tensors"):
        mnn.save_checkpoint(tmp_path / "a.pt", model=net)
