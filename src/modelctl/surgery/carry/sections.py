"""One change of names, carried through every section: model, EMA copies, optimizer, records.

Every edit that renames or removes tensors says what becomes of each name; this does the rest.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from shlex import quote
from typing import Any, Literal

from ...core.checkpoint import Checkpoint
from ...core.nodes import Obj, mapping, with_attributes, with_entries
from ...core.notes import Note, info, warning
from ...core.records import frozen_names, unread_freeze
from ...core.sections import Sections, StateDict
from ...core.sections.copies import Aliases, Known, beside
from ...core.sections.copies import inside as copies_in
from ...core.sections.pairing import is_ordered, merged, under
from ...core.tensors import TensorRef
from ...core.tree import Path, get, path_text, rebuild, walk
from ...errors import AmbiguousError, RefusedError, UsageError
from .optimizer import (
    drop_from_object,
    drop_parameters,
    permute_parameters,
    rename_parameters,
)
from .optimizer_names import surviving
from .packed import apart, renamed_metadata
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
    inner = {} if model.is_module or not renaming else copies_in(model)
    renaming = {**renaming, **_followed(inner, renaming)}
    removed = {name for name, new in renaming.items() if new is None}
    if removed.issuperset(model.tensors()):
        raise RefusedError("no tensor would be left in the model")
    changes: dict[int, Any] = {}
    notes = [*apart(ckpt.packed, renaming)]
    if not model.is_module:
        notes += _left_behind(beside(model), renaming)
    if renaming:
        said = renamed_metadata(ckpt.metadata, ckpt.packed, renaming)
        ckpt = ckpt if said == ckpt.metadata else ckpt.replace(metadata=said)
    for copy in sections.ema:
        of_copy = _of_copy(copy, model, copies or plan, renaming)
        changes[id(copy.node)] = _renamed(copy, of_copy, record=False)
        what = _kind_of_copy(copy)
        if of_copy:
            gone = sum(new is None for new in of_copy.values())
            done = f"{len(of_copy) - gone} renamed, {gone} removed"
            notes.append(info(f"{what}: {done}"))
        elif renaming and copies is None:
            notes.append(warning(f"{what} has none of these names: it stays as it was"))
    notes += [
        warning(f"'{path_text(part.path)}' has some of these names, too: it stays as it was")
        for part in sections.parts
        if renaming.keys() & part.entries.keys()
    ]
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
        own = (
            *(*sections.own_optimizers, *sections.own_optimizer_objects),
            *sections.own_schedulers,
        )
        return ckpt.replace(root=without_parts(root, [path for path, _ in own])).noting(*notes)
    if removed:
        notes += [
            warning(
                f"'{path_text(path)}' is called like an optimizer, but is none that is known: "
                "it stays as it was"
            )
            for path in sections.unknown_optimizers
        ]
        notes += [
            info(f"'{path_text(path)}' is over none of the models: it stays as it was")
            for (path, _), of in zip(sections.optimizers, sections.owners, strict=True)
            if of == ()
        ]
    # one after the other: an optimizer may stand in the state_dict itself
    for step in (changes, _optimizers(ckpt, renaming, removed, inner, plan)):
        root = rebuild(root, {key: node for key, node in step.items() if id(node) != key})
    return ckpt if root is ckpt.root else ckpt.replace(root=root).noting(*notes)


def cut_optimizers(
    ckpt: Checkpoint, removed: Collection[str], frozen: Collection[str] = ()
) -> dict[int, Any]:
    """What becomes of the model's optimizers, by the ``id`` of each, without these parameters.

    Raises:
        RefusedError, AmbiguousError: which of their state it is can't be proved.
    """
    sections = ckpt.sections
    model = sections.model()
    inner = {} if model.is_module else copies_in(model)
    changes: dict[int, Any] = {}
    for path, node, of in _concerned(sections):
        tensors, before = _parameters_of(path, node, of, model, inner)
        names = {before + name for name in removed}
        changes[id(node)] = drop_parameters(node, tensors, names, {before + n for n in frozen})
    for path, node in sections.own_optimizer_objects:
        changes[id(node)] = drop_from_object(path_text(path), node, model.tensors(), removed)
    return changes


def _optimizers(
    ckpt: Checkpoint,
    renaming: Renaming,
    removed: Collection[str],
    inner: Aliases,
    plan: Plan,
) -> dict[int, Any]:
    """What becomes of the optimizers."""
    sections = ckpt.sections
    model = sections.model()
    changes = cut_optimizers(ckpt, removed, frozen_names(ckpt)) if removed else {}
    swapped = not removed and renaming and set(renaming) == set(renaming.values())
    for path, node, of in _concerned(sections):
        changed = changes.get(id(node), node)
        if swapped:
            tensors, before = _parameters_of(path, node, of, model, inner)
            under_it = {before + old: f"{before}{new}" for old, new in renaming.items()}
            frozen = {before + name for name in frozen_names(ckpt)}
            changed = permute_parameters(changed, tensors, under_it, frozen)
        if len(of) != 1:
            changed = rename_parameters(changed, _of_one(plan, model, of))
        else:
            changed = rename_parameters(changed, plan)
        changes[id(node)] = changed
    return changes


def _concerned(sections: Sections) -> Iterator[tuple[Path, Any, tuple[StateDict, ...]]]:
    """The optimizers that are over the model, or may be, with all models that they are over."""
    model = sections.models[0]
    for (path, node), of in zip(sections.optimizers, sections.owners, strict=True):
        if of is None or any(one is model for one in of):
            yield path, node, of or ()


def _parameters_of(
    path: Path, node: Any, of: tuple[StateDict, ...], model: StateDict, inner: Aliases
) -> tuple[dict[str, TensorRef], str]:
    """The tensors of all models that an optimizer is over, and what stands before the names of
    this one there."""
    if not of:
        raise AmbiguousError(
            f"whose optimizer '{path_text(path)}' is, is not clear: neither its name nor its "
            "shapes tell",
            hint="--optimizer drop leaves it out",
        )
    if len(of) > 1:
        if not is_ordered(node, of):
            raise AmbiguousError(
                f"'{path_text(path)}' is over {', '.join(path_text(one.path) for one in of)}; in "
                "which order is not clear, since they are alike",
                hint="--optimizer drop leaves it out",
            )
        return merged(of), under(model)
    return {name: ref for name, ref in model.tensors().items() if name not in inner}, ""


def _of_one(plan: Plan, model: StateDict, of: tuple[StateDict, ...]) -> Plan:
    """The plan for the names of an optimizer over several models, or for one that may be
    another's: only what can be no other's name, or says whose it is."""
    before = under(model)
    others = {name for one in of if one is not model for name in one.entries}

    def only(names: Sequence[str]) -> Renaming:
        told = {n: n.removeprefix(before) for n in names if before and n.startswith(before)}
        if of and not told:
            told = {n: n for n in names if n in model.entries and n not in others}
        renaming = plan(list(told.values()))
        return {
            name: new if new is None else name[: len(name) - len(bare)] + new
            for name, bare in told.items()
            if bare in renaming
            for new in [renaming[bare]]
        }

    return only


def _of_copy(copy: StateDict, model: StateDict, plan: Plan, renaming: Renaming) -> Renaming:
    """What becomes of a copy's names: by themselves, or by what they are in the model."""
    found = plan(list(copy.entries))
    if found or not renaming or copy.is_module:
        return found
    return _followed(Known.of(model).aliases(copy), renaming)


