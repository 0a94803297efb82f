"""Whole modules in a tree (``torch.save(model)``), read without their classes.

A pickled ``nn.Module`` is an object whose state has ``_parameters``, ``_buffers`` and ``_modules``
(docs/formats.md#whole-modules); everything else in its state are its hyperparameters. TorchScript
and torch.export archives are brought into the same shape by their readers.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from .nodes import (
    Global,
    Obj,
    attributes,
    children,
    is_graph_module,
    is_module,
    mapping,
    ordered_dict,
)
from .tensors import TensorRef

# What nn.Module itself keeps in its state: no hyperparameters of the layer.
INTERNAL = frozenset(
    (
        *("_parameters", "_buffers", "_modules", "_non_persistent_buffers_set", "training"),
        *("_backward_hooks", "_backward_pre_hooks", "_forward_hooks", "_forward_pre_hooks"),
        *("_forward_hooks_with_kwargs", "_forward_hooks_always_called"),
        *("_forward_pre_hooks_with_kwargs", "_state_dict_hooks", "_state_dict_pre_hooks"),
        *("_load_state_dict_pre_hooks", "_load_state_dict_post_hooks"),
        *("_is_full_backward_hook", "_backend", "_version", "call_super_init", "dump_patches"),
        # and torch.fx.GraphModule
        *("_lineno_map", "_prologue_start", "_tracer_cls", "shape_env"),
    )
)


_GRAPH_MODULE = Global("torch.fx.graph_module", "GraphModule")


def class_of(module: Obj) -> Any:
    """The module's class (a :class:`Global`)."""
    return _GRAPH_MODULE if is_graph_module(module) else module.func


def class_name(module: Obj) -> str:
    """The module's class, without where it is defined (``Linear``)."""
    cls = class_of(module)
    name = cls.name if isinstance(cls, Global) else "?"
    return str(name).rpartition(".")[2]


def is_training(module: Obj) -> bool | None:
    """The module's mode: True for train, False for eval, None where its state does not say."""
    mode = attributes(module).get("training")
    return mode if isinstance(mode, bool) else None


def submodules(module: Obj) -> Iterator[tuple[str, Obj]]:
    """(dotted path, module) of a module and all below it, in torch's order.

    A module that is reached on several paths is given on each, as ``state_dict`` does; one that
    holds itself is not entered again.
    """
    stack: list[tuple[str, Obj, tuple[int, ...]]] = [("", module, ())]
    while stack:
        path, node, above = stack.pop()
        yield path, node
        inner = mapping(attributes(node).get("_modules")) or {}
        below = (*above, id(node))
        todo = [
            (f"{path}.{name}" if path else str(name), child, below)
            for name, child in inner.items()
            if is_module(child) and id(child) not in below
        ]
        stack.extend(reversed(todo))


def hyperparameters(module: Obj) -> dict[str, Any]:
    """What the layer was built with, as far as its state shows it: plain values."""
    return {
        str(name): value
        for name, value in attributes(module).items()
        if name not in INTERNAL and (value is None or isinstance(value, str | int | float | tuple))
    }


def module_tensors(module: Obj) -> dict[str, TensorRef]:
    """The tensors of a module by their state_dict names, each knowing its role."""
    found: dict[str, TensorRef] = {}
    known: dict[int, TensorRef] = {}
    for path, node in submodules(module):
        own = mapping(attributes(node)["_parameters"]) or {}
        prefix = path + "." if path else ""
        for name, ref in children(node):
            if isinstance(ref, TensorRef):
                role = "parameter" if name in own else "buffer"
                made = ref if ref.role == role else ref.replace(role=role)
                found[f"{prefix}{name}"] = known.setdefault(id(ref), made)
    return found


def make_module(cls: Global, attributes_: dict[str, Any], **groups: dict[str, Any]) -> Obj:
    """A module as torch would have pickled it: what readers of other archives build."""
    state: dict[str, Any] = {
        f"_{name}": ordered_dict(groups.get(name, {}))
        for name in ("parameters", "buffers", "modules")
    }
    return Obj(cls, (), "newobj", state={**state, **attributes_})
