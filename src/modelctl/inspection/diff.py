"""What differs between two checkpoints: the data behind ``modelctl diff`` and dry runs."""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal, NamedTuple

from ..core.checkpoint import Checkpoint
from ..core.names import Patterns, no_match, select
from ..core.nodes import Global, Obj
from ..core.notes import Note
from ..core.numbers import bits_differ, gap, numbers
from ..core.pages import Column, Line, Page, Progress, Table
from ..core.records import PREFIX
from ..core.tensors import StorageRef, TensorRef, announce_all
from ..core.text import count, prefix_command, shape
from ..core.tree import path_text, walk
from .printed import Printed

# How much a terminal shows of many differences, and of a long value.
_MOST, _LONGEST = 200, 40
# Rows of tensors; of more there is one a module.
_FOLDED = 20


class Change(NamedTuple):
    """A tensor that both have, and that is not the same. ``elements`` differ (None: not counted,
    since shape or dtype differ); ``max_abs`` is the largest difference, None where the dtype has
    no arithmetic here, NaN where a NaN stands against a number; ``relative`` is that, of the
    largest value before."""

    name: str
    what: str  # "shape", "dtype" or "values"
    before: str
    after: str
    elements: int | None = None
    numel: int | None = None
    max_abs: float | None = None
    relative: float | None = None

    def as_dict(self) -> dict[str, Any]:
        return {
            key: repr(value) if isinstance(value, float) and not math.isfinite(value) else value
            for key, value in self._asdict().items()
        }

    @property
    def rank(self) -> tuple[bool, float]:
        """Less is worse: another shape or dtype, a NaN against a number, the largest change."""
        relative = math.inf if self.relative is None else self.relative
        return self.what == "values", -math.inf if math.isnan(relative) else -relative

    @property
    def text(self) -> str:
        if self.what != "values":
            return f"{self.before} -> {self.after}"
        text = f"{self.elements:,} of {self.numel:,}"
        if self.max_abs is not None:
            nan = math.isnan(self.max_abs)
            text += f", at most {'a NaN against a number' if nan else f'{self.max_abs:.3g}'}"
        return text


class ValueChange(NamedTuple):
    """A value that is no tensor; ``before`` or ``after`` is None where it isn't there."""

    path: str
    before: str | None
    after: str | None

    @property
    def text(self) -> str:
        return f"{_short(self.before)} -> {_short(self.after)}"


def _short(text: str | None) -> str:
    if text is None:
        return "(none)"
    return text if len(text) <= _LONGEST else text[: _LONGEST - 1] + "…"


