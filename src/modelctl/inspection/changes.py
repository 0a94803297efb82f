"""What an edit did to the model's tensors: the report of every editing command."""

from __future__ import annotations

from typing import Any, NamedTuple

from ..core.checkpoint import Checkpoint
from ..core.nodes import mapping
from .ls import trainability


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
    if not old and not new:  # no model: what is there is all of it
        kept = len(after.tensors())
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
    return Plan(kept, renamed, removed, dropped, added, trains)


def _trains(before: Checkpoint, after: Checkpoint, old_names: dict[str, str]) -> list[Trains]:
    was, now = trainability(before), trainability(after)
    tensors = after.sections.models[0].tensors() if after.sections.models else {}
    source = before.sections.models[0].tensors() if before.sections.models else {}
    # what the source knows to be a buffer is none of the parameters, whatever its name looks like
    buffers = {name for name, ref in source.items() if ref.role == "buffer"}
    found = [
        Trains(name, was.get(old_names.get(name, name)), now.get(name))
        for name in after.packed.parameters(tensors)
        if old_names.get(name, name) not in buffers
    ]
    told = any(one.after is not None and one.before is not one.after for one in found)
    return found if told else []


def fold_trains(rows: list[Trains]) -> list[Trains]:
    """A row a module where all in it agree, as far up as they do, and one for modules that differ
    only by their numbers; in the order of the model."""
    folded: list[Trains] = []
    said: set[str] = set()
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
        elif module not in said:  # a file may be sorted by dtype: its modules are not in one piece
            said.add(module)
            folded.append(row._replace(name=module, tensors=len(inside[module])))
    return _fold_numbers(folded)


def _fold_numbers(rows: list[Trains]) -> list[Trains]:
    alike: dict[tuple[str, bool | None, bool | None], list[Trains]] = {}
    for row in rows:
        template = ".".join("*" if part.isdecimal() else part for part in row.name.split("."))
        alike.setdefault((template, row.before, row.after), []).append(row)
    folded: list[Trains] = []
    for group in alike.values():
        name = _numbered([row.name for row in group])
        if name is None:
            folded += group
        else:
            folded.append(group[0]._replace(name=name, tensors=sum(row.tensors for row in group)))
    return folded


def _numbered(names: list[str]) -> str | None:
    """``layers.{0-2,5}.norm``: the numbers of names that differ by nothing else, so that it stands
    for these names and no other; None where that can't be said so."""
    parts = []
    several = 1
    for column in zip(*(name.split(".") for name in names), strict=True):
        if len(set(column)) == 1:
            parts.append(column[0])
            continue
        numbers = sorted({int(part) for part in column})
        several *= len(numbers)
        parts.append(f"{{{_ranges(numbers)}}}")
    return ".".join(parts) if several == len(names) else None


def _ranges(numbers: list[int]) -> str:
    """``0-2,5,7-8``."""
    found: list[list[int]] = []
    for number in numbers:
        if found and number == found[-1][-1] + 1:
            found[-1].append(number)
        else:
            found.append([number])
    return ",".join(f"{run[0]}-{run[-1]}" if len(run) > 1 else str(run[0]) for run in found)


def _beside(ckpt: Checkpoint) -> list[str]:
    """The top-level entries beside the model's, where the model is one of them."""
    models = ckpt.sections.models
    if not models or not models[0].path:
        return []
    return [str(key) for key in mapping(ckpt.root) or {} if key != models[0].path[0]]
