"""Thawing: parameters train again, and an optimizer that left them out gets them."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from typing import Any, Literal

from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim import Optimizer

from ...core.names import Patterns
from ...core.text import some
from ...errors import RefusedError, UsageError
from ..model_names import Parameters, numel
from ..optim import schedulers
from ..optim.groups import RESERVED, in_common, split, undecayed
from .batchnorm import held_batchnorms, release_batchnorms
from .freeze import Frozen, can_train, count_trainable, remember, select_with, set_grad


def unfreeze(
    model: nn.Module,
    patterns: Patterns,
    *,
    exclude: Patterns = (),
    regex: bool = False,
    optimizer: Optimizer | None = None,
    scheduler: schedulers.Schedulers = None,
    lr: float | None = None,
    no_decay: Literal[False, True] | Patterns = False,
    **settings: Any,
) -> Frozen:
    """Let parameters train again, by name; with ``optimizer``, make sure that they really do.

    Without an optimizer this sets ``requires_grad`` and lets their BatchNorms out of lasting
    eval mode (each takes the mode of the module it stands in). Integer tensors are passed over.

    With one, the parameters that are in none of its groups are added as one new group, with
    ``param_names`` where the other groups have them. Its settings are those in which all groups
    agree, else the optimizer's defaults; of weight decays those above 0 count. ``settings``
    (``weight_decay=0.05``) go over that. ``no_decay`` as in :func:`param_groups`: what it means
    gets a second new group, without decay. Parameters that the optimizer already holds (passed
    while they were frozen) stay where they are.

    ``lr`` is the new group's base learning rate, by default that of the other groups where all
    have the same, else the optimizer's. With ``scheduler`` (one or several; SequentialLR's and
    ChainedScheduler's inner ones included) it is the group's ``initial_lr``, and its current lr
    is lr·(first group's current lr / first group's initial lr). Under OneCycleLR it is the
    group's ``max_lr``, under CyclicLR its ``base_lr``; the other bounds of both (CyclicLR's
    ``max_lr``, too) are in proportion to the first group's. The schedulers' lists with an entry
    per group (``base_lrs``, ``lr_lambdas``, ``min_lrs``, …) get one more, by the example of the
    first group. Where the first group has no ``initial_lr`` (ReduceLROnPlateau) the current lr
    is ``lr`` itself.

    DistributedDataParallel looks at what trains only when it is built, and would leave what
    thaws later unsynchronised: thaw the bare model, then wrap it anew. ``fully_shard`` (FSDP2)
    takes notice.

    Raises:
        NoMatchError: a pattern, or all together, match nothing.
        UsageError: ``scheduler``, ``lr``, ``no_decay`` or settings without ``optimizer``;
            settings that it does not have; a scheduler of another optimizer; no ``lr`` where
            OneCycleLR or CyclicLR gives the groups different ones; not a regular expression.
        RefusedError: something would thaw inside DistributedDataParallel; the optimizer can't
            take a second group (LBFGS).
    """
    params = Parameters(model)
    names, bare = select_with(params, held_batchnorms(model), patterns, exclude, regex)
    thawing = {n: params.by_name[n] for n in names if can_train(params.by_name[n])}
    _check_wrapped(model, thawing)
    groups: list[dict[str, Any]] = []
    if optimizer is not None:
        check_joinable(optimizer, scheduler)
        without = undecayed(model, params, no_decay)
        groups = _new_groups(optimizer, thawing, scheduler, lr, without, settings)
    elif schedulers.each(scheduler) or lr is not None or no_decay is not False or settings:
        raise UsageError(
            f"{some(['scheduler', 'lr', 'no_decay', *settings])}: these need the optimizer= that "
            "they belong to"
        )
    before = count_trainable(params)
    changed = set_grad(params, names, True)
    released = release_batchnorms(model, bare)
    joined: list[str] = []
    for group in groups:
        named = dict(zip(group["param_names"], group["params"], strict=True))
        values = {key: value for key, value in group.items() if key not in RESERVED}
        assert optimizer is not None
        add_group(optimizer, named, values, scheduler)
        joined += named
    remember(model, ())
    total = sum(numel(p) for p in params.by_name.values())
    after = count_trainable(params)
    return Frozen(
        tuple(names), tuple(changed), before, after, total, tuple(released), tuple(joined)
    )


def _check_wrapped(model: nn.Module, thawing: Mapping[str, nn.Parameter]) -> None:
    wrappers = (m for m in model.modules() if isinstance(m, DistributedDataParallel))
    inside = {id(p) for wrapper in wrappers for p in wrapper.parameters()}
    late = [n for n, p in thawing.items() if id(p) in inside and not p.requires_grad]
    if late:
        raise RefusedError(
            f"DistributedDataParallel looks at what trains only when it is built: {some(late, 3)} "
            "would train without being synchronised",
            hint="unfreeze the bare model (modelctl.nn.unwrap), then wrap it anew",
        )


def check_joinable(optimizer: Optimizer, scheduler: schedulers.Schedulers) -> None:
    """Raises UsageError or RefusedError where a group can't be added, before anything is."""
    schedulers.check_owner(scheduler, optimizer)
    if type(optimizer).__name__ == "LBFGS":
        raise RefusedError(
            "LBFGS has one flat state over all parameters: none can join it",
            hint="thaw without optimizer=, and make a new LBFGS",
        )


def _new_groups(
    optimizer: Optimizer,
    thawing: Mapping[str, nn.Parameter],
    scheduler: schedulers.Schedulers,
    lr: float | None,
    without_decay: set[str],
    settings: Mapping[str, Any],
) -> list[dict[str, Any]]:
    """The groups for what the optimizer does not hold yet; nothing is changed."""
    odd = [key for key in settings if key not in optimizer.defaults]
    if odd:
        raise UsageError(
            f"{type(optimizer).__name__} has no setting '{odd[0]}'",
            hint=f"it has {', '.join(optimizer.defaults)}",
        )
    held = {id(p) for group in optimizer.param_groups for p in group["params"]}
    new = {name: p for name, p in thawing.items() if id(p) not in held}
    if (lr is not None or settings) and len(new) < len(thawing):
        there = [name for name in thawing if name not in new]
        warnings.warn(
            f"{len(there)} parameters are in the optimizer already, and keep the lr and the "
            f"settings of their group: {some(there, 3)}",
            stacklevel=3,
        )
    if not new:
        return []
    scheduled = bool(schedulers.each(scheduler))
    if not scheduled and "initial_lr" in optimizer.param_groups[0]:
        warnings.warn(
            "a scheduler drives this optimizer: pass it as scheduler=, or its next step() "
            "fails or leaves the new group out",
            stacklevel=3,
        )
    base = schedulers.shared_lr(optimizer, scheduler) if lr is None else float(lr)
    values = in_common(optimizer.param_groups)
    values |= schedulers.group_values(optimizer, base, scheduled)
    return split(new, {**values, **settings}, without_decay, {})


def add_group(
    optimizer: Optimizer,
    named: dict[str, nn.Parameter],
    values: dict[str, Any],
    scheduler: schedulers.Schedulers,
) -> None:
    """Add a group to an optimizer, and its entries to the schedulers that drive it."""
    group: dict[str, Any] = {**values, "params": list(named.values())}
    if "param_names" in optimizer.param_groups[0]:
        group["param_names"] = list(named)
    optimizer.add_param_group(group)
    schedulers.extend(scheduler, group)
