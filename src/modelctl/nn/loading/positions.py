"""Learned position embeddings of a grid of patches (ViT), of another size than the model's."""

from __future__ import annotations

from math import isqrt
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from ...core.matching.matcher import Shape
from ..model_names import Slot

# What timm, torchvision and DeiT, and those after them, call it.
_CALLED = ("pos_embed", "pos_embedding", "position_embedding", "position_embeddings")
_MOST_PREFIX = 2  # a class token, and one of distillation


class Grids(NamedTuple):
    """The rows and columns of the file's patches and of the model's, and how many tokens stand
    before them (a class token), which have no place in the grid."""

    old: tuple[int, int]
    new: tuple[int, int]
    prefix: int

    def __str__(self) -> str:
        (a, b), (c, d) = self.old, self.new
        return f"positions on a grid of {a}x{b}, {c}x{d} in the model"

    def resized(self, positions: Tensor) -> Tensor:
        """Positions [1, prefix + old, C] as [1, prefix + new, C]: bicubic with antialias, the
        prefix tokens as they are; as timm's ``resample_abs_pos_embed`` does it."""
        prefix, patches = positions[:, : self.prefix], positions[:, self.prefix :]
        grid = patches.float().reshape(1, *self.old, -1).permute(0, 3, 1, 2)
        grid = F.interpolate(
            grid, size=self.new, mode="bicubic", align_corners=False, antialias=True
        )
        patches = grid.permute(0, 2, 3, 1).reshape(1, -1, positions.shape[-1])
        return torch.cat([prefix, patches.to(positions.dtype)], dim=1)


def grids(slot: Slot, found: Shape) -> Grids | None:
    """Those of a tensor of the model and its shape in the file, where it is one of positions and
    both sizes are known: the file's grid is square, the model's what its ``patch_embed`` says, or
    square, too."""
    own = tuple(slot.tensor.shape)
    if slot.attr not in _CALLED or not len(found) == len(own) == 3:
        return None
    if (found[0], found[2]) != (1, own[2]) or own[0] != 1:
        return None
    embed: Any = getattr(slot.owner, "patch_embed", None)
    told = getattr(embed, "grid_size", None)
    if isinstance(told, tuple) and len(told) == 2:
        prefixes = [own[1] - told[0] * told[1]]
    else:
        told, prefixes = None, [*range(_MOST_PREFIX + 1)]
    possible = []
    for prefix in prefixes:
        old, new = _square(found[1] - prefix), told or _square(own[1] - prefix)
        if prefix >= 0 and old is not None and new is not None:
            possible.append(Grids(old, new, prefix))
    return possible[0] if len(possible) == 1 else None


def _square(count: int) -> tuple[int, int] | None:
    side = isqrt(count) if count > 0 else 0
    return (side, side) if side and side * side == count else None
