"""Which id of a saved optimizer is which parameter of its model.

An optimizer may record ``param_names`` ("" is one that is not the model's). Where it doesn't, the
names are found from the shapes of its state, and only used where exactly one assignment fits:
candidates are the model's parameters in order, each group takes an ordered subsequence of them;
where the file has them sorted, the order is that of known code
(docs/optimizers.md#which-number-is-which-parameter).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from typing import Any

from ...core.matching.decay import decay_groups
from ...core.matching.matcher import Names, Shape
from ...core.matching.module_order import possible_orders
from ...core.matching.order import embeddings
from ...core.names import alphabetical, parameters
from ...core.sections import param_groups
from ...core.sections.optimizers import Groups, flat_param, read_groups, trainable
from ...core.tensors import TensorRef
from ...errors import AmbiguousError, RefusedError

_DROP = "--optimizer drop leaves the optimizer out"
_DROP_EMA = "'modelctl convert --weights-only' leaves the EMA copy out"


def is_flat(optimizer: Any, model: Mapping[str, TensorRef]) -> bool:
    """True where state is not kept a parameter (LBFGS, FSDP): nothing proves whose it is."""
    return read_groups(optimizer).flat or flat_param(model) is not None


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
    if groups.flat:
        raise RefusedError("LBFGS keeps one flat state for all parameters", hint=_DROP)
    if groups.names is not None:
        try:
            return _by_names(groups, model)
        except RefusedError:
            # recorded names may be relative and collide: the shapes may still prove which is which
            if any(shape is None for group in groups.shapes for shape in group):
                raise
    decays = [group.get("weight_decay") for group in param_groups(optimizer)]
    same = _differ_in_decay_alone(param_groups(optimizer))
    return _prove(
        "the optimizer", groups.shapes, model, _DROP, frozen, decays=decays if same else ()
    )


def _differ_in_decay_alone(groups: Sequence[Mapping[str, Any]]) -> bool:
    rest = [
        {key: one for key, one in group.items() if key not in ("params", "weight_decay")}
        for group in groups
    ]
    return all(one == rest[0] for one in rest)


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
    if [*shapes] == [ref.shape for ref in model.values()] and not alphabetical(list(model)):
        names = list(model)  # one of each, buffers too
    else:
        (names,) = _prove(f"the EMA copy '{what}'", [list(shapes)], model, _DROP_EMA)
    alive = {ref.identity for name, ref in model.items() if name not in removed}
    return [model[name].identity in alive for name in names]


def _prove(
    whose: str,
    shapes: Sequence[Sequence[Shape | None]],
    model: Mapping[str, TensorRef],
    way_out: str,
    frozen: Collection[str] = (),
    decays: Sequence[Any] = (),
) -> list[list[str]]:
    """The only names that groups of parameters with these shapes can have in the model. ``decays``
    are the groups' weight decays, where that is all in which they differ."""
    flat = flat_param(model)
    if flat is not None:
        raise RefusedError(f"'{flat}' is several parameters in one (FSDP)", hint=way_out)
    candidates = trainable(model)
    total = sum(map(len, shapes))
    if total > len(candidates):
        raise RefusedError(
            f"{whose} has {total} parameters, the model {len(candidates)}: "
            "they don't belong together",
            hint=way_out,
        )
    if alphabetical(list(candidates)):
        try:
            return _prove_by_shape(whose, shapes, candidates, way_out)
        except AmbiguousError as unproved:
            return _prove_by_code(whose, shapes, candidates, decays, unproved)
    found, count = _in_order(shapes, candidates, decays)
    if count == 0:
        raise RefusedError(
            f"{whose}'s {total} parameters don't fit the model's in shape and order", hint=way_out
        )
    if count > 1:
        training = {name: shape for name, shape in candidates.items() if name not in frozen}
        if len(training) == total:  # built from what trains, as the freeze record says
            chosen, ways = _in_order(shapes, training, decays)
            if ways == 1:
                return chosen
        many = f"{count:,}" if count < 1000 else f"{count:.1e}"
        raise AmbiguousError(
            f"{whose}'s {total} parameters fit the model's {len(candidates)} in "
            f"{many} ways, and it does not record their names",
            hint=f"{way_out}; build it from model.named_parameters() so that it records names"
            if way_out is _DROP
            else way_out,
        )
    return found


def _in_order(
    shapes: Sequence[Sequence[Shape | None]],
    candidates: Mapping[str, Shape],
    decays: Sequence[Any],
) -> tuple[list[list[str]], int]:
    """The names of each group, in one way that keeps the order; and how many ways there are, by
    what is known of which groups decay, where the order alone leaves several."""
    found, count = embeddings(shapes, list(candidates.values()))
    if count > 1 and sum(map(len, shapes)) == len(candidates):
        where = decay_groups(candidates, decays)
        if where is not None:
            found, count = embeddings(shapes, list(candidates.values()), where)
    names = list(candidates)
    return [[names[i] for i in group] for group in found], count


def _prove_by_code(
    whose: str,
    shapes: Sequence[Sequence[Shape | None]],
    candidates: Mapping[str, Shape],
    decays: Sequence[Any],
    unproved: AmbiguousError,
) -> list[list[str]]:
    """As :func:`_prove`, in the order that known code gives modules with such names: all of the
    parameters, each of its own shape, and the same ones whichever architecture it is."""

    def refused(why: str) -> AmbiguousError:
        return AmbiguousError(f"{unproved.message}, and {why}", hint=unproved.hint)

    if sum(map(len, shapes)) < len(candidates):
        raise refused("some of them are not in it")
    if any(shape is None for group in shapes for shape in group):
        raise refused("some have no state")
    try:
        orders = possible_orders(candidates)
    except AmbiguousError as e:
        raise refused(e.message) from None
    proved: list[list[list[str]]] = []
    for order in orders:
        found, ways = _in_order(shapes, {name: candidates[name] for name in order}, decays)
        if ways > 1:
            raise refused("they fit in several ways")
        if ways and found not in proved:
            proved.append(found)
    if len(proved) != 1:
        raise refused(
            "architectures with such modules have them in several orders"
            if proved
            else "their shapes fit no known architecture"
        )
    return proved[0]


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
