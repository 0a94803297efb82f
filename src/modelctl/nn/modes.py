"""Train and eval mode, for a while."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn


@contextmanager
def evaluating(model: nn.Module) -> Iterator[nn.Module]:
    """Eval mode and inference mode inside the block; every module's own mode after it.

    ``model.train()`` after a validation would put parts in train mode that were in eval before
    it (a frozen BatchNorm, a frozen trunk); this restores each module's mode, also when the
    block raises. Tensors made inside can't take part in autograd later (torch's rule for
    inference mode): ``clone()`` those that must.
    """
    modes = [(module, module.training) for module in model.modules()]
    try:
        model.eval()
        with torch.inference_mode():
            yield model
    finally:
        for module, mode in modes:
            module.training = mode
