"""Put separately saved parts together into one checkpoint that resumes."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ..core.checkpoint import Checkpoint
from ..core.matching.matcher import Names
from ..core.matching.optimizer_states import kinds
from ..core.nodes import ABSENT, Obj, children, mapping
from ..core.notes import Note, info, warning
from ..core.records import frozen_names
from ..core.sections import (
    Sections,
    StateDict,
    find_sections,
    is_optimizer,
    is_scheduler,
    param_groups,
)
from ..core.tensors import TensorRef
from ..core.tree import Path, brief, get, path_text, rebuild, set_at, walk
from ..errors import AmbiguousError, CollisionError, NoMatchError, RefusedError, UsageError
from .carry.lr import set_lr, set_scheduler_lr
from .carry.optimizer_names import assign_names, is_flat
from .split import PARTS, places


def merge(
    model: Checkpoint | None = None,
    optimizer: Checkpoint | None = None,
    scheduler: Checkpoint | None = None,
    ema: Checkpoint | None = None,
    epoch: int | None = None,
    step: int | None = None,
    lr: float | None = None,
    set: Mapping[str, Any] | None = None,
    like: Checkpoint | None = None,
    rest: Checkpoint | None = None,
) -> Checkpoint:
    """One resumable checkpoint of separately saved parts.

    ``model`` is a state_dict, or a training checkpoint that is updated. Keys are ``model``,
    ``optimizer``, ``scheduler``, ``ema``, ``epoch`` (finished epochs: training goes on with
    ``range(epoch, epochs)``), ``step`` and ``lr``, or those that ``model`` or the reference
    checkpoint ``like`` uses for them. ``lr`` goes to every place that holds the present one: each
    param_group's ``lr``, the scheduler's ``_last_lr``, and ``lr``; what a schedule began with or
    goes to (``initial_lr``, ``base_lrs``, ``max_lr``, ``eta_min``) is scaled alike, so that it
    goes on from there. ``set`` adds values under other keys. ``rest`` is what
    :func:`~modelctl.split` left: each part goes back where it was, among the values that were
    beside it.

    Raises:
        UsageError: nothing to merge, numbers that can't be, or a part that ``rest`` has a place
            for and that is not given.
        NoMatchError: a part is not in its file.
        RefusedError: the optimizer or the EMA copy does not belong to the model, or the scheduler
            to the optimizer; or a schedule can't be scaled to ``lr``.
    """
    if model is None:
        raise UsageError(
            "there is no model to merge into", hint="--model takes a state_dict or a checkpoint"
        )
    for name, number in (("epoch", epoch), ("step", step)):
        if number is not None and number < 0:
            raise UsageError(f"--{name} is {number}: it counts from 0")
    if lr is not None and not 0 <= lr < float("inf"):
        raise UsageError(f"--lr is {lr}: it is a finite number from 0")
    parts = [part for part in (model, optimizer, scheduler, ema, rest) if part is not None]
    if len(parts) == 1 and like is None and not set and (epoch, step, lr) == (None, None, None):
        raise UsageError(
            "there is nothing to merge into the model",
            hint="--optimizer, --scheduler, --ema, --epoch, --step, --lr, --set, --like or --rest",
        )
    replaced: list[Note] = []
    if rest is not None:
        given = {"model": model, "optimizer": optimizer, "scheduler": scheduler, "ema": ema}
        layout = _Layout(_paths_of_rest(rest, given, like))
        root = layout.put(rest.root, "model", model.sections.model().node)
    else:
        layout = _Layout.of(model, like)
        root = _base(model, layout)
    if optimizer is not None:
        root = layout.put(root, "optimizer", _part(optimizer, "optimizer"))
    if scheduler is not None:
        root = layout.put(root, "scheduler", _part(scheduler, "scheduler"))
    if ema is not None:
        copies = ema.sections.ema
        root = layout.put(root, "ema", (copies[0] if copies else ema.sections.model()).node)
    for name, value in (("epoch", epoch), ("step", step)):
        if value is not None:
            root = layout.put(root, name, value)
    for key, value in (set or {}).items():
        root = _set(root, key, value, replaced)
    if lr is not None:
        root = _with_lr(root, layout, lr, replaced)
    notes = [note for part in parts for note in part.notes]
    for name in ("optimizer", "scheduler", "ema"):
        if {"optimizer": optimizer, "scheduler": scheduler, "ema": ema}[name] is not None:
            notes += _replaced_part(name, model, get(root, layout.paths[name]))
    notes += replaced
    notes += _changed(model.sections, {"epoch": epoch, "step": step}, lr)
    out = model.replace(
        root=root,
        key=layout.paths["model"],
        notes=tuple(notes),
        findings=tuple(finding for part in parts for finding in part.findings),
        warnings=tuple(one for part in parts for one in part.warnings),
        resources=tuple({id(r): r for part in parts for r in part.resources}.values()),
    )
    return _checked(out.noting(*_unreached(out, model.sections, epoch, lr)))


def _changed(before: Sections, numbers: Mapping[str, int | None], lr: float | None) -> list[Note]:
    """What an update changes of the progress that the checkpoint recorded."""
    notes = []
    for name, old in (("epoch", before.epoch), ("step", before.step)):
        new = numbers[name]
        if old is not None and new is not None and old[1] != new:
            notes.append(info(f"{name}: {old[1]} -> {new}"))
    old_lrs = before.lrs()
    if lr is not None and old_lrs and set(old_lrs) != {lr}:
        were = ", ".join(f"{x:g}" for x in dict.fromkeys(old_lrs))
        notes.append(info(f"lr: {were} -> {lr:g}"))
    return notes


def _replaced_part(name: str, model: Checkpoint, new: Any) -> list[Note]:
    """That a checkpoint had this part already, and which it was."""
    path = _paths(model.sections).get(name)
    if path is None:
        return []
    old = get(model.root, path)
    if name == "optimizer":
        was, now = _optimizer_kind(old), _optimizer_kind(new)
        which = f": {was} -> {now}" if was != now else f", both {was}"
        return [(info if was == now else warning)(f"{path_text(path)} is replaced{which}")]
    return [info(f"{path_text(path)} is replaced")]


def _optimizer_kind(optimizer: Any) -> str:
    state = (mapping(optimizer) or {}).get("state")
    held = state if isinstance(state, list) else [*(mapping(state) or {}).values()]
    keys = [key for one in held for key in (mapping(one) or {})]
    groups = param_groups(optimizer)
    return " or ".join(kinds(keys, groups[0] if groups else {})) or "an unknown kind"


def _set(root: Any, key: str, value: Any, replaced: list[Note]) -> Any:
    """The tree with the value at a dotted path set; numbers are the places in a list. What stood
    there is noted."""
    path: list[Any] = []
    node = root
    *above, last = key.split(".")
    for label in above:
        path.append(int(label) if isinstance(node, list) and label.isdecimal() else label)
        try:
            node = get(root, tuple(path))
        except KeyError:
            raise UsageError(f"--set {key}: there is no '{path_text(tuple(path))}'") from None
    is_place = isinstance(node, list) and last.isdecimal()
    old = dict(children(node)).get(int(last) if is_place else last, ABSENT)
    if isinstance(old, dict | Obj | TensorRef) and not isinstance(value, dict):
        raise UsageError(f"--set {key}={value} would replace all that is in '{key}'")
    if old is not ABSENT and old != value:
        replaced.append(info(f"{key}: {_said(old)} -> {_said(value)}"))
    if is_place and int(last) < len(node):
        return set_at(root, (*path, int(last)), value)
    if mapping(node) is None or not last:
        raise UsageError(f"--set {key}: nothing can be set there")
    return set_at(root, (*path, last), value)


def _said(node: Any) -> str:
    """A value for a note; short lists of numbers in full."""
    numbers = isinstance(node, list) and all(isinstance(one, int | float) for one in node)
    return str(node) if numbers and len(node) <= 8 else brief(node)


class _Layout:
    """Under which path each part goes."""

    def __init__(self, paths: dict[str, Path]) -> None:
        self.paths = paths

    @classmethod
    def of(cls, model: Checkpoint, like: Checkpoint | None) -> _Layout:
        """Our own keys, over those of the checkpoint that is updated, over ``like``'s."""
        paths: dict[str, Path] = {
            name: (name,)
            for name in ("model", "optimizer", "scheduler", "ema", "epoch", "step", "lr")
        }
        for ckpt in (model, like):
            if ckpt is not None and mapping(ckpt.root) is not None:
                found = _paths(ckpt.sections)
                if found.get("model") != ():
                    paths.update(found)
        return cls(paths)

    def put(self, root: Any, part: str, value: Any) -> Any:
        path = self.paths[part]
        if len(path) == 2 and isinstance(path[1], int):  # Lightning: a list of one
            inner = dict(children(root)).get(path[0])
            if not isinstance(inner, list | tuple) or len(inner) <= path[1]:
                return set_at(root, path[:1], [value])
        return set_at(root, path, value)


