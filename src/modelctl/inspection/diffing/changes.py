"""What was found to differ, one by one and by module."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from functools import reduce
from typing import Any, NamedTuple

from ...core.text import count
from .measures import Measure

# How much people see of a long value.
_LONGEST = 40


@dataclass(frozen=True)
class Change:
    """A tensor that both have, and that is not the same.

    Attributes:
        what: ``shape``, ``dtype`` or ``values``: the first that differs.
        measure: how much its values differ; None where they were not compared, since the shape
            differs, or of two dtypes one has no arithmetic here.
    """

    name: str
    what: str
    before: str
    after: str
    measure: Measure | None = None

    @property
    def elements(self) -> int | None:
        """How many elements differ; None: not counted."""
        return None if self.measure is None else self.measure.elements

    @property
    def numel(self) -> int | None:
        """How many there are."""
        return None if self.measure is None else self.measure.numel

    @property
    def max_abs(self) -> float | None:
        """The largest difference; None where the dtype has no arithmetic here, NaN where a NaN
        stands against a number."""
        return self.measure.max_abs if self.measure is not None and self.measure.known else None

    @property
    def relative(self) -> float | None:
        """The largest difference, of the largest value before."""
        return self.measure.relative if self.measure is not None and self.measure.known else None

    def as_dict(self) -> dict[str, Any]:
        found = {
            "name": self.name,
            "what": self.what,
            "before": self.before,
            "after": self.after,
        }
        return {**found, **figures(self.measure)}

    @property
    def rank(self) -> tuple[bool, float]:
        """Less is worse: another shape or dtype, a NaN against a number, the largest change."""
        return self.what == "values", _rank(self.measure)

    @property
    def text(self) -> str:
        if self.what == "values":
            return how(self.measure) if self.measure is not None else ""
        text = f"{self.before} -> {self.after}"
        if self.measure is not None and self.measure.known:
            text += f", {how(self.measure) if self.measure.elements else 'equal values'}"
        return text


class ValueChange(NamedTuple):
    """A value that is no tensor; ``before`` or ``after`` is None where it isn't there."""

    path: str
    before: str | None
    after: str | None

    @property
    def text(self) -> str:
        return f"{_short(self.before)} -> {_short(self.after)}"


class ModuleChange(NamedTuple):
    """What differs in a module: tensors of which the same is to be said.

    Attributes:
        sign: ``-`` only in A, ``+`` only in B, ``~`` in both.
        what: as people read it: ``only in A``, ``shape``, ``values`` …
        changes: those tensors that both have.
        measure: of them together.
    """

    sign: str
    module: str
    what: str
    tensors: int
    changes: tuple[Change, ...]
    measure: Measure | None

    @property
    def rank(self) -> tuple[bool, bool, float]:
        """Less is worse: names, shapes, then the largest change of one of its tensors."""
        worst = min((change.rank for change in self.changes), default=(False, -math.inf))
        return self.sign == "~", *worst

    @property
    def text(self) -> str:
        if not self.changes:
            return count(self.tensors, "tensor")
        worst = min(self.changes, key=lambda change: change.rank)
        if self.tensors == 1:
            return f"1 tensor: {worst.text}"
        if self.measure is None or self.what != "values":
            return f"{count(self.tensors, 'tensor')}, the worst: {worst.text}"
        return f"{count(self.tensors, 'tensor')}: {how(self.measure)}"


def by_module(
    removed: Iterable[str], added: Iterable[str], changed: Iterable[Change], most: int | None
) -> list[ModuleChange]:
    """Differences by the module that their tensors are in, largest first; by those further up
    where there would be more than ``most``."""
    found: list[tuple[str, str, str, Change | None]] = [
        *(("-", name, "only in A", None) for name in removed),
        *(("+", name, "only in B", None) for name in added),
        *(("~", change.name, change.what, change) for change in changed),
    ]
    deepest = max((name.count(".") for _, name, _, _ in found), default=0)
    grouped: dict[tuple[str, str, str], list[Change | None]] = {}
    for level in range(max(deepest, 1), 0, -1):
        grouped = {}
        for sign, name, what, change in found:
            module = ".".join(name.split(".")[:-1][:level]) or name
            grouped.setdefault((sign, module, what), []).append(change)
        if most is None or len(grouped) <= most:
            break
    rows = []
    for (sign, module, what), group in grouped.items():
        changes = tuple(change for change in group if change is not None)
        measures = [change.measure for change in changes if change.measure is not None]
        measure = reduce(Measure.plus, measures) if measures else None
        rows.append(ModuleChange(sign, module, what, len(group), changes, measure))
    return sorted(rows, key=lambda row: row.rank)


def figures(measure: Measure | None) -> dict[str, Any]:
    """A measure as JSON knows it; None where nothing is known."""
    known = measure is not None and measure.known
    found: dict[str, Any] = {
        "elements": measure.elements if measure else None,
        "numel": measure.numel if measure else None,
    }
    for name in ("max_abs", "relative", "mean_abs", "max_rel", "mean_rel", "cosine"):
        value = getattr(measure, name) if known else None
        special = isinstance(value, float) and not math.isfinite(value)
        found[name] = repr(value) if special else value
    found["nan_a"] = measure.nan_a if measure is not None and known else None
    found["nan_b"] = measure.nan_b if measure is not None and known else None
    return found


def how(measure: Measure) -> str:
    """What people read of a measure in a line: how many differ, and how much."""
    text = f"{measure.elements:,} of {measure.numel:,}"
    if not measure.known:
        return text
    if not math.isnan(measure.max_abs):
        text += f", at most {measure.max_abs:.3g}"
    return text + "".join(f", {part}" for part in nans(measure))


def nans(measure: Measure) -> list[str]:
    """How many NaNs are on one side only."""
    sides = (("A", measure.nan_a), ("B", measure.nan_b))
    return [f"{n:,} NaN only in {side}" for side, n in sides if n]


def share(part: int, whole: int) -> str:
    """A part of a whole as people read it: ``0.3 %``."""
    percent = 100 * part / whole if whole else 0.0
    if 0 < percent < 0.01:
        return "under 0.01 %"
    if 99 < percent < 100:
        return "over 99 %"
    return f"{percent:.0f} %" if percent >= 10 else f"{percent:.2g} %"


def _rank(measure: Measure | None) -> float:
    relative = math.inf if measure is None or not measure.known else measure.relative
    return -math.inf if math.isnan(relative) else -relative


def _short(text: str | None) -> str:
    if text is None:
        return "(none)"
    return text if len(text) <= _LONGEST else text[: _LONGEST - 1] + "…"
