"""Which parameters the builders of optimizers let decay: told from names and shapes.

Sources: transformers' ``Trainer.get_decay_parameter_names``, timm's ``param_groups_weight_decay``,
nanoGPT's ``configure_optimizers``. All make two groups that differ in nothing else.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

from .matcher import Shape

# Of transformers: nothing decays that is called so, and no LayerNorm, whatever it is called.
_NEVER = re.compile(r"bias|layernorm|rmsnorm|(?:^|\.)norm(?:$|\.)|_norm(?:$|\.)")
_LAYER_NORM = re.compile(r"(?:layer_norm|(?:^|[._])ln)_?\w*\.weight$", re.IGNORECASE)


def decay_groups(
    parameters: Mapping[str, Shape], decays: Sequence[Any]
) -> list[tuple[int, ...]] | None:
    """For each parameter which of two groups it may be in, by their weight decays; None where
    these don't say which one decays. The Trainer's decay first, and both are 0 by default."""
    if len(decays) != 2 or not all(isinstance(one, int | float) for one in decays):
        return None
    first, second = decays
    if second != 0 and first != 0:
        return None
    decaying = 1 if second else 0
    return [
        _may_be(name, shape, decaying, parameters.get(f"{name.removesuffix('weight')}bias"))
        for name, shape in parameters.items()
    ]


def _may_be(name: str, shape: Shape, decaying: int, bias: Shape | None) -> tuple[int, ...]:
    layer_norm = bias == shape and _LAYER_NORM.search(name)
    never = _NEVER.search(name.lower()) or layer_norm
    if len(shape) < 2 and never:
        return (1 - decaying,)
    if len(shape) > 1 and name.endswith("weight") and not never:
        return (decaying,)
    return (0, 1)  # some let it decay, others don't
