"""What modelctl writes into a checkpoint about it: freeze record, removed tensors, history.

They lie in the model's state_dict, in ``_metadata[""]`` beside torch's own ``version``: that goes
through ``torch.save``, ``torch.load(weights_only=True)`` and ``load_state_dict`` without a word
(FORMATS section 6). Formats whose state_dict has no ``_metadata`` (safetensors) keep the same
entries in their own place.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from ..errors import RefusedError
from .checkpoint import Checkpoint
from .tree import Obj, attributes, mapping, ordered_dict, rebuild

PREFIX = "modelctl."
FREEZE = "modelctl.freeze"
REMOVED = "modelctl.removed"
HISTORY = "modelctl.history"
METADATA = "modelctl.metadata"


def read_record(ckpt: Checkpoint, name: str) -> Any:
    """The record called ``name`` of the model's state_dict, or None."""
    if not ckpt.sections.models:
        return None
    found = mapping(ckpt.sections.models[0].metadata.get(""))
    return found.get(name) if found else None


def records(node: Any) -> dict[str, Any]:
    """All records of a state_dict."""
    if not isinstance(node, Obj):
        return {}
    found = mapping((mapping(attributes(node).get("_metadata")) or {}).get("")) or {}
    return {k: v for k, v in found.items() if isinstance(k, str) and k.startswith(PREFIX)}


def with_records(node: Any, changes: dict[str, Any]) -> Any:
    """A state_dict with these records set (None removes one).

    A plain dict becomes an OrderedDict, which can carry ``_metadata`` and is what
    ``Module.state_dict`` gives.
    """
    entries = mapping(node) or {}
    metadata = mapping(attributes(node).get("_metadata")) if isinstance(node, Obj) else None
    ours = {**(mapping((metadata or {}).get("")) or {}), **changes}
    ours = {key: value for key, value in ours.items() if value is not None}
    if metadata is None and not ours:
        return node
    new_metadata = {**(metadata or {}), "": ours}
    old = attributes(node).get("_metadata") if isinstance(node, Obj) else None
    boxed = (
        old.replace(entries=new_metadata) if isinstance(old, Obj) else ordered_dict(new_metadata)
    )
    if isinstance(node, Obj):
        state = node.state if isinstance(node.state, dict) else {}
        return node.replace(entries=entries, state={**state, "_metadata": boxed})
    return ordered_dict(entries, {"_metadata": boxed})


def write_records(ckpt: Checkpoint, changes: dict[str, Any]) -> Checkpoint:
    """The checkpoint with these records of its model's state_dict set (None removes one).

    Raises:
        RefusedError: the model is a whole module, which has no place for them.
    """
    model = ckpt.sections.model()
    if model.is_module:
        raise whole_module("carry records")
    root = rebuild(ckpt.root, {id(model.node): with_records(model.node, changes)})
    return ckpt.replace(root=root)


def whole_module(what: str) -> RefusedError:
    """The error for an edit that only a state_dict can take."""
    return RefusedError(
        f"this file holds a whole module, which can't {what} yet",
        hint="'modelctl convert --weights-only' makes a state_dict of it, without its class",
    )


def add_history(ckpt: Checkpoint, lines: Sequence[str]) -> Checkpoint:
    """The checkpoint with more lines of history, where it has a state_dict to carry them."""
    sections = ckpt.sections
    if not sections.models or not sections.certain or sections.models[0].is_module:
        return ckpt
    past = read_record(ckpt, HISTORY)
    return write_records(ckpt, {HISTORY: [*(past if isinstance(past, list) else []), *lines]})
