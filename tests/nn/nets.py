"""A small model for the tests on live modules, and what they do with it."""

from __future__ import annotations

import torch
from torch import nn


class Net(nn.Module):
    """conv, BatchNorm, blocks, dropout, fc: (2, 3, 8, 8) -> (2, 5)."""

    def __init__(self, classes: int = 5) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 4, 3, bias=False)
        self.bn1 = nn.BatchNorm2d(4)
        self.layer1 = nn.Sequential(nn.Conv2d(4, 4, 3), nn.BatchNorm2d(4), nn.ReLU())
        self.layer2 = nn.Sequential(nn.Conv2d(4, 6, 3), nn.BatchNorm2d(6), nn.ReLU())
        self.drop = nn.Dropout(0.2)
        self.fc = nn.Linear(6, classes)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.layer2(self.layer1(self.bn1(self.conv1(x))))
        return self.fc(self.drop(x.mean((2, 3))))


def batch() -> torch.Tensor:
    return torch.randn(2, 3, 8, 8)


def train_step(model, optimizer, scheduler=None):
    """One step on random data, drawn from torch's generator."""
    optimizer.zero_grad()
    loss = model(torch.randn(4, 3, 8, 8)).square().mean()
    loss.backward()
    optimizer.step()
    if scheduler is not None:
        scheduler.step()


def same(a, b) -> bool:
    """Two state_dicts with the same names and exactly the same values."""
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)
