"""What modelctl writes into a checkpoint about it: freeze record, removed tensors, history.

They lie in the model's state_dict, in ``_metadata[""]`` beside torch's own ``version``: that goes
through ``torch.save``, ``torch.load(weights_only=True)`` and ``load_state_dict`` without a word
(docs/records.md). A whole module carries them as attributes, which torch ignores, too. Formats
whose state_dict has no ``_metadata`` (safetensors) keep the same entries in their own place.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from .checkpoint import Checkpoint
from .freeze_record import FreezeRecord
from .names import parameters
from .nodes import Obj, attributes, is_module, mapping, ordered_dict, with_attributes
from .notes import Note, warning
from .tree import rebuild

PREFIX = "modelctl."
FREEZE = "modelctl.freeze"
REMOVED = "modelctl.removed"
ONLY = "modelctl.only"
HISTORY = "modelctl.history"
METADATA = "modelctl.metadata"


def read_record(ckpt: Checkpoint, name: str) -> Any:
    """The record called ``name`` of the model's state_dict, or None."""
    models = ckpt.sections.models
    return records(models[0].node).get(name) if models else None


def read_freeze(ckpt: Checkpoint) -> FreezeRecord | None:
    """The freeze record of the model's state_dict, as far as it can be understood, or None."""
    return FreezeRecord.read(read_record(ckpt, FREEZE))


def unread_freeze(ckpt: Checkpoint) -> Note | None:
    """A warning where there is a freeze record that can't be understood."""
    node = read_record(ckpt, FREEZE)
    if node is None or FreezeRecord.read(node) is not None:
        return None
    return warning(
        "the freeze record can't be understood: what it freezes is not known",
        "'modelctl freeze' writes a new one",
    )


def frozen_names(ckpt: Checkpoint) -> set[str]:
    """The names in the checkpoint's freeze record, or of a whole module's frozen parameters."""
    model = ckpt.sections.models[0] if ckpt.sections.models else None
    if model is not None and model.is_module:
        tensors = parameters(model.tensors())
        return {name for name, ref in tensors.items() if ref.requires_grad is False}
    record = read_freeze(ckpt)
    return set() if record is None else {*record.frozen}


def records(node: Any) -> dict[str, Any]:
    """All records of a state_dict or a whole module."""
    if not isinstance(node, Obj):
        return {}
    found = attributes(node)
    if not is_module(node):
        found = mapping((mapping(found.get("_metadata")) or {}).get("")) or {}
    return {k: v for k, v in found.items() if isinstance(k, str) and k.startswith(PREFIX)}


def without_records(entry: Any) -> Any:
    """What torch recorded of a module in ``_metadata``, without our records."""
    return {k: v for k, v in (mapping(entry) or {}).items() if not str(k).startswith(PREFIX)}


def with_records(node: Any, changes: dict[str, Any]) -> Any:
    """A state_dict or whole module with these records set (None removes one).

    A plain dict becomes an OrderedDict, which can carry ``_metadata`` and is what
    ``Module.state_dict`` gives.
    """
    if is_module(node):
        return with_attributes(node, changes)
    entries = mapping(node) or {}
    metadata = mapping(attributes(node).get("_metadata")) if isinstance(node, Obj) else None
    ours = {**(mapping((metadata or {}).get("")) or {}), **changes}
    removed = {key for key, value in changes.items() if value is None}
    ours = {key: value for key, value in ours.items() if key not in removed}
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
    """The checkpoint with these records of its model set (None removes one)."""
    model = ckpt.sections.model()
    root = rebuild(ckpt.root, {id(model.node): with_records(model.node, changes)})
    return ckpt.replace(root=root)


def add_history(ckpt: Checkpoint, lines: Sequence[str]) -> Checkpoint:
    """The checkpoint with more lines of history, where it has a model to carry them."""
    sections = ckpt.sections
    if not sections.models or not sections.certain:
        return ckpt
    past = read_record(ckpt, HISTORY)
    return write_records(ckpt, {HISTORY: [*(past if isinstance(past, list) else []), *lines]})
