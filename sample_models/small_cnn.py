"""The small convolutional net of the samples, as a training script would define it."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor, nn


class Block(nn.Module):
    """Two 3x3 convolutions with BatchNorm and a shortcut; halves height and width."""

    def __init__(self, channels_in: int, channels: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(channels_in, channels, 3, stride=2, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(channels)
        self.conv2 = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(channels)
        self.shortcut = nn.Conv2d(channels_in, channels, 1, stride=2, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        out = torch.relu(self.bn1(self.conv1(x)))
        return torch.relu(self.bn2(self.conv2(out)) + self.shortcut(x))


class SmallCNN(nn.Module):
    """Images [N, 3, 16, 16] to logits [N, classes]."""

    def __init__(self, classes: int = 10) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 8, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(8)
        self.layer1 = Block(8, 8)
        self.layer2 = Block(8, 16)
        self.layer3 = Block(16, 32)
        self.fc = nn.Linear(32, classes)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.bn1(self.conv1(x)))
        x = self.layer3(self.layer2(self.layer1(x)))
        return self.fc(x.mean(dim=(2, 3)))


def batches(classes: int, seed: int = 0, size: int = 32) -> Iterator[tuple[Tensor, Tensor]]:
    """Endless batches of made-up images, each class with colours and stripes of its own:
    images [size, 3, 16, 16], labels [size]."""
    generator = torch.Generator().manual_seed(seed)
    ramp = torch.linspace(0, 6.28, 16)
    while True:
        labels = torch.randint(classes, (size,), generator=generator)
        stripes = torch.sin(ramp * (1 + labels[:, None] % 4))  # [size, 16]
        colours = torch.cos(labels[:, None] + torch.arange(3.0))  # [size, 3]
        images = colours[:, :, None, None] * stripes[:, None, :, None].expand(-1, 3, -1, 16)
        yield images + 0.5 * torch.randn(images.shape, generator=generator), labels
