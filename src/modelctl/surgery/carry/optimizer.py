"""Keep an optimizer in step with its model: renamed, cut or put into another order.

A torch optimizer's state_dict names parameters by number, in the order of its param_groups; which
number is which parameter :mod:`.optimizer_names` finds out.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any

from ...core.names import alphabetical, parameters
from ...core.nodes import Obj, mapping, with_attributes, with_entries
from ...core.sections import param_groups
from ...core.sections.kinds import optimizer_entries
from ...core.sections.optimizers import is_named
from ...core.tensors import TensorRef
from ...core.tree import holds_tensors
from ...errors import RefusedError
from .optimizer_names import assign_names


def drop_parameters(
    optimizer: Any,
    model: Mapping[str, TensorRef],
    removed: Collection[str],
    frozen: Collection[str] = (),
) -> Any:
    """The optimizer without the parameters called ``removed``: ids are issued anew without
    gaps, in the same order; a group that gets empty stays, since schedulers count groups.

    Raises:
        RefusedError, AmbiguousError: which ids are meant can't be proved.
    """
    if not any(name in removed for name in parameters(dict(model))):
        return optimizer
    # a tied parameter goes when the last of its names goes, and until then has the first that stays
    alive: dict[Any, str] = {}
    for name, ref in model.items():
        if name not in removed:
            alive.setdefault(ref.identity, name)

    def now(name: str) -> str | None:
        return alive.get(model[name].identity) if name in removed else name

    return _reissued(optimizer, assign_names(optimizer, model, frozen), list(model), now)


def drop_from_object(
    what: str, optimizer: Obj, model: Mapping[str, TensorRef], removed: Collection[str]
) -> Obj:
    """A pickled ``torch.optim.Optimizer`` without the parameters called ``removed``: it holds the
    model's own, so which they are is no question; those that stay are the very same.

    Raises:
        RefusedError: it holds other tensors than the model's.
    """
    known = {ref.identity: name for name, ref in model.items()}
    alive = {ref.identity for name, ref in model.items() if name not in removed}
    gone = {model[name].identity for name in removed if name in model} - alive
    entries = optimizer_entries(optimizer)
    held = [one for group in param_groups(optimizer) for one in group.get("params", ())]
    if not all(isinstance(one, TensorRef) and one.identity in known for one in held):
        raise RefusedError(
            f"'{what}' is a pickled optimizer, whose parameters are not the model's own",
            hint="--optimizer drop leaves the optimizer out",
        )
    groups = [
        {**group, "params": [one for one in group["params"] if one.identity not in gone]}
        for group in param_groups(optimizer)
    ]
    state = entries["state"]
    kept = {
        key: value
        for key, value in (mapping(state) or {}).items()
        if not (isinstance(key, TensorRef) and key.identity in gone)
    }
    return with_attributes(optimizer, {"param_groups": groups, "state": with_entries(state, kept)})


def permute_parameters(
    optimizer: Any,
    model: Mapping[str, TensorRef],
    renaming: Mapping[str, str | None],
    frozen: Collection[str] = (),
) -> Any:
    """The optimizer of a model whose tensors change names among themselves: the live model has
    its parameters in the order of their names as it was, so the state must change places.

    Raises:
        RefusedError, AmbiguousError: which ids are meant can't be proved.
    """
    names = assign_names(optimizer, model, frozen)
    was = {new: old for old, new in renaming.items()}
    live = list(model)
    if alphabetical(live):  # the order is the groups' own
        live = [name for group in names for name in group if name]
    order = [was.get(name, name) for name in live]
    return _reissued(optimizer, names, live, lambda name: name, order)


def _reissued(
    optimizer: Any,
    names: Sequence[Sequence[str]],
    order: Sequence[str],
    now: Callable[[str], str | None],
    new_order: Sequence[str] | None = None,
) -> Any:
    """The optimizer with ids issued anew, group by group.

    Args:
        names: what each id is called in the model; "" is none of the model's, and stays.
        order: the model's names in its order; a group that follows it goes on following it.
        now: what a name is from now on, None where it is dropped.
        new_order: the order from now on, where it is another.
    """
    top = mapping(optimizer) or {}
    if isinstance(top.get("state"), list):  # fastai's: in order, without groups
        (of_all,) = names
        place = {name: i for i, name in enumerate(new_order or order)}
        stay = [(place[new], i) for i, name in enumerate(of_all) if (new := now(name)) is not None]
        return with_entries(optimizer, {**top, "state": [top["state"][i] for _, i in sorted(stay)]})
    groups = param_groups(optimizer)
    before = {name: i for i, name in enumerate(order)}
    after = {name: i for i, name in enumerate(new_order or order)}
    named = is_named([group["params"] for group in groups])
    new_groups, moved_to = [], dict[Any, Any]()
    next_id = 0
    for group, of_group in zip(groups, names, strict=True):
        kept = []  # each one's id, its name in the model, and the one to record
        for i, (id_, name) in enumerate(zip(group["params"], of_group, strict=True)):
            new = now(name) if name else name
            if new is not None:
                old = id_ if named else (group.get("param_names") or of_group)[i]
                kept.append((id_, new, old if new == name else new))
        own = [name for name in of_group if name]
        if own == sorted(own, key=before.__getitem__):
            moved = iter(sorted((one for one in kept if one[1]), key=lambda one: after[one[1]]))
            kept = [next(moved) if one[1] else one for one in kept]
        recorded = [record for _, _, record in kept]
        ids = recorded if named else list(range(next_id, next_id + len(kept)))
        next_id += len(kept)
        moved_to.update((old, new) for new, (old, _, _) in zip(ids, kept, strict=True))
        changed = {**group, "params": ids}
        if isinstance(group.get("param_names"), list):
            changed["param_names"] = recorded
        new_groups.append(changed)
    known = {id_ for group in groups for id_ in group["params"]}
    changed = {
        key: with_entries(part, _by_new_ids(by_id, known, moved_to))
        for key, part in top.items()
        if (by_id := mapping(part)) is not None and (key == "state" or _is_by_id(by_id, known))
    }
    return with_entries(optimizer, {**top, **changed, "param_groups": new_groups})


def _by_new_ids(
    state: Mapping[Any, Any], known: Collection[Any], moved_to: Mapping[Any, Any]
) -> dict[Any, Any]:
    """State by its new ids; what is no parameter's (MADGRAD counts its steps there) stays."""
    shared = {key: one for key, one in state.items() if isinstance(key, str) and key not in known}
    return {**shared, **{new: state[old] for old, new in moved_to.items() if old in state}}


