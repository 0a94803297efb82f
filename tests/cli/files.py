"""Checkpoints made without torch, and what running a command gives."""

from __future__ import annotations

import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import modelctl as mc
from modelctl.core.checkpoint import Checkpoint
from modelctl.core.dtypes import BY_NAME
from modelctl.core.nodes import ordered_dict
from modelctl.core.storages import MemoryStorage
from modelctl.core.tensors import TensorRef


class Result(NamedTuple):
    code: int
    out: str
    err: str


Cli = Callable[..., Result]


def tensor(*shape: int, fill: float = 0.0, dtype: str = "float32") -> TensorRef:
    """A tensor whose bytes are in memory."""
    code = {"float32": "<f", "float64": "<d", "int64": "<q"}[dtype]
    n = 1
    for size in shape:
        n *= size
    value = fill if code != "<q" else int(fill)
    return TensorRef(BY_NAME[dtype], shape, MemoryStorage(struct.pack(code, value) * n))


def net(prefix: str = "", fill: float = 0.0) -> dict[str, TensorRef]:
    """The state_dict of a small convolutional net with BatchNorm."""
    found = {
        "conv1.weight": tensor(4, 3, 3, 3, fill=fill),
        "bn1.weight": tensor(4, fill=fill),
        "bn1.bias": tensor(4),
        "bn1.running_mean": tensor(4),
        "bn1.running_var": tensor(4, fill=1),
        "bn1.num_batches_tracked": tensor(fill=7, dtype="int64"),
        "layer1.0.weight": tensor(6, 4, fill=fill),
        "layer1.0.bias": tensor(6),
        "layer1.1.weight": tensor(6, 6, fill=fill),
        "layer1.1.bias": tensor(6),
        "fc.weight": tensor(5, 6, fill=fill),
        "fc.bias": tensor(5),
    }
    return {prefix + name: ref for name, ref in found.items()}


def training(prefix: str = "module.") -> dict[str, Any]:
    """A training checkpoint: model, SGD with momentum, progress."""
    model = net(prefix)
    shapes = [ref.shape for name, ref in model.items() if "running" not in name]
    shapes = [shape for shape in shapes if shape]
    return {
        "epoch": 3,
        "arch": "net",
        "lr": 0.1,
        "state_dict": ordered_dict(model),
        "optimizer": {
            "state": {i: {"momentum_buffer": tensor(*shape)} for i, shape in enumerate(shapes)},
            "param_groups": [
                {"lr": 0.1, "momentum": 0.9, "nesterov": False, "params": [*range(len(shapes))]}
            ],
        },
        "best": [0.5, None, (1, "two")],
    }


def write(path: Path, root: Any) -> Path:
    """A tree, saved by the library."""
    if isinstance(root, dict) and all(isinstance(ref, TensorRef) for ref in root.values()):
        root = ordered_dict(root)
    mc.save(Checkpoint(root), path)
    return path
