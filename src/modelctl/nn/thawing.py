"""Thawing: parameters train again, and an optimizer that left them out gets them."""

from __future__ import annotations

import warnings
from dataclasses import replace
from typing import Any

from torch import nn
from torch.optim import Optimizer

from ..core.names import Patterns
from ..errors import RefusedError, UsageError
from . import schedules
from .batchnorm import held_batchnorms, release_batchnorms
from .freezing import (
    Frozen,
    count_trainable,
    remember,
    select_with,
    set_grad,
)
from .naming import Parameters, numel
from .text import some


def unfreeze(
    model: nn.Module,
    patterns: Patterns,
    *,
    exclude: Patterns = (),
    regex: bool = False,
    optimizer: Optimizer | None = None,
    scheduler: schedules.Schedulers = None,
    lr: float | None = None,
) -> Frozen:
    """Let parameters train again, by name; with ``optimizer``, make sure that they really do.

    Without an optimizer this sets ``requires_grad`` and lets their BatchNorms out of lasting
    eval mode (each takes the mode of the module it stands in). Integer tensors are passed over.

    With one, the parameters that are in none of its groups are added as one new group: base
    learning rate ``lr`` (default: the optimizer's), everything else the optimizer's defaults,
    with ``param_names`` where the other groups have them. Parameters that it already holds
    (passed while they were frozen) stay where they are.

    With ``scheduler`` (one or several; SequentialLR's and ChainedScheduler's inner ones
    included) ``lr`` is the group's ``initial_lr``, its current lr is
    lr·(first group's current lr / first group's initial lr), and the schedulers' lists with an
    entry per group (``base_lrs``, ``lr_lambdas``, ``min_lrs``, …) get one more, by the example
    of the first group. Where the first group has no ``initial_lr`` (ReduceLROnPlateau) the
    current lr is ``lr`` itself.

    Raises:
        NoMatchError: a pattern, or all together, match nothing.
        UsageError: ``scheduler`` or ``lr`` without ``optimizer``, a scheduler of another
            optimizer, not a regular expression.
        RefusedError: the optimizer can't take a second group (LBFGS).
    """
    if optimizer is None and (schedules.each(scheduler) or lr is not None):
        raise UsageError("scheduler= and lr= need the optimizer= that they belong to")
    params = Parameters(model)
    names, bare = select_with(params, held_batchnorms(model), patterns, exclude, regex)
    if optimizer is not None:
        check_joinable(optimizer, scheduler)
    before = count_trainable(params)
    changed = set_grad(params, names, True)
    released = release_batchnorms(model, bare)
    joined: list[str] = []
    if optimizer is not None:
        new = {n: params.by_name[n] for n in names if params.by_name[n].requires_grad}
        joined = _join(optimizer, new, scheduler, lr)
    remember(model, ())
    total = sum(numel(p) for p in params.by_name.values())
    after = count_trainable(params)
    report = Frozen(tuple(names), tuple(changed), before, after, total, tuple(released))
    return replace(report, joined=tuple(joined))


def check_joinable(optimizer: Optimizer, scheduler: schedules.Schedulers) -> None:
    """Raises UsageError or RefusedError where a group can't be added, before anything is."""
    schedules.check_owner(scheduler, optimizer)
    if type(optimizer).__name__ == "LBFGS":
        raise RefusedError(
            "LBFGS has one flat state over all parameters: none can join it",
            hint="thaw without optimizer=, and make a new LBFGS",
        )


def _join(
    optimizer: Optimizer,
    named: dict[str, nn.Parameter],
    scheduler: schedules.Schedulers,
    lr: float | None,
) -> list[str]:
    held = {id(p) for group in optimizer.param_groups for p in group["params"]}
    new = {name: p for name, p in named.items() if id(p) not in held}
    if lr is not None and len(new) < len(named):
        there = [name for name in named if name not in new]
        warnings.warn(
            f"{len(there)} parameters are in the optimizer already, and keep the lr of their "
            f"group: {some(there, 3)}",
            stacklevel=3,
        )
    if not new:
        return []
    if not schedules.each(scheduler) and "initial_lr" in optimizer.param_groups[0]:
        warnings.warn(
            "a scheduler drives this optimizer: pass it as scheduler=, or its next step() "
            "fails or leaves the new group out",
            stacklevel=3,
        )
    base = float(optimizer.defaults["lr"] if lr is None else lr)
    values = schedules.group_values(optimizer, base, bool(schedules.each(scheduler)))
    add_group(optimizer, new, values, scheduler)
    return list(new)


def add_group(
    optimizer: Optimizer,
    named: dict[str, nn.Parameter],
    values: dict[str, Any],
    scheduler: schedules.Schedulers,
) -> None:
    """Add a group to an optimizer, and its entries to the schedulers that drive it."""
    group: dict[str, Any] = {**values, "params": list(named.values())}
    if "param_names" in optimizer.param_groups[0]:
        group["param_names"] = list(named)
    optimizer.add_param_group(group)
    schedules.extend(scheduler, group)