def _is_by_id(entries: Mapping[Any, Any], ids: Collection[Any]) -> bool:
    """Whether it is more state, by the numbers of parameters (Lookahead's ``slow_state``)."""
    return bool(entries) and entries.keys() <= {*ids} and holds_tensors(entries)


def rename_parameters(
    optimizer: Any, plan: Callable[[Sequence[str]], Mapping[str, str | None]]
) -> Any:
    """The optimizer with its ``param_names`` renamed, and its ids where they are names."""
    optimizer = _rename_ids(optimizer, plan)
    groups = param_groups(optimizer)
    named = [name for group in groups for name in group.get("param_names") or [] if name != ""]
    if not named or not all(isinstance(name, str) for name in named):
        return optimizer
    renaming = plan(named)
    changed = [
        {**group, "param_names": [renaming.get(name) or name for name in group["param_names"]]}
        if group.get("param_names")
        else group
        for group in groups
    ]
    return with_entries(optimizer, {**(mapping(optimizer) or {}), "param_groups": changed})


def _rename_ids(optimizer: Any, plan: Callable[[Sequence[str]], Mapping[str, str | None]]) -> Any:
    top = mapping(optimizer) or {}
    groups = param_groups(optimizer)
    ids = [group.get("params", []) for group in groups]
    renaming = plan([id_ for group in ids for id_ in group]) if is_named(ids) else None
    if not renaming:
        return optimizer
    state = {renaming.get(id_) or id_: one for id_, one in (mapping(top["state"]) or {}).items()}
    changed = [
        {**group, "params": [renaming.get(id_) or id_ for id_ in group["params"]]}
        for group in groups
    ]
    top = {**top, "state": with_entries(top["state"], state), "param_groups": changed}
    return with_entries(optimizer, top)