@dataclass(frozen=True)
class Diff(Printed):
    """Names only in A (``removed``) or only in B (``added``), and what changed; how many tensors
    are the ``same`` bit for bit, or ``close``, within the tolerance; ``a`` and ``b`` are where the
    two were read from. ``under``: which of them ("a", "b") has the names of the other under a
    prefix, and the prefix; those tensors are compared all the same, by the names without it.
    ``each``: people get a row a tensor, however many there are."""

    added: list[str] = field(default_factory=list)
    removed: list[str] = field(default_factory=list)
    changed: list[Change] = field(default_factory=list)
    values: list[ValueChange] = field(default_factory=list)
    same: int = 0
    close: int = 0

    a: str | None = None
    b: str | None = None
    under: tuple[str, str] | None = None
    each: bool = False

    @property
    def differs(self) -> bool:
        return bool(self.added or self.removed or self.changed or self.values)

    def as_dict(self) -> dict[str, Any]:
        return {
            "a": self.a,
            "b": self.b,
            "differs": self.differs,
            "same": self.same,
            "close": self.close,
            "added": self.added,
            "removed": self.removed,
            "changed": [change.as_dict() for change in self.changed],
            "values": [change._asdict() for change in self.values],
            "under": self.under and dict(zip(("which", "prefix"), self.under, strict=True)),
        }

    def page(self) -> Page:
        """A line a difference, or of many a line a module; and the verdict."""
        alone = [("-", name, "only in A", "") for name in self.removed]
        alone += [("+", name, "only in B", "") for name in self.added]
        changed = sorted(self.changed, key=lambda change: change.rank)
        rows = [("~", change.name, change.what, change.text) for change in changed]
        rows += [("~", change.path, "value", change.text) for change in self.values]
        names = [Column("change"), Column("name"), Column("what"), Column("how")]
        data = Table(names, [*alone, *rows])
        rows = rows if self.under else [*alone, *rows]
        columns = [Column("", "change"), Column("name", "name"), Column(""), Column("")]
        shown = rows if self.each or len(rows) <= _FOLDED else self._by_module(changed)
        body: list[Line | Table] = [Table(columns, shown, _MOST), Line()] if rows else []
        if len(shown) < len(rows):
            body.insert(1, Line("a row a module: --pattern or --format json shows each tensor"))
        body.append(Line(self._verdict(), strong=True))
        return Page(body, data, notes=self._hints())

    def _by_module(self, changed: Sequence[Change]) -> list[tuple[str, str, str, str]]:
        """A row for all in a module of which the same is to be said, the worst first."""
        removed, added = ([], []) if self.under else (self.removed, self.added)
        found: list[tuple[str, str, str, Change | None]] = [
            *(("-", name, "only in A", None) for name in removed),
            *(("+", name, "only in B", None) for name in added),
        ]
        found += [("~", change.name, change.what, change) for change in changed]
        rest = [("~", change.path, "value", change.text) for change in self.values]
        deepest = max((name.count(".") for _, name, _, _ in found), default=0)
        grouped: dict[tuple[str, str, str], list[Change | None]] = {}
        for level in range(max(deepest, 1), 0, -1):
            grouped = {}
            for sign, name, what, change in found:
                module = ".".join(name.split(".")[:-1][:level]) or name
                grouped.setdefault((sign, module, what), []).append(change)
            if len(grouped) + len(rest) <= _FOLDED:
                break
        rows = []
        for (sign, module, what), group in grouped.items():
            worst = group[0]
            text = count(len(group), "tensor")
            if worst is not None:
                text += f": {worst.text}" if len(group) == 1 else f", the worst: {worst.text}"
            rows.append((sign, module, what, text))
        return rows + rest

    def _verdict(self) -> str:
        counts = [
            f"{count(len(names), 'tensor')} {where}"
            for names, where in (
                (self.removed, "only in A"),
                (self.added, "only in B"),
                (self.changed, "changed"),
            )
            if names
        ]
        if self.under is not None:
            which, prefix = self.under
            moved = f"the names of {which.upper()} are the other's under '{prefix}'"
            counts = [moved, *counts[2:]]
        if self.values:
            counts.append(count(len(self.values), "other value"))
        equal = f"{count(self.same, 'tensor')} bit-equal"
        if self.close:
            equal += f", {self.close:,} within the tolerance"
        return f"{', '.join(counts) or 'no difference'}; {equal}"

    def _hints(self) -> list[Note]:
        """How names that differ by a prefix alone become the same."""
        if self.under is None:
            return []
        which, prefix = self.under
        paths = {"a": self.a or "A", "b": self.b or "B"}
        under = paths.pop(which)
        (bare,) = paths.values()
        return [
            Note("hint", prefix_command("strip", under, prefix)),
            Note("hint", f"or {prefix_command('add', bare, prefix)}"),
        ]