def _paths(sections: Sections) -> dict[str, Path]:
    found: dict[str, Path] = {"model": sections.model().path}
    if sections.optimizers:
        found["optimizer"] = sections.optimizers[0][0]
    if sections.schedulers:
        found["scheduler"] = sections.schedulers[0][0]
    if sections.ema:
        found["ema"] = sections.ema[0].path
    for name, number in (
        ("epoch", sections.epoch),
        ("step", sections.step),
        ("lr", sections.lr),
    ):
        if number is not None:
            found[name] = number[0]
    return found


def _paths_of_rest(
    rest: Checkpoint, given: Mapping[str, Checkpoint | None], like: Checkpoint | None
) -> dict[str, Path]:
    found = places(rest)
    if like is not None or "model" not in found:
        raise UsageError(
            "--rest says itself where the parts go"
            if like is not None
            else "--rest has no place for a model: it takes what 'modelctl split' left"
        )
    model = given["model"]
    if model is not None and model.sections.model().path != ():
        raise UsageError("with --rest the model is a part by itself, not in a checkpoint")
    for part in found:
        if given[part] is None:
            raise UsageError(
                f"--rest has a place for the {part}", hint=f"--{part} FILE, which split wrote, too"
            )
    numbers = ("epoch", "step", "lr")
    known = {name: getattr(rest.sections, name) for name in numbers}
    return {
        **{name: (name,) for name in (*PARTS, *numbers)},
        **{name: number[0] for name, number in known.items() if number is not None},
        **found,
    }


