"""What differs between two checkpoints: the data behind ``modelctl diff`` and dry runs."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Callable, Mapping
from functools import partial
from threading import Lock
from typing import Any, Literal

from ...core.checkpoint import Checkpoint
from ...core.names import Patterns, no_match, select
from ...core.nodes import Global, Obj
from ...core.pages import Progress
from ...core.records import PREFIX
from ...core.tensors import StorageRef, TensorRef, announce_all
from ...core.text import shape
from ...core.tree import path_text, walk
from ..reading import as_tensor, is_far, spread
from .report import By, Change, Diff, ValueChange
from .values import Advance, equal, measure

__all__ = ["Change", "Diff", "ValueChange", "diff"]


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
    """
    whole = [_is_whole(one) for one in (a, b)]
    left, left_values = _parts(a, by_name=whole[0] != whole[1])
    right, right_values = _parts(b, by_name=whole[0] != whole[1])
    names_a, names_b = _model_names(a, left), _model_names(b, right)
    under = None
    if ignore_prefix:
        under = _most_common_prefix(names_a, names_b)
    elif not pattern:
        under = _prefix_between(names_a, names_b)
    moved = [n for n in left if n in names_a], [n for n in right if n in names_b]
    if under is not None:
        which, prefix = under
        mine = names_a if which == "a" else names_b
        bare = {
            name.removeprefix(prefix) if name in mine else name: ref
            for name, ref in (left if which == "a" else right).items()
        }
        left, right = (bare, right) if which == "a" else (left, bare)
    names = list(dict.fromkeys([*left, *right]))
    if pattern:
        if not names:
            raise no_match(str(pattern), names)
        names = select(names, pattern, regex=regex)
        left_values = right_values = {}
    paths = [ckpt.origin.path if ckpt.origin else None for ckpt in (a, b)]
    both = {name: (left[name], right[name]) for name in names if name in left and name in right}
    files = ", ".join(os.path.basename(path or "") for path in paths)
    compared = _compared(both, rtol, atol, progress and partial(progress, files))
    found = Diff(
        [name for name in names if name not in left],
        [name for name in names if name not in right],
        [change for change, _ in compared if change is not None],
        same=sum(is_equal for _, is_equal in compared),
        close=sum(change is None and not is_equal for change, is_equal in compared),
        a=paths[0],
        b=paths[1],
        under=under,
        ignored=ignore_prefix,
        by=by or ("tensor" if pattern else None),
        stats=stats,
    )
    for path in dict.fromkeys([*left_values, *right_values]):
        before, after = left_values.get(path), right_values.get(path)
        if before != after:
            found.values.append(ValueChange(path, before, after))
    if under is not None and not ignore_prefix:
        found.removed.extend(moved[0])
        found.added.extend(moved[1])
    return found


def _compared(
    pairs: Mapping[str, tuple[TensorRef, TensorRef]],
    rtol: float,
    atol: float,
    tell: Callable[[int, int], object] | None,
) -> list[tuple[Change | None, bool]]:
    """What differs of each pair, and whether the two are equal bit for bit, in their order."""
    wanted = [refs for refs in pairs.values() if _is_compared(*refs)]
    total, lock = sum(one.nbytes for one, _ in wanted), Lock()
    found: dict[str, tuple[Change | None, bool]] = {}

    def advance(more: int) -> None:
        if tell is not None:
            with lock:
                tell(more, total)

    def compare(name: str) -> None:
        found[name] = _compare(name, *pairs[name], rtol, atol, advance)

    refs = [ref for one in wanted for ref in one]
    alone = is_far(refs)
    jobs = list(pairs)
    if alone:
        announce_all(refs)
    else:  # the largest first: none is left alone at the end
        jobs.sort(key=lambda name: -pairs[name][0].nbytes)
    spread(jobs, compare, alone=alone)
    return [found[name] for name in pairs]


def _is_whole(ckpt: Checkpoint) -> bool:
    models = ckpt.sections.models
    return bool(models) and ckpt.sections.certain and models[0].is_module


def _model_names(ckpt: Checkpoint, tensors: dict[str, TensorRef]) -> set[str]:
    models = ckpt.sections.models
    clear = bool(models) and ckpt.sections.certain
    return {name for name in (models[0].tensors() if clear else tensors) if name in tensors}


def _prefix_between(a: set[str], b: set[str]) -> tuple[Literal["a", "b"], str] | None:
    """Which of two has exactly the other's names under a prefix, and the prefix."""
    if not a or len(a) != len(b) or a == b:
        return None
    ways: tuple[tuple[Literal["a", "b"], set[str], set[str]], ...] = (("a", a, b), ("b", b, a))
    for which, longer, shorter in ways:
        last, same = (max(names, key=lambda name: (len(name), name)) for names in (longer, shorter))
        prefix = last.removesuffix(same)
        if prefix.endswith(".") and longer == {prefix + name for name in shorter}:
            return which, prefix
    return None


def _most_common_prefix(a: set[str], b: set[str]) -> tuple[Literal["a", "b"], str] | None:
    """Which of two has more of the other's names under a prefix than by themselves, and the
    prefix."""
    found: list[tuple[int, Literal["a", "b"], str]] = []
    ways: tuple[tuple[Literal["a", "b"], set[str], set[str]], ...] = (("a", a, b), ("b", b, a))
    for which, longer, shorter in ways:
        prefixes: Counter[str] = Counter()
        for name in longer:
            at = name.find(".")
            while at >= 0:
                if name[at + 1 :] in shorter:
                    prefixes[name[: at + 1]] += 1
                at = name.find(".", at + 1)
        found += [(times, which, prefix) for prefix, times in prefixes.most_common(1)]
    times, which, prefix = max(found, default=(0, "a", ""))
    return (which, prefix) if times > len(a & b) else None


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
        ref = as_tensor(node)
        if ref is not None:
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


def _is_compared(a: TensorRef, b: TensorRef) -> bool:
    """Whether it takes their values to know what differs."""
    return a.shape == b.shape and (a.dtype != b.dtype or a.identity != b.identity)


def _compare(
    name: str, a: TensorRef, b: TensorRef, rtol: float, atol: float, advance: Advance
) -> tuple[Change | None, bool]:
    """What differs, and whether the two are equal bit for bit."""
    if a.shape != b.shape:
        return Change(name, "shape", shape(a.shape), shape(b.shape)), False
    if not _is_compared(a, b):
        return None, True
    done = 0

    def told(more: int) -> None:
        nonlocal done
        done += more
        advance(more)

    if a.dtype == b.dtype and equal(a, b, told):
        return None, True
    advance(-done)  # once more, from the start
    sums, close, same = measure(a, b, rtol, atol, advance)
    if a.dtype != b.dtype:
        return Change.of(name, "dtype", a.dtype.name, b.dtype.name, sums), False
    if not sums.elements or ((rtol or atol) and close):
        return None, same
    return Change.of(name, "values", shape(a.shape), shape(b.shape), sums), False
