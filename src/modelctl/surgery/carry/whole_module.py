"""Edits of whole modules (``torch.save(model)``), without their classes.

A module's names are the attributes that its class gives it, so they can't be changed freely;
what can be done is what people do to a live model: put an ``Identity`` where a layer was, take
a wrapper off, say which parameters train.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

from ...core.modules import INTERNAL, submodules
from ...core.names import RESERVED, WRAPPERS
from ...core.nodes import (
    Global,
    Obj,
    attributes,
    is_graph_module,
    is_module,
    mapping,
    with_attributes,
    with_entries,
)
from ...core.records import records, with_records
from ...core.sections import StateDict
from ...core.tensors import TensorRef
from ...core.text import some
from ...core.tree import rebuild
from ...errors import RefusedError
from .state_dict import Renaming, follow_records

_IDENTITY = Global("torch.nn.modules.linear", "Identity")
_CODE = "this file holds a torch.fx.GraphModule, whose code names its modules: {} can't be {}"
_HINT = "'modelctl convert --weights-only' makes a state_dict of it, without its class"


def rename_module(model: StateDict, renaming: Renaming, *, record: bool) -> Any:
    """The whole module with the layers that are removed replaced by ``nn.Identity``, so that it
    still runs, and with wrappers (DataParallel, ``torch.compile``) taken off.

    Raises:
        RefusedError: other names are asked for, or parameters of a layer that keeps others.
    """
    if not renaming:
        return model.node
    gone = {name for name, new in renaming.items() if new is None}
    node = model.node
    if any(new is not None for new in renaming.values()):
        node = _unwrapped(node)
    else:
        layers = _layers(node, gone)
        coded = _in_code(node)
        if any(id(layer) in coded for layer in layers):
            raise RefusedError(_CODE.format(some([*gone], 3), "removed"), hint=_HINT)
        node = rebuild(node, {id(layer): _identity(layer) for layer in layers})
    expected = [new for name in model.entries if (new := renaming.get(name, name)) is not None]
    if list(StateDict(model.path, node).entries) != expected:
        if _in_code(node):
            what = "renamed" if len(gone) < len(renaming) else "removed"
            raise RefusedError(_CODE.format(some([*renaming], 3), what), hint=_HINT)
        what = "be renamed" if len(gone) < len(renaming) else "lose a part of a layer"
        raise RefusedError(f"this file holds a whole module, which can't {what}", hint=_HINT)
    return follow_records(node, model, renaming, record=record)


def _in_code(module: Obj) -> set[int]:
    """Ids of the modules that the code of a GraphModule names, wherever it stands."""
    return {
        id(below)
        for _, node in submodules(module)
        if is_graph_module(node)
        for path, below in submodules(node)
        if path
    }


def _layers(module: Obj, gone: Collection[str]) -> list[Obj]:
    """The smallest modules that hold all the tensors that are to go, and no others."""
    inside: dict[str, list[str]] = {}
    for name in StateDict((), module).entries:
        parts = name.split(".")[:-1]
        for end in range(len(parts) + 1):
            inside.setdefault(".".join(parts[:end]), []).append(name)
    going = {path: nodes for path, nodes in inside.items() if all(n in gone for n in nodes)}
    found = []
    for path, node in submodules(module):
        above = path.rpartition(".")[0]
        if path not in going or (path and above in going):
            continue
        children = [(f"{path}.{name}", child) for name, child in _children(node)]
        holding = [(below, child) for below, child in children if below in inside]
        while len(holding) == 1 and len(inside[holding[0][0]]) == len(inside[path]):
            path, node = holding[0]
            children = [(f"{path}.{name}", child) for name, child in _children(node)]
            holding = [(below, child) for below, child in children if below in inside]
        found.append(node)
    return found


def _children(node: Obj) -> list[tuple[str, Obj]]:
    inner = mapping(attributes(node).get("_modules")) or {}
    return [(str(name), child) for name, child in inner.items() if is_module(child)]


def _identity(layer: Obj) -> Obj:
    """An ``nn.Identity`` as the torch that wrote ``layer`` would have pickled it."""
    state: dict[str, Any] = {}
    for name, value in attributes(layer).items():
        if name in INTERNAL:
            state[name] = with_entries(value, {}) if mapping(value) is not None else value
    return Obj(_IDENTITY, (), layer.how, state=state)


def _unwrapped(module: Obj) -> Obj:
    """Without the wrappers around it, and around what ``torch.compile`` was called on inside."""
    kept = records(module)
    while (inner := _wrapped(module, WRAPPERS)) is not None:
        module = inner
    while compiled := [
        (node, inner)
        for path, node in submodules(module)
        if path and (inner := _wrapped(node, RESERVED)) is not None
    ]:
        node, inner = compiled[-1]  # the innermost first: a replacement is not looked into
        module = rebuild(module, {id(node): inner})
    out = with_records(module, kept)
    assert isinstance(out, Obj)
    return out


def _wrapped(node: Obj, names: Collection[str]) -> Obj | None:
    children = [] if is_graph_module(node) else _children(node)
    return children[0][1] if len(children) == 1 and children[0][0] in names else None


# ---------------------------------------------------------------------- what trains


def set_requires_grad(root: Any, module: Obj, trains: Mapping[str, bool]) -> Any:
    """The tree with ``requires_grad`` of these parameters of a module in it set, by their names in
    its state_dict: wherever they stand, since a pickled optimizer holds the very same."""
    changes: dict[int, Any] = {}
    for path, node in submodules(module):
        for name, ref in (mapping(attributes(node)["_parameters"]) or {}).items():
            full = f"{path}.{name}" if path else str(name)
            if isinstance(ref, TensorRef) and full in trains:
                changes[id(ref)] = ref.replace(requires_grad=trains[full])
    return rebuild(root, changes)


def frozen_batchnorm_in_eval(module: Obj) -> tuple[Obj, int]:
    """The module with its BatchNorms of which every parameter is frozen in eval mode, and how
    many are."""
    changes: dict[int, Any] = {}
    for _, node in submodules(module):
        own = (mapping(attributes(node)["_parameters"]) or {}).values()
        refs = [ref for ref in own if isinstance(ref, TensorRef)]
        if is_batchnorm(node) and refs and not any(ref.requires_grad for ref in refs):
            changes[id(node)] = with_attributes(node, {"training": False})
    changed = rebuild(module, changes)
    assert isinstance(changed, Obj)
    return changed, len(changes)


def is_batchnorm(node: Obj) -> bool:
    """A module that keeps running statistics."""
    buffers = mapping(attributes(node).get("_buffers")) or {}
    return all(isinstance(buffers.get(name), TensorRef) for name in ("running_mean", "running_var"))
