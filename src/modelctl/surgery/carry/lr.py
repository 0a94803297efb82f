"""Another learning rate in the middle of a schedule: what is left of it is scaled alike.

Whatever a schedule keeps is a rate that it began with, ends with or bounds itself by
(``initial_lr``, ``base_lrs``, ``max_lr``, ``eta_min``): where the present one is to be a tenth,
these have to be a tenth, too, so that each later one is.
"""

from __future__ import annotations

from collections.abc import Sequence
from math import isclose
from typing import Any

from ...core.nodes import mapping, with_entries
from ...core.numbers import plain_number
from ...core.sections import param_groups
from ...errors import RefusedError

_WAY_OUT = "merge without --lr, and set it where the schedule is built"


def set_lr(what: str, optimizer: Any, lr: float) -> Any:
    """The optimizer with this learning rate in each group; what else a schedule keeps there
    (``initial_lr``, ``max_lr``, ``min_lr``, ``swa_lr``) is scaled as the group's lr is.

    Raises:
        RefusedError: the lr is 0 now, no number, or not the optimizer's to follow.
    """
    groups = []
    for group in param_groups(optimizer):
        if "lr" in group and group["lr"] is None:
            raise RefusedError(f"'{what}' finds its own lr: its groups have none", hint=_WAY_OUT)
        rates = [key for key in group if _is_rate(key) and key != "lr"]
        ratio = _ratio(what, group.get("lr"), lr) if rates else 1.0
        scaled = {key: _scaled(what, key, group[key], [ratio]) for key in rates}
        groups.append({**group, **scaled, "lr": lr})
    return with_entries(optimizer, {**(mapping(optimizer) or {}), "param_groups": groups})


def set_scheduler_lr(what: str, scheduler: Any, lr: float) -> Any:
    """The scheduler's state with this as its last lr, and all its rates scaled alike; also those
    of the schedulers that it chains.

    Raises:
        RefusedError: its last lr is 0, or it has one bound for groups of different lrs.
    """
    entries = mapping(scheduler) or {}
    last = entries.get("_last_lr")
    if not isinstance(last, list) or not last:  # of a torch that kept none: nothing to go by
        lists = {key: one for key, one in entries.items() if _is_rate(key)}
        plain = {key: [lr] * len(one) for key, one in lists.items() if isinstance(one, list)}
        return with_entries(scheduler, {**entries, **plain})
    changed = _all_scaled(what, scheduler, [_ratio(what, one, lr) for one in last])
    return with_entries(changed, {**(mapping(changed) or {}), "_last_lr": [lr] * len(last)})


def _all_scaled(what: str, scheduler: Any, ratios: Sequence[float]) -> Any:
    entries = mapping(scheduler) or {}
    changed = {
        key: _scaled(what, key, value, ratios)
        for key, value in entries.items()
        if _is_rate(key) or key == "eta_min"
    }
    inner = entries.get("_schedulers")
    if isinstance(inner, list):
        changed["_schedulers"] = [_all_scaled(what, one, ratios) for one in inner]
    return with_entries(scheduler, {**entries, **changed})


def _is_rate(key: Any) -> bool:
    return isinstance(key, str) and key.endswith(("lr", "lrs"))


def _ratio(what: str, now: Any, lr: float) -> float:
    value = plain_number(now)
    if not isinstance(value, int | float) or (value == 0 and lr != 0):
        state = "0" if value == 0 else "no number"
        raise RefusedError(
            f"'{what}': the lr is {state} at this point of its schedule, which can't be scaled "
            f"to {lr:g}",
            hint=_WAY_OUT,
        )
    return lr / value if value else 1.0


def _scaled(what: str, key: str, value: Any, ratios: Sequence[float]) -> Any:
    """A rate, or one a group, as much larger as the group's lr gets."""
    if isinstance(value, list):
        several = len(value) == len(ratios)
        return [
            _scaled(what, key, one, [ratios[i]] if several else ratios)
            for i, one in enumerate(value)
        ]
    number = plain_number(value)
    if isinstance(number, bool) or not isinstance(number, int | float) or number == 0:
        return value
    if not all(isclose(ratio, ratios[0], rel_tol=1e-9) for ratio in ratios):
        raise RefusedError(
            f"'{what}' has one {key} for groups of different lrs: they can't become one lr",
            hint=_WAY_OUT,
        )
    return number * ratios[0]
