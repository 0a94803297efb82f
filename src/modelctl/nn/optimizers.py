"""A saved optimizer's state onto a live optimizer: by name, or by an order that can't be wrong.

``Optimizer.load_state_dict`` goes by position and checks only sizes of groups: a re-ordered
optimizer gets another parameter's state without a word. Here entries are matched first.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn
from torch.optim import Optimizer

from ..errors import AmbiguousError, CollisionError, RefusedError
from . import schedules
from .naming import Parameters, match_names
from .text import some
from .thawing import add_group

# How an optimizer runs, not what it computes: the live one's settings stay.
_HOW = ("foreach", "fused", "capturable", "differentiable")
# Settings that some versions of torch don't have.
_RECENT = ("maximize", "decoupled_weight_decay")
_NOT_SETTINGS = ("params", "param_names")
# State of the parameter's own shape, by torch's optimizers.
_SHAPED = (
    *("exp_avg", "exp_avg_sq", "max_exp_avg_sq", "exp_inf", "momentum_buffer", "square_avg"),
    *("grad_avg", "acc_delta", "sum", "ax", "prev", "step_size"),
)

Group = dict[str, Any]


@dataclass
class OptimizerPlan:
    """How a saved optimizer goes onto a live one; nothing is changed yet.

    Attributes:
        saved: the saved state_dict.
        ids: the saved id of each live parameter's state, by the parameter's identity.
        source: for each live group, added ones last, the saved group, or None for a fresh one.
        added: (saved group, parameters by name) that the live optimizer lacks.
        fresh: parameters of the live optimizer that the saved one does not know.
        lrs: (live group, its lr, the saved one) where the two differ.
    """

    saved: dict[str, Any]
    ids: dict[int, Any]
    source: list[int | None]
    added: list[tuple[int, dict[str, nn.Parameter]]]
    fresh: list[str]
    lrs: list[tuple[int, float, float]]

    def run(self, optimizer: Optimizer, scheduler: schedules.Schedulers) -> None:
        """Add the missing groups to the optimizer and its schedulers, then load the state."""
        groups: list[Group] = self.saved["param_groups"]
        for origin, named in self.added:
            settings = _settings(groups[origin], (*_NOT_SETTINGS, *_HOW))
            add_group(optimizer, named, settings, scheduler)
        state: dict[int, Any] = {}
        count = 0
        loaded: list[Group] = []
        for group, i in zip(optimizer.param_groups, self.source, strict=True):
            merged = _settings(group, ("params",))
            if i is not None:
                merged.update(_settings(groups[i], (*_NOT_SETTINGS, *_HOW)))
            merged["params"] = list(range(count, count + len(group["params"])))
            count += len(group["params"])
            for index, parameter in zip(merged["params"], group["params"], strict=True):
                kept = self._state_of(parameter, optimizer)
                if kept is not None:
                    state[index] = kept
            loaded.append(merged)
        optimizer.load_state_dict({"state": state, "param_groups": loaded})

    def _state_of(self, parameter: Tensor, optimizer: Optimizer) -> Any:
        if id(parameter) in self.ids:
            return self.saved["state"].get(self.ids[id(parameter)])
        return optimizer.state.get(parameter)  # Adagrad has one from the start


def _settings(group: Mapping[str, Any], without: Sequence[str]) -> Group:
    return {key: value for key, value in group.items() if key not in without}


def plan_optimizer(optimizer: Optimizer, saved: Any, params: Parameters) -> OptimizerPlan:
    """Match a saved optimizer with a live one over a model's parameters.

    By names where the saved one carries them and the model, or the live one, has them all. Else
    by position where the groups have the same sizes, else where the saved parameters fit the
    live ones in order in exactly one way, judged by the shapes of their state. Live parameters
    that the saved one does not know start fresh; saved groups over parameters of the model that
    the live one lacks are added to it (they were thawed in between).

    Raises:
        RefusedError: another kind of optimizer, state of other shapes, or parameters that are
            not there.
        AmbiguousError: without names, and more than one order fits.
    """
    groups = _checked(saved)
    _same_kind(optimizer, groups)
    where = {pid: i for i, group in enumerate(groups) for pid in group["params"]}
    live = [p for group in optimizer.param_groups for p in group["params"]]
    targets = _by_name(optimizer, groups, params)
    if targets is None:
        targets = _by_order(optimizer, groups, saved["state"], params)
    if len({id(p) for p in targets.values()}) < len(targets):
        raise RefusedError("two of the checkpoint's optimizer entries mean one tied parameter")
    for pid, parameter in targets.items():
        _check_shapes(saved["state"].get(pid), parameter, params.name_of(parameter) or str(pid))
    if any("old_dirs" in entry for entry in saved["state"].values()) and (
        [id(p) for p in targets.values()] != [id(p) for p in live]
    ):
        raise RefusedError("LBFGS has one flat state over all parameters: it can't be re-ordered")
    held = {id(p) for p in live}
    added: dict[int, dict[str, nn.Parameter]] = {}
    for pid, parameter in targets.items():
        if id(parameter) not in held:
            name = params.name_of(parameter) or str(pid)
            added.setdefault(where[pid], {})[name] = params.by_name[name]
    ids = {id(parameter): pid for pid, parameter in targets.items()}
    source = [
        _one_source({where[ids[id(p)]] for p in group["params"] if id(p) in ids}, groups, i)
        for i, group in enumerate(optimizer.param_groups)
    ]
    fresh = [params.name_of(p) or f"#{i}" for i, p in enumerate(live) if id(p) not in ids]
    lrs = [
        (i, own, theirs)
        for i, j in enumerate(source)
        if j is not None
        for own, theirs in [_lrs(optimizer.param_groups[i], groups[j])]
        if own != theirs
    ]
    return OptimizerPlan(saved, ids, [*source, *sorted(added)], sorted(added.items()), fresh, lrs)


def _lrs(live: Group, saved: Group) -> tuple[float, float]:
    """The constructor's lr and the saved one that corresponds to it."""
    key = "initial_lr" if "initial_lr" in live and "initial_lr" in saved else "lr"
    own: Any = live[key]
    return float(own), float(saved.get(key, own))


