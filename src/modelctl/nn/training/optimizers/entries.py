"""Which parameter each entry of a saved optimizer is for: by name, or by an order that can't be
wrong. Those that are not the model's (a temperature, a loss with weights) may have no name."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from itertools import chain
from typing import Any, NamedTuple

from torch import Tensor, nn
from torch.optim import Optimizer

from ....core.matching import optimizer_states
from ....core.matching.matcher import match_names
from ....core.matching.order import embeddings
from ....core.text import some
from ....errors import AmbiguousError, CollisionError, RefusedError
from ...model_names import Parameters

WAY_OUT = (
    "resume(..., on_mismatch='skip') keeps the state of what fits, the rest starts fresh; or "
    "resume without optimizer="
)
_SAME = "build the optimizer over the same parameters, or resume without optimizer="

Group = dict[str, Any]
Targets = dict[Any, nn.Parameter]


class Found(NamedTuple):
    """The live parameter of each saved id, and whether names say so, not places."""

    targets: Targets
    by_name: bool


def find_targets(
    optimizer: Optimizer,
    groups: list[Group],
    state: Mapping[Any, Any],
    params: Parameters,
    names_in_file: Callable[[], Mapping[Any, str] | None],
    skip: bool,
    reordered: bool = False,
) -> Found:
    """The live parameter of each saved id; with ``skip`` without those that the model lacks.

    By the names that the saved groups carry; those without one in between, which were not the
    model's, by their place among such of their group. Without any names by position, where groups
    have the same sizes and all shapes fit; else by the names that only the file's own model can
    give them; else in the only order that fits. With ``reordered`` (the model has its parameters
    in another order than the file's) positions say nothing, and the file's names only where the
    optimizer follows the model's order.

    Raises:
        RefusedError: parameters that are not there.
        AmbiguousError: more than one order fits, or the order changed and nothing proves the old
            one.
    """
    named = _names(groups)
    found = None
    if named is not None:
        own = _names(optimizer.param_groups) or {}
        live = {name: p for p, name in own.values() if name is not None}
        known = {pid: name for pid, (_, name) in named.items() if name is not None}
        found = _by_name(known, live, params, skip)
    if named is not None and found is not None:
        if len(known) < len(named):
            found |= _outsiders(optimizer, groups, {*named} - {*known}, found, params, state, skip)
        return Found({pid: found[pid] for pid in named if pid in found}, by_name=True)
    lives: list[nn.Parameter] = [p for group in optimizer.param_groups for p in group["params"]]
    ids = [pid for group in groups for pid in group["params"]]
    sizes, own_sizes = (
        [len(group["params"]) for group in each] for each in (groups, optimizer.param_groups)
    )
    by_place = dict(zip(ids, lives, strict=True)) if sizes == own_sizes else None
    fits = by_place and all(misfit(state.get(pid), p) is None for pid, p in by_place.items())
    if by_place and fits and not reordered:
        return Found(by_place, by_name=False)
    moved = fits and reordered
    proved = None if moved and not _follows(optimizer, params) else names_in_file()
    if proved is not None:
        found = _by_name(proved, {}, params, skip)
    if found is not None:
        return Found(found, by_name=True)
    if moved:
        raise AmbiguousError(
            "the model has its parameters in another order than the checkpoint's, and the "
            "checkpoint's optimizer does not say which is which",
            hint="build the model as it was, with its parts in the same order; or resume without "
            "optimizer=",
        )
    return Found(by_place or _by_order(ids, lives, state, sizes), by_name=False)


def _follows(optimizer: Optimizer, params: Parameters) -> bool:
    """Whether each group has its parameters in the model's order."""
    place = {id(p): i for i, p in enumerate(params.by_name.values())}
    places = [[place.get(id(p), -1) for p in g["params"]] for g in optimizer.param_groups]
    return all(found == sorted(found) for found in places)


def misfit(state: Mapping[str, Any] | None, parameter: Tensor) -> tuple[str, Tensor] | None:
    """A tensor of a saved state that can't be this parameter's, with its key; None if all can."""
    key = optimizer_states.misfit(state or {}, tuple(parameter.shape))
    return None if key is None or state is None else (key, state[key])


def shows(state: Mapping[str, Any], parameter: Tensor) -> bool:
    """Whether a saved state shows that it is of a parameter of this shape."""
    shape = tuple(parameter.shape)
    shapes = {tuple(getattr(value, "shape", ())) for value in state.values()}
    return shape in shapes or optimizer_states.shape_shown(state) == shape


# ------------------------------------------------------------------ names


def _by_name(
    named: Mapping[Any, str], live: Mapping[str, nn.Parameter], params: Parameters, skip: bool
) -> Targets | None:
    """Parameters by saved id; None where names don't decide."""
    ids = {name: pid for pid, name in named.items()}
    try:
        found = match_names(ids, params.called)
        # names relative to a part of the model: the live optimizer may have the same
        relative = match_names(ids, live) if len(found) < len(ids) else {}
    except CollisionError:
        return None
    if live and len(relative) == len(ids):
        return {ids[name]: live[meant] for name, meant in relative.items()}
    targets = {ids[n]: params.by_name[params.called[meant][0]] for n, meant in found.items()}
    for name, meant in relative.items():  # what is not the model's has the name that it was given
        if name not in found and params.name_of(live[meant]) is None:
            targets[ids[name]] = live[meant]
    if len(targets) < len(ids) and (live or found) and not skip:
        raise RefusedError(
            "the checkpoint's optimizer has parameters that the model lacks: "
            f"{some([name for name, pid in ids.items() if pid not in targets])}",
            hint=WAY_OUT,
        )
    return targets or None


def recordable(optimizer: Optimizer, params: Parameters) -> list[list[str]]:
    """The names to record of an optimizer's parameters, group by group: the model's own. What is
    not the model's has the name that it was given, or "", which no parameter can have."""
    groups = optimizer.param_groups
    given = [group.get("param_names") or [""] * len(group["params"]) for group in groups]
    count = Counter(name for names in given for name in names)
    return [
        [
            params.name_of(p) or (name if count[name] == 1 and name not in params.called else "")
            for p, name in zip(group["params"], names, strict=True)
        ]
        for group, names in zip(groups, given, strict=True)
    ]


def _names(groups: Iterable[Group]) -> dict[Any, tuple[Any, str | None]] | None:
    """(the parameter, its name or None) by id; None where names are missing or not unique."""
    found: dict[Any, tuple[Any, str | None]] = {}
    for group in groups:
        # torch.distributed.checkpoint has names for ids
        names = group.get("param_names", group["params"])
        if not isinstance(names, list) or len(names) != len(group["params"]):
            return None
        for parameter, name in zip(group["params"], names, strict=True):
            key = id(parameter) if isinstance(parameter, Tensor) else parameter
            found[key] = (parameter, None if name == "" else name)
    names = [name for _, name in found.values() if name is not None]
    unique = {name for name in names if isinstance(name, str)}
    return found if names and len(unique) == len(names) else None


def _outsiders(
    optimizer: Optimizer,
    groups: list[Group],
    nameless: Collection[Any],
    found: Targets,
    params: Parameters,
    state: Mapping[Any, Any],
    skip: bool,
) -> Targets:
    """The live parameters of saved ids without a name: those that no model has, in the group with
    the same others, or in the same one of the groups without others, in their order."""
    taken = {id(p): pid for pid, p in found.items()}
    saved: dict[Any, list[list[Any]]] = {}
    live: dict[Any, list[list[nn.Parameter]]] = {}
    for i, group in enumerate(groups):
        mine = [pid for pid in group["params"] if pid in nameless]
        if mine:
            company = i if any(pid in found for pid in group["params"]) else None
            saved.setdefault(company, []).append(mine)
    where = {pid: i for i, group in enumerate(groups) for pid in group["params"]}
    for group in optimizer.param_groups:
        own = [p for p in group["params"] if params.name_of(p) is None and id(p) not in taken]
        company = next((where[taken[id(p)]] for p in group["params"] if id(p) in taken), None)
        if own:
            live.setdefault(company, []).append(own)
    targets: Targets = {}
    for company, lists in saved.items():
        others = live.get(company, [])
        if [*map(len, lists)] == [*map(len, others)]:
            pairs = zip(chain(*lists), chain(*others), strict=True)
            targets.update((pid, p) for pid, p in pairs if misfit(state.get(pid), p) is None)
    if len(targets) < len(nameless) and not skip:
        raise RefusedError(
            f"{len(nameless)} parameters of the checkpoint's optimizer are not the model's and "
            "have no names, and they don't fit those of the live optimizer in their places",
            hint=f"{_SAME}; named ones, AdamW([('t', t), …]), are matched by name",
        )
    return targets


# ------------------------------------------------------------------ order


def _by_order(
    ids: list[Any], live: list[nn.Parameter], state: Mapping[Any, Any], sizes: Sequence[int]
) -> Targets:
    shown = [optimizer_states.shape_shown(state.get(pid) or {}) for pid in ids]
    found, ways = embeddings([shown], [tuple(p.shape) for p in live])
    what = f"the checkpoint's optimizer has {len(ids)} parameters"
    if ways == 0:
        raise RefusedError(
            f"{what} in groups of {list(sizes)}, without names, and they don't fit the "
            f"{len(live)} live ones in order",
            hint=_SAME,
        )
    if ways > 1:
        raise AmbiguousError(
            f"{what} without names, and they fit the {len(live)} live ones in order in more than "
            "one way",
            hint=_SAME,
        )
    return {pid: live[at] for pid, at in zip(ids, found[0], strict=True)}
