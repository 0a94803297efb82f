"""Shapes and errors of a forward, in words."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from ...core.text import shape
from .kernels import tensors_in

Shapes = tuple[int, ...] | dict[str, Any]

_NO_VALUES = (
    "no data",
    "meta tensor",
    "meta device",
    "Meta kernel",
    "register_meta function",
    "data-dependent",
    "unallocated storage",
)


def shapes_of(value: Any) -> Shapes | None:
    """The shape of a tensor; of several a mapping of their names or places; None where there is
    none."""
    if isinstance(value, Tensor):
        return tuple(value.shape)
    if isinstance(value, Mapping):
        items: Any = value.items()
    elif isinstance(value, list | tuple):
        names = getattr(value, "_fields", None) or map(str, range(len(value)))
        items = zip(names, value, strict=True)
    elif hasattr(value, "__dataclass_fields__"):
        items = vars(value).items()
    else:
        data = getattr(value, "data", None)  # a PackedSequence
        return tuple(data.shape) if isinstance(data, Tensor) else None
    found = {str(name): shapes for name, one in items if (shapes := shapes_of(one)) is not None}
    return found or None


def describe(value: Any) -> str:
    """Inputs in a few words: ``1x3x224x224 float32``."""
    return words([(one.shape, one.dtype) for one in tensors_in(value)])


def words(tensors: Sequence[tuple[torch.Size, torch.dtype]]) -> str:
    shown = [
        f"{shape(dims) if dims else 'a scalar'} {str(dtype).removeprefix('torch.')}"
        for dims, dtype in tensors
    ]
    return ", ".join(shown[:4]) + (" …" if len(shown) > 4 else "")


def cut(text: str, most: int = 300) -> str:
    return text if len(text) <= most else text[:most] + " …"


def needs_values(error: Exception, text: str) -> bool:
    """Whether torch says that a tensor on meta has no data."""
    return isinstance(error, NotImplementedError | RuntimeError | TypeError) and any(
        words in text for words in _NO_VALUES
    )
