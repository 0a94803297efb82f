"""Train and eval mode, for a while."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from itertools import chain

import torch
from torch import nn

from .model_names import is_lazy


@contextmanager
def evaluating(model: nn.Module) -> Iterator[nn.Module]:
    """Eval mode and inference mode inside the block; every module's own mode after it.

    ``model.train()`` after a validation would put parts in train mode that were in eval before
    it (a frozen BatchNorm, a frozen trunk); this restores each module's mode, also when the
    block raises. It does so by the module's own ``train``, so that what that does besides
    (LoRA layers take their merged weights apart again) is done. Tensors made inside can't take
    part in autograd later (torch's rule for inference mode): ``clone()`` those that must.

    A model with lazy parameters that have no shape yet runs under ``no_grad`` instead: made in
    inference mode they could never train.
    """
    lazy = any(is_lazy(tensor) for tensor in chain(model.parameters(), model.buffers()))
    with modes_kept(model):
        model.eval()
        with torch.no_grad() if lazy else torch.inference_mode():
            yield model


@contextmanager
def modes_kept(model: nn.Module) -> Iterator[None]:
    """Every module's own mode after the block, by its own ``train``."""
    modes = [(module, module.training) for module in _parents_first(model)]
    try:
        yield
    finally:
        for module, mode in modes:
            if module.training != mode:
                module.train(mode)


def _parents_first(model: nn.Module) -> list[nn.Module]:
    """All modules, a shared one after each that it stands in: ``train`` goes down to children."""
    found: dict[nn.Module, None] = {}

    def visit(module: nn.Module) -> None:
        for child in module.children():
            if child not in found:
                visit(child)
        found[module] = None

    visit(model)
    return [*reversed(found)]
