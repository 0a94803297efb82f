"""Compare two checkpoints: the data behind ``modelctl diff``."""

from __future__ import annotations

import os
from typing import Any

from ...core.checkpoint import Checkpoint
from ...core.names import Patterns, no_match, select
from ...core.nodes import Global, Obj
from ...core.pages import Progress
from ...core.records import PREFIX
from ...core.tensors import StorageRef, TensorRef
from ...core.text import shape
from ...core.tree import path_text, walk
from ..reading import as_tensor
from .bytewise import compare
from .changes import Change, ValueChange
from .names import Under, likely_prefix, likest, prefix_between, without_prefix, without_wrappers
from .report import By, Diff

Tensors = dict[str, TensorRef]


def diff(
    a: Checkpoint,
    b: Checkpoint,
    pattern: Patterns = (),
    regex: bool = False,
    rtol: float = 0.0,
    atol: float = 0.0,
    ignore_prefix: bool = False,
    by: By | None = None,
    stats: bool = False,
    progress: Progress | None = None,
) -> Diff:
    """Compare two checkpoints as :func:`modelctl.diff` says. What modelctl recorded about itself
    (``modelctl.*``) is not compared. ``progress`` is told how far the comparison of values is.

    Raises:
        NoMatchError: ``pattern`` matches nothing in either.
        DamagedError: bytes that were read are not what was saved.
    """
    whole = [_is_whole(one) for one in (a, b)]
    left, left_values = _parts(a, by_name=whole[0] != whole[1])
    right, right_values = _parts(b, by_name=whole[0] != whole[1])
    names_a, names_b = _model_names(a, left), _model_names(b, right)
    under = None
    moved: tuple[list[str], list[str]] = [], []
    if ignore_prefix:
        left, right, under = _without_prefixes(left, right, names_a, names_b)
    elif not pattern and (under := prefix_between(names_a, names_b)) is not None:
        moved = [n for n in left if n in names_a], [n for n in right if n in names_b]
        left, right = _bare(left, right, names_a, names_b, under)
    names = list(dict.fromkeys([*left, *right]))
    if pattern:
        if not names:
            raise no_match(str(pattern), names)
        names = select(names, pattern, regex=regex)
        left_values = right_values = {}
    both = [name for name in names if name in left and name in right]
    paths = [ckpt.origin.path if ckpt.origin else None for ckpt in (a, b)]
    files = ", ".join(os.path.basename(path or "") for path in paths)
    changed, same, close = _changes(both, left, right, rtol, atol, progress, files)
    values = []
    for path in dict.fromkeys([*left_values, *right_values]):
        before, after = left_values.get(path), right_values.get(path)
        if before != after:
            values.append(ValueChange(path, before, after))
    removed = [name for name in names if name not in right]
    added = [name for name in names if name not in left]
    apart = bool(removed and added) and under is None and not ignore_prefix
    likely = likely_prefix(removed, added) if apart else None
    return Diff(
        added + moved[1],
        removed + moved[0],
        changed,
        values,
        same,
        close,
        sum(left[name].numel for name in both if left[name].shape == right[name].shape),
        a=paths[0],
        b=paths[1],
        under=under,
        ignored=ignore_prefix,
        moved=len(moved[0]),
        likely=likely,
        likest=likest(removed, added) if likely is None else (),
        tolerant=bool(rtol or atol),
        by=by or ("tensor" if pattern else None),
        stats=stats,
    )


