"""Param groups for an optimizer, by rules over names."""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Literal

from torch import nn
from torch.nn.modules.batchnorm import _NormBase
from torch.optim import Optimizer

from ..core.names import Patterns
from ..errors import RefusedError, UsageError
from .naming import Parameters, is_lazy, numel, places
from .text import some, table

_NORMS = (_NormBase, nn.LayerNorm, nn.GroupNorm, nn.LocalResponseNorm)
_RESERVED = ("params", "param_names")


def param_groups(
    model: nn.Module,
    rules: Mapping[str, Mapping[str, Any]],
    *,
    no_decay: Literal[False, True] | Patterns = False,
    **defaults: Any,
) -> list[dict[str, Any]]:
    """Groups for any ``torch.optim`` optimizer: different settings for different layers.

    ``param_groups(model, {"layer4": {"lr": 1e-4}, "fc": {"lr": 1e-3}}, lr=1e-5,
    weight_decay=0.01)``: patterns as everywhere (globs over dotted names, a module's name is its
    subtree), the first that matches a parameter decides over it, and what no rule matches goes
    to a last group with the defaults alone. Every trainable parameter is in exactly one group,
    tied ones once; frozen ones are left out.

    Args:
        rules: settings by pattern; they go over ``defaults``.
        no_decay: the parameters whose ``weight_decay`` is 0 whatever the rules say, in groups of
            their own: those that these patterns match, or, with True, biases, parameters of
            norms, and all others with fewer than two dimensions.
        defaults: settings of every group, by keyword.

    Returns:
        Dicts with ``params`` (a list of parameters), ``param_names`` (their names without
        wrapper prefixes, which the optimizer's state_dict then carries) and the settings; those
        of a rule in the order of the rules, with decay before without.

    Raises:
        NoMatchError: a rule, or a pattern of ``no_decay``, matches no parameter.
        RefusedError: no parameter is trainable.
        UsageError: a setting called ``params`` or ``param_names``.
    """
    for settings in (defaults, *rules.values()):
        for key in _RESERVED:
            if key in settings:
                raise UsageError(f"'{key}' is no setting: the patterns choose the parameters")
    params = Parameters(model)
    undecayed = _undecayed(model, params, no_decay)
    left = {name: p for name, p in params.by_name.items() if p.requires_grad}
    if not left:
        raise RefusedError(
            "every parameter is frozen: there is nothing to optimize", hint="unfreeze some first"
        )
    groups: list[dict[str, Any]] = []
    for pattern, settings in rules.items():
        matched = params.select(pattern)
        taken = {name: left.pop(name) for name in matched if name in left}
        if not taken:
            why = (
                "frozen"
                if not any(params.by_name[n].requires_grad for n in matched)
                else ("taken by earlier rules")
            )
            warnings.warn(
                f"the rule '{pattern}' gets no group: all that it matches is {why}", stacklevel=2
            )
        groups += _split(taken, {**defaults, **settings}, undecayed)
    return groups + _split(left, defaults, undecayed)


def _split(
    named: Mapping[str, nn.Parameter], settings: Mapping[str, Any], undecayed: set[str]
) -> list[dict[str, Any]]:
    parts = (
        ({n: p for n, p in named.items() if n not in undecayed}, settings),
        ({n: p for n, p in named.items() if n in undecayed}, {**settings, "weight_decay": 0.0}),
    )
    # names beside the parameters, not (name, parameter) pairs: every torch takes that
    return [
        {"params": list(part.values()), "param_names": list(part), **values}
        for part, values in parts
        if part
    ]


def _undecayed(model: nn.Module, params: Parameters, no_decay: bool | Patterns) -> set[str]:
    if no_decay is False:
        return set()
    if no_decay is not True:
        return set(params.select(no_decay))
    found = {
        n
        for n, p in params.by_name.items()
        if n.endswith("bias") or (not is_lazy(p) and p.ndim < 2)
    }
    for place in places(model):
        if isinstance(place.module, _NORMS) or type(place.module).__name__.endswith("RMSNorm"):
            found.update(params.name_of(p) or "" for p in place.module.parameters())
    return found


def describe_groups(groups: Optimizer | Sequence[Mapping[str, Any]]) -> str:
    """A table of param groups, or of those of an optimizer: sizes, settings, names.

    Only settings in which groups differ, and lr and weight_decay, have a column.
    """
    found = groups.param_groups if isinstance(groups, Optimizer) else list(groups)
    keys = [key for key in ("lr", "weight_decay") if any(key in group for group in found)]
    keys += _differing(found, {*keys, *_RESERVED})
    rows = []
    for i, group in enumerate(found):
        params = list(group["params"])
        names = list(group.get("param_names", ())) or ["?"]
        rows.append(
            [
                str(i),
                str(len(params)),
                f"{sum(numel(p) for p in params):,}",
                *(_short(group.get(key, "-")) for key in keys),
                some(names, 3),
            ]
        )
    header = ["group", "params", "elements", *keys, "names"]
    return table(header, rows, right=range(3 + len(keys)))


def _differing(groups: Iterable[Mapping[str, Any]], known: set[str]) -> list[str]:
    groups = list(groups)
    keys = dict.fromkeys(key for group in groups for key in group if key not in known)
    return [key for key in keys if len({repr(group.get(key)) for group in groups}) > 1]


def _short(value: Any) -> str:
    return f"{value:g}" if isinstance(value, float) else str(value)
