"""A saved optimizer's state onto a live optimizer.

``Optimizer.load_state_dict`` goes by position and checks only sizes of groups: a re-ordered
optimizer gets another parameter's state without a word. Here entries are matched first.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn
from torch.optim import Optimizer

from ....core.matching.matcher import Shape
from ....core.matching.optimizer_states import DECOUPLED, HOW, MAXIMIZE, TELLING, implied, is_flat
from ....core.tensors import TensorRef
from ....core.text import some
from ....errors import RefusedError
from ...freezing.unfreeze import add_group
from ...loading.sharded import is_sharded
from ...model_names import Parameters
from ...optim import schedulers
from .entries import WAY_OUT, Group, find_targets, misfit, shows
from .streaming import States, is_by_element

_NOT_SETTINGS = ("params", "param_names")


@dataclass
class OptimizerPlan:
    """How a saved optimizer goes onto a live one; nothing is changed yet.

    Attributes:
        saved: the saved state_dict.
        ids: the saved id of each live parameter's state, by the parameter's identity.
        source: for each live group, added ones last, the saved group, or None for a fresh one.
        added: (saved group, parameters by name) that the live optimizer lacks.
        fresh: parameters of the live optimizer that get no state: the saved one has none that
            fits.
        dropped: parameters of the saved one that are left aside.
        changed: for each live group its settings that differ: (own, saved) by key.
        by_place: how many parameters that no model has were matched by their place alone.
        reset: of an optimizer with one state over all parameters (LBFGS), of which none is kept,
            the parameters that are others now.
        unknown: keys of the saved groups that mean nothing to the live optimizer.
        made: the states once they are read, by the parameter's identity.
        shared: the state of no parameter, likewise.
    """

    saved: dict[str, Any]
    ids: dict[int, Any]
    source: list[int | None]
    added: list[tuple[int, dict[str, nn.Parameter]]]
    fresh: list[str]
    dropped: list[str]
    changed: dict[int, dict[str, tuple[Any, Any]]]
    by_place: int = 0
    reset: Sequence[str] = ()
    unknown: Sequence[str] = ()
    made: dict[int, Any] = field(default_factory=dict)
    shared: dict[str, Any] = field(default_factory=dict)

    def read(self, optimizer: Optimizer) -> None:
        """Read the tensors of what comes back, each to the device of its parameter; nothing is
        changed yet."""
        states = States(optimizer)
        saved, live = self.saved["state"], {id(p): p for p in self._parameters(optimizer)}
        wanted = [(pid, live[i]) for i, pid in self.ids.items() if i in live and saved.get(pid)]
        shared = self._saved_shared()
        for pid, parameter in wanted:
            states.add(saved[pid], parameter)
        states.add(shared)
        states.read()
        self.made = {id(p): states.made(saved[pid], p) for pid, p in wanted}
        self.shared = states.made(shared)

    def _parameters(self, optimizer: Optimizer) -> list[Tensor]:
        """Those that it holds, and those that are to join it."""
        held: list[Tensor] = [p for group in optimizer.param_groups for p in group["params"]]
        return [*held, *(p for _, named in self.added for p in named.values())]

    def run(self, optimizer: Optimizer, scheduler: schedulers.Schedulers) -> None:
        """Add the missing groups to the optimizer and its schedulers, then load the state."""
        groups: list[Group] = self.saved["param_groups"]
        for origin, named in self.added:
            settings = _settings(groups[origin], (*_NOT_SETTINGS, *HOW))
            add_group(optimizer, named, settings, scheduler)
        state: dict[Any, Any] = {}
        count = 0
        loaded: list[Group] = []
        pace = self._pace() if schedulers.each(scheduler) else 1.0
        for group, i in zip(optimizer.param_groups, self.source, strict=True):
            merged = _settings(group, ("params",))
            if i is not None:
                merged.update(_settings(groups[i], (*_NOT_SETTINGS, *HOW)))
            elif "initial_lr" in merged:
                merged["lr"] = merged["initial_lr"] * pace
            merged["params"] = list(range(count, count + len(group["params"])))
            count += len(group["params"])
            for index, parameter in zip(merged["params"], group["params"], strict=True):
                kept = self._state_of(parameter, optimizer)
                if kept is not None:
                    state[index] = kept
            loaded.append(merged)
        state.update(self._shared(optimizer))
        optimizer.load_state_dict({"state": state, "param_groups": loaded})

    def _pace(self) -> float:
        """How far the schedule has brought the lr, for groups that it did not know."""
        for i in self.source:
            group = {} if i is None else self.saved["param_groups"][i]
            now, first = (schedulers.lr_of(group, key) for key in ("lr", "initial_lr"))
            if now is not None and first:
                return now / first
        return 1.0

    def _shared(self, optimizer: Optimizer) -> dict[Any, Any]:
        """State of no parameter, under names (MADGRAD counts its steps so): what was saved, else
        what the optimizer has."""
        own = {key: one for key, one in optimizer.state.items() if isinstance(key, str)}
        return {**own, **self.shared}

    def _saved_shared(self) -> dict[str, Any]:
        ids = {pid for group in self.saved["param_groups"] for pid in group["params"]}
        if any(isinstance(pid, str) for pid in ids):
            return {}
        return {key: one for key, one in self.saved["state"].items() if isinstance(key, str)}

    def _state_of(self, parameter: Tensor, optimizer: Optimizer) -> Any:
        if id(parameter) in self.ids:
            return self.made.get(id(parameter), self.saved["state"].get(self.ids[id(parameter)]))
        return optimizer.state.get(parameter)  # Adagrad has one from the start


def _unparted(state: Mapping[str, Any] | None, parameter: Tensor) -> str | None:
    """The key of a state of a sharded parameter of which it is not known how it is sharded."""
    for key, value in (state or {}).items() if is_sharded(parameter) else ():
        if isinstance(value, Tensor):
            return key
        if (
            isinstance(value, TensorRef)
            and value.numel > 1
            and not is_by_element(key, value, parameter)
        ):
            return key
    return None


def _settings(group: Mapping[str, Any], without: Sequence[str]) -> Group:
    return {key: value for key, value in group.items() if key not in without}


def plan_optimizer(
    optimizer: Optimizer,
    saved: Any,
    params: Parameters,
    names_in_file: Callable[[], Mapping[Any, str] | None] = lambda: None,
    *,
    shapes: Mapping[str, Shape],
    skip: bool = False,
    scheduled: bool = False,
    reordered: bool = False,
) -> OptimizerPlan:
    """Match a saved optimizer with a live one over a model's parameters.

    By names where there are any, see :func:`find_targets`. Live parameters that the saved one
    does not know start fresh; saved groups over parameters of the model that the live one lacks
    are added to it (they were thawed in between). With ``skip`` saved parameters that the model
    lacks, or that have another shape there, are left aside. ``shapes`` are those of the
    parameters in the file, by the model's names: where one is still the same, so is what the
    optimizer keeps of it, whatever shape that has. ``scheduled`` says that a scheduler
    moved the saved lr: its start is only known where that is recorded (``initial_lr``).
    ``reordered`` says that the file has the model's parameters in another order.

    Raises:
        RefusedError: another kind of optimizer, state of other shapes, or parameters that are
            not there.
        AmbiguousError: without names, and more than one order fits.
    """
    groups = _checked(saved)
    _same_kind(optimizer, groups)
    where = {pid: i for i, group in enumerate(groups) for pid in group["params"]}
    live = [p for group in optimizer.param_groups for p in group["params"]]
    targets, by_name = find_targets(
        optimizer, groups, saved["state"], params, names_in_file, skip, reordered
    )
    if len({id(p) for p in targets.values()}) < len(targets):
        raise RefusedError("two of the checkpoint's optimizer entries mean one tied parameter")
    flat = any(is_flat(saved["state"].get(pid, {})) for pid in where)
    others: list[str] = []
    for pid, parameter in [*targets.items()]:
        name, state = params.name_of(parameter), saved["state"].get(pid)
        was = None if name is None else shapes.get(name)
        if flat:  # no parameter's own
            others += [name] if name and was not in (None, tuple(parameter.shape)) else []
            continue
        odd = _odd(state, parameter, was, by_name and not _is_torchs(optimizer))
        if odd is not None and skip:
            del targets[pid]
        elif odd is not None:
            called_so = name or _called(groups, [pid], names_in_file)[0]
            raise RefusedError(
                f"the optimizer's state of '{called_so}' is not that of a parameter of "
                f"{list(parameter.shape)}: {odd}",
                hint=WAY_OUT,
            )
        unparted = _unparted(state, parameter)
        if unparted is not None:
            raise RefusedError(
                f"the optimizer's '{unparted}' of '{name or pid}' is not one value for each "
                "element: how it is sharded with its parameter is not known",
                hint="resume without optimizer=",
            )
    reset: list[str] = []
    order = [id(p) for p in live]
    if flat and (others or len(targets) < len(where) or order != [*map(id, targets.values())]):
        kept = {*map(id, targets.values())}
        reset = [*others, *(params.name_of(p) or "?" for p in live if id(p) not in kept)]
        lost = [pid for pid in where if pid not in targets or id(targets[pid]) not in order]
        reset += _called(groups, lost, names_in_file)
        if not (skip and reset):
            raise RefusedError(
                "LBFGS has one flat state over all parameters: it can't be re-ordered, or cut",
                hint="resume(..., on_mismatch='skip') has it start fresh where parameters are "
                "others; or resume without optimizer=",
            )
        saved = {**saved, "state": {}}
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
    changed = {
        i: _differences(optimizer.param_groups[i], groups[j], optimizer.defaults, scheduled)
        for i, j in enumerate(source)
        if j is not None
    }
    return OptimizerPlan(
        saved,
        ids,
        [*source, *sorted(added)],
        sorted(added.items()),
        fresh=[
            params.name_of(p) or f"#{i}" for i, p in enumerate(live) if reset or id(p) not in ids
        ],
        dropped=_called(
            groups, [pid for pid in where if reset or pid not in targets], names_in_file
        ),
        changed={i: differ for i, differ in changed.items() if differ},
        by_place=sum(
            not name and pid in targets
            for group in groups
            for pid, name in zip(group["params"], group.get("param_names", ()), strict=False)
        ),
        reset=[*dict.fromkeys(reset)],
        unknown=_unknown(optimizer, groups),
    )


def _odd(
    state: Mapping[str, Any] | None, parameter: Tensor, was: Shape | None, any_shape: bool
) -> str | None:
    """Why a saved state can't be a parameter's; None where it is. What the parameter ``was`` in
    the file decides. Where that is not known, or nothing but its place says that it is the same
    one, the state has to show it; and what torch's own optimizers keep is known."""
    if not state:
        return None
    if was is not None and was != tuple(parameter.shape):
        return f"the checkpoint's is {list(was)}"
    if was is not None and any_shape:
        return None
    odd = misfit(state, parameter)
    if odd is not None:
        return f"its '{odd[0]}' is {list(odd[1].shape)}"
    tensors = [key for key, value in state.items() if len(getattr(value, "shape", ())) > 0]
    if was is None and tensors and not shows(state, parameter):
        return f"the checkpoint does not tell, nor does its '{tensors[0]}'"
    return None


