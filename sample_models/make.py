"""Make the samples in this folder: python sample_models/make.py

They are trained for a moment on made-up images, so that their numbers are not all alike, with
fixed seeds on one thread. Needs torch and safetensors.
"""

from __future__ import annotations

from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import nn

from small_cnn import SmallCNN, batches

HERE = Path(__file__).parent


def train(model: nn.Module, optimizer: torch.optim.Optimizer, steps: int, seed: int) -> None:
    model.train()
    stream = batches(classes=10, seed=seed)
    for _ in range(steps):
        images, labels = next(stream)
        loss = nn.functional.cross_entropy(model(images), labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()


def main() -> None:
    torch.manual_seed(0)
    torch.set_num_threads(1)
    model = nn.DataParallel(SmallCNN())  # without a GPU it only wraps, which is all we need
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9, weight_decay=1e-4)
    train(model, optimizer, steps=60, seed=1)
    # a training checkpoint as most scripts save it: module. before every name
    torch.save(
        {
            "arch": "SmallCNN",
            "epoch": 3,
            "lr": 0.1,
            "state_dict": model.state_dict(),
            "optimizer": optimizer.state_dict(),
        },
        HERE / "cnn-ddp.pt",
    )
    # an optimizer of the last block alone, saved by itself: it does not record names
    block = model.module.layer3
    optimizer = torch.optim.AdamW(block.parameters(), lr=1e-3)
    train(model, optimizer, steps=10, seed=2)
    torch.save(optimizer.state_dict(), HERE / "layer3-adamw.pt")
    # the same weights in the other formats
    weights = model.module.state_dict()
    torch.save(weights, HERE / "cnn-legacy.pth", _use_new_zipfile_serialization=False)
    save_file(weights, HERE / "cnn.safetensors", metadata={"format": "pt"})


if __name__ == "__main__":
    main()
