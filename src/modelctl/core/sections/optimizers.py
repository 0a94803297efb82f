"""What a saved optimizer shows of its parameters: how many, which shapes, perhaps their names."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

from ..matching import optimizer_states
from ..matching.matcher import Names, Shape
from ..matching.order import embeddings
from ..names import parameters
from ..nodes import mapping
from ..tensors import TensorRef
from .kinds import optimizer_entries, param_groups


class Groups(NamedTuple):
    """An optimizer's ids, group by group, the shape that each one's state shows (or None), and
    their names where it records them. ``flat``: its state is not kept a parameter (LBFGS)."""

    ids: list[list[Any]]
    shapes: list[list[Shape | None]]
    names: list[list[str]] | None
    flat: bool = False

    @property
    def total(self) -> int:
        return sum(map(len, self.ids))


def read_groups(optimizer: Any) -> Groups:
    """The groups of an optimizer's state_dict. fastai's has one state a parameter, in the order
    of its groups, and does not say where they end: one group, numbered."""
    entries = optimizer_entries(optimizer)
    if isinstance(entries.get("state"), list):
        states = [mapping(one) or {} for one in entries["state"]]
        shown = [optimizer_states.shape_shown(one) for one in states]
        return Groups([[*range(len(states))]], [shown], None)
    state = mapping(entries.get("state")) or {}
    groups = param_groups(optimizer)
    ids = [list(group.get("params", [])) for group in groups]
    known = [[mapping(state.get(id_)) or {} for id_ in group] for group in ids]
    flat = any(optimizer_states.is_flat(one) for group in known for one in group)
    shapes = [[optimizer_states.shape_shown(one) for one in group] for group in known]
    names: list[Any] = [group.get("param_names") for group in groups]
    usable = all(
        isinstance(of_group, list)
        and len(of_group) == len(group)
        and all(isinstance(name, str) for name in of_group)
        for of_group, group in zip(names, ids, strict=True)
    ) and any(name for of_group in names for name in of_group)
    if not usable and is_named(ids):
        names, usable = [list(group) for group in ids], True
    return Groups(ids, shapes, names if usable and groups else None, flat)


def held_by(optimizer: Any) -> list[TensorRef]:
    """The parameters themselves, which a pickled optimizer holds."""
    held = (one for group in param_groups(optimizer) for one in group.get("params", ()))
    return [one for one in held if isinstance(one, TensorRef)]


def is_named(ids: Sequence[Sequence[Any]]) -> bool:
    """True where ids are names already (torch.distributed.checkpoint's flat state_dicts)."""
    return any(ids) and all(isinstance(id_, str) for group in ids for id_ in group)


def trainable(model: Mapping[str, TensorRef]) -> dict[str, Shape]:
    """The parameters that an optimizer can have: no buffers, tied ones once."""
    found: dict[Any, tuple[str, Shape]] = {}
    for name, ref in parameters(dict(model)).items():
        found.setdefault(ref.identity, (name, ref.shape))
    return dict(found.values())


def flat_param(model: Iterable[str]) -> str | None:
    """The name of a tensor that is several parameters in one (FSDP 1)."""
    return next(
        (name for name in model if name.rpartition(".")[2].lstrip("_") == "flat_param"), None
    )


def may_belong(groups: Groups, model: Mapping[str, TensorRef]) -> bool:
    """Whether the optimizer's parameters can be some of the model's, as far as names, shapes and
    order tell."""
    if groups.names is not None:
        known = Names(model)
        return all(
            not name
            or ((meant := known.meant(name)) is not None and shape in (None, model[meant].shape))
            for of_group, shapes in zip(groups.names, groups.shapes, strict=True)
            for name, shape in zip(of_group, shapes, strict=True)
        )
    candidates = trainable(model)
    if groups.flat or flat_param(model) is not None:
        return True
    if groups.total > len(candidates):
        return False
    return embeddings(groups.shapes, list(candidates.values()))[1] > 0
