"""Seeds, and the modes of a validation."""

from __future__ import annotations

import os
import random
import warnings

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, Dataset

import modelctl.nn as mnn
from modelctl.errors import UsageError

from .nets import Net, batch


@pytest.fixture(autouse=True)
def as_before(monkeypatch):
    """The settings of the process, put back."""
    cudnn = torch.backends.cudnn
    flags = torch.are_deterministic_algorithms_enabled(), cudnn.deterministic, cudnn.benchmark
    monkeypatch.delenv("CUBLAS_WORKSPACE_CONFIG", raising=False)
    yield
    torch.use_deterministic_algorithms(flags[0])
    cudnn.deterministic, cudnn.benchmark = flags[1:]


def draws() -> list[object]:
    return [random.random(), np.random.rand(), torch.rand(1).item(), nn.Linear(3, 3).bias.tolist()]


def test_the_same_seed_gives_the_same_numbers_of_all_three():
    mnn.seed_everything(7)
    first = draws()
    assert draws() != first
    mnn.seed_everything(7)
    assert draws() == first
    mnn.seed_everything(8)
    assert all(a != b for a, b in zip(draws(), first, strict=True))
    mnn.seed_everything(np.int64(7))
    assert draws() == first


def test_every_device_is_seeded(monkeypatch):
    seeded = []
    monkeypatch.setattr(torch.cuda, "manual_seed_all", seeded.append)
    mnn.seed_everything(7)
    assert seeded == [7]


@pytest.mark.parametrize("seed", [-1, 2**32, 1.5, True, "7", None])
def test_seeds_that_numpy_can_not_take(seed):
    with pytest.raises(UsageError, match=r"0 to 2\*\*32 - 1"):
        mnn.seed_everything(seed)


def test_deterministic_is_asked_for_and_not_taken_back():
    cudnn = torch.backends.cudnn
    cudnn.benchmark = True
    mnn.seed_everything(7)
    assert cudnn.benchmark  # another wish, left alone
    assert not torch.are_deterministic_algorithms_enabled()
    assert "CUBLAS_WORKSPACE_CONFIG" not in os.environ
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        mnn.seed_everything(7, deterministic=True)
    assert torch.are_deterministic_algorithms_enabled()
    assert not torch.is_deterministic_algorithms_warn_only_enabled()
    assert cudnn.deterministic
    assert not cudnn.benchmark
    assert os.environ["CUBLAS_WORKSPACE_CONFIG"] == ":4096:8"
    mnn.seed_everything(8)
    assert torch.are_deterministic_algorithms_enabled()


def test_too_late_for_cublas_is_said(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    with pytest.warns(UserWarning, match="CUDA is up already"):
        mnn.seed_everything(7, deterministic=True)
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", ":16:8")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        mnn.seed_everything(7, deterministic=True)
    assert os.environ["CUBLAS_WORKSPACE_CONFIG"] == ":16:8"


class Noise(Dataset):
    def __len__(self):
        return 4

    def __getitem__(self, i):
        return torch.tensor([random.random(), np.random.rand(), torch.rand(1).item()])


def test_workers_of_a_loader_need_no_seeds_of_their_own():
    """What the docstring says: torch seeds all three in each worker, each otherwise."""

    def epoch():
        return torch.cat([*DataLoader(Noise(), batch_size=2, num_workers=2)])

    mnn.seed_everything(7)
    first, second = epoch(), epoch()
    mnn.seed_everything(7)
    assert torch.equal(epoch(), first)
    assert len(first.unique()) == 12  # no two workers, and no two generators, draw the same
    assert not torch.equal(first, second)


# ------------------------------------------------------------------ evaluating


def test_validation_changes_nothing(net):
    """Dropout is off, BatchNorm's statistics stay, no graph is kept; then training goes on."""
    mnn.freeze(net, "bn1", bn_eval=True)
    net.train()
    net.layer1.eval()
    modes = [module.training for module in net.modules()]
    state = {name: value.clone() for name, value in net.state_dict().items()}
    x = batch()
    with mnn.evaluating(net):
        out = net(x)
        assert torch.equal(out, net(x))
        assert not out.requires_grad
    assert all(torch.equal(value, state[name]) for name, value in net.state_dict().items())
    assert [module.training for module in net.modules()] == modes
    assert net.drop.training
    assert net(x).requires_grad


def test_evaluating_within_evaluating_and_as_a_decorator():
    net = Net()
    with mnn.evaluating(net):
        with mnn.evaluating(net):
            pass
        assert not net.training
        assert torch.is_inference_mode_enabled()
    assert net.training

    @mnn.evaluating(net)
    def validate():
        return net.training, torch.is_inference_mode_enabled()

    assert validate() == validate() == (False, True)
    assert net.training
