"""Checkpoints of known values, made without torch."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

import modelctl as mc
from modelctl.core.checkpoint import Checkpoint
from modelctl.core.dtypes import BY_NAME
from modelctl.core.nodes import ordered_dict
from modelctl.core.storages import MemoryStorage
from modelctl.core.tensors import TensorRef


def tensor(values: Any, dtype: str = "float32") -> TensorRef:
    """A tensor of the numbers of an array; of what numpy has not, of its bytes."""
    found = np.asarray(values)
    if dtype in ("float32", "float64", "float16", "int64"):
        found = found.astype(dtype)
    return TensorRef(BY_NAME[dtype], found.shape, MemoryStorage(found.tobytes()))


def numbers(*shape: int, seed: int = 0) -> TensorRef:
    return tensor(np.random.default_rng(seed).standard_normal(shape))


def model() -> dict[str, TensorRef]:
    return {
        "conv.weight": numbers(4, 3, 3, 3, seed=1),
        "bn.weight": numbers(4, seed=2),
        "bn.num_batches_tracked": tensor(7, "int64"),
        "fc.weight": numbers(5, 4, seed=3),
        "fc.bias": numbers(5, seed=4),
    }


def training() -> dict[str, Any]:
    state = model()
    of = [ref.shape for name, ref in state.items() if ref.shape]
    return {
        "epoch": 3,
        "model": ordered_dict(state),
        "optimizer": {
            "state": {
                i: {"exp_avg": numbers(*shape, seed=10 + i), "exp_avg_sq": numbers(*shape, seed=i)}
                for i, shape in enumerate(of)
            },
            "param_groups": [{"lr": 0.1, "params": [*range(len(of))]}],
        },
    }


def write(path: Path, root: Any, **options: Any) -> Path:
    flat = isinstance(root, dict) and all(isinstance(ref, TensorRef) for ref in root.values())
    mc.save(Checkpoint(ordered_dict(root) if flat else root), path, **options)
    return path


def flipped(path: Path, at: int, bit: int = 0) -> Path:
    """The same file, with one bit turned."""
    data = bytearray(path.read_bytes())
    data[at] ^= 1 << bit
    path.write_bytes(data)
    return path
