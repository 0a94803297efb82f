"""The inert tree of a file as Python and torch values, without running what it names."""

from __future__ import annotations

from collections import Counter, OrderedDict
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import nn

from ...core.dtypes import BY_NAME
from ...core.nodes import ORDERED_DICT, Composite, Global, Obj
from ...core.sections.kinds import is_uninitialized
from ...core.tensors import TensorRef
from ...core.tree import walk
from ...errors import UnsupportedError
from .tensors import SPARSE, declared, sparse_tensor, to_tensors, wrapping_tensor

_DICTS: dict[Any, Callable[[], Any]] = {
    ORDERED_DICT: OrderedDict,
    Global("collections", "Counter"): Counter,
    Global("collections", "defaultdict"): dict,
}
_SIZE = Global("torch", "Size")
_DEVICE = Global("torch", "device")


def live(node: Any, where: str, *, lazy: bool = False) -> Any:
    """The tree of a file as values: tensors (on the CPU, tied ones one), containers, atoms. Where
    it is ``lazy``, tensors stay references, but those of which a sparse or a wrapped one is made.

    Raises:
        UnsupportedError: something else, which would have to be run or imported; names its key.
    """
    refs = _references(node)
    made_of = [_references(one) for _, one in walk(node) if lazy and isinstance(one, Composite)]
    now = {key: ref for found in made_of for key, ref in found.items()} if lazy else refs
    tensors: dict[int, Any] = {**refs, **to_tensors(now)}
    # by identity: what is shared stays shared, and a few shared lists can't spell out billions
    made: dict[int, Any] = {}

    def fill(shell: Any, items: Mapping[Any, Any], where: str) -> None:
        for key, inner in items.items():  # update() of a Counter would count
            shell[key] = of(inner, f"{where}.{key}")

    def of(node: Any, where: str) -> Any:
        if isinstance(node, bool | int | float | str | bytes | None):
            return node
        if isinstance(node, TensorRef):
            return tensors[id(node)]
        if isinstance(node, Composite) and node.layout in SPARSE and id(node) not in made:
            made[id(node)] = sparse_tensor(node, {k: tensors[id(p)] for k, p in node.parts.items()})
        if isinstance(node, Composite) and id(node) not in made and (cls := declared(node)):
            made[id(node)] = wrapping_tensor(cls, node, of(node.args[3], where))
        if id(node) not in made:
            made[id(node)] = _named(node)
            if made[id(node)] is None:
                build(node, where)
        return made[id(node)]

    def build(node: Any, where: str) -> None:
        if isinstance(node, dict):
            made[id(node)] = {}
            fill(made[id(node)], node, where)
        elif type(node) is list:
            made[id(node)] = filled = []
            filled += [of(inner, f"{where}.{i}") for i, inner in enumerate(node)]
        elif type(node) is tuple:
            made[id(node)] = tuple(of(inner, f"{where}.{i}") for i, inner in enumerate(node))
        elif isinstance(node, Obj) and isinstance(node.func, Global) and node.func in _DICTS:
            made[id(node)] = _DICTS[node.func]()
            counted = node.args[0] if node.args and isinstance(node.args[0], dict) else {}
            fill(made[id(node)], {**counted, **node.entries}, where)
        else:
            what = node.func if isinstance(node, Obj) else node
            raise UnsupportedError(
                f"'{where}' is a {what}, which is not made from a file",
                hint="save it as numbers, texts, tensors, lists and dicts",
            )

    return of(node, where)


def _references(node: Any) -> dict[int, TensorRef]:
    return {id(found): found for _, found in walk(node) if isinstance(found, TensorRef)}


def _named(node: Any) -> Any:
    """A dtype, a device, a size, or a parameter that has no shape yet."""
    if is_uninitialized(node):
        trains = bool(node.args and node.args[0] is True)
        return getattr(nn.parameter, node.func.name)(requires_grad=trains)
    if isinstance(node, Global) and node.module == "torch" and node.name in BY_NAME:
        return getattr(torch, node.name, None)
    if isinstance(node, Obj) and len(node.args) in (1, 2):
        if node.func == _SIZE and isinstance(node.args[0], tuple | list):
            return torch.Size(node.args[0])
        if node.func == _DEVICE and isinstance(node.args[0], str):
            return torch.device(*node.args)
    return None
