"""Schedulers: warm-up with a cosine, and keeping any of torch's in step with the param_groups."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from numbers import Real
from typing import Any, TypeAlias

from torch import Tensor
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR, LRScheduler

from ...core.text import some
from ...errors import RefusedError, UsageError
from .several import Several, labelled

Schedulers: TypeAlias = Several[LRScheduler]

# What torch's schedulers, and timm's (the last two), keep one entry per param_group of, and how an
# entry follows from that of the first group for a new group whose lr is ``ratio`` times as large.
_PER_GROUP: dict[str, Callable[[Any, float], Any]] = {
    "base_lrs": lambda first, ratio: first * ratio,
    "max_lrs": lambda first, ratio: first * ratio,
    "_last_lr": lambda first, ratio: first * ratio,
    "lr_lambdas": lambda first, ratio: first,
    "min_lrs": lambda first, ratio: first,
    "base_momentums": lambda first, ratio: first,
    "max_momentums": lambda first, ratio: first,
    "base_values": lambda first, ratio: first * ratio,
    "warmup_steps": lambda first, ratio: first,
}
# The same for what they keep in the groups themselves (OneCycleLR, CyclicLR, SWALR).
IN_GROUP: dict[str, Callable[[Any, float], Any]] = {
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


class WarmupCosineLR(LambdaLR):
    """A LambdaLR whose cosine ends at ``min_lr``, which its state has where it is not 0."""

    min_lr = 0.0

    def __init__(self, optimizer: Optimizer, shape: WarmupCosine, min_lr: float) -> None:
        if min_lr:
            self.min_lr = min_lr
        super().__init__(optimizer, shape)

    def get_lr(self) -> list[float | Tensor]:
        step = self.last_epoch
        lrs: list[float | Tensor] = []
        for base, shape in zip(self.base_lrs, self.lr_lambdas, strict=True):
            low = min(base, self.min_lr) if step >= getattr(shape, "warmup_steps", 0) else 0.0
            lrs.append(low + (base - low) * shape(step))
        return lrs


def warmup_cosine(
    optimizer: Optimizer, warmup_steps: int, total_steps: int, *, min_lr: float = 0.0
) -> LambdaLR:
    """A scheduler, stepped once an optimizer step: linear warm-up, then a cosine to ``min_lr``.

    At step t from 0: lr·(t+1)/warmup while t < warmup, then
    min_lr + (lr-min_lr)·½(1+cos(π·(t-warmup)/(total-warmup))), and min_lr from ``total_steps``
    on. Step warmup-1 and step warmup both have the full lr: there is no jump where they meet.
    Each group's own lr is scaled; ``min_lr`` is a learning rate, the same for all groups, and a
    group whose own lr is lower stays at that.

    Raises:
        UsageError: negative steps, steps that are no whole numbers (``0.05 * total``), a
            warm-up that is not shorter than the whole, or a ``min_lr`` below 0, not finite, or
            above the lr of every group.
    """
    for name, steps in (("warmup_steps", warmup_steps), ("total_steps", total_steps)):
        if not isinstance(steps, Real) or not float(steps).is_integer():
            raise UsageError(
                f"{name}={steps!r:.40}: it must be a whole number of steps",
                hint=f"round it: int({steps!r:.20})" if isinstance(steps, Real) else None,
            )
    if not 0 <= warmup_steps < total_steps:
        raise UsageError(
            f"warmup_steps={warmup_steps} and total_steps={total_steps}: "
            "the warm-up must be shorter than the whole"
        )
    if not isinstance(min_lr, Real) or not 0 <= float(min_lr) < math.inf:
        raise UsageError(f"min_lr={min_lr!r:.40}: it must be a learning rate, 0 or more")
    own = [group.get("initial_lr", group.get("lr")) for group in optimizer.param_groups]
    highest = max(map(float, own)) if min_lr else 0.0
    if min_lr > highest:
        raise UsageError(
            f"min_lr={float(min_lr):g} is above the lr of every group ({highest:g} at most)",
            hint="it is a learning rate, not a part of one: min_lr=lr / 100",
        )
    shape = WarmupCosine(int(warmup_steps), int(total_steps))
    return WarmupCosineLR(optimizer, shape, float(min_lr))


def each(schedulers: Schedulers) -> list[LRScheduler]:
    """One scheduler, several or none, as a list."""
    return list(labelled(schedulers).values())


def flatten(schedulers: Schedulers) -> Iterator[Any]:
    """The schedulers and those inside SequentialLR and ChainedScheduler."""
    for scheduler in each(schedulers):
        yield scheduler
        yield from flatten(list(getattr(scheduler, "_schedulers", ())))


def check_owner(schedulers: Schedulers, *optimizers: Optimizer) -> None:
    """Raises UsageError where a scheduler drives none of these optimizers."""
    for scheduler in flatten(schedulers):
        if all(scheduler.optimizer is not optimizer for optimizer in optimizers):
            raise UsageError(f"the {type(scheduler).__name__} belongs to another optimizer")


def lr_of(group: Mapping[str, Any], key: str = "lr") -> float | None:
    """A group's lr, or what it began with; None where the optimizer finds its own (Adafactor)."""
    value = group.get(key)
    return None if value is None else float(value)


