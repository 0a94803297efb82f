"""What the surgery tests share: small nets, optimizers that train them, files made of them."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import nn

import modelctl as mc
from modelctl.core.checkpoint import Checkpoint
from modelctl.core.dtypes import BY_NAME
from modelctl.core.nodes import ordered_dict
from modelctl.core.storages import MemoryStorage
from modelctl.core.tensors import TensorRef


class Net(nn.Module):
    """Two convolutions with BatchNorm, and a head called ``fc``."""

    def __init__(self, classes: int = 5) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 4, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(4)
        self.layer1 = nn.Sequential(nn.Conv2d(4, 6, 3, padding=1), nn.BatchNorm2d(6), nn.ReLU())
        self.fc = nn.Linear(6, classes)

    def trunk(self, x: torch.Tensor) -> torch.Tensor:
        return self.layer1(torch.relu(self.bn1(self.conv1(x)))).mean(dim=(2, 3))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.fc(self.trunk(x))


HEAD = ("fc.weight", "fc.bias")

OPTIMIZERS: dict[str, Callable[[Any], torch.optim.Optimizer]] = {
    "sgd": lambda groups: torch.optim.SGD(groups, lr=0.05, momentum=0.9),
    "adamw": lambda groups: torch.optim.AdamW(groups, lr=0.01),
    "adafactor": lambda groups: torch.optim.Adafactor(groups, lr=0.01),
    "nadam": lambda groups: torch.optim.NAdam(groups, lr=0.01),
    "rmsprop": lambda groups: torch.optim.RMSprop(groups, lr=0.01, momentum=0.9),
    "amsgrad": lambda groups: torch.optim.Adam(groups, lr=0.01, amsgrad=True),
    "asgd": lambda groups: torch.optim.ASGD(groups, lr=0.01),
}


def set_grads(named: Mapping[str, torch.Tensor], seed: int) -> None:
    """The same gradients for the same names, whatever else the model has."""
    for name, parameter in named.items():
        generator = torch.Generator().manual_seed(seed * 1000 + sum(name.encode()) % 997)
        parameter.grad = torch.randn(parameter.shape, generator=generator)


def train(model: nn.Module, optimizer: torch.optim.Optimizer, seeds: range) -> None:
    """Steps with gradients that depend on names and seed alone."""
    named = {
        name.replace("module.", "").replace("_orig_mod.", ""): parameter
        for name, parameter in model.named_parameters()
        if parameter.requires_grad
    }
    for seed in seeds:
        set_grads(named, seed)
        optimizer.step()


@contextmanager
def opened(path: Path, obj: Any, **options: Any) -> Iterator[Checkpoint]:
    """``obj`` through torch.save and modelctl.open."""
    torch.save(obj, path, **options)
    with mc.open(path) as ckpt:
        yield ckpt


def load(ckpt: Checkpoint, path: Path) -> Any:
    """A checkpoint through modelctl.save and torch.load(weights_only=True)."""
    mc.save(ckpt, path, overwrite=True)
    mapped = torch.load(path, weights_only=True, mmap=True)
    loaded = torch.load(path, weights_only=True)
    assert type(mapped) is type(loaded)
    return loaded


def in_memory(shapes: Mapping[str, torch.Tensor | tuple[int, ...]]) -> Checkpoint:
    """A checkpoint of a (meta) state_dict: names, shapes and dtypes; equal tensors are tied."""
    storages: dict[int, MemoryStorage] = {}
    entries: dict[str, Any] = {}
    for name, value in shapes.items():
        dtype, shape = "float32", value
        key = id(value)
        if isinstance(value, torch.Tensor):
            dtype, shape = str(value.dtype).removeprefix("torch."), tuple(value.shape)
            # a meta tensor has no memory: parameters that are one object share this
            key = value.untyped_storage()._cdata
        storage = storages.setdefault(
            key if isinstance(value, torch.Tensor) else len(storages), MemoryStorage(b"")
        )
        entries[name] = TensorRef(BY_NAME[dtype], tuple(shape), storage)
    return Checkpoint(ordered_dict(entries))


def names(ckpt: Checkpoint) -> list[str]:
    return list(ckpt.state_dict())


def same_tensors(a: Mapping[str, torch.Tensor], b: Mapping[str, torch.Tensor]) -> None:
    assert list(a) == list(b)
    for name in a:
        assert a[name].dtype == b[name].dtype, name
        assert torch.equal(a[name], b[name]), name