def diff(
    a: Checkpoint,
    b: Checkpoint,
    pattern: Patterns = (),
    regex: bool = False,
    rtol: float = 0.0,
    atol: float = 0.0,
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
    under = None if pattern else _prefix_between(names_a, names_b)
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
    found = Diff()
    same = close = 0
    paths = [ckpt.origin.path if ckpt.origin else None for ckpt in (a, b)]
    files = ", ".join(os.path.basename(path or "") for path in paths)
    both = [(left[name], right[name]) for name in names if name in left and name in right]
    total = sum(one.nbytes for one, other in both if _is_compared(one, other))
    advance = None if progress is None else lambda more: progress(files, more, total)
    announce_all(ref for pair in both if _is_compared(*pair) for ref in pair)
    for name in names:
        if name not in right:
            found.removed.append(name)
        elif name not in left:
            found.added.append(name)
        else:
            change, equal = _compare(name, left[name], right[name], rtol, atol, advance)
            if change is not None:
                found.changed.append(change)
            elif equal:
                same += 1
            else:
                close += 1
    for path in dict.fromkeys([*left_values, *right_values]):
        before, after = left_values.get(path), right_values.get(path)
        if before != after:
            found.values.append(ValueChange(path, before, after))
    if under is not None:
        found.removed.extend(moved[0])
        found.added.extend(moved[1])
    return replace(
        found, same=same, close=close, a=paths[0], b=paths[1], under=under, each=bool(pattern)
    )


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
        if isinstance(node, TensorRef):
            tensors[name] = node
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
    if isinstance(node, StorageRef):
        return f"<storage of {node.storage.nbytes} bytes>"
    return repr(node)


def _is_compared(a: TensorRef, b: TensorRef) -> bool:
    """Whether it takes their values to know what differs."""
    return a.spec == b.spec and a.identity != b.identity


def _compare(
    name: str,
    a: TensorRef,
    b: TensorRef,
    rtol: float,
    atol: float,
    advance: Callable[[int], object] | None,
) -> tuple[Change | None, bool]:
    """What differs, and whether the two are equal bit for bit."""
    if a.shape != b.shape:
        return Change(name, "shape", shape(a.shape), shape(b.shape)), False
    if a.dtype != b.dtype:
        return Change(name, "dtype", a.dtype.name, b.dtype.name), False
    if not _is_compared(a, b):
        return None, True
    differ, largest, close, equal = 0, None, True, True
    size = 0.0  # of the largest value before
    a.check()
    b.check()
    for x, y in _aligned(a.chunks(), b.chunks(), a.dtype.itemsize):
        if advance is not None:
            advance(len(x))
        size = max(size, _largest(x, a))
        if x == y:
            continue
        equal = False
        n, most, all_close = _measure(x, y, a, rtol, atol)
        differ += n
        close &= all_close
        if most is not None:
            largest = most if largest is None or most > largest or math.isnan(most) else largest
    if differ == 0 or ((rtol or atol) and close):
        return None, equal
    relative = None if largest is None else largest / size if size else math.inf
    shapes = shape(a.shape), shape(b.shape)
    return Change(name, "values", *shapes, differ, a.numel, largest, relative), False


def _largest(raw: bytes, ref: TensorRef) -> float:
    """The largest finite magnitude of a piece; 0 where there is none."""
    import numpy as np

    values = numbers(raw, ref.dtype)
    if values is None or not values.size:
        return 0.0
    found = np.abs(values.astype("f8", copy=False))
    return float(found.max(where=np.isfinite(found), initial=0.0))


def _aligned(
    a: Iterator[bytes], b: Iterator[bytes], itemsize: int
) -> Iterator[tuple[bytes, bytes]]:
    """Pieces of equal length from two streams of the same total length, cut at items."""
    left = right = b""
    for piece in a:
        left += piece
        while len(right) < len(left):
            more = next(b, None)
            if more is None:
                break
            right += more
        n = min(len(left), len(right))
        n -= n % itemsize
        yield left[:n], right[:n]
        left, right = left[n:], right[n:]
    right += b"".join(b)  # to its end, where a damaged one says so
    if left or right:
        yield left, right


def _measure(
    x: bytes, y: bytes, ref: TensorRef, rtol: float, atol: float
) -> tuple[int, float | None, bool]:
    """(elements that differ, largest difference, all within tolerance) of two pieces."""
    import numpy as np

    differing = bits_differ(x, y, ref.dtype)
    u, v = (numbers(raw, ref.dtype) for raw in (x, y))
    if u is None or v is None:
        return differing, None, False
    with np.errstate(invalid="ignore", over="ignore"):
        both_nan = np.isnan(u) & np.isnan(v)
        equal = (u == v) | both_nan
        apart = np.where(equal, 0, gap(u, v))
        size = np.abs(v.astype("f8") if v.dtype.kind in "iu" else v)
        close = equal | (np.isfinite(apart) & (apart <= atol + rtol * size))
    differ = int((~equal).sum()) if (rtol or atol) else differing
    most = float(apart.max()) if apart.size else 0.0
    if np.isnan(apart).any():
        most = math.nan
    return differ, most, bool(close.all())
