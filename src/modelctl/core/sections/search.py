"""Every part that stands in a tree, by what it is (:mod:`.kinds`)."""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

from ..nodes import children, is_module
from ..tensors import TensorRef
from ..tree import Path, is_leaf, is_small
from .kinds import (
    StateDict,
    is_list_of_tensors,
    is_optimizer,
    is_optimizer_object,
    is_scheduler,
    is_state_dict,
    is_surely_scheduler,
)


@dataclass
class Found:
    """The parts of a tree by what they are, in order."""

    state_dicts: list[tuple[Path, Any]] = field(default_factory=list)
    optimizers: list[tuple[Path, Any]] = field(default_factory=list)
    objects: list[tuple[Path, Any]] = field(default_factory=list)
    schedulers: list[tuple[Path, Any]] = field(default_factory=list)
    lists: list[tuple[Path, Any]] = field(default_factory=list)

    @cached_property
    def models(self) -> list[StateDict]:
        """State_dicts and whole modules."""
        return [StateDict(path, node) for path, node in self.state_dicts]

    @cached_property
    def _trainings(self) -> set[Path]:
        """Where optimizers stand."""
        return {path[:-1] for path, _ in (*self.optimizers, *self.objects)}

    def is_of_another(self, path: Path, first: Path) -> bool:
        """Whether a state_dict has an optimizer beside it, and the first model is elsewhere: it is
        another training's, no copy."""
        above = (path[:end] for end in range(1, len(path)))
        return any(one in self._trainings and one != first[: len(one)] for one in above)


def search(root: Any) -> Found:
    """Every part that stands in a tree, at any depth, on each of its paths; what is no part is
    looked into once."""
    found = Found()
    known: dict[int, list[tuple[Path, Any]] | None] = {}
    todo: list[tuple[Path, Any, bool]] = [((), root, False)]
    while todo:
        path, node, inside = todo.pop()
        if is_leaf(node):
            continue
        if id(node) in known:
            kind = known[id(node)]
            if kind is not None:
                kind.append((path, node))
            continue
        kind = None
        if is_optimizer(node):
            kind = found.optimizers
        elif is_optimizer_object(node):
            kind = found.objects
        elif is_scheduler(node) and (is_surely_scheduler(node) or _says_scheduler(path)):
            kind = found.schedulers
        elif is_module(node):
            kind = found.state_dicts
        elif is_list_of_tensors(node):
            kind = found.lists
        else:
            state_dict = is_state_dict(node)
            if state_dict and not inside:
                kind = found.state_dicts
            below = [
                ((*path, label), child, inside or state_dict)
                for label, child in children(node)
                if not is_leaf(child) and not _is_data(child)
            ]
            todo += reversed(below)
        known[id(node)] = kind
        if kind is not None:
            kind.append((path, node))
    return found


def _is_data(node: Any) -> bool:
    """Whether it is no part: a few numbers and texts, as a data set has millions of."""
    if not is_small(node):
        return False
    values = node.values() if isinstance(node, dict) else node
    return TensorRef not in map(type, values) and not is_scheduler(node)


def _says_scheduler(path: Path) -> bool:
    return any("sched" in str(label).lower() for label in path)
