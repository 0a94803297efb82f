"""Which of several saved optimizers is which of several live ones: by the parameters they hold."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch.optim import Optimizer

from ...core.matcher import match_names
from ...errors import AmbiguousError, CollisionError, RefusedError
from ..model_names import Parameters
from ..optim.several import Label, called
from .optimizer_state import OptimizerPlan

_WAY_OUT = (
    "give optimizer= as it was saved, each over the same parameters, in the same order or under "
    "the same name; or resume without optimizer="
)


def order_by_content(
    live: Sequence[Optimizer], saved: Sequence[Any], params: Parameters
) -> list[int]:
    """For each live optimizer of a list the place of the saved one that holds what it holds.

    Where places are as good as anything (several over the same parameters, saved ones without
    names) they count.

    Raises:
        AmbiguousError: which is which can't be told.
    """
    held = [
        {name for group in one.param_groups for p in group["params"] if (name := params.name_of(p))}
        for one in live
    ]
    known = [_names(one, params) for one in saved]
    best = []
    for mine in held:
        shares = [len(mine & theirs) / max(1, len(mine | theirs)) for theirs in known]
        best.append({i for i, share in enumerate(shares) if share == max(shares)})
    if all(i in found for i, found in enumerate(best)):
        return [*range(len(live))]
    order = [found.pop() for found in best if len(found) == 1]
    if len({*order}) < len(live):
        raise AmbiguousError(
            f"which of the {len(live)} optimizers is which can't be told: by the names of their "
            "parameters they don't go one to one with those of the checkpoint",
            hint=_WAY_OUT,
        )
    return order


def _names(saved: Any, params: Parameters) -> set[str]:
    groups = saved.get("param_groups", ()) if isinstance(saved, dict) else ()
    names = [
        name
        for group in groups
        if isinstance(group, dict)
        for name in group.get("param_names") or ()
        if isinstance(name, str)
    ]
    try:
        found = match_names(dict.fromkeys(names), params.called)
    except CollisionError:
        return set()
    return {first for name in found.values() for first in params.called[name]}


def check_apart(
    optimizers: Mapping[Label, Optimizer], plans: Mapping[Label, OptimizerPlan]
) -> None:
    """Raises RefusedError where a parameter would join one optimizer, and another has it that had
    not when this was saved."""
    for label, plan in plans.items():
        joining = {id(p): name for _, named in plan.added for name, p in named.items()}
        for other, one in optimizers.items():
            held = [id(p) for group in one.param_groups for p in group["params"]]
            for both in [key for key in held if key in joining and key not in plans[other].ids]:
                raise RefusedError(
                    f"the checkpoint's {called('optimizer', label)} has '{joining[both]}', which "
                    f"{called('optimizer', other)} holds here: both would train it",
                    hint=_WAY_OUT,
                )
