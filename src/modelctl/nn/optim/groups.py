"""Param groups for an optimizer, by rules over names."""

from __future__ import annotations

import fnmatch
import re
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from glob import escape
from typing import Any, Literal

from torch import Tensor, nn
from torch.optim import Optimizer

from ...core.names import Patterns
from ...core.text import some, table
from ...errors import RefusedError, UsageError
from ..model_names import Parameters, is_lazy, numel, places
from .layer_depth import depths, is_norm

# Bare parameters that say where or what something is, as ViT, DeiT, BEiT, Swin, MViT and LeViT call
# them; an embedding that is a module has a ``weight``.
_POSITIONS = re.compile(
    r"(cls|class|dist|distillation|mask|reg|register)_tokens?\w{0,2}"
    r"|((absolute|abs|pixel|patch)_)?pos(ition(al)?)?(_emb\w*)?"
    r"|rel(ative)?_pos(ition)?_\w+|attention_biases"
)
RESERVED = ("params", "param_names")


def param_groups(
    model: nn.Module,
    rules: Mapping[str, Mapping[str, Any]] | None = None,
    *,
    no_decay: Literal[False, True] | Patterns = False,
    layer_decay: float | None = None,
    layers: Sequence[Patterns] | None = None,
    **defaults: Any,
) -> list[dict[str, Any]]:
    """Groups for any ``torch.optim`` optimizer: different settings for different layers.

    ``param_groups(model, {"layer4": {"lr": 1e-4}, "fc": {"lr": 1e-3}}, lr=1e-5,
    weight_decay=0.01)``: patterns as everywhere (globs over dotted names, a module's name is its
    subtree), the first that matches a parameter decides over it, and what no rule matches goes
    to a last group with the defaults alone. Every trainable parameter is in exactly one group,
    tied ones once; frozen ones are left out.

    Args:
        rules: settings by pattern; they go over ``defaults``. None are fine.
        no_decay: the parameters whose ``weight_decay`` is 0 whatever the rules say, in groups of
            their own: those that these patterns match, or, with True, biases, parameters of
            norms, all others with fewer than two dimensions (the rule of nanoGPT and timm, for
            which "Bag of Tricks", arXiv:1812.01187, is the source), class tokens, position
            embeddings and tables of relative positions that are bare parameters (ViT, BEiT and
            Swin take them out), and those that the model's own ``no_weight_decay()`` names, as
            timm's models do. Embeddings that are modules are matrices, so they decay, as in
            nanoGPT; the rule ``{"*embed*": {"weight_decay": 0}}`` ends that.
        layer_decay: the lr of a group times this for every layer between it and the last one
            (0.65 to 0.9 are usual), as in BEiT, arXiv:2106.08254: in ``lr`` itself, where timm
            writes an ``lr_scale`` that no torch optimizer reads. A model of timm says itself what
            its layers are, and ``param_groups_layer_decay`` gives the same. Else they are found:
            the row of numbered siblings that holds most tensors is the blocks
            (``encoder_layer_0`` …), or stages of them (``layer1`` … of a resnet, ``stages.0``,
            ``features.0`` …), one layer a block; what is before them is the stem, what is after
            them the head, each a layer. Norms right after the last block go with it.
        layers: says the layers instead, patterns from the input on; what none matches is the
            head, a layer after them.
        defaults: settings of every group, by keyword.

    Returns:
        Dicts with ``params`` (a list of parameters), ``param_names`` (their names without
        wrapper prefixes, which the optimizer's state_dict then carries) and the settings; those
        of a rule in the order of the rules, within it layers from the input on, with decay
        before without.

    Raises:
        NoMatchError: a rule, or a pattern of ``no_decay`` or ``layers``, matches no parameter;
            no layers are found.
        AmbiguousError: two rows could be the layers, as in an encoder with a decoder.
        RefusedError: no parameter is trainable.
        UsageError: rules that are no dict of dicts; a setting called ``params`` or
            ``param_names``; a ``layer_decay`` that is not above 0 and at most 1, or where a group
            has no ``lr``; ``layers`` without it.
    """
    rules = _checked(rules)
    for settings in (defaults, *rules.values()):
        for key in RESERVED:
            if key in settings:
                raise UsageError(f"'{key}' is no setting: the patterns choose the parameters")
    params = Parameters(model)
    bare = undecayed(model, params, no_decay)
    scales = _scales(model, params, layer_decay, layers)
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
        groups += split(taken, {**defaults, **settings}, bare, scales)
    return groups + split(left, defaults, bare, scales)


def _checked(rules: Any) -> Mapping[str, Mapping[str, Any]]:
    if rules is not None and not isinstance(rules, Mapping):
        raise UsageError(
            f"rules are a dict of settings by pattern, not a {type(rules).__name__}",
            hint="{'head': {'lr': 1e-3}}",
        )
    for pattern, settings in (rules or {}).items():
        if not isinstance(settings, Mapping):
            raise UsageError(
                f"the rule '{pattern}' has no settings by name: {settings!r:.40}",
                hint=f"{{{pattern!r}: {{'lr': {settings!r:.40}}}}}",
            )
    return rules or {}


