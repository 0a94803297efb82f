"""Convert: the same checkpoint in another format, or its weights alone."""

from __future__ import annotations

from ..core.checkpoint import Checkpoint
from ..core.records import FREEZE, with_records
from ..core.roles import parameters
from ..core.sections import StateDict
from ..core.tensors import TensorRef
from ..core.tree import ordered_dict, with_entries


def convert(ckpt: Checkpoint, weights_only: bool = False) -> Checkpoint:
    """The checkpoint as it is, or with ``weights_only`` the model's state_dict alone.

    What a format can't hold is refused when it is saved. ``weights_only`` leaves behind
    optimizer, scheduler, progress and everything else that is no tensor of the model; its
    records (freeze, removed, history) stay.

    Raises:
        NoMatchError, AmbiguousError: ``weights_only``, and no state_dict is clearly the model's.
    """
    if not weights_only:
        return ckpt
    model = ckpt.sections.model()
    if model.is_module:
        return _state_dict(ckpt, model)
    others = [name for name, value in model.entries.items() if not isinstance(value, TensorRef)]
    node = model.node
    if others:
        node = with_entries(node, model.tensors())
    out = ckpt.replace(root=node, key=None)
    if others:
        out = out.noting(f"left out, no tensors: {', '.join(others[:6])}")
    return out


def _state_dict(ckpt: Checkpoint, model: StateDict) -> Checkpoint:
    """The state_dict that a whole module would give; which parameters train goes on as a record."""
    tensors = model.tensors()
    plain = {name: ref.replace(role=None, requires_grad=None) for name, ref in tensors.items()}
    node = ordered_dict(plain)
    known = parameters(tensors)
    frozen = [name for name, ref in known.items() if ref.requires_grad is False]
    if frozen:
        record = {"version": 1, "frozen": frozen, "bn_eval": False, "patterns": []}
        node = with_records(node, {FREEZE: record})
    return ckpt.replace(root=node, key=None)