def _checked(saved: Any) -> list[Group]:
    """The param_groups of a saved optimizer, if that is what it is."""
    groups = saved.get("param_groups") if isinstance(saved, dict) else None
    state = saved.get("state") if isinstance(saved, dict) else None
    ids: list[Any] = []
    sound = isinstance(groups, list) and isinstance(state, dict)
    for group in groups or ():
        sound = sound and isinstance(group, dict) and isinstance(group.get("params"), list)
        ids += group["params"] if sound else ()
    sound = sound and all(isinstance(pid, int | str) for pid in ids) and len({*ids}) == len(ids)
    if not sound or not all(isinstance(entry, dict) for entry in (state or {}).values()):
        raise RefusedError("the checkpoint's optimizer is not what Optimizer.state_dict gives")
    assert isinstance(groups, list)
    return groups


# Settings that tell torch's optimizers apart.
_KIND = frozenset(
    (
        *("alpha", "amsgrad", "betas", "centered", "dampening", "etas", "lambd", "lr_decay"),
        *("momentum", "momentum_decay", "nesterov", "ns_steps", "rho", "step_sizes", "t0"),
    )
)


def _same_kind(optimizer: Optimizer, groups: list[Group]) -> None:
    """Raises RefusedError where the saved settings are those of another kind of optimizer."""
    own = {key for key in optimizer.defaults if key not in (*_HOW, *_RECENT)}
    decoupled = optimizer.defaults.get("decoupled_weight_decay")
    for group in groups:
        differ = sorted((own - {*group}) | (_KIND & {*group}) - own)
        if group.get("decoupled_weight_decay", decoupled) not in (decoupled, None):
            differ.append("decoupled_weight_decay")  # Adam and AdamW
        if differ:
            raise RefusedError(
                f"the checkpoint's optimizer is no {type(optimizer).__name__}: they differ in "
                f"{some(differ)}",
                hint="build the optimizer that was saved, or resume without optimizer=",
            )


def _check_shapes(state: Mapping[str, Any] | None, parameter: Tensor, name: str) -> None:
    for key, value in (state or {}).items():
        if isinstance(value, Tensor) and not _fits(key, value, parameter):
            raise RefusedError(
                f"the optimizer's '{key}' of '{name}' is {list(value.shape)} in the checkpoint, "
                f"the parameter is {list(parameter.shape)}",
                hint="resume without optimizer=, or drop its state from the checkpoint",
            )


def _fits(key: str, value: Tensor, parameter: Tensor) -> bool:
    shape = tuple(parameter.shape)
    if key in _SHAPED:
        return tuple(value.shape) == shape or (value.ndim == 0 and key == "step_size")
    if key == "row_var":  # Adafactor
        return tuple(value.shape) == (*shape[:-1], 1)
    if key == "col_var":
        return tuple(value.shape) == (*shape[:-2], 1, *shape[-1:])
    return True


# ------------------------------------------------------------------ matching


