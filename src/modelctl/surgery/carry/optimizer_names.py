"""Which id of a saved optimizer is which parameter of its model.

An optimizer may record ``param_names`` ("" is one that is not the model's). Where it doesn't, the
names are found from the shapes of its state, and only used where exactly one assignment fits:
candidates are the model's parameters in order, each group takes an ordered subsequence of them
(docs/optimizers.md#which-number-is-which-parameter).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

from ...core.matching import optimizer_states
from ...core.matching.matcher import Names, Shape
from ...core.matching.order import embeddings
from ...core.names import alphabetical, parameters
from ...core.nodes import mapping
from ...core.sections import param_groups
from ...core.tensors import TensorRef
from ...errors import AmbiguousError, RefusedError

_DROP = "--optimizer drop leaves the optimizer out"
_DROP_EMA = "'modelctl convert --weights-only' leaves the EMA copy out"


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
    shapes = [[_shown(mapping(state.get(id_)) or {}) for id_ in group] for group in ids]
    names: list[Any] = [group.get("param_names") for group in groups]
    usable = all(
        isinstance(of_group, list)
        and len(of_group) == len(group)
        and all(isinstance(name, str) for name in of_group)
        for of_group, group in zip(names, ids, strict=True)
    ) and any(name for of_group in names for name in of_group)
    if not usable and is_named(ids):
        names, usable = [list(group) for group in ids], True
    return Groups(ids, shapes, names if usable and groups else None)


def _shown(state: Mapping[Any, Any]) -> Shape | None:
    if optimizer_states.is_flat(state):
        raise RefusedError("LBFGS keeps one flat state for all parameters", hint=_DROP)
    return optimizer_states.shape_shown(state)


def is_named(ids: Sequence[Sequence[Any]]) -> bool:
    """True where ids are names already (torch.distributed.checkpoint's flat state_dicts)."""
    return any(ids) and all(isinstance(id_, str) for group in ids for id_ in group)


def is_flat(optimizer: Any, model: Mapping[str, TensorRef]) -> bool:
    """True where state is not kept a parameter (LBFGS, FSDP): nothing proves whose it is."""
    state = mapping((mapping(optimizer) or {}).get("state")) or {}
    flat = any(optimizer_states.is_flat(mapping(one) or {}) for one in state.values())
    return flat or _flat_param(model) is not None


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
    if alphabetical(list(candidates)):
        return _prove_by_shape(whose, shapes, candidates, way_out)
    found, count = embeddings(shapes, list(candidates.values()))
    if count == 0:
        raise RefusedError(
            f"{whose}'s {total} parameters don't fit the model's in shape and order", hint=way_out
        )
    if count > 1:
        training = {name: shape for name, shape in candidates.items() if name not in frozen}
        if len(training) == total:  # built from what trains, as the freeze record says
            chosen, ways = embeddings(shapes, list(training.values()))
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
    known = Names(model)
    out = []
    seen: set[str] = set()
    for recorded, shapes in zip(groups.names or (), groups.shapes, strict=True):
        names: list[str] = []
        for name, shape in zip(recorded, shapes, strict=True):
            if not name:
                names.append(name)
                continue
            found = known.meant(name)
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
