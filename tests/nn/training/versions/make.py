"""Writes the trainings of this torch that test_versions.py resumes; run it by itself."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor, nn, optim

OPTIMIZERS = {
    "sgd": lambda given: optim.SGD(given, lr=0.1, momentum=0.9),
    "adam": lambda given: optim.Adam(given, lr=0.1),
    "adamw": lambda given: optim.AdamW(given, lr=0.1),
    "nadam": lambda given: optim.NAdam(given, lr=0.1),
}


def net() -> nn.Linear:
    """A net that is the same in each torch."""
    made = nn.Linear(3, 2)
    with torch.no_grad():
        made.weight.copy_(torch.arange(6.0).reshape(2, 3) / 8)
        made.bias.copy_(torch.tensor([0.5, -0.25]))
    return made


def step(model: nn.Linear, optimizer: optim.Optimizer, nth: int) -> dict[str, Tensor]:
    """A step of gradients that are the same in each torch; what the model has then."""
    for parameter in model.parameters():
        parameter.grad = torch.linspace(-1, nth, parameter.numel()).reshape(parameter.shape)
    optimizer.step()
    return {name: value.clone() for name, value in model.state_dict().items()}


def main() -> None:
    version = ".".join(torch.__version__.split(".")[:2])
    for name, build in OPTIMIZERS.items():
        model = net()
        optimizer = build(model.parameters())
        step(model, optimizer, 1)
        ckpt = {"model": step(model, optimizer, 2), "optimizer": optimizer.state_dict()}
        saved = Path(__file__).parent / f"{name}-torch-{version}.pt"
        torch.save({**ckpt, "then": None}, saved)  # as it is before the next step
        then = step(model, optimizer, 3)
        torch.save({**torch.load(saved, weights_only=True), "then": then}, saved)


if __name__ == "__main__":
    main()
