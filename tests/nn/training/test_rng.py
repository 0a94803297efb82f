"""The generators of all devices: here by what torch.cuda is asked to do, and on a GPU for real."""

from __future__ import annotations

import warnings

import numpy as np
import pytest
import torch
from torch import nn, optim

import modelctl.nn as mnn
from modelctl.errors import RefusedError
from modelctl.nn.training.rng import restore_rng, rng_state
from tests.nn.nets import Net, same, train_step


class Cuda:
    """Stands for torch.cuda on a machine with so many devices; each state is its number."""

    def __init__(self, monkeypatch, devices: int, current: int) -> None:
        self.states = {i: torch.tensor([i], dtype=torch.uint8) for i in range(devices)}
        for name, value in {
            "is_available": lambda: True,
            "is_initialized": lambda: True,
            "device_count": lambda: devices,
            "current_device": lambda: current,
            "get_rng_state_all": lambda: list(self.states.values()),
            "set_rng_state": lambda state, device: self.states.update({device: state}),
        }.items():
            monkeypatch.setattr(torch.cuda, name, value)

    @property
    def numbers(self) -> list[int]:
        return [int(state) for state in self.states.values()]


@pytest.mark.parametrize(
    ("saved", "here", "expected"),
    [
        ((4, 3), (4, 3), [0, 1, 2, 3]),
        ((4, 3), (1, 0), [3]),  # cuda:3 onto what is there
        ((4, 3), (4, 0), [3, 1, 2, 0]),  # the devices change places
        ((1, 0), (4, 2), [100, 101, 0, 103]),
        ((2, 1), (4, 3), [0, 101, 102, 1]),
    ],
)
def test_the_models_generator_follows_it(monkeypatch, saved, here, expected):
    net = nn.Linear(2, 2)
    with monkeypatch.context() as patch:
        Cuda(patch, *saved)
        state = rng_state(net)
    assert state["cuda_device"] == saved[1]
    with monkeypatch.context() as patch:
        cuda = Cuda(patch, *here)
        for i, one in cuda.states.items():
            cuda.states[i] = one + 100
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            restore_rng(state, net)
        assert cuda.numbers == expected
        assert [str(w.message).split(",")[0] for w in caught] == (
            [] if saved[0] == here[0] else [f"generators of {saved[0]} CUDA devices were saved"]
        )


def test_a_machine_without_cuda_leaves_its_generators_out(monkeypatch, net, tmp_path):
    with monkeypatch.context() as patch:
        Cuda(patch, 2, 0)
        mnn.save_checkpoint(tmp_path / "a.pt", model=net)
    assert len(torch.load(tmp_path / "a.pt", weights_only=True)["rng"]["cuda"]) == 2
    assert "rng" in mnn.resume(tmp_path / "a.pt", model=net).restored
    whole = torch.load(tmp_path / "a.pt", weights_only=True)
    whole["rng"]["cuda_device"] = 2
    torch.save(whole, tmp_path / "a.pt")
    with pytest.raises(RefusedError, match="rng is not one"):
        mnn.resume(tmp_path / "a.pt", model=net)


def test_another_generator_of_numpy_is_left_out_with_a_warning(net, tmp_path):
    before = np.random.get_bit_generator()
    np.random.set_bit_generator(np.random.PCG64(3))
    try:
        with pytest.warns(UserWarning, match="not MT19937: not saved"):
            mnn.save_checkpoint(tmp_path / "a.pt", model=net)
    finally:
        np.random.set_bit_generator(before)
    assert "numpy" not in torch.load(tmp_path / "a.pt", weights_only=True)["rng"]


# ------------------------------------------------------------------ on a GPU

gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device here")


def on_gpu(device: int):
    net = Net().to(f"cuda:{device}")
    optimizer = optim.AdamW(net.parameters(), lr=0.01, fused=True)
    scaler = torch.amp.GradScaler("cuda", init_scale=2.0**8, growth_interval=2)
    return {"model": net, "optimizer": optimizer, "scaler": scaler}


def steps(parts, count: int) -> torch.Tensor:
    device = parts["model"].conv1.weight.device
    for _ in range(count):
        parts["optimizer"].zero_grad()
        with torch.autocast("cuda", torch.float16):
            loss = parts["model"](torch.randn(4, 3, 8, 8, device=device)).square().mean()
        parts["scaler"].scale(loss).backward()
        parts["scaler"].step(parts["optimizer"])
        parts["scaler"].update()
    return torch.randn(3, device=device)


@gpu
def test_a_training_on_a_gpu_goes_on_bit_for_bit(tmp_path, monkeypatch):
    monkeypatch.setattr(torch.backends.cudnn, "deterministic", True)
    torch.manual_seed(0)
    parts = on_gpu(0)
    steps(parts, 3)
    mnn.save_checkpoint(tmp_path / "a.pt", **parts)
    drawn = steps(parts, 3)
    torch.manual_seed(99)
    last = torch.cuda.device_count() - 1  # another device, where there is one
    other = on_gpu(last)
    mnn.resume(tmp_path / "a.pt", **other)
    assert all(entry["step"].device.index == last for entry in other["optimizer"].state.values())
    assert torch.equal(steps(other, 3).cpu(), drawn.cpu())
    mine, theirs = (
        {k: v.cpu() for k, v in one["model"].state_dict().items()} for one in (other, parts)
    )
    assert same(mine, theirs)
    assert other["scaler"].state_dict() == parts["scaler"].state_dict()


@gpu
def test_what_a_gpu_saved_resumes_on_the_cpu(tmp_path):
    parts = on_gpu(0)
    steps(parts, 2)
    mnn.save_checkpoint(tmp_path / "a.pt", **parts)
    net = Net()
    optimizer = optim.AdamW(net.parameters(), lr=0.01)
    mnn.resume(tmp_path / "a.pt", model=net, optimizer=optimizer)
    assert {t.device.type for entry in optimizer.state.values() for t in entry.values()} == {"cpu"}
    train_step(net, optimizer)
