"""Several checkpoints, a row each: where each stands, how large it is, what is odd about it."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

from ..core.pages import Column, Line, Page, Table
from ..core.text import count
from ..errors import ModelctlError
from .summary.report import Summary

_COLUMNS = (
    Column("file"),
    Column("epoch", "number", "-"),
    Column("step", "count", "-"),
    Column("lr", "number", "-"),
    Column("best", "number", "-", spare=2),
    Column("loss", "number", "-", spare=1),
    Column("tensors", "count"),
    Column("params", "count"),
    Column("size", "bytes"),
    Column("findings"),
)


class Seen(NamedTuple):
    """A file of several: its summary, or why there is none."""

    path: str
    summary: Summary | None = None
    error: ModelctlError | None = None

    @property
    def runs(self) -> list[str]:
        """What unpickling it would run that is not known to be harmless."""
        found = () if self.summary is None else self.summary.ckpt.findings
        return list(dict.fromkeys(one.name for one in found if one.level == "dangerous"))

    @property
    def findings(self) -> str:
        """What is odd about it, in a few words; ``!`` where unpickling would run something."""
        if self.summary is None:
            return f"error: {self.error}"
        bad = sum(one.nan + one.inf > 0 for one in self.summary.stats.values())
        parts = [f"! {', '.join(self.runs)}"] if self.runs else []
        parts += [f"{count(bad, 'tensor')} with NaN or Inf"] if bad else []
        others = len(self.summary.warnings)
        parts += [count(others, "remark")] if others and not parts else []
        return "; ".join(parts)

    def row(self) -> tuple[Any, ...]:
        """Its cells."""
        if self.summary is None:
            return self.path, *[None] * (len(_COLUMNS) - 2), self.findings
        training, totals = self.summary.training, self.summary.totals
        origin = self.summary.ckpt.origin
        return (
            self.path,
            training.epoch if training else None,
            training.step if training else None,
            training.lr[0] if training and training.lr else None,
            training.best[1] if training and training.best else None,
            training.loss if training else None,
            totals.tensors,
            totals.params,
            origin.bytes_on_disk if origin else totals.nbytes,
            self.findings,
        )

    def as_dict(self) -> dict[str, Any]:
        """The summary of one, with what unpickling would run; or the error."""
        if self.summary is None:
            error = None if self.error is None else self.error.as_dict()
            return {"path": self.path, "error": error}
        return {"path": self.path, "error": None, "runs": self.runs, **self.summary.as_dict()}


class Overview(list[Seen]):
    """Several files."""

    @property
    def failed(self) -> bool:
        """Whether one of them can't be read."""
        return any(one.error is not None for one in self)

    @property
    def finding(self) -> bool:
        """Whether a value in one of them is no number."""
        return any(one.summary is not None and one.summary.finding for one in self)

    def as_dict(self) -> dict[str, Any]:
        return {"files": [one.as_dict() for one in self]}

    def page(self) -> Page:
        table = Table(_COLUMNS, [one.row() for one in self])
        return Page(self._body(table), table)

    def _body(self, table: Table) -> Iterator[Line | Table]:
        yield table
        if any(one.runs for one in self):
            yield Line("")
            yield Line("!  unpickling it would run what stands there; modelctl did not")
