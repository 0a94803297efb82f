"""A trial of training that leaves no trace."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from copy import deepcopy
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.utils.data import DataLoader

from ...core.text import some
from ...errors import UsageError
from ..model_names import is_lazy, slots
from ..modes import modes_kept
from ..optim.several import with_inner
from ..training.rng import random_numbers_kept

# Wrappers whose own attributes are theirs to keep: buckets, compiled code.
_MACHINERY = ("torch.distributed.", "torch.nn.parallel.", "torch._dynamo.")


@contextmanager
def untouched(model: nn.Module, optimizer: Optimizer, data: Any) -> Iterator[None]:
    """After the block all is as it was, bit for bit, also where it raised: parameters, buffers,
    gradients, each module's mode and plain attributes, the optimizer's state and groups, the
    random numbers (torch's on every device, numpy's, Python's, those of a DataLoader's own
    generator). Gradients are None when the block begins.

    Raises:
        UsageError: parameters that have no shape yet.
    """
    lazy = [slot.name for slot in slots(model) if is_lazy(slot.tensor)]
    if lazy:
        raise UsageError(
            f"{some(lazy, 3)}: no shape yet", hint="run a batch through the model first"
        )
    held = [p for group in optimizer.param_groups for p in group["params"]]
    tensors = {id(t): t for t in (*model.parameters(), *model.buffers(), *held)}
    with ExitStack() as stack:
        stack.enter_context(random_numbers_kept())
        stack.enter_context(_generators_kept(data))
        stack.enter_context(_values_kept([*tensors.values()]))
        stack.enter_context(_attributes_kept(model))
        for one in with_inner(optimizer):
            stack.enter_context(_optimizer_kept(one, held))
        stack.enter_context(modes_kept(model))
        yield


@contextmanager
def _values_kept(tensors: list[Tensor]) -> Iterator[None]:
    values = [(t, t.detach().clone()) for t in tensors if not _overlaps(t)]
    # DistributedDataParallel's gradients are views that the next backward writes into
    grads = [(t, t.grad, None if t.grad is None else t.grad.clone()) for t in tensors if t.is_leaf]
    try:
        for tensor, _, _ in grads:
            tensor.grad = None
        yield
    finally:
        with torch.no_grad():
            for tensor, value in values:
                tensor.data.copy_(value)
            for tensor, grad, before in grads:
                tensor.grad = grad
                if grad is not None and before is not None:
                    grad.data.copy_(before)


def _overlaps(tensor: Tensor) -> bool:
    """Whether it is expanded: nothing writes into that, torch refuses."""
    if tensor.layout != torch.strided:
        return False
    return any(n > 1 and not step for n, step in zip(tensor.shape, tensor.stride(), strict=True))


@contextmanager
def _attributes_kept(model: nn.Module) -> Iterator[None]:
    """What modules have as attributes: counters, and which tensor a buffer is."""
    kept = [
        (mapping, dict(mapping))
        for module in model.modules()
        if not isinstance(module, torch.jit.ScriptModule)
        and not type(module).__module__.startswith(_MACHINERY)
        for mapping in (vars(module), module._parameters, module._buffers)
    ]
    try:
        yield
    finally:
        for mapping, before in kept:
            mapping.clear()
            mapping.update(before)


@contextmanager
def _optimizer_kept(optimizer: Optimizer, held: list[Tensor]) -> Iterator[None]:
    """The optimizer goes on with copies, and gets its own state and settings back."""
    memo: dict[int, Any] = {id(p): p for p in held}
    attributes = dict(vars(optimizer))
    state = dict(optimizer.state)
    groups = [(group, dict(group)) for group in optimizer.param_groups]
    try:
        for key, value in state.items():
            optimizer.state[key] = deepcopy(value, memo)
        for group, settings in groups:
            copies = {k: deepcopy(v, memo) for k, v in settings.items() if k != "params"}
            group.update(copies)
        yield
    finally:
        vars(optimizer).clear()
        vars(optimizer).update(attributes)
        optimizer.state.clear()
        optimizer.state.update(state)
        for group, settings in groups:
            group.clear()
            group.update(settings)


@contextmanager
def _generators_kept(data: Any) -> Iterator[None]:
    """A DataLoader's own generators, and that it has no workers that it did not have."""
    if not isinstance(data, DataLoader):
        yield
        return
    samplers = [data, data.sampler, data.batch_sampler, getattr(data.batch_sampler, "sampler", 0)]
    own = [getattr(one, "generator", None) for one in samplers]
    states = [(one, one.get_state()) for one in own if isinstance(one, torch.Generator)]
    workers = data._iterator
    try:
        yield
    finally:
        for generator, state in states:
            generator.set_state(state)
        data._iterator = workers
