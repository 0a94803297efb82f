"""One change of names, carried through every section: model, EMA copies, optimizer, records.

Every edit that renames or removes tensors says what becomes of each name; this does the rest.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, Literal

from ..core.checkpoint import Checkpoint
from ..core.records import FREEZE, REMOVED, records, whole_module, with_records
from ..core.sections import StateDict
from ..core.tensors import TensorRef
from ..core.tree import Obj, attributes, mapping, path_text, rebuild, set_at, with_entries
from ..errors import CollisionError, RefusedError, UsageError
from .optimizer import drop_parameters, rename_parameters

# What becomes of each name that changes: its new name, or None where the tensor is removed.
Renaming = Mapping[str, "str | None"]
OptimizerPolicy = Literal["keep", "drop"]


def remap(
    ckpt: Checkpoint,
    plan: Callable[[Sequence[str]], Renaming],
    *,
    optimizer: OptimizerPolicy = "keep",
) -> Checkpoint:
    """Rename and remove tensors in every section.

    ``plan`` gets the names of a state_dict (the model's first, then each EMA copy's, then the
    optimizer's ``param_names``) and says what changes. With ``optimizer="drop"`` optimizer and
    scheduler are left out instead of being kept in step.

    Raises:
        CollisionError: two tensors would get one name.
        RefusedError, AmbiguousError: the optimizer can't be kept in step.
    """
    check_choice("optimizer", optimizer, ("keep", "drop"))
    sections = ckpt.sections
    model = sections.model()
    if any(part.is_module for part in (model, *sections.ema)):
        raise whole_module("be renamed or cut")
    renaming = plan(list(model.entries))
    removed = {name for name, new in renaming.items() if new is None}
    if removed.issuperset(model.tensors()):
        raise RefusedError("no tensor would be left in the model")
    if removed and sections.nameless_ema:
        where = path_text(sections.nameless_ema[0])
        raise RefusedError(
            f"the EMA copy at '{where}' has no names: which of its tensors to remove is unknown",
            hint="save the EMA copy as a state_dict",
        )
    changes: dict[int, Any] = {}
    notes = []
    for copy in sections.ema:
        of_copy = plan(list(copy.entries))
        changes[id(copy.node)] = _rename_state_dict(copy, of_copy, record=False)
        if of_copy:
            gone = sum(new is None for new in of_copy.values())
            notes.append(
                f"EMA copy '{path_text(copy.path)}': {len(of_copy) - gone} renamed, {gone} removed"
            )
    changes[id(model.node)] = _rename_state_dict(model, renaming, record=True)
    root = ckpt.root
    if optimizer == "drop":
        root = rebuild(root, changes)
        paths = [path for path, _ in (*sections.optimizers, *sections.schedulers)]
        return ckpt.replace(root=_without(root, paths)).noting(
            *notes, *(f"left out: {'.'.join(map(str, path))}" for path in paths)
        )
    for _, node in sections.optimizers:
        changed = node
        if removed:
            changed = drop_parameters(changed, model.tensors(), removed)
        changes[id(node)] = rename_parameters(changed, plan)
    changes = {key: node for key, node in changes.items() if id(node) != key}
    return ckpt.replace(root=rebuild(root, changes)).noting(*notes) if changes else ckpt


def check_choice(option: str, value: object, choices: Sequence[str]) -> None:
    """Raises UsageError unless ``value`` is one of ``choices``."""
    if value not in choices:
        raise UsageError(f"{option} is {' or '.join(choices)}, not {value!r}")


def _without(root: Any, paths: Iterable[tuple[Any, ...]]) -> Any:
    for path in {path[:1] for path in paths if path}:
        entries = mapping(root) or {}
        kept = {key: value for key, value in entries.items() if key != path[0]}
        root = set_at(root, (), with_entries(root, kept))
    return root


def _rename_state_dict(model: StateDict, renaming: Renaming, *, record: bool) -> Any:
    if not renaming:
        return model.node
    entries: dict[str, Any] = {}
    origin: dict[str, str] = {}
    removed = []
    for name, value in model.entries.items():
        new = renaming.get(name, name)
        if new is None:
            if isinstance(value, TensorRef):
                removed.append(
                    {"name": name, "shape": list(value.shape), "dtype": value.dtype.name}
                )
            continue
        if new in origin:
            raise CollisionError(
                f"'{origin[new]}' and '{name}' would both be named '{new}'",
                hint="rename or drop one of them first",
            )
        origin[new] = name
        entries[new] = value
    node = _rename_metadata(with_entries(model.node, entries), model.entries, renaming)
    changes: dict[str, Any] = {}
    ours = records(node)
    if removed and record:
        changes[REMOVED] = [*ours.get(REMOVED, []), *removed]
    freeze = mapping(ours.get(FREEZE))
    if freeze is not None:
        names = [renaming.get(name, name) for name in freeze.get("frozen", [])]
        changes[FREEZE] = {**freeze, "frozen": [name for name in names if name is not None]}
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
    return node.replace(state={**attributes(node), "_metadata": with_entries(boxed, entries)})


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
