"""What differs between two checkpoints, as data and as people read it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from ...core.notes import Note, info
from ...core.pages import Column, Line, Page, Table
from ...core.text import count, prefix_command, some
from ..printed import Printed
from .changes import Change, ModuleChange, ValueChange, by_module, figures, share
from .measures import Measure
from .names import Under

By = Literal["tensor", "module"]

# How much a terminal shows of many differences; rows of tensors, of more there is one a module.
_MOST, _FOLDED = 200, 20
_FIGURES = ("elements", "numel", "max_abs", "mean_abs", "max_rel", "mean_rel", "cosine")


@dataclass(frozen=True)
class Diff(Printed):
    """Names only in A (``removed``) or only in B (``added``), and what changed.

    Attributes:
        same: how many tensors are the same bit for bit.
        close: how many differ within the tolerance alone, or in the bits of NaNs.
        numel: the elements of the tensors that both have, in one shape.
        a, b: where the two were read from.
        under: which of them has the names of the other under a prefix; those tensors are compared
            all the same, by the names without it.
        ignored: whether that, and prefixes of wrappers, are no difference.
        moved: how many names, the last of ``removed`` and of ``added``, differ by that alone.
        likely: a prefix without which names that only one has would meet, and how many.
        likest: names only in A, each with the one only in B that looks most like it.
        by: what people get a row of; None: tensors, where these are not too many.
        stats: whether people get all figures, in a table.
    """

    added: list[str] = field(default_factory=list)
    removed: list[str] = field(default_factory=list)
    changed: list[Change] = field(default_factory=list)
    values: list[ValueChange] = field(default_factory=list)
    same: int = 0
    close: int = 0
    numel: int = 0

    a: str | None = None
    b: str | None = None
    under: Under | None = None
    ignored: bool = False
    moved: int = 0
    likely: tuple[Under, int] | None = None
    likest: Sequence[tuple[str, str]] = ()
    tolerant: bool = False
    by: By | None = None
    stats: bool = False

    @property
    def differs(self) -> bool:
        return bool(self.added or self.removed or self.changed or self.values)

    @property
    def tensors(self) -> int:
        """How many tensors both have."""
        return self.same + self.close + len(self.changed)

    @property
    def modules(self) -> list[ModuleChange]:
        """What differs, by the module that it is in, largest first."""
        return by_module(*self._alone(), self.changed, most=None)

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
            "under": self.under and {"which": self.under.which, "prefix": self.under.prefix},
            "tensors": self.tensors,
            "numel": self.numel,
            "elements": self._elements(),
            "modules": [
                {
                    "module": row.module,
                    "what": row.what,
                    "tensors": row.tensors,
                    **figures(row.measure),
                }
                for row in self.modules
            ],
        }

    def page(self) -> Page:
        """A line a difference, or of many a line a module; and the verdict."""
        removed, added = self._alone()
        changed = sorted(self.changed, key=lambda change: change.rank)
        number = len(removed) + len(added) + len(changed) + len(self.values)
        modules = self.by == "module" or (self.by is None and number > _FOLDED)
        rows: list[_Row] = []
        if modules:
            most = max(_FOLDED - len(self.values), 1) if self.by is None else None
            for row in by_module(removed, added, changed, most):
                rows.append((row.sign, row.module, row.what, row.text, row.measure))
        else:
            rows += [("-", name, "only in A", "", None) for name in removed]
            rows += [("+", name, "only in B", "", None) for name in added]
            rows += [("~", one.name, one.what, one.text, one.measure) for one in changed]
        rows += [("~", one.path, "value", one.text, None) for one in self.values]
        shown = self._with_figures(rows) if self.stats else self._in_words(rows)
        body: list[Line | Table] = [shown, Line()] if rows else []
        if modules and len(rows) < number and self.by is None:
            said = "a row a module: --by tensor, --pattern or --format json shows each tensor"
            body.insert(1, Line(said))
        body.append(Line(self._verdict(), strong=True))
        data = self._data(changed)
        return Page(body, data, tables=[shown] if rows else [data], notes=self._notes())

    def _in_words(self, rows: Sequence[_Row]) -> Table:
        columns = [Column("", "change"), Column("name", "name"), Column(""), Column("")]
        return Table(columns, [row[:4] for row in rows], _MOST)

    def _with_figures(self, rows: Sequence[_Row]) -> Table:
        """All figures of what has them; of all else what is to be said in words."""
        columns = [
            *(Column("", "change"), Column("name", "name"), Column("")),
            *(Column("changed", "number"), Column("max abs", "number")),
            *(Column("mean abs", "number", spare=5), Column("max rel", "number", spare=2)),
            *(Column("mean rel", "number", spare=3), Column("cosine", "number", spare=4)),
            Column("NaN A, B", "number", spare=1),
        ]
        made: list[tuple[Any, ...]] = []
        for sign, name, what, text, measure in rows:
            if measure is None or not measure.known:
                said = f"{what} {text}" if measure is None or what != "values" else text
                made.append((sign, name, said.strip(), *[""] * 7))
                continue
            nan = f"{measure.nan_a:,}, {measure.nan_b:,}" if measure.nan_a or measure.nan_b else ""
            changed = share(measure.elements, measure.numel)
            made.append(
                (
                    *(sign, name, "" if what == "values" else what, changed),
                    *(measure.max_abs, measure.mean_abs, measure.max_rel, measure.mean_rel),
                    *("" if measure.cosine is None else f"{measure.cosine:.6f}", nan),
                )
            )
        return Table(columns, made, _MOST)

    def _data(self, changed: Sequence[Change]) -> Table:
        """A row a difference, with every figure."""
        columns = [
            *(Column("change"), Column("name"), Column("what"), Column("how")),
            *(Column(name, "number") for name in _FIGURES),
            *(Column("nan_a", "number"), Column("nan_b", "number")),
        ]
        empty = (None,) * (len(columns) - 4)
        rows: list[tuple[Any, ...]] = [
            ("-", name, "only in A", "", *empty) for name in self.removed
        ]
        rows += [("+", name, "only in B", "", *empty) for name in self.added]
        for one in changed:
            found = one.as_dict()
            figures_ = (found[column.name] for column in columns[4:])
            rows.append(("~", one.name, one.what, one.text, *figures_))
        rows += [("~", one.path, "value", one.text, *empty) for one in self.values]
        return Table(columns, rows)

    def _alone(self) -> tuple[list[str], list[str]]:
        """Names that only one has, but for those that differ by a prefix alone."""
        ends = (len(names) - self.moved for names in (self.removed, self.added))
        removed, added = (slice(end) for end in ends)
        return self.removed[removed], self.added[added]

    def _elements(self) -> int:
        return sum(change.elements or 0 for change in self.changed)

    def _verdict(self) -> str:
        removed, added = self._alone()
        counts = []
        if self.under is not None and not self.ignored:
            which, prefix = self.under
            counts.append(f"the names of {which.upper()} are the other's under '{prefix}'")
        for names, where in ((removed, "only in A"), (added, "only in B")):
            counts += [f"{count(len(names), 'tensor')} {where}"] if names else []
        if self.changed:
            elements = self._elements()
            of = f" ({share(elements, self.numel)} of the elements)" if elements else ""
            counts.append(f"{len(self.changed):,} of {count(self.tensors, 'tensor')} changed{of}")
        if self.values:
            counts.append(count(len(self.values), "other value"))
        equal = f"{count(self.same, 'tensor')} bit-equal"
        if self.close:
            why = "within the tolerance" if self.tolerant else "but for the bits of NaNs"
            equal += f", {self.close:,} {why}"
        return f"{', '.join(counts) or 'no difference'}; {equal}"

    def _notes(self) -> list[Note]:
        """How names that differ by a prefix alone become the same, and which others may be."""
        if self.under is not None and self.ignored:
            which, prefix = self.under
            return [info(f"the names of {which.upper()} are compared without '{prefix}'")]
        if self.under is not None:
            which, prefix = self.under
            paths = {"a": self.a or "A", "b": self.b or "B"}
            under = paths.pop(which)
            (bare,) = paths.values()
            return [
                Note("hint", f"all of {which.upper()}'s names start with '{prefix}': "
                     "--ignore-prefix compares them without it"),
                Note("hint", prefix_command("strip", under, prefix)),
                Note("hint", f"or {prefix_command('add', bare, prefix)}"),
            ]  # fmt: skip
        notes = []
        if self.likely is not None:
            (which, prefix), times = self.likely
            said = f"{count(times, 'name')} of {which.upper()} would meet the other's without"
            notes.append(Note("hint", f"{said} '{prefix}': --ignore-prefix"))
        elif self.likest:
            pairs = some([f"'{one}' in A, '{other}' in B" for one, other in self.likest])
            notes.append(Note("hint", f"names that look alike: {pairs}"))
        return notes


_Row = tuple[str, str, str, str, Measure | None]
