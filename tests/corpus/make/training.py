"""What training scripts save, by hand, to go on from."""

from __future__ import annotations

import argparse
import datetime
import random
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn, optim
from torch.optim import lr_scheduler

from ..made import makes
from ..nets import Language, ResNet, images, train
from .state_dicts import new, old


def loop() -> dict[str, Any]:
    """The ImageNet example of pytorch/examples, wrapped, with momentum."""
    net = nn.DataParallel(ResNet())
    optimizer = optim.SGD(net.parameters(), lr=0.1, momentum=0.9, weight_decay=1e-4)
    scheduler = lr_scheduler.StepLR(optimizer, 30)
    train(net, optimizer, images())
    scheduler.step()
    return {
        "epoch": 1,
        "arch": "resnet20",
        "state_dict": net.state_dict(),
        "best_acc1": torch.tensor(41.5),
        "optimizer": optimizer.state_dict(),
        "scheduler": scheduler.state_dict(),
    }


@makes("training checkpoint")
def imagenet(folder: Path) -> Path:
    return new(loop(), folder / "checkpoint.pth.tar")


@makes("training checkpoint")
def imagenet_legacy(folder: Path) -> Path:
    return old(loop(), folder / "checkpoint.pth.tar")


@makes("training checkpoint")
def language_groups(folder: Path) -> Path:
    """Two groups, named parameters, a schedule, a scaler and the state of the rng."""
    net = Language()
    groups = [
        {"params": [(n, p) for n, p in net.named_parameters() if p.ndim > 1]},
        {"params": [(n, p) for n, p in net.named_parameters() if p.ndim < 2], "weight_decay": 0},
    ]
    if tuple(map(int, torch.__version__.split(".")[:2])) < (2, 6):  # took no names then
        groups = [{**g, "params": [p for _, p in g["params"]]} for g in groups]
    optimizer = optim.AdamW(groups, lr=1e-3)
    scheduler = lr_scheduler.CosineAnnealingLR(optimizer, 10)
    train(net, optimizer, torch.randint(11, (2, 5)))
    scheduler.step()
    saved = {
        "model": net.state_dict(),
        "optimizer": optimizer.state_dict(),
        "lr_scheduler": scheduler.state_dict(),
        "scaler": torch.amp.GradScaler("cpu").state_dict(),
        "rng_state": torch.get_rng_state(),
        "step": 1,
    }
    return new(saved, folder / "step-1.pt")


@makes("training checkpoint")
def two_nets(folder: Path) -> Path:
    """A GAN: two models, two optimizers, and nothing says which is meant."""
    nets = {"generator": nn.Linear(3, 4), "discriminator": nn.Linear(4, 1)}
    saved: dict[str, Any] = {name: net.state_dict() for name, net in nets.items()}
    for name, net in nets.items():
        saved[f"optimizer_{name[0]}"] = optim.Adam(net.parameters()).state_dict()
    return new(saved, folder / "gan.pt")


@makes("training checkpoint", plain=False)
def arguments(folder: Path) -> Path:
    """With all that a script has at hand: its arguments, paths, times, numpy's numbers."""
    saved = {
        **loop(),
        "args": argparse.Namespace(lr=0.1, data=Path("/data"), optimizer=optim.SGD),
        "at": datetime.datetime(2020, 2, 2, 20, 20),
        "best": np.float64(0.5),
        "confusion": np.arange(4).reshape(2, 2),
        "random": random.getstate(),
        "numpy": np.random.RandomState(3).get_state(),
    }
    return new(saved, folder / "everything.pt")


def policy(make: type[optim.Optimizer]) -> tuple[nn.Module, optim.Optimizer]:
    torch.manual_seed(1)
    net = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 2))
    optimizer = make(net.parameters(), lr=1e-3)
    train(net, optimizer, torch.randn(3, 4))
    return net, optimizer


@makes("state_dict")
def a_policy(folder: Path) -> Path:
    return new(policy(optim.Adam)[0].state_dict(), folder / "policy.pth")


@makes("optimizer")
def adam(folder: Path) -> Path:
    return new(policy(optim.Adam)[1].state_dict(), folder / "policy.optimizer.pth")


@makes("optimizer")
def rmsprop_legacy(folder: Path) -> Path:
    return old(policy(optim.RMSprop)[1].state_dict(), folder / "policy.optimizer.pth")
