"""Keep an optimizer in step with its model: which id is which parameter, and what to drop.

A torch optimizer's state_dict names parameters by number, in the order of its param_groups; it
may record ``param_names`` ("" is one that is not the model's). Where it doesn't, the names are
found from the shapes of its state, and only used where exactly one assignment fits
(shared/OPTIMIZER.md, "Algorithm": candidates are the model's parameters in order, each group takes
an ordered subsequence of them).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from itertools import pairwise
from typing import Any, NamedTuple

from ...core.names import unwrapped
from ...core.nodes import mapping, with_entries
from ...core.roles import parameters
from ...core.sections import param_groups
from ...core.tensors import TensorRef
from ...errors import AmbiguousError, RefusedError

Shape = tuple[int, ...]

# State of one parameter that is not shaped like it.
_SCALARS = ("step", "mu_product", "eta", "mu")
_LBFGS = ("func_evals", "n_iter", "old_dirs", "prev_flat_grad")
_DROP = "--optimizer drop leaves the optimizer out"
_DROP_EMA = "'modelctl convert --weights-only' leaves the EMA copy out"
# The assignments that are followed at once; beyond it the answer is "ambiguous" anyway.
_MOST_STATES = 200_000


class Groups(NamedTuple):
    """An optimizer's ids, group by group, and the shape that each one's state shows (or None)."""

    ids: list[list[Any]]
    shapes: list[list[Shape | None]]
    names: list[list[str]] | None


def read_groups(optimizer: Any) -> Groups:
    """The groups of an optimizer's state_dict.

    Raises:
        RefusedError: its state is not kept a parameter (LBFGS, flattened state).
    """
    state = mapping((mapping(optimizer) or {}).get("state")) or {}
    groups = param_groups(optimizer)
    ids = [list(group.get("params", [])) for group in groups]
    shapes = [[_state_shape(mapping(state.get(id_)) or {}) for id_ in group] for group in ids]
    names: list[Any] = [group.get("param_names") for group in groups]
    usable = all(
        isinstance(of_group, list)
        and len(of_group) == len(group)
        and all(isinstance(name, str) for name in of_group)
        for of_group, group in zip(names, ids, strict=True)
    ) and any(name for of_group in names for name in of_group)
    if not usable and _is_named(ids):
        names, usable = [list(group) for group in ids], True
    return Groups(ids, shapes, names if usable and groups else None)


def _is_named(ids: Sequence[Sequence[Any]]) -> bool:
    """True where ids are names already (torch.distributed.checkpoint's flat state_dicts)."""
    return any(ids) and all(isinstance(id_, str) for group in ids for id_ in group)


def _state_shape(state: Mapping[Any, Any]) -> Shape | None:
    """The parameter's shape, as far as its state shows it."""
    tensors = {key: value for key, value in state.items() if isinstance(value, TensorRef)}
    if any(key in state for key in _LBFGS):
        raise RefusedError("LBFGS keeps one flat state for all parameters", hint=_DROP)
    if "row_var" in tensors and "col_var" in tensors:  # Adafactor: (…, o, 1) and (…, 1, i)
        return (*tensors["row_var"].shape[:-1], tensors["col_var"].shape[-1])
    shapes = {ref.shape for key, ref in tensors.items() if key not in _SCALARS}
    return shapes.pop() if len(shapes) == 1 else None


def is_flat(optimizer: Any, model: Mapping[str, TensorRef]) -> bool:
    """True where state is not kept a parameter (LBFGS, FSDP): nothing proves whose it is."""
    state = mapping((mapping(optimizer) or {}).get("state")) or {}
    lbfgs = any(key in (mapping(one) or {}) for one in state.values() for key in _LBFGS)
    return lbfgs or _flat_param(model) is not None


def _flat_param(model: Iterable[str]) -> str | None:
    return next(
        (name for name in model if name.rpartition(".")[2].lstrip("_") == "flat_param"), None
    )


def assign_names(
    optimizer: Any, model: Mapping[str, TensorRef], frozen: Collection[str] = ()
) -> list[list[str]]:
    """The model's name of each id, group by group; "" where one is recorded as none of the
    model's. ``frozen`` are parameters that are known not to train: the optimizer may have been
    built without them.

    Raises:
        RefusedError: the optimizer does not belong to this model.
        AmbiguousError: its state fits the model in more than one way.
    """
    groups = read_groups(optimizer)
    if groups.names is not None:
        try:
            return _by_names(groups, model)
        except RefusedError:
            # recorded names may be relative and collide: the shapes may still prove which is which
            if any(shape is None for group in groups.shapes for shape in group):
                raise
    return _prove("the optimizer", groups.shapes, model, _DROP, frozen)


def surviving(
    what: str,
    shapes: Sequence[Shape],
    model: Mapping[str, TensorRef],
    removed: Collection[str],
) -> list[bool]:
    """Of a list of tensors in the order of the model's parameters (``shadow_params`` of an EMA
    copy), which belong to a parameter that stays.

    Raises:
        RefusedError, AmbiguousError: which is which can't be proved.
    """
    if not any(name in removed for name in parameters(dict(model))):
        return [True] * len(shapes)
    (names,) = _prove(f"the EMA copy '{what}'", [list(shapes)], model, _DROP_EMA)
    alive = {ref.identity for name, ref in model.items() if name not in removed}
    return [model[name].identity in alive for name in names]


def _prove(
    whose: str,
    shapes: Sequence[Sequence[Shape | None]],
    model: Mapping[str, TensorRef],
    way_out: str,
    frozen: Collection[str] = (),
) -> list[list[str]]:
    """The only names that groups of parameters with these shapes can have in the model."""
    flat = _flat_param(model)
    if flat is not None:
        raise RefusedError(f"'{flat}' is several parameters in one (FSDP)", hint=way_out)
    candidates = _candidates(model)
    total = sum(map(len, shapes))
    if total > len(candidates):
        raise RefusedError(
            f"{whose} has {total} parameters, the model {len(candidates)}: "
            "they don't belong together",
            hint=way_out,
        )
    if _sorted(list(candidates)):
        return _prove_by_shape(whose, shapes, candidates, way_out)
    found, count = _embeddings(shapes, list(candidates.values()))
    if count == 0:
        raise RefusedError(
            f"{whose}'s {total} parameters don't fit the model's in shape and order", hint=way_out
        )
    if count > 1:
        training = {name: shape for name, shape in candidates.items() if name not in frozen}
        if len(training) == total:  # built from what trains, as the freeze record says
            chosen, ways = _embeddings(shapes, list(training.values()))
            if ways == 1:
                return [[list(training)[i] for i in group] for group in chosen]
        many = f"{count:,}" if count < 1000 else f"{count:.1e}"
        raise AmbiguousError(
            f"{whose}'s {total} parameters fit the model's {len(candidates)} in "
            f"{many} ways, and it does not record their names",
            hint=f"{way_out}; build it from model.named_parameters() so that it records names"
            if way_out is _DROP
            else way_out,
        )
    names = list(candidates)
    return [[names[i] for i in group] for group in found]


def _sorted(names: Sequence[str]) -> bool:
    """Whether a file has its names sorted, as safetensors' own writer does, one dtype or shard
    after the other: their order is not the model's then, where every third name or so goes back."""
    back = sum(one > other for one, other in pairwise(names))
    return len(names) > 1 and 10 * back < len(names)


def _prove_by_shape(
    whose: str,
    shapes: Sequence[Sequence[Shape | None]],
    candidates: Mapping[str, Shape],
    way_out: str,
) -> list[list[str]]:
    """As :func:`_prove`, where there is no order to go by: each shape must be one parameter's."""
    there: dict[Shape | None, list[str]] = {}
    for name, shape in candidates.items():
        there.setdefault(shape, []).append(name)
    wanted = Counter(shape for group in shapes for shape in group)
    unknown = wanted.pop(None, 0)
    if any(count > len(there.get(shape, ())) for shape, count in wanted.items()):
        raise RefusedError(f"{whose}'s parameters don't fit the model's in shape", hint=way_out)
    if unknown or any(len(there[shape]) > 1 for shape in wanted):
        raise AmbiguousError(
            f"{whose} does not record names, and the model's are sorted: they don't tell the "
            "order of its parameters",
            hint=f"{way_out}; or merge it with weights as torch saved them"
            if way_out is _DROP
            else way_out,
        )
    return [[there[shape][0] for shape in group] for group in shapes]


def _by_names(groups: Groups, model: Mapping[str, TensorRef]) -> list[list[str]]:
    known: dict[str, str] = {}
    for name in model:
        known.setdefault(unwrapped(name), name)
    out = []
    seen: set[str] = set()
    for recorded, shapes in zip(groups.names or (), groups.shapes, strict=True):
        names: list[str] = []
        for name, shape in zip(recorded, shapes, strict=True):
            if not name:
                names.append(name)
                continue
            found = known.get(unwrapped(name))
            if found is None or found in seen:
                what = "is not in the model" if found is None else "is recorded twice"
                raise RefusedError(f"the optimizer's parameter '{name}' {what}", hint=_DROP)
            if shape not in (None, model[found].shape):
                raise RefusedError(
                    f"the optimizer's parameter '{name}' has the shape {list(shape or ())}, the "
                    f"model's {list(model[found].shape)}",
                    hint=_DROP,
                )
            seen.add(found)
            names.append(found)
        out.append(names)
    return out


def _candidates(model: Mapping[str, TensorRef]) -> dict[str, Shape]:
    """The parameters that an optimizer can have: no buffers, tied ones once."""
    found: dict[Any, tuple[str, Shape]] = {}
    for name, ref in parameters(dict(model)).items():
        found.setdefault(ref.identity, (name, ref.shape))
    return dict(found.values())


def _embeddings(
    groups: Sequence[Sequence[Shape | None]], candidates: Sequence[Shape]
) -> tuple[list[list[int]], int]:
    """One way to take each group's shapes from the candidates in order, and how many there are.

    Dynamic programming over the candidates: a state is how far each group has got; a candidate
    is taken by a group whose next shape it has (or that shows none), or skipped. As many
    candidates may be skipped as there are more than ids.
    """
    total = sum(map(len, groups))
    spare = len(candidates) - total
    states: dict[tuple[int, ...], int] = {tuple(0 for _ in groups): 1}
    history: list[dict[tuple[int, ...], tuple[tuple[int, ...], int | None]]] = []
    for i, shape in enumerate(candidates):
        reached: dict[tuple[int, ...], int] = {}
        came: dict[tuple[int, ...], tuple[tuple[int, ...], int | None]] = {}
        for state, count in states.items():
            if i - sum(state) < spare:
                reached[state] = reached.get(state, 0) + count
                came.setdefault(state, (state, None))
            for g, at in enumerate(state):
                if at < len(groups[g]) and groups[g][at] in (None, shape):
                    after = (*state[:g], at + 1, *state[g + 1 :])
                    reached[after] = reached.get(after, 0) + count
                    came.setdefault(after, (state, g))
        if len(reached) > _MOST_STATES:
            return [], len(reached)
        history.append(came)
        states = reached
    state = tuple(map(len, groups))
    count = states.get(state, 0)
    if count == 0:
        return [], 0
    found: list[list[int]] = [[] for _ in groups]
    for i in range(len(candidates) - 1, -1, -1):
        state, taken_by = history[i][state]
        if taken_by is not None:
            found[taken_by].append(i)
    return [group[::-1] for group in found], count


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
    order = [was.get(name, name) for name in model]
    return _reissued(optimizer, names, list(model), lambda name: name, order)


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
    state = mapping(top.get("state")) or {}
    groups = param_groups(optimizer)
    before = {name: i for i, name in enumerate(order)}
    after = {name: i for i, name in enumerate(new_order or order)}
    named = _is_named([group["params"] for group in groups])
    new_groups, new_state = [], dict[Any, Any]()
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
        new_state.update(
            (new, state[old]) for new, (old, _, _) in zip(ids, kept, strict=True) if old in state
        )
        changed = {**group, "params": ids}
        if isinstance(group.get("param_names"), list):
            changed["param_names"] = recorded
        new_groups.append(changed)
    return with_entries(
        optimizer,
        {**top, "state": with_entries(top["state"], new_state), "param_groups": new_groups},
    )


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
    renaming = plan([id_ for group in ids for id_ in group]) if _is_named(ids) else None
    if not renaming:
        return optimizer
    state = {renaming.get(id_) or id_: one for id_, one in (mapping(top["state"]) or {}).items()}
    changed = [
        {**group, "params": [renaming.get(id_) or id_ for id_ in group["params"]]}
        for group in groups
    ]
    top = {**top, "state": with_entries(top["state"], state), "param_groups": changed}
    return with_entries(optimizer, top)


def set_lr(optimizer: Any, lr: float) -> Any:
    """The optimizer with this learning rate in each group, and in ``initial_lr`` where it is."""
    groups = [
        {**group, "lr": lr, **({"initial_lr": lr} if "initial_lr" in group else {})}
        for group in param_groups(optimizer)
    ]
    return with_entries(optimizer, {**(mapping(optimizer) or {}), "param_groups": groups})