def _by_name(
    optimizer: Optimizer, groups: list[Group], params: Parameters
) -> dict[Any, nn.Parameter] | None:
    """Parameters by saved id; None where names don't decide."""
    named = _names(groups)
    if named is None:
        return None
    own = _names(optimizer.param_groups)
    live = {} if own is None else {name: p for p, name in own.values() if p is not None}
    try:
        wanted = [name for _, name in named.values()]
        found = match_names(wanted, params.called)
        ids = {name: pid for pid, (_, name) in named.items()}
        if len(found) == len(wanted):
            return {pid: params.by_name[params.called[found[name]][0]] for name, pid in ids.items()}
        # names relative to a part of the model: the live optimizer may have the same
        found = match_names(wanted, live)
    except CollisionError:
        return None
    if live and len(found) == len(wanted):
        return {ids[name]: live[meant] for name, meant in found.items()}
    if live or match_names(wanted, params.called):
        lacking = [name for name in wanted if name not in match_names(wanted, params.called)]
        raise RefusedError(
            f"the checkpoint's optimizer has parameters that the model lacks: {some(lacking)}",
            hint="resume without optimizer=, or strip them from the checkpoint with modelctl",
        )
    return None


def _names(groups: Iterable[Group]) -> dict[Any, tuple[Any, str]] | None:
    """(the parameter, its name) by id; None where names are missing or not unique."""
    found: dict[Any, tuple[Any, str]] = {}
    for group in groups:
        names = group.get("param_names")
        if not isinstance(names, list) or len(names) != len(group["params"]):
            return None
        for parameter, name in zip(group["params"], names, strict=True):
            key = id(parameter) if isinstance(parameter, Tensor) else parameter
            found[key] = (parameter, name)
    unique = {name for _, name in found.values() if isinstance(name, str)}
    return found if found and len(unique) == len(found) else None


def _by_order(
    optimizer: Optimizer, groups: list[Group], state: Mapping[Any, Any], params: Parameters
) -> dict[Any, nn.Parameter]:
    live: list[nn.Parameter] = [p for group in optimizer.param_groups for p in group["params"]]
    ids = [pid for group in groups for pid in group["params"]]
    sizes = [len(group["params"]) for group in groups]
    if sizes == [len(group["params"]) for group in optimizer.param_groups]:
        return dict(zip(ids, live, strict=True))
    table = [
        [all(_fits(key, v, p) for key, v in (state.get(pid) or {}).items() if isinstance(v, Tensor))
         for p in live]
        for pid in ids
    ]  # fmt: skip
    order, ways = _embedding(table, len(live))
    if ways == 0:
        raise RefusedError(
            f"the checkpoint's optimizer has {len(ids)} parameters in groups of {sizes}, without "
            f"names, and they don't fit the {len(live)} live ones in order",
            hint="build the optimizer over the same parameters, or resume without optimizer=",
        )
    if ways > 1:
        raise AmbiguousError(
            f"the checkpoint's optimizer has {len(ids)} parameters without names, and they fit "
            f"the {len(live)} live ones in order in more than one way",
            hint="build the optimizer over the same parameters, or resume without optimizer=",
        )
    return {pid: live[at] for pid, at in zip(ids, order, strict=True)}


def _embedding(table: list[list[bool]], width: int) -> tuple[list[int], int]:
    """An order-preserving way to give each row a column of its own that it allows, and how many
    such ways there are (2 stands for all more than one)."""
    # ways[r][c]: ways for the rows from r on in the columns from c on
    ways = [[0] * (width + 1) for _ in range(len(table) + 1)]
    ways[len(table)] = [1] * (width + 1)
    for r in reversed(range(len(table))):
        for c in reversed(range(width)):
            taken = ways[r + 1][c + 1] if table[r][c] else 0
            ways[r][c] = min(2, ways[r][c + 1] + taken)
    order, c = [], 0
    if ways[0][0] == 1:
        for r in range(len(table)):
            while not (table[r][c] and ways[r + 1][c + 1]):
                c += 1
            order.append(c)
            c += 1
    return order, ways[0][0]


def _one_source(found: set[int], groups: list[Group], live: int) -> int | None:
    """The saved group that a live group's settings come from."""
    if not found:
        return None
    first, *others = sorted(found)
    for other in others:
        mine, theirs = (_settings(groups[i], _NOT_SETTINGS) for i in (first, other))
        if mine != theirs:
            raise RefusedError(
                f"the optimizer's group {live} has parameters of the saved groups {first} and "
                f"{other}, whose settings differ",
                hint="build the optimizer with the same groups",
            )
    return first
