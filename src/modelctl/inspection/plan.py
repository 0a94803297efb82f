"""What an edit did to the model's tensors: the report of every editing command."""

from __future__ import annotations

from typing import Any, NamedTuple

from ..core.checkpoint import Checkpoint
from ..core.nodes import mapping
from ..core.roles import parameters
from .listing import trainability


class Trains(NamedTuple):
    """Whether a parameter (or, folded, all ``tensors`` of a module) trains, before and after an
    edit; None where the file does not say."""

    name: str
    before: bool | None
    after: bool | None
    tensors: int = 1


class Plan(NamedTuple):
    """``kept`` tensors have their names, ``renamed`` are (old, new), ``removed`` are gone from
    the model, ``dropped`` and ``added`` are top-level entries of the file, ``trains`` are the
    model's parameters where the edit changes which of them train."""

    kept: int
    renamed: list[tuple[str, str]]
    removed: list[str]
    dropped: list[str]
    added: list[str]
    trains: list[Trains]
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
    trains = _trains(before, after, {now: old for old, now in renamed})
    return Plan(kept, renamed, removed, dropped, added, trains, list(after.notes))


def _trains(before: Checkpoint, after: Checkpoint, old_names: dict[str, str]) -> list[Trains]:
    was, now = trainability(before), trainability(after)
    tensors = after.sections.models[0].tensors() if after.sections.models else {}
    found = [
        Trains(name, was.get(old_names.get(name, name)), now.get(name))
        for name in parameters(tensors)
    ]
    return found if any(one.before is not one.after for one in found) else []


def fold_trains(rows: list[Trains]) -> list[Trains]:
    """A row a module where all in it agree, as far up as they do; in the order of the model."""
    folded: list[Trains] = []
    inside: dict[str, list[Trains]] = {}
    for row in rows:
        parts = row.name.split(".")
        for end in range(1, len(parts)):
            inside.setdefault(".".join(parts[:end]), []).append(row)
    agreed = {
        module
        for module, of_module in inside.items()
        if len({(row.before, row.after) for row in of_module}) == 1
    }
    for row in rows:
        parts = row.name.split(".")
        above = [".".join(parts[:end]) for end in range(1, len(parts))]
        module = next((one for one in above if one in agreed), None)
        if module is None:
            folded.append(row)
        elif not folded or folded[-1].name != module:
            folded.append(row._replace(name=module, tensors=len(inside[module])))
    return folded


def _beside(ckpt: Checkpoint) -> list[str]:
    """The top-level entries beside the model's, where the model is one of them."""
    models = ckpt.sections.models
    if not models or not models[0].path:
        return []
    return [str(key) for key in mapping(ckpt.root) or {} if key != models[0].path[0]]
