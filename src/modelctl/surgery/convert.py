"""Convert: the same checkpoint in another format, or its weights alone."""

from __future__ import annotations

from typing import Any

from ..core.checkpoint import Checkpoint
from ..core.freeze_record import FreezeRecord
from ..core.names import parameters
from ..core.nodes import ABSENT, Composite, mapping, ordered_dict, with_entries
from ..core.notes import info, warning
from ..core.records import FREEZE, records, with_records
from ..core.sections import StateDict, is_nameless
from ..core.sections.devices import device_tag
from ..core.tensors import Rebuild, TensorRef
from ..core.text import some
from ..core.tree import path_text, walk
from ..errors import NoMatchError


def convert(ckpt: Checkpoint, weights_only: bool = False, device: str | None = None) -> Checkpoint:
    """The checkpoint as it is, or with ``weights_only`` the model's state_dict alone; a file that
    is a whole module becomes the state_dict that it would give, without its class. ``device``
    (``cpu``, ``cuda:0``) is where the output says that every storage was, in all sections:
    ``torch.load`` puts it there where no ``map_location`` says otherwise.

    What a format can't hold is refused when it is saved. ``weights_only`` leaves behind
    optimizer, scheduler, progress and everything else that is no tensor of the model; its
    records (freeze, removed, history) stay.

    Raises:
        NoMatchError, AmbiguousError: ``weights_only``, and no state_dict is clearly the model's; or
            a whole module without tensors.
        UsageError: there is no such device.
    """
    if device is not None:
        ckpt = ckpt.replace(device=device_tag(device))
    sections = ckpt.sections
    first = sections.models[0] if sections.models and sections.certain else None
    # nobody without its class can load a module: a file that is one becomes its state_dict
    is_file = first is not None and first.path == () and ckpt.outside is None
    if first is not None and first.is_module and (weights_only or is_file):
        return _state_dict(ckpt, first)
    if not weights_only or is_nameless(ckpt.root):  # which are all weights
        return ckpt
    model = sections.model()
    others = [name for name, value in model.entries.items() if not isinstance(value, TensorRef)]
    node = model.node
    if others:
        node = with_entries(node, model.tensors())
    if any(finding.level == "dangerous" for finding in ckpt.findings):
        node = _plain(model)
    out = ckpt.replace(root=node, key=None, outside=None)
    top = mapping(ckpt.root) or {}
    if model.path == ("state_dict",) and "ema_state_dict" in top and "meta" in top:
        out = out.noting(info("mmengine swaps them: 'state_dict' holds the averaged (EMA) weights"))
    if others:
        out = out.noting(info(f"left out, no tensors: {some(others, 6)}"))
    if mapping(ckpt.root) is None:  # of a mapping the report says what goes
        kept = {ref.identity for ref in model.tensors().values()}
        if lost := [name for name, ref in ckpt.tensors().items() if ref.identity not in kept]:
            out = out.noting(warning(f"left out, none of the model's: {some(lost, 6)}"))
    return out


def _plain(model: StateDict) -> Any:
    """A state_dict of which nothing stays but values: no state or class of a tensor, no hooks, of
    ``_metadata`` the versions."""
    tensors = {
        name: ref.replace(rebuild=Rebuild(ref.rebuild.bits) if ref.rebuild.bits else None)
        if ref.rebuild is not None
        else ref
        for name, ref in model.tensors().items()
    }
    versions = {
        module: {"version": version}
        for module, said in model.metadata.items()
        if isinstance(module, str) and type(version := (mapping(said) or {}).get("version")) is int
    }
    node = ordered_dict(tensors, {"_metadata": ordered_dict(versions)} if versions else ABSENT)
    return with_records(node, records(model.node))


def _state_dict(ckpt: Checkpoint, model: StateDict) -> Checkpoint:
    """The state_dict that a whole module would give; which parameters train goes on as a record."""
    tensors = model.tensors()
    if not tensors:
        raise NoMatchError("the module in this file has no tensors")
    plain = {name: ref.replace(role=None, requires_grad=None) for name, ref in tensors.items()}
    node = ordered_dict(plain)
    known = parameters(tensors)
    frozen = [name for name, ref in known.items() if ref.requires_grad is False]
    ours = records(model.node)
    if frozen:
        ours[FREEZE] = FreezeRecord(tuple(frozen)).node()
    node = with_records(node, ours)
    out = ckpt.replace(root=node, key=None, outside=None)
    special = [path_text(path) for path, one in walk(model.node) if isinstance(one, Composite)]
    if special:
        return out.noting(warning(f"left out, no plain tensors: {some(special, 6)}"))
    return out