def _called(
    groups: list[Group], ids: list[Any], names_in_file: Callable[[], Mapping[Any, str] | None]
) -> list[str]:
    """Names for saved ids, as far as anything gives them."""
    names: dict[Any, str] = {}
    for group in groups:
        names.update(zip(group["params"], group.get("param_names", ()), strict=False))
    if any(isinstance(pid, int) and pid not in names for pid in ids):
        names.update(names_in_file() or {})
    return [str(names.get(pid) or (f"#{pid}" if isinstance(pid, int) else pid)) for pid in ids]


def _differences(
    live: Group, saved: Group, settings: Mapping[str, Any], scheduled: bool
) -> dict[str, tuple[Any, Any]]:
    """What the constructor said and what was saved, where the two differ; of what a scheduler
    moves its start."""
    moved = ("betas", "momentum") if "max_momentum" in live or "max_momentum" in saved else ()
    if scheduled and "initial_lr" not in saved:  # ReduceLROnPlateau's doing
        moved = (*moved, "lr")
    found = {}
    for key in settings:
        if key in (*HOW, *moved) or key not in live or key not in saved:
            continue
        own, theirs = (group[key] for group in (live, saved))
        if key == "lr":
            own, theirs = (
                schedulers.lr_of(group, "initial_lr" if "initial_lr" in group else "lr")
                for group in (live, saved)
            )
        if _plain(own) != _plain(theirs):
            found[key] = (_plain(own), _plain(theirs))
    return found


