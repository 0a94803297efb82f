"""What becomes of the names of a state_dict: its tensors, its ``_metadata``, its records."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from typing import Any

from ...core.freeze_record import FreezeRecord
from ...core.matching.matcher import Names
from ...core.names import wrappers
from ...core.nodes import Obj, attributes, mapping, with_attributes, with_entries
from ...core.records import FREEZE, REMOVED, records, with_records, without_records
from ...core.sections import StateDict
from ...errors import CollisionError

# What becomes of each name that changes: its new name, or None where the tensor is removed.
Renaming = Mapping[str, "str | None"]
# Says it for the names of one state_dict: the model's, an EMA copy's, an optimizer's.
Plan = Callable[[Sequence[str]], Renaming]


def following(names: Collection[str], renaming: Renaming) -> Plan:
    """The plan that does to other names of the same tensors what ``renaming`` does to ``names``.

    An EMA copy or an optimizer may call them with or without a wrapper's prefix, which stays.
    """
    known = Names(names)

    def plan(others: Sequence[str]) -> Renaming:
        out: dict[str, str | None] = {}
        for other in others:
            name = known.meant(other)
            if name is None or name not in renaming:
                continue
            new = renaming[name]
            if new is not None and name != other:
                new = wrappers(other) + _inside(new, name)
            out[other] = new
        return out

    return plan


def _inside(new: str, name: str) -> str:
    """What ``name`` became, ``new``, without the wrappers that were around it."""
    around = wrappers(name)
    if not new.startswith(around) and new.endswith("." + name):  # a prefix was put before them
        return new.removesuffix(name) + name.removeprefix(around)
    return new.removeprefix(around)


def rename_state_dict(model: StateDict, renaming: Renaming, *, record: bool) -> Any:
    """The state_dict with its tensors renamed or removed; ``_metadata`` and the freeze record
    follow, and with ``record`` what was removed is recorded.

    Raises:
        CollisionError: two tensors would get one name.
    """
    if not renaming:
        return model.node
    entries: dict[str, Any] = {}
    origin: dict[str, str] = {}
    for name, value in model.entries.items():
        new = renaming.get(name, name)
        if new is None:
            continue
        if new in origin:
            raise CollisionError(
                f"'{origin[new]}' and '{name}' would both be named '{new}'",
                hint="rename or drop one of them first",
            )
        origin[new] = name
        entries[new] = value
    node = _rename_metadata(with_entries(model.node, entries), model.entries, renaming)
    return follow_records(node, model, renaming, record=record)


def follow_records(node: Any, before: StateDict, renaming: Renaming, *, record: bool) -> Any:
    """``node``, which came of renaming ``before``, with the records that this makes of its own."""
    ours = records(node)
    changes: dict[str, Any] = {}
    removed = [
        {"name": name, "shape": list(ref.shape), "dtype": ref.dtype.name}
        for name, ref in before.tensors().items()
        if renaming.get(name, name) is None
    ]
    if removed and record:
        past = ours.get(REMOVED)
        changes[REMOVED] = [*(past if isinstance(past, list) else []), *removed]
    freeze = FreezeRecord.read(ours.get(FREEZE))
    if freeze is not None:
        changes[FREEZE] = freeze.renamed(renaming).node()
    return with_records(node, changes) if changes else node


def _rename_metadata(node: Any, names: Iterable[str], renaming: Renaming) -> Any:
    """``_metadata`` has a key a module: they move with the tensors under them."""
    boxed = attributes(node).get("_metadata") if isinstance(node, Obj) else None
    old = mapping(boxed)
    if old is None or boxed is None:
        return node
    modules = _module_renaming(names, renaming)
    entries: dict[str, Any] = {}
    for module, value in old.items():
        new = _renamed_module(module, modules)
        if new is None:
            continue
        if new in entries:  # a wrapper's own entry: the wrapped module's counts, records stay
            value = {**(mapping(entries[new]) or {}), **(mapping(value) or {})}
        entries[new] = value
        moved = _moved_root(names, renaming) if module == "" else ""
        if moved:  # under a prefix the root is a module like others; the new root is a wrapper
            entries[moved] = without_records(value)
    return with_attributes(node, {"_metadata": with_entries(boxed, entries)})


def _moved_root(names: Iterable[str], renaming: Renaming) -> str:
    """The prefix that all names get, without its dot; or ''."""
    prefixes = set()
    for name in names:
        new = renaming.get(name, name)
        if new is not None:
            prefixes.add(new.removesuffix("." + name) if new.endswith("." + name) else "")
    return prefixes.pop() if len(prefixes) == 1 else ""


def _module_renaming(names: Iterable[str], renaming: Renaming) -> dict[str, str | None]:
    """What becomes of each module, from what becomes of the tensors in it."""
    modules: dict[str, str | None] = {}
    kept: set[str] = set()
    for name in names:
        parts = name.split(".")[:-1]
        new = renaming.get(name, name)
        if new is None:
            for end in range(1, len(parts) + 1):
                modules.setdefault(".".join(parts[:end]), None)
            continue
        new_parts = new.split(".")[:-1]
        for end in range(len(parts), 0, -1):
            cut = len(parts) - end
            if cut > len(new_parts):  # a wrapper around a wrapper: both become the root
                modules.setdefault(".".join(parts[:end]), "")
                continue
            if parts[end:] != new_parts[len(new_parts) - cut :]:
                break
            module = ".".join(parts[:end])
            if module not in kept:
                kept.add(module)
                modules[module] = ".".join(new_parts[: len(new_parts) - cut])
    return modules


def _renamed_module(module: str, modules: Mapping[str, str | None]) -> str | None:
    """The new name of a module; one without tensors goes where the module above it goes."""
    above, below = module, ""
    while above:
        if above in modules:
            new = modules[above]
            return None if new is None else ".".join(part for part in (new, below) if part)
        above, _, last = above.rpartition(".")
        below = f"{last}.{below}" if below else last
    return module
