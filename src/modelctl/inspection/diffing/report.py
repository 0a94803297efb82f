"""What comparing found: a row a tensor or a module, the largest difference first."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple

from ...core.notes import Note
from ...core.pages import Column, Line, Page, Table
from ...core.text import count, prefix_command
from ..printed import Printed
from .values import Sums

# How much a terminal shows of many differences, and of a long value.
_MOST, _LONGEST = 200, 40
# Rows of tensors; of more there is one a module.
_FOLDED = 20

By = Literal["tensor", "module"]
# The columns of --stats: what Change calls them, and how they are headed.
_STATS = (
    Column("changed %", "percent"),
    Column("max abs", "number", spare=3),
    Column("mean abs", "number", spare=2),
    Column("max rel", "number", spare=2),
    Column("mean rel", "number", spare=1),
    Column("cosine", "number", spare=4),
)


class Change(NamedTuple):
    """A tensor that both have, and that is not the same.

    ``elements`` of ``numel`` differ (None: not counted, since shapes differ), ``nan`` of them since
    one of the two is NaN. ``max_abs`` is the largest difference, None where the dtype has no
    arithmetic here, NaN where a NaN stands against a number; ``relative`` is that, of the largest
    value before. ``mean_abs`` is the mean difference; ``max_rel`` and ``mean_rel`` are those of
    \\|a - b\\| / \\|a\\|, over values before that are not 0 (as numpy.testing.assert_allclose);
    ``cosine`` is that of the angle between the two; these of finite pairs, in float64.
    """

    name: str
    what: str  # "shape", "dtype" or "values"
    before: str
    after: str
    elements: int | None = None
    numel: int | None = None
    max_abs: float | None = None
    relative: float | None = None
    mean_abs: float | None = None
    max_rel: float | None = None
    mean_rel: float | None = None
    cosine: float | None = None
    nan: int | None = None
    sums: Sums | None = None

    @classmethod
    def of(cls, name: str, what: str, before: str, after: str, sums: Sums) -> Change:
        """One whose values were compared."""
        relative = None
        if sums.most is not None:
            relative = sums.most / sums.size if sums.size else math.inf if sums.most else 0.0
        return cls(
            *(name, what, before, after, sums.elements, sums.numel, sums.most, relative),
            *(sums.mean_abs, sums.max_rel, sums.mean_rel, sums.cosine, sums.nan, sums),
        )

    def as_dict(self) -> dict[str, Any]:
        return {
            key: repr(value) if isinstance(value, float) and not math.isfinite(value) else value
            for key, value in self._asdict().items()
            if key != "sums"
        }

    @property
    def rank(self) -> tuple[bool, float]:
        """Less is worse: another shape or dtype, a NaN against a number, the largest change."""
        relative = math.inf if self.relative is None else self.relative
        return self.what == "values", -math.inf if math.isnan(relative) else -relative

    @property
    def text(self) -> str:
        text = "" if self.what == "values" else f"{self.before} -> {self.after}"
        if self.what == "values" or self.elements:
            text += f"{', ' if text else ''}{self.elements:,} of {self.numel:,}"
        if self.elements and self.max_abs is not None:
            nan = math.isnan(self.max_abs)
            text += f", at most {'a NaN against a number' if nan else f'{self.max_abs:.3g}'}"
        return text

    @property
    def cells(self) -> tuple[Any, ...]:
        """Those of --stats."""
        return _cells(self.sums)


def _cells(sums: Sums | None) -> tuple[Any, ...]:
    if sums is None:
        return (None,) * len(_STATS)
    changed = 100 * sums.elements / sums.numel if sums.numel else 0.0
    found = (sums.most, sums.mean_abs, sums.max_rel, sums.mean_rel, sums.cosine)
    return changed, *found


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
    prefix, and the prefix; those tensors are compared all the same, by the names without it, and
    where it is ``ignored`` that is no difference.

    What people get: a row ``by`` tensor or module (None: by tensor, of many by module), with
    ``stats`` the measures in columns.
    """

    added: list[str] = field(default_factory=list)
    removed: list[str] = field(default_factory=list)
    changed: list[Change] = field(default_factory=list)
    values: list[ValueChange] = field(default_factory=list)
    same: int = 0
    close: int = 0

    a: str | None = None
    b: str | None = None
    under: tuple[str, str] | None = None
    ignored: bool = False
    by: By | None = None
    stats: bool = False

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
        alone = [("-", name, "only in A", "", None) for name in self.removed]
        alone += [("+", name, "only in B", "", None) for name in self.added]
        changed = sorted(self.changed, key=lambda change: change.rank)
        found = [("~", one.name, one.what, one.text, one.sums) for one in changed]
        values = [("~", one.path, "value", one.text, None) for one in self.values]
        every = [*alone, *found, *values]
        data = Table(
            [*(Column(name) for name in ("change", "name", "what", "how")), *_STATS],
            [(*row[:4], *_cells(row[4])) for row in every],
        )
        seen = every if self.under is None or self.ignored else [*found, *values]
        by = self.by or ("tensor" if len(seen) <= _FOLDED else "module")
        rows = seen if by == "tensor" else self._by_module(changed)
        body: list[Line | Table] = [self._table(rows), Line()] if rows else []
        if by == "module" and self.by is None and rows:
            text = "a row a module: --by tensor, --pattern or --format json shows each tensor"
            body.insert(1, Line(text))
        body.append(Line(self._verdict(), strong=True))
        return Page(body, data, notes=self._hints())

    def _table(self, rows: Sequence[tuple[str, str, str, str, Sums | None]]) -> Table:
        columns = [Column("", "change"), Column("name", "name"), Column(""), Column("")]
        if not self.stats:
            return Table(columns, [row[:4] for row in rows], _MOST)
        told = [  # what the columns say is not said again
            (*row[:3], row[3] if row[4] is None or row[2] != "values" else "", *_cells(row[4]))
            for row in rows
        ]
        if not any(row[3] for row in told):
            columns, told = columns[:3], [(*row[:3], *row[4:]) for row in told]
        return Table([*columns, *_STATS], told, _MOST)

    def _by_module(self, changed: Sequence[Change]) -> list[tuple[str, str, str, str, Sums | None]]:
        """A row for all in a module of which the same is to be said, the worst first."""
        hidden = self.under is not None and not self.ignored
        removed, added = ([], []) if hidden else (self.removed, self.added)
        found: list[tuple[str, str, str, Change | None]] = [
            *(("-", name, "only in A", None) for name in removed),
            *(("+", name, "only in B", None) for name in added),
        ]
        found += [("~", change.name, change.what, change) for change in changed]
        rest = [("~", one.path, "value", one.text, None) for one in self.values]
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
            rows.append((sign, module, what, text, _together(group)))
        return rows + rest

    def _verdict(self) -> str:
        counts = [
            f"{count(len(names), 'tensor')} {where}"
            for names, where in ((self.removed, "only in A"), (self.added, "only in B"))
            if names
        ]
        if self.changed:
            counts.append(f"{count(len(self.changed), 'tensor')} changed{self._share()}")
        if self.under is not None:
            which, prefix = self.under
            if self.ignored:
                counts.append(f"the names of {which.upper()} taken without '{prefix}'")
            else:
                moved = f"the names of {which.upper()} are the other's under '{prefix}'"
                counts = [moved, *counts[2:]]
        if self.values:
            counts.append(count(len(self.values), "other value"))
        equal = f"{count(self.same, 'tensor')} bit-equal"
        if self.close:
            equal += f", {self.close:,} within the tolerance"
        said = ", ".join(counts)
        return f"{said if self.differs or self.under else 'no difference'}; {equal}"

    def _share(self) -> str:
        """With --stats: of the tensors that changed, the share of elements that did."""
        sums = _together(self.changed) if self.stats else None
        if sums is None or not sums.numel:
            return ""
        return f" ({100 * sums.elements / sums.numel:.3g} % of their elements)"

    def _hints(self) -> list[Note]:
        """How names that differ by a prefix alone become the same."""
        if self.under is None or self.ignored:
            return []
        which, prefix = self.under
        paths = {"a": self.a or "A", "b": self.b or "B"}
        under = paths.pop(which)
        (bare,) = paths.values()
        return [
            Note("hint", prefix_command("strip", under, prefix)),
            Note("hint", f"or {prefix_command('add', bare, prefix)}"),
        ]


def _together(changes: Iterable[Change | None]) -> Sums | None:
    """The sums of several tensors; None where one's values were not compared."""
    found = Sums()
    for change in changes:
        if change is None or change.sums is None:
            return None
        found = found.plus(change.sums)
    return found