def split(
    named: Mapping[str, nn.Parameter],
    settings: Mapping[str, Any],
    without_decay: set[str],
    scales: Mapping[str, float],
) -> list[dict[str, Any]]:
    """Groups of parameters with the same settings, by the scale of their lr and by decay."""
    lr = settings.get("lr")
    if named and scales and lr is None:
        raise UsageError(
            f"layer_decay scales the lr, and '{next(iter(named))}' gets none",
            hint="give lr=, the one of the last layer",
        )
    parts: dict[tuple[float, bool], list[str]] = {}
    for name in named:
        parts.setdefault((scales.get(name, 1.0), name in without_decay), []).append(name)
    groups = []
    for scale, bare in sorted(parts):
        names = parts[scale, bare]
        # names beside the parameters, not (name, parameter) pairs: every torch takes that
        group = {"params": [named[name] for name in names], "param_names": names, **settings}
        if lr is not None:
            group["lr"] = lr * scale  # a tensor of its own, where it is one
        if bare:
            group["weight_decay"] = 0.0
        groups.append(group)
    return groups


def _scales(
    model: nn.Module,
    params: Parameters,
    layer_decay: float | None,
    layers: Sequence[Patterns] | None,
) -> dict[str, float]:
    """What the lr of each parameter is multiplied by; nothing without ``layer_decay``."""
    if layer_decay is None:
        if layers is not None:
            raise UsageError("layers= says where layer_decay= counts: give that too")
        return {}
    if not 0 < layer_decay <= 1:
        raise UsageError(f"layer_decay={layer_decay}: it must be above 0 and at most 1")
    depth = depths(model, params, layers)
    last = max(depth.values(), default=0)
    return {name: layer_decay ** (last - layer) for name, layer in depth.items()}


def in_common(groups: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """The settings that all groups have alike; of weight decays those above 0 count, as the
    others are what ``no_decay`` makes."""
    first, *others = groups
    found = {
        key: value
        for key, value in first.items()
        if key not in RESERVED and all(key in o and _same(o[key], value) for o in others)
    }
    decays = {float(group["weight_decay"]) for group in groups if group.get("weight_decay")}
    return {**found, "weight_decay": decays.pop()} if len(decays) == 1 else found


def _same(a: Any, b: Any) -> bool:
    a, b = (value.tolist() if isinstance(value, Tensor) else value for value in (a, b))
    return bool(a == b)


def undecayed(model: nn.Module, params: Parameters, no_decay: bool | Patterns) -> set[str]:
    """First names of the parameters that ``no_decay`` of :func:`param_groups` means."""
    if no_decay is False:
        return set()
    if no_decay is not True:
        return set(params.select(no_decay))
    found = {
        n
        for n, p in params.by_name.items()
        if n.endswith("bias") or (not is_lazy(p) and p.ndim < 2)
    }
    said: list[str] = []  # the modules that say themselves what does not decay
    for name, _, module, _ in places(model):
        if is_norm(module):
            found.update(params.name_of(p) or "" for p in module.parameters())
        says = getattr(module, "no_weight_decay", None)
        if callable(says):
            said.append(f"{name}." if name else "")
            for own in says():  # names, or globs of them
                for called in fnmatch.filter(params.called, escape(said[-1]) + own):
                    found.update(params.called[called])
    for name in params.by_name:
        if _POSITIONS.fullmatch(name.rpartition(".")[2]) and not name.startswith((*said,)):
            found.add(name)
    return found


def describe_groups(groups: Optimizer | Sequence[Mapping[str, Any]]) -> str:
    """A table of param groups, or of those of an optimizer: sizes, settings, names.

    Only settings in which groups differ, and lr and weight_decay, have a column. Names are
    ``param_names``, or those of ``(name, parameter)`` pairs, as torch takes them.

    Raises:
        UsageError: not a list of dicts with ``params``, or these are an iterator, which looking
            would use up.
    """
    found = groups.param_groups if isinstance(groups, Optimizer) else list(groups)
    members = [_members(group) for group in found]
    keys = [key for key in ("lr", "weight_decay") if any(key in group for group in found)]
    keys += _differing(found, {*keys, *RESERVED})
    rows = []
    for i, (group, (params, names)) in enumerate(zip(found, members, strict=True)):
        rows.append(
            [
                str(i),
                str(len(params)),
                f"{sum(numel(p) for p in params):,}",
                *(_short(group.get(key, "-")) for key in keys),
                some(names or ["?"], 3),
            ]
        )
    header = ["group", "params", "elements", *keys, "names"]
    return table(header, rows, right=range(3 + len(keys)))


def _members(group: Any) -> tuple[list[Tensor], list[str]]:
    """The parameters of a group, and their names where it has them."""
    params = group.get("params") if isinstance(group, Mapping) else None
    if not isinstance(params, Iterable) or isinstance(params, Iterator):
        what = "an iterator of params" if isinstance(params, Iterator) else type(group).__name__
        raise UsageError(
            f"a param group is a dict with a list of params, not {what}",
            hint="[{'params': [*model.parameters()]}], or the optimizer",
        )
    members = [params] if isinstance(params, Tensor) else [*params]
    pairs = [member for member in members if not isinstance(member, Tensor)]
    names = [*group.get("param_names", ()), *(name for name, _ in pairs)]
    return [member if isinstance(member, Tensor) else member[1] for member in members], names


def _differing(groups: Iterable[Mapping[str, Any]], known: set[str]) -> list[str]:
    groups = list(groups)
    keys = dict.fromkeys(key for group in groups for key in group if key not in known)
    return [key for key in keys if len({repr(group.get(key)) for group in groups}) > 1]


def _short(value: Any) -> str:
    if isinstance(value, Tensor) and value.numel() == 1:  # an lr may be one
        value = value.item()
    return f"{value:g}" if isinstance(value, float) else str(value)