def _followed(known: Aliases, renaming: Renaming) -> dict[str, str | None]:
    """What becomes of the names of a copy that nothing was said of, when the model's change."""
    out: dict[str, str | None] = {}
    for name, alias in known.items():
        if name in renaming or alias.name not in renaming:
            continue
        new = renaming[alias.name]
        called = None if new is None else alias.renamed(new)
        if new is not None and called is None:
            raise RefusedError(
                f"'{name}' is a copy of '{alias.name}', and can't follow it to '{new}'",
                hint=f"drop the copy first: modelctl drop --pattern {quote(alias.before + '*')}",
            )
        out[name] = called
    return {name: new for name, new in out.items() if new != name}


def _left_behind(known: Aliases, renaming: Renaming) -> Iterator[Note]:
    """What to say where a part changes and the one with the same tensors beside it does not: who
    names one of them means that one. Nothing where all of it is removed."""
    parts: dict[tuple[str, str], list[tuple[str, str]]] = {}
    for name, alias in known.items():
        parts.setdefault((alias.before, alias.part), []).append((name, alias.name))
    for (before, part), pairs in parts.items():
        for changed, stays, ours in (
            (before, part, pairs),
            (part, before, [(other, name) for name, other in pairs]),
        ):
            alone = any(name in renaming and other not in renaming for name, other in ours)
            left = any(renaming.get(name, name) is not None for name, _ in ours)
            if alone and left:
                what = f"'{changed.rstrip('.')}'" if changed else "the rest"
                other = f"'{stays.rstrip('.')}'" if stays else "the rest"
                yield info(f"{other} has the same tensors as {what}: it stays as it was")


def _kind_of_copy(copy: StateDict) -> str:
    what = "EMA copy" if "ema" in path_text(copy.path).lower() else "copy"
    return f"{what} '{path_text(copy.path)}'"


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
        for inner, node in walk(get(sections.root, path)):
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


def without_parts(root: Any, paths: Iterable[Path]) -> Any:
    """The tree without these parts: a key goes, and a list of which nothing is left; in a tuple
    or beside others in a list None takes the place, since places count there."""
    going = {path for path in paths if path}
    for parent in {path[:-1] for path in going}:
        node = get(root, parent)
        if (
            parent
            and isinstance(node, list)
            and all((*parent, i) in going for i in range(len(node)))
        ):
            going = {path for path in going if path[:-1] != parent} | {parent}
    changes: dict[int, Any] = {}
    for parent in {path[:-1] for path in going}:
        node = get(root, parent)
        entries = mapping(node)
        if entries is not None:
            kept = {label: one for label, one in entries.items() if (*parent, label) not in going}
            changes[id(node)] = with_entries(node, kept)
        elif isinstance(node, list | tuple):
            left = [None if (*parent, i) in going else one for i, one in enumerate(node)]
            changes[id(node)] = left if isinstance(node, list) else tuple(left)
        elif isinstance(node, Obj):
            gone = {str(path[-1]): None for path in going if path[:-1] == parent}
            changes[id(node)] = with_attributes(node, gone)
    return rebuild(root, changes)
