"""What differs between two checkpoints: the data behind ``modelctl diff`` and dry runs."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from ..core.checkpoint import Checkpoint
from ..core.names import Patterns, no_match, select
from ..core.nodes import Global, Obj
from ..core.notes import Note
from ..core.numbers import bits_differ, gap, numbers
from ..core.pages import Column, Line, Page, Table
from ..core.records import PREFIX
from ..core.tensors import StorageRef, TensorRef
from ..core.text import count, shape
from ..core.tree import path_text, walk
from .printed import Printed

# How much a terminal shows of many differences, and of a long value.
_MOST, _LONGEST = 200, 40


class Change(NamedTuple):
    """A tensor that both have, and that is not the same. ``elements`` differ (None: not counted,
    since shape or dtype differ); ``max_abs`` is the largest difference, None where the dtype has
    no arithmetic here, NaN where a NaN stands against a number."""

    name: str
    what: str  # "shape", "dtype" or "values"
    before: str
    after: str
    elements: int | None = None
    numel: int | None = None
    max_abs: float | None = None

    def as_dict(self) -> dict[str, Any]:
        largest = self.max_abs
        if largest is not None and not math.isfinite(largest):
            return {**self._asdict(), "max_abs": repr(largest)}
        return self._asdict()

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
    two were read from."""

    added: list[str] = field(default_factory=list)
    removed: list[str] = field(default_factory=list)
    changed: list[Change] = field(default_factory=list)
    values: list[ValueChange] = field(default_factory=list)
    same: int = 0
    close: int = 0

    a: str | None = None
    b: str | None = None

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
        }

    def page(self) -> Page:
        """A line a difference, and the verdict."""
        rows = [("-", name, "only in A", "") for name in self.removed]
        rows += [("+", name, "only in B", "") for name in self.added]
        rows += [("~", change.name, change.what, change.text) for change in self.changed]
        rows += [("~", change.path, "value", change.text) for change in self.values]
        data = Table([Column("change"), Column("name"), Column("what"), Column("how")], rows)
        columns = [Column("", "change"), Column("name", "name"), Column(""), Column("")]
        body: list[Line | Table] = [Table(columns, rows, _MOST), Line()] if rows else []
        body.append(Line(self._verdict(), strong=True))
        return Page(body, data, notes=self._hints())

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
        if self.values:
            counts.append(count(len(self.values), "other value"))
        equal = f"{count(self.same, 'tensor')} bit-equal"
        if self.close:
            equal += f", {self.close:,} within the tolerance"
        return f"{', '.join(counts) or 'no difference'}; {equal}"

    def _hints(self) -> list[Note]:
        """Of names that only differ by a wrapper none is in both."""
        wrapped = [
            bool(names) and all(name.startswith("module.") for name in names)
            for names in (self.removed, self.added)
        ]
        if wrapped[0] == wrapped[1] or self.same or self.close:
            return []
        which = "A" if wrapped[0] else "B"
        text = f"the names of {which} start with 'module.': compare after 'modelctl strip-prefix'"
        return [Note("hint", text)]


def diff(
    a: Checkpoint,
    b: Checkpoint,
    pattern: Patterns = (),
    regex: bool = False,
    rtol: float = 0.0,
    atol: float = 0.0,
) -> Diff:
    """Compare two checkpoints, whatever their formats.

    The model's tensors are compared by the names that ``load_state_dict`` would see, all else by
    its path. With ``pattern`` only the tensors that it matches in either, and no other values.
    Values are compared bit for bit, or with ``rtol``/``atol`` as ``torch.allclose`` does
    (\\|a - b\\| <= atol + rtol * \\|b\\|); two NaNs are the same. What modelctl recorded about
    itself (``modelctl.*``) is not compared.

    Raises:
        NoMatchError: ``pattern`` matches nothing in either.
    """
    left, left_values = _parts(a)
    right, right_values = _parts(b)
    names = list(dict.fromkeys([*left, *right]))
    if pattern:
        if not names:
            raise no_match(str(pattern), names)
        names = select(names, pattern, regex=regex)
        left_values = right_values = {}
    found = Diff()
    same = close = 0
    for name in names:
        if name not in right:
            found.removed.append(name)
        elif name not in left:
            found.added.append(name)
        else:
            change, equal = _compare(name, left[name], right[name], rtol, atol)
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
    paths = [ckpt.origin.path if ckpt.origin else None for ckpt in (a, b)]
    return Diff(found.added, found.removed, found.changed, found.values, same, close, *paths)


def _parts(ckpt: Checkpoint) -> tuple[dict[str, TensorRef], dict[str, str]]:
    """Tensors by name, and other values by path; the model's without the path of its section."""
    models = ckpt.sections.models
    at = models[0].path if models and ckpt.sections.certain else None
    tensors: dict[str, TensorRef] = {}
    values: dict[str, str] = {}
    whole: set[Any] = set()  # paths of lists that are one value: betas, a generator's state
    for path, node in walk(ckpt.root):
        if path and path[:-1] in whole:
            continue
        inside = at is not None and path[: len(at)] == at and len(path) > len(at)
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


def _compare(
    name: str, a: TensorRef, b: TensorRef, rtol: float, atol: float
) -> tuple[Change | None, bool]:
    """What differs, and whether the two are equal bit for bit."""
    if a.shape != b.shape:
        return Change(name, "shape", shape(a.shape), shape(b.shape)), False
    if a.dtype != b.dtype:
        return Change(name, "dtype", a.dtype.name, b.dtype.name), False
    if a is b or (a.identity == b.identity):
        return None, True
    differ, largest, close, equal = 0, None, True, True
    a.check()
    b.check()
    for x, y in _aligned(a.chunks(), b.chunks(), a.dtype.itemsize):
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
    change = Change(name, "values", shape(a.shape), shape(b.shape), differ, a.numel, largest)
    return change, False


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