def own_lr(group: Mapping[str, Any]) -> float:
    """The lr that a group was given, whatever its schedule made of it: what the optimizer says,
    or OneCycleLR's ``max_lr`` and CyclicLR's ``base_lr``, which take the place of that."""
    return float(next(group[key] for key in ("max_lr", "initial_lr", "lr") if key in group))


def shared_lr(optimizer: Optimizer, schedulers: Schedulers) -> float:
    """The :func:`own_lr` that all groups have; where they differ, the optimizer's default.

    Raises:
        UsageError: they differ under a schedule (OneCycleLR, CyclicLR) that overwrote that
            default.
    """
    groups = optimizer.param_groups
    lrs = [own_lr(group) for group in groups]
    own = [scheduler.max_lrs for scheduler in flatten(schedulers) if hasattr(scheduler, "max_lrs")]
    own += [lrs] if "max_lr" in groups[0] else []
    if all(len({*map(float, values)}) == 1 for values in (lrs, *own)):
        return lrs[0]
    if own:
        raise UsageError(
            f"the groups have different lrs in their schedule ({some([*map(str, own[0])], 3)}): "
            "none is that of a new group",
            hint="say which: lr=",
        )
    return float(optimizer.defaults["lr"])


def group_values(optimizer: Optimizer, lr: float, scheduled: bool) -> dict[str, Any]:
    """``lr`` and what schedulers keep in a group, for a new group whose :func:`own_lr` is ``lr``.

    Each is to that of the first group as ``lr`` is to the first group's; so is the current lr,
    with a schedule.
    """
    first = optimizer.param_groups[0]
    values: dict[str, Any] = {"lr": lr}
    if "initial_lr" in first:
        values["initial_lr"] = lr
        own = own_lr(first)
        if own > 0:
            ratio = lr / own
            values.update(
                (key, follow(first[key], ratio)) for key, follow in IN_GROUP.items() if key in first
            )
            values["max_lr" if "max_lr" in first else "initial_lr"] = lr  # exactly
            if scheduled:
                values["lr"] = lr * (float(first["lr"]) / own)
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
        exact = {"base_lrs": lr, "_last_lr": group["lr"], "base_values": lr}
        if getattr(scheduler, "warmup_t", 0):  # timm's: what is added at each step
            exact["warmup_steps"] = (lr - scheduler.warmup_lr_init) / scheduler.warmup_t
        for key, follow in _PER_GROUP.items():
            values = getattr(scheduler, key, None)
            if isinstance(values, list) and values:
                value = exact[key] if key in exact else follow(values[0], lr / base if base else 1)
                # a new list: a saved state_dict may still hold the old one
                setattr(scheduler, key, [*values, value])


# ------------------------------------------------------------------ saved ones

# What moves with the steps, or follows from the optimizer's groups: no setting.
_MOVING = frozenset(
    (
        *("last_epoch", "best", "num_bad_epochs", "cooldown_counter", "T_cur", "T_i"),
        *("base_lrs", "max_lrs", "base_values", "verbose"),
    )
)


def check_same(scheduler: Any, state: Any) -> None:
    """Raises RefusedError where a saved state has other attributes than the live scheduler."""
    own = scheduler.state_dict()
    sound = isinstance(state, dict)
    mine, theirs = ({key for key in one if not key.startswith("_")} for one in (own, state or {}))
    inner = [len(one.get("_schedulers") or ()) if sound else 0 for one in (own, state)]
    # private ones come and go with versions of torch
    if not sound or mine - {"verbose"} != theirs - {"verbose"} or inner[0] != inner[1]:
        differ = sorted(mine ^ theirs)
        raise RefusedError(
            f"the checkpoint's scheduler is no {type(scheduler).__name__}"
            + (f": they differ in {some(differ)}" if differ else ""),
            hint="build the scheduler that was saved, or resume without scheduler=",
        )
    for child, saved in zip(
        getattr(scheduler, "_schedulers", ()), state.get("_schedulers") or (), strict=True
    ):
        check_same(child, saved)


def differences(own: Mapping[str, Any], saved: Mapping[str, Any]) -> dict[str, tuple[Any, Any]]:
    """The settings in which two states of a scheduler differ: (own, saved) by name."""
    mine, theirs = dict(_settings(own)), dict(_settings(saved))
    return {
        key: (mine[key], theirs[key]) for key in mine if key in theirs and mine[key] != theirs[key]
    }


def _settings(state: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    for key, value in state.items():
        if key == "_schedulers":
            for i, inner in enumerate(value):
                yield from ((f"{i}.{name}", setting) for name, setting in _settings(inner))
        elif key == "_milestones":
            yield "milestones", value
        elif key in _PER_GROUP and isinstance(value, list):
            yield from _of_groups(key, value)
        elif key not in _MOVING and not key.startswith("_"):
            yield key, value


def _of_groups(key: str, values: list[Any]) -> Iterator[tuple[str, Any]]:
    """What the groups have, whatever their order: one value where it is the same."""
    if key in _MOVING or key.startswith("_") or key == "warmup_steps":  # it follows from the lr
        return
    named = [value if isinstance(value, Mapping) else {key: value} for value in values]
    for name in dict.fromkeys(name for entry in named for name in entry):
        different = sorted({repr(e[name]): e[name] for e in named if name in e}.items())
        yield name, different[0][1] if len(different) == 1 else [value for _, value in different]


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
        if key == "_last_lr":
            own = [group["lr"] for group in live.optimizer.param_groups]
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
