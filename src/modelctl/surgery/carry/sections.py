"""One change of names, carried through every section: model, EMA copies, optimizer, records.

Every edit that renames or removes tensors says what becomes of each name; this does the rest.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import Any, Literal

from ...core.checkpoint import Checkpoint
from ...core.nodes import mapping, with_entries
from ...core.notes import info
from ...core.records import frozen_names, unread_freeze
from ...core.sections import Sections, StateDict
from ...core.tensors import TensorRef
from ...core.tree import path_text, rebuild, set_at, walk
from ...errors import RefusedError, UsageError
from .optimizer import drop_parameters, permute_parameters, rename_parameters
from .optimizer_names import surviving
from .state_dict import Plan, Renaming, rename_state_dict
from .whole_module import rename_module

OptimizerPolicy = Literal["keep", "drop"]


def remap(
    ckpt: Checkpoint,
    plan: Plan,
    *,
    copies: Plan | None = None,
    optimizer: OptimizerPolicy = "keep",
    record: bool = False,
) -> Checkpoint:
    """Rename and remove tensors in every section.

    ``plan`` gets the names of a state_dict (the model's first, then each EMA copy's, then the
    optimizer's ``param_names``) and says what changes; ``copies`` says it for EMA copies where
    they differ. With ``optimizer="drop"`` optimizer and
    scheduler are left out instead of being kept in step. With ``record`` the model's state_dict
    says what was removed from it.

    Raises:
        CollisionError: two tensors would get one name.
        RefusedError, AmbiguousError: the optimizer can't be kept in step, or a whole module
            can't be changed so without its class.
    """
    check_choice("optimizer", optimizer, ("keep", "drop"))
    sections = ckpt.sections
    model = sections.model()
    renaming = plan(list(model.entries))
    removed = {name for name, new in renaming.items() if new is None}
    if removed.issuperset(model.tensors()):
        raise RefusedError("no tensor would be left in the model")
    changes: dict[int, Any] = {}
    notes = []
    for copy in sections.ema:
        of_copy = (copies or plan)(list(copy.entries))
        changes[id(copy.node)] = _renamed(copy, of_copy, record=False)
        if of_copy:
            gone = sum(new is None for new in of_copy.values())
            what = f"{len(of_copy) - gone} renamed, {gone} removed"
            notes.append(info(f"EMA copy '{path_text(copy.path)}': {what}"))
    if removed:
        lists = _without_removed(sections, model.tensors(), removed)
        notes += [
            info(f"EMA copy '{path_text(path)}': cut, too")
            for path in sections.nameless_ema
            if lists
        ]
        changes.update(lists)
    changes[id(model.node)] = _renamed(model, renaming, record=record)
    unread = unread_freeze(ckpt)
    if renaming and unread is not None:
        notes.append(unread)  # names in it stay as they are
    root = ckpt.root
    if optimizer == "drop":
        root = rebuild(root, changes)
        paths = [path for path, _ in (*sections.optimizers, *sections.schedulers)]
        return ckpt.replace(root=_without(root, paths)).noting(*notes)
    for _, node in sections.optimizers:
        changed = node
        if removed:
            changed = drop_parameters(changed, model.tensors(), removed, frozen_names(ckpt))
        elif renaming and set(renaming) == set(renaming.values()):
            changed = permute_parameters(changed, model.tensors(), renaming, frozen_names(ckpt))
        changes[id(node)] = rename_parameters(changed, plan)
    changes = {key: node for key, node in changes.items() if id(node) != key}
    return ckpt.replace(root=rebuild(root, changes)).noting(*notes) if changes else ckpt


def check_choice(option: str, value: object, choices: Sequence[str]) -> None:
    """Raises UsageError unless ``value`` is one of ``choices``."""
    if value not in choices:
        raise UsageError(f"{option} is {' or '.join(choices)}, not {value!r}")


def _renamed(part: StateDict, renaming: Renaming, *, record: bool) -> Any:
    rename = rename_module if part.is_module else rename_state_dict
    return rename(part, renaming, record=record)


def _without_removed(
    sections: Sections, model: Mapping[str, TensorRef], removed: Collection[str]
) -> dict[int, Any]:
    """The EMA copies that are lists (``shadow_params``) without what is removed: they hold the
    parameters in the model's order, so the shapes must prove which is which."""
    changes: dict[int, Any] = {}
    for path in sections.nameless_ema:
        for inner, node in walk(_at(sections.root, path)):
            refs = [ref for ref in node if isinstance(ref, TensorRef)] if _is_list(node) else []
            if not refs:
                continue
            if len(refs) != len(node):
                raise RefusedError(
                    f"the EMA copy '{path_text((*path, *inner))}' is no list of tensors"
                )
            kept = surviving(
                path_text((*path, *inner)), [ref.shape for ref in refs], model, removed
            )
            changes[id(node)] = type(node)(
                ref for ref, stays in zip(node, kept, strict=True) if stays
            )
    return changes


def _is_list(node: Any) -> bool:
    return isinstance(node, list) or type(node) is tuple


def _at(root: Any, path: tuple[Any, ...]) -> Any:
    return (mapping(root) or {})[path[0]]


def _without(root: Any, paths: Iterable[tuple[Any, ...]]) -> Any:
    for path in {path[:1] for path in paths if path}:
        entries = mapping(root) or {}
        kept = {key: value for key, value in entries.items() if key != path[0]}
        root = set_at(root, (), with_entries(root, kept))
    return root