def _changes(
    names: list[str],
    left: Tensors,
    right: Tensors,
    rtol: float,
    atol: float,
    progress: Progress | None,
    files: str,
) -> tuple[list[Change], int, int]:
    """What changed of the tensors that both have; how many are the same, and close."""
    alike = [name for name in names if left[name].shape == right[name].shape]
    pairs = [(left[name], right[name]) for name in alike]
    total = sum(one.nbytes for one, other in pairs if one.identity != other.identity)

    def advance(more: int) -> None:
        if progress is not None:
            progress(files, more, total)

    known = dict(zip(alike, compare(pairs, rtol, atol, advance), strict=True))
    changed = []
    same = close = 0
    for name in names:
        a, b = left[name], right[name]
        if a.shape != b.shape:
            changed.append(Change(name, "shape", shape(a.shape), shape(b.shape)))
            continue
        found = known[name]
        if a.dtype != b.dtype:
            compared = found.measure if found.measure and found.measure.known else None
            changed.append(Change(name, "dtype", a.dtype.name, b.dtype.name, compared))
        elif found.measure is None:
            same += 1
        elif found.measure.elements:
            changed.append(Change(name, "values", shape(a.shape), shape(b.shape), found.measure))
        else:
            close += 1
    return changed, same, close


def _bare(
    left: Tensors, right: Tensors, names_a: set[str], names_b: set[str], under: Under
) -> tuple[Tensors, Tensors]:
    """Both, one of them by its names without the prefix."""
    if under.which == "a":
        return without_prefix(left, names_a, under.prefix), right
    return left, without_prefix(right, names_b, under.prefix)


def _without_prefixes(
    left: Tensors, right: Tensors, names_a: set[str], names_b: set[str]
) -> tuple[Tensors, Tensors, Under | None]:
    """Both by names without what wrappers put before them; then without the prefix that most of
    the names that don't meet have on one side alone."""
    bare = [without_wrappers(*one) for one in ((left, names_a), (right, names_b))]
    models = [
        {new for new, old in zip(made, before, strict=True) if old in names}
        for made, before, names in zip(bare, (left, right), (names_a, names_b), strict=True)
    ]
    likely = likely_prefix(*models)
    under = None if likely is None else likely[0]
    if under is not None:
        bare = list(_bare(bare[0], bare[1], models[0], models[1], under))
    return bare[0], bare[1], under


def _is_whole(ckpt: Checkpoint) -> bool:
    models = ckpt.sections.models
    return bool(models) and ckpt.sections.certain and models[0].is_module


def _model_names(ckpt: Checkpoint, tensors: dict[str, TensorRef]) -> set[str]:
    models = ckpt.sections.models
    clear = bool(models) and ckpt.sections.certain
    return {name for name in (models[0].tensors() if clear else tensors) if name in tensors}


def _parts(ckpt: Checkpoint, by_name: bool) -> tuple[dict[str, TensorRef], dict[str, str]]:
    """Tensors by name, and other values by path; the model's without the path of its section.
    ``by_name``: the model's as its state_dict has them, and no values of its class."""
    models = ckpt.sections.models
    at = models[0].path if models and ckpt.sections.certain else None
    tensors: dict[str, TensorRef] = {}
    values: dict[str, str] = {}
    if by_name and at is not None:
        tensors.update(models[0].tensors())
    whole: set[Any] = set()  # paths of lists that are one value: betas, a generator's state
    for path, node in walk(ckpt.root):
        if path and path[:-1] in whole:
            continue
        inside = at is not None and path[: len(at)] == at and len(path) > len(at)
        if inside and by_name:
            continue
        name = path_text(path[len(at or ()) :] if inside else path)
        if (ref := as_tensor(node)) is not None:
            is_own = ref is node or isinstance(node, StorageRef)
            tensors[name if is_own else f"{name}.storage"] = ref
        elif any(isinstance(label, str) and label.startswith(PREFIX) for label in path):
            continue
        elif inside and "_metadata" in path:
            continue  # versions of torch's own layers, which not every format holds
        elif _is_one_value(node):
            whole.add(path)
            values[name] = _text(node)
    return tensors, values


def _is_one_value(node: Any) -> bool:
    if isinstance(node, list | tuple) and not isinstance(node, StorageRef):
        return all(part is None or isinstance(part, str | int | float) for part in node)
    return not isinstance(node, dict | Obj)


def _text(node: Any) -> str:
    if isinstance(node, Global):
        return f"<{node}>"
    return repr(node)
