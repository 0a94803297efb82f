"""What a part of a checkpoint is, by its structure alone."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property
from itertools import islice
from typing import Any

from ..modules import module_tensors
from ..nodes import ABSENT, Composite, Global, Obj, attributes, is_module, mapping
from ..tensors import TensorRef
from ..tree import Path, holds_tensors, is_leaf


@dataclass(frozen=True)
class StateDict:
    """A state_dict in the tree: a mapping of names to tensors (and a few other values), or a
    whole module that would give one."""

    path: Path
    node: Any

    @cached_property
    def entries(self) -> dict[str, Any]:
        if is_module(self.node):
            return dict(module_tensors(self.node))
        return mapping(self.node) or {}

    @property
    def is_module(self) -> bool:
        """True for a whole module: its entries are those of the state_dict that it would give."""
        return is_module(self.node)

    def tensors(self) -> dict[str, TensorRef]:
        return {name: ref for name, ref in self.entries.items() if isinstance(ref, TensorRef)}

    def composites(self) -> dict[str, Composite]:
        """The entries that are tensors of another kind: sparse, quantized, wrapped."""
        return {name: node for name, node in self.entries.items() if isinstance(node, Composite)}

    @property
    def metadata(self) -> dict[str, Any]:
        """``_metadata``: for each module (``""`` is the root) what its class recorded."""
        if isinstance(self.node, Obj):
            found = mapping(attributes(self.node).get("_metadata"))
            return found or {}
        return {}


def is_state_dict(node: Any) -> bool:
    """True for a mapping of string names to tensors. Other entries may stand in between: numbers,
    texts, dtypes, ``_extra_state``, whatever holds no tensors; and what holds some (the packed
    parameters of quantized layers, the lists of a metric) where names are those of modules. What
    has more tensors in one of its entries than beside it is a checkpoint.
    """
    entries = mapping(node)
    if not entries:
        return False
    tensors = dotted = extra = 0
    others: list[tuple[str, Any]] = []
    for key, value in entries.items():
        if not isinstance(key, str):
            return False
        if isinstance(value, TensorRef | Composite) or is_uninitialized(value):
            tensors += 1
            dotted += "." in key
        elif is_extra_state(key):
            extra += 1
        elif not is_leaf(value):
            others.append((key, value))
    if not tensors:
        return False
    holding = {key: value for key, value in others if holds_tensors(value)}
    if holding:
        if not dotted or any(_has_more(value, tensors) for value in holding.values()):
            return False
        tensors += sum("." in key for key in holding)  # packed: as good as a tensor
    return 2 * tensors >= len(entries) - extra


def is_extra_state(name: str) -> bool:
    """Whether a name is that of what ``get_extra_state`` of a module gave; Megatron has it by
    layers and ranks (``…_extra_state/shard_0_24``)."""
    return name.rpartition(".")[2].partition("/")[0] == "_extra_state"


# Names that only tensors of layers have, where there are no dots.
_OF_LAYERS = frozenset(("weight", "bias", "running_mean"))


def like_layers(names: Iterable[str]) -> bool:
    """Whether names look like a model's, not like those of some tensors."""
    return any("." in name or name in _OF_LAYERS for name in names)


# What lazy modules have in a tensor's place before their first batch.
_UNINITIALIZED = frozenset(
    Global("torch.nn.parameter", name) for name in ("UninitializedParameter", "UninitializedBuffer")
)


def is_uninitialized(node: Any) -> bool:
    """A tensor to be: it has no shape yet."""
    return isinstance(node, Obj) and isinstance(node.func, Global) and node.func in _UNINITIALIZED


def _has_more(node: Any, tensors: int) -> bool:
    """Whether more tensors than that stand in a mapping itself."""
    found = (one for one in (mapping(node) or {}).values() if isinstance(one, TensorRef))
    return next(islice(found, tensors, None), None) is not None


def is_list_of_tensors(node: Any) -> bool:
    """Whether it is a list or tuple of tensors alone."""
    return isinstance(node, list | tuple) and all(isinstance(one, TensorRef) for one in node)


def is_nameless(node: Any) -> bool:
    """Whether all of a file are tensors without names: one, or a list of them."""
    return isinstance(node, TensorRef) or (is_list_of_tensors(node) and len(node) > 0)


def is_model(node: Any) -> bool:
    """True for what a model can be saved as: its state_dict, or all of it."""
    return is_state_dict(node) or is_module(node)


def is_optimizer(node: Any) -> bool:
    """True for what ``torch.optim.Optimizer.state_dict`` gives, and fastai's (``hypers`` and a list
    of states, one a parameter)."""
    entries = mapping(node)
    if entries is None:
        return False
    state, groups = entries.get("state", ABSENT), entries.get("param_groups")
    return (mapping(state) is not None and isinstance(groups, list) and _are_groups(groups)) or (
        isinstance(entries.get("hypers"), list)
        and isinstance(state, list)
        and all(mapping(one) is not None for one in state)
    )


# What can't be the key of a parameter's state.
_NO_IDS = frozenset((list, dict, tuple))


def _are_groups(groups: list[Any]) -> bool:
    """Whether those that are mappings have the parameters that make a group one."""
    found = [entries.get("params") for group in groups if (entries := mapping(group)) is not None]
    return all(
        isinstance(one, list | tuple) and _NO_IDS.isdisjoint(map(type, one)) for one in found
    )


def is_optimizer_object(node: Any) -> bool:
    """True for a ``torch.optim.Optimizer`` that was pickled itself: it holds the very parameters,
    and its state is by them."""
    if not isinstance(node, Obj) or mapping(node) is not None:
        return False
    found = attributes(node)
    groups = found.get("param_groups")
    return (
        isinstance(groups, list)
        and _are_groups(groups)
        and mapping(found.get("state", ABSENT)) is not None
        and any(
            isinstance(one, TensorRef)
            for group in groups
            for one in (mapping(group) or {}).get("params", ())
        )
    )


def is_scheduler(node: Any) -> bool:
    """True for what ``torch.optim.lr_scheduler.LRScheduler.state_dict`` gives."""
    entries = mapping(node)
    if entries is None or not {"last_epoch", "_schedulers"} & entries.keys():
        return False
    # a checkpoint may have a key last_epoch, too
    return not any(is_optimizer(part) or is_state_dict(part) for part in (node, *entries.values()))


# By which a scheduler is known under whatever name: a mere last_epoch may be anybody's.
_OF_SCHEDULERS = frozenset(("base_lrs", "_last_lr", "_step_count", "_schedulers"))


def is_surely_scheduler(node: Any) -> bool:
    """A scheduler's state_dict by what only they have."""
    return is_scheduler(node) and not _OF_SCHEDULERS.isdisjoint(mapping(node) or {})


def optimizer_entries(node: Any) -> Mapping[Any, Any]:
    """``state`` and ``param_groups``, of an optimizer's state_dict or of a pickled one."""
    found = mapping(node)
    return found if found is not None else attributes(node) if isinstance(node, Obj) else {}


def param_groups(optimizer: Any) -> list[dict[Any, Any]]:
    """The param_groups of an optimizer that are mappings; what fastai has in their place."""
    entries = optimizer_entries(optimizer)
    groups = entries.get("param_groups", entries.get("hypers", []))
    groups = groups if isinstance(groups, list) else []
    return [found for group in groups if (found := mapping(group)) is not None]