def _base(model: Checkpoint, layout: _Layout) -> Any:
    """The tree to put parts into: the checkpoint itself, or a new one around a state_dict."""
    found: StateDict = model.sections.model()
    if all(layout.paths[part] == path for part, path in _paths(model.sections).items()):
        return model.root
    root: Any = {}
    for depth in range(1, len(layout.paths["model"])):
        root = set_at(root, layout.paths["model"][:depth], {})
    root = set_at(root, layout.paths["model"], found.node)
    return _moved(root, model, layout) if found.path else root


def _moved(root: Any, model: Checkpoint, layout: _Layout) -> Any:
    """With the other parts of the checkpoint that is updated, under their keys in the layout."""
    sections = model.sections
    for what, parts in (("optimizers", sections.optimizers), ("schedulers", sections.schedulers)):
        if len(parts) > 1:
            raise AmbiguousError(f"--like has one place for {len(parts)} {what}")
    old = _paths(sections)
    for key, value in (mapping(model.root) or {}).items():
        if key in {path[0] for path in old.values()}:
            continue
        if key in (mapping(root) or {}):
            raise CollisionError(f"'{key}' is a part in --like, and something else in --model")
        root = set_at(root, (key,), value)
    for part, path in old.items():
        if part != "model":
            root = layout.put(root, part, get(model.root, path))
    return root


def _part(ckpt: Checkpoint, what: str) -> Any:
    sections = ckpt.sections
    found = sections.optimizers if what == "optimizer" else sections.schedulers
    if not found:
        test = is_optimizer if what == "optimizer" else is_scheduler
        if test(ckpt.root):
            return ckpt.root
        where = ckpt.origin.path if ckpt.origin else "the file"
        keys = "'state' and 'param_groups'" if what == "optimizer" else "'last_epoch'"
        raise NoMatchError(f"{where}: no {what} is found in it (a mapping with {keys})")
    if len(found) > 1:
        raise AmbiguousError(f"{len(found)} {what}s are in one file: save the one that is meant")
    return found[0][1]


