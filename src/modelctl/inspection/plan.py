"""What an edit did to the model's tensors: the report of every editing command."""

from __future__ import annotations

from typing import Any, NamedTuple

from ..core.checkpoint import Checkpoint
from ..core.tree import mapping


class Plan(NamedTuple):
    """``kept`` tensors have their names, ``renamed`` are (old, new), ``removed`` are gone from
    the model, ``dropped`` and ``added`` are top-level entries of the file."""

    kept: int
    renamed: list[tuple[str, str]]
    removed: list[str]
    dropped: list[str]
    added: list[str]
    notes: list[str]


def plan(before: Checkpoint, after: Checkpoint) -> Plan:
    """Compare a checkpoint with an edit of it: edits keep the storages of what they keep."""
    old = before.sections.models[0].tensors() if before.sections.models else {}
    new = after.sections.models[0].tensors() if after.sections.models else {}
    now: dict[Any, list[str]] = {}
    for name, ref in new.items():
        now.setdefault(ref.identity, []).append(name)
    kept = 0
    renamed, removed = [], []
    for name, ref in old.items():
        names = now.get(ref.identity, [])
        if name in names:
            names.remove(name)
            kept += 1
        elif names:
            renamed.append((name, names.pop(0)))
        else:
            removed.append(name)
    tops = [mapping(ckpt.root) or {} for ckpt in (before, after)]
    flat = any(
        ckpt.sections.models and not ckpt.sections.models[0].path for ckpt in (before, after)
    )
    if flat:  # beside a model that was, or now is, the whole file
        dropped, added = _beside(before), _beside(after)
    else:
        dropped = [str(key) for key in tops[0] if key not in tops[1]]
        added = [str(key) for key in tops[1] if key not in tops[0]]
    return Plan(kept, renamed, removed, dropped, added, list(after.notes))


def _beside(ckpt: Checkpoint) -> list[str]:
    """The top-level entries beside the model's, where the model is one of them."""
    models = ckpt.sections.models
    if not models or not models[0].path:
        return []
    return [str(key) for key in mapping(ckpt.root) or {} if key != models[0].path[0]]