def _plain(value: Any) -> Any:
    if isinstance(value, Tensor):
        return value.tolist()
    return tuple(map(_plain, value)) if isinstance(value, list | tuple) else value


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
    if sound and isinstance(state, dict):
        sound = all(isinstance(state.get(pid, {}), dict) for pid in ids)
    if not sound:
        raise RefusedError("the checkpoint's optimizer is not what Optimizer.state_dict gives")
    assert isinstance(groups, list)
    return groups


def _same_kind(optimizer: Optimizer, groups: list[Group]) -> None:
    """Raises RefusedError where the saved settings are those of another kind of optimizer."""
    own = {*optimizer.defaults}.union(*optimizer.param_groups)
    recent = _recent(optimizer)
    needed = {key for key in optimizer.defaults if key not in (*HOW, *recent)}
    if _is_torchs(optimizer):  # another torch may lack the others
        needed &= {"lr", *TELLING}
    for group in groups:
        differ = sorted((needed - {*group}) | ((TELLING & {*group}) - own))
        for key, here in recent.items():
            # of maximize any value is fine where it is a setting
            if here is not None and (key == DECOUPLED or key not in own):
                differ += [key] if group.get(key, here) != here else []
        if differ:
            raise RefusedError(
                f"the checkpoint's optimizer is no {type(optimizer).__name__}: they differ in "
                f"{some(differ)}",
                hint="build the optimizer that was saved, or resume without optimizer=",
            )


def _is_torchs(optimizer: Optimizer) -> bool:
    return type(optimizer).__module__.startswith("torch.optim")


def _recent(optimizer: Optimizer) -> dict[str, Any]:
    """The settings that not every torch has, as they are here: those of the constructor, else
    what the class does anyway; None where that is not known."""
    anyway = implied(cls.__name__ for cls in type(optimizer).__mro__)
    return {key: optimizer.defaults.get(key, anyway.get(key)) for key in (MAXIMIZE, DECOUPLED)}


def _unknown(optimizer: Optimizer, groups: list[Group]) -> list[str]:
    """Keys of the saved groups that mean nothing to the live optimizer and its schedulers."""
    known = {*optimizer.defaults, *HOW, *_NOT_SETTINGS, *schedulers.IN_GROUP}
    known.update(*optimizer.param_groups)
    known.update(key for key, here in _recent(optimizer).items() if here is not None)
    return sorted({key for group in groups for key in group if key not in known})


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