def _with_lr(root: Any, layout: _Layout, lr: float, replaced: list[Note]) -> Any:
    sections = find_sections(root, layout.paths["model"])
    changes = {id(node): set_lr(path_text(path), node, lr) for path, node in sections.optimizers}
    changes.update(
        (id(node), set_scheduler_lr(path_text(path), node, lr))
        for path, node in sections.schedulers
    )
    root = rebuild(root, changes)
    # a checkpoint of somebody else's layout has no use for a value that nothing there reads
    ours = layout.paths["model"] == ("model",)
    if not ours and sections.lr is None:
        return root
    old = (mapping(root) or {}).get("lr") if layout.paths["lr"] == ("lr",) else None
    if isinstance(old, list) and old and all(isinstance(one, int | float) for one in old):
        each = [lr] * len(old)  # one a group, as whoever reads it expects
        if old != each:
            replaced.append(info(f"lr: {_said(old)} -> {_said(each)}"))
        return set_at(root, ("lr",), each)
    if isinstance(old, list | dict):
        replaced.append(warning(f"lr was {_said(old)}, and is {lr:g} now"))
    return layout.put(root, "lr", lr)


def _unreached(
    ckpt: Checkpoint, before: Sections, epoch: int | None, lr: float | None
) -> list[Note]:
    """What an epoch or a lr that was set does not reach."""
    found = []
    loops = (mapping(ckpt.root) or {}).get("loops")
    if epoch is not None and mapping(loops) is not None:
        found.append(warning("Lightning goes on from 'loops', not from 'epoch': that is as it was"))
    if lr is None:
        return found
    known = {path[0] for path, _ in ckpt.sections.schedulers if path}
    found += [
        warning(f"'{key}' is called like a scheduler, but is none that is known: it is as it was")
        for key, node in (mapping(ckpt.root) or {}).items()
        if isinstance(key, str) and "sched" in key.lower() and key not in known
        if any(isinstance(part, int | float) for _, part in walk(node))
    ]
    if len(set(before.lrs())) > 1:
        found.append(warning(f"{len(set(before.lrs()))} different lrs become one"))
    return found


def _checked(ckpt: Checkpoint) -> Checkpoint:
    """Refuse parts that would fail, or load into the wrong parameters, on resuming."""
    sections = ckpt.sections
    tensors = sections.model().tensors()
    for path, node in sections.optimizers:
        try:
            assign_names(node, tensors, frozen_names(ckpt))
        except (AmbiguousError, RefusedError) as e:
            if isinstance(e, RefusedError) and not is_flat(node, tensors):
                hint = "merge the optimizer that was trained with this model"
                raise RefusedError(e.message, hint=hint) from None
            ckpt = ckpt.noting(
                warning(
                    f"{path_text(path)}: {e.message}", "check that it was trained with this model"
                )
            )
    for copy in sections.ema:
        _check_ema(copy, tensors)
    for path, node in sections.schedulers:
        _check_scheduler(path_text(path), node, [opt for _, opt in sections.optimizers])
    return ckpt


def _check_ema(copy: StateDict, model: Mapping[str, TensorRef]) -> None:
    """An EMA copy has the model's names, as far as wrappers go, and its shapes."""
    hint = "merge the copy that was made of this model"
    known = Names(model)
    common = 0
    for name, ref in copy.tensors().items():
        own = known.meant(name)
        common += own is not None
        if own is not None and model[own].shape != ref.shape:
            raise RefusedError(
                f"{path_text(copy.path)}: '{name}' has the shape {list(ref.shape)}, the model's "
                f"{list(model[own].shape)}",
                hint=hint,
            )
    if not common:
        raise RefusedError(f"{path_text(copy.path)}: no name is one of the model's", hint=hint)


def _check_scheduler(where: str, scheduler: Any, optimizers: list[Any]) -> None:
    """One ``base_lr`` a param_group: torch loads any number, and goes on wrongly."""
    lrs = (mapping(scheduler) or {}).get("base_lrs")
    counts = {len(param_groups(optimizer)) for optimizer in optimizers}
    if isinstance(lrs, list) and counts and len(lrs) not in counts:
        raise RefusedError(
            f"{where} has {len(lrs)} base_lrs, the optimizer "
            f"{' or '.join(map(str, sorted(counts)))} param_groups",
            hint="merge the scheduler that was made for this optimizer",
        )
