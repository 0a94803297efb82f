"""Schedulers: warm-up with a cosine, and keeping any of torch's in step with the param_groups."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR, LRScheduler

from ..errors import UsageError

Schedulers = LRScheduler | Sequence[LRScheduler] | None

# What torch's schedulers keep one entry per param_group of, and how an entry follows from that
# of the first group for a new group whose lr is ``ratio`` times as large.
_PER_GROUP: dict[str, Callable[[Any, float], Any]] = {
    "base_lrs": lambda first, ratio: first * ratio,
    "max_lrs": lambda first, ratio: first * ratio,
    "_last_lr": lambda first, ratio: first * ratio,
    "lr_lambdas": lambda first, ratio: first,
    "min_lrs": lambda first, ratio: first,
    "base_momentums": lambda first, ratio: first,
    "max_momentums": lambda first, ratio: first,
}
# The same for what they keep in the groups themselves (OneCycleLR, CyclicLR, SWALR).
_IN_GROUP: dict[str, Callable[[Any, float], Any]] = {
    "initial_lr": lambda first, ratio: first * ratio,
    "max_lr": lambda first, ratio: first * ratio,
    "min_lr": lambda first, ratio: first * ratio,
    "swa_lr": lambda first, ratio: first * ratio,
    "max_momentum": lambda first, ratio: first,
    "base_momentum": lambda first, ratio: first,
}


class WarmupCosine:
    """The factor on the lr at step ``t``, from 0; see :func:`warmup_cosine`.

    An object and not a function, so that LambdaLR saves it and it can be pickled.
    """

    def __init__(self, warmup_steps: int, total_steps: int) -> None:
        self.warmup_steps, self.total_steps = warmup_steps, total_steps

    def __call__(self, step: int) -> float:
        if step < self.warmup_steps:
            return (step + 1) / self.warmup_steps
        if step >= self.total_steps:
            return 0.0
        done = (step - self.warmup_steps) / (self.total_steps - self.warmup_steps)
        return 0.5 * (1 + math.cos(math.pi * done))


def warmup_cosine(optimizer: Optimizer, warmup_steps: int, total_steps: int) -> LambdaLR:
    """A scheduler, stepped once an optimizer step: linear warm-up, then a cosine down to 0.

    At step t from 0: lr·(t+1)/warmup while t < warmup, then
    lr·½(1+cos(π·(t-warmup)/(total-warmup))), and 0 from ``total_steps`` on. Step warmup-1 and
    step warmup both have the full lr: there is no jump where they meet. Each group's own lr is
    scaled.

    Raises:
        UsageError: negative steps, or a warm-up that is not shorter than the whole.
    """
    if not 0 <= warmup_steps < total_steps:
        raise UsageError(
            f"warmup_steps={warmup_steps} and total_steps={total_steps}: "
            "the warm-up must be shorter than the whole"
        )
    return LambdaLR(optimizer, WarmupCosine(warmup_steps, total_steps))


def each(schedulers: Schedulers) -> list[LRScheduler]:
    """One scheduler, several or none, as a list."""
    if schedulers is None:
        return []
    return [schedulers] if isinstance(schedulers, LRScheduler) else list(schedulers)


def flatten(schedulers: Schedulers) -> Iterator[Any]:
    """The schedulers and those inside SequentialLR and ChainedScheduler."""
    for scheduler in each(schedulers):
        yield scheduler
        yield from flatten(list(getattr(scheduler, "_schedulers", ())))


def check_owner(schedulers: Schedulers, optimizer: Optimizer) -> None:
    """Raises UsageError where a scheduler drives another optimizer."""
    for scheduler in flatten(schedulers):
        if scheduler.optimizer is not optimizer:
            raise UsageError(f"the {type(scheduler).__name__} belongs to another optimizer")


def group_values(optimizer: Optimizer, lr: float, scheduled: bool) -> dict[str, Any]:
    """``lr`` and what schedulers keep in a group, for a new group of base learning rate ``lr``.

    With a schedule, its current lr is to ``lr`` as the first group's current to its initial one.
    """
    first = optimizer.param_groups[0]
    values: dict[str, Any] = {"lr": lr}
    base = first.get("initial_lr")
    if base is not None:
        values["initial_lr"] = lr
        if float(base) > 0:
            ratio = lr / float(base)
            values.update(
                (key, follow(first[key], ratio))
                for key, follow in _IN_GROUP.items()
                if key in first
            )
            values["initial_lr"] = lr  # exactly
            if scheduled:
                values["lr"] = lr * (float(first["lr"]) / float(base))
        for key in ("betas", "momentum"):  # cycled together with the lr
            if "max_momentum" in first and key in first:
                values[key] = first[key]
    return values


def extend(schedulers: Schedulers, group: dict[str, Any]) -> None:
    """Give the schedulers their entries for a group that was just added to their optimizer."""
    for scheduler in flatten(schedulers):
        first = scheduler.optimizer.param_groups[0]
        base = float(first.get("initial_lr", first["lr"]))
        lr = float(group.get("initial_lr", group["lr"]))
        exact = {"base_lrs": lr, "_last_lr": group["lr"]}
        for key, follow in _PER_GROUP.items():
            values = getattr(scheduler, key, None)
            if isinstance(values, list) and values:
                value = exact[key] if key in exact else follow(values[0], lr / base if base else 1)
                # a new list: a saved state_dict may still hold the old one
                setattr(scheduler, key, [*values, value])


def rearranged(state: dict[str, Any], live: Any, source: Sequence[int | None], saved: int) -> Any:
    """A saved scheduler state with its per-group entries in the order of the live groups.

    ``source`` gives for each live group the saved one, or None where ``live``'s own entry stays;
    ``saved`` is the number of saved groups.
    """
    out = dict(state)
    for key in _PER_GROUP:
        values = out.get(key)
        if not isinstance(values, list) or len(values) != saved:
            continue
        own = live.state_dict().get(key, [])
        out[key] = [
            own[i] if j is None and i < len(own) else values[j or 0] for i, j in enumerate(source)
        ]
    inner = getattr(live, "_schedulers", None)
    if inner is not None and isinstance(out.get("_schedulers"), list):
        out["_schedulers"] = [
            rearranged(part, child, source, saved)
            for part, child in zip(out["_schedulers"], inner, strict=True)
        ]
    return out
