"""The live view of a file, for people and programs: the report of ``summary`` with an input."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from ...core.names import natural
from ...core.pages import Column, Kind, Line, Page, Table
from ...core.text import count
from ...inspection.summary.report import Summary, counts, file_line
from ..loading.report import LoadReport
from .rows import Layer, Totals
from .summary import ModelSummary, cells_of, foot, shown, title

_KINDS: dict[str, Kind] = {"name": "name", "type": "text", "output": "text"}
# In which order a narrow terminal does without them; of two % the last one goes first.
_SPARE = {"%": 2, "buffers": 3, "trainable": 4, "output": 5, "type": 6}
_ORDER = {
    "name": lambda row: natural(row.path),
    "params": lambda row: -row.params,
    "size": lambda row: -row.nbytes,
}


@dataclass(frozen=True)
class View:
    """A :class:`ModelSummary` of the model that a file is of.

    Attributes:
        file: what the file holds, with all its rows.
        arch: the architecture and its arguments, as given or as identified; None for a module
            that the file holds whole. ``identified``: whether modelctl found it.
        fit: how the file's tensors fit the model; None for a whole module.
        seconds: how long it took, if somebody looked.
    """

    file: Summary
    summary: ModelSummary
    arch: str | None
    args: tuple[str, ...]
    identified: bool
    fit: LoadReport | None
    seconds: float = 0.0

    @property
    def finding(self) -> bool:
        """No value was looked at."""
        return False

    def sort(self, by: str) -> None:
        """Put the rows into another order: ``name``, ``params`` or ``size``, the largest first."""
        if by in _ORDER:
            self.summary.rows.sort(key=_ORDER[by])

    def as_dict(self) -> dict[str, Any]:
        """The summary of the file, with rows and totals of the model and what only it can tell."""
        file, data = self.file.as_dict(), self.summary
        return {
            **file,
            "totals": {**file["totals"], **_totals(data.totals)},
            "rows": [_row(row) for row in data.rows],
            "model": {
                "class": data.name,
                "arch": self.arch,
                "arch_args": list(self.args),
                "identified": self.identified,
                "mode": data.mode,
                "device": data.device,
                "input": data.inputs,
                "output": _dims(data.output),
            },
            "fit": None if self.fit is None else _fit(self.fit),
            "uncounted": [
                {"op": op, "module": module, "calls": calls} for op, module, calls in data.uncounted
            ],
            "advice": [note.text for note in data.advice],
            "remarks": [note.as_dict() for note in (*self.file.warnings, *data.advice)],
        }

    def page(self) -> Page:
        """The file in a line, what runs, a row a module, totals and memory."""
        names, cells, _ = cells_of(self.summary)
        columns = [Column(n, _KINDS.get(n, "number"), spare=_SPARE.get(n, 0)) for n in names]
        if names[-1] == "%":
            columns[-1] = columns[-1]._replace(spare=1)
        table = Table(columns, cells)
        notes = [*self.summary.advice, *self.file.warnings]
        return Page(self._body(table), self._data(), [table], notes)

    def _body(self, table: Table) -> Iterator[Line | Table]:
        read = "no tensor read" if self.fit is not None else "loaded by torch"
        yield Line(file_line(self.file.ckpt, f"{self.seconds:.1f} s, {read}"), strong=True)
        for line in (*self._model(), title(self.summary)):
            yield Line(f" {line}")
        yield Line()
        yield table
        yield Line()
        for i, line in enumerate(foot(self.summary)):
            yield Line(f" {line}", strong=not i)
        depth, deepest = self.summary.depth, self.summary.deepest
        if depth is not None and depth < deepest:
            deeper = f"--depth {depth + 1} · " if depth + 1 < deepest else ""
            yield Line(f" more: {deeper}--depth all")

    def _model(self) -> list[str]:
        """Which model it is, and how the tensors fit it."""
        if self.arch is None or self.fit is None:
            return ["the module that the file holds, run since it is trusted"]
        args = "".join(f" --arch-arg {arg}" for arg in self.args)
        how = ", identified by its tensors" if self.identified else ""
        under = f" without '{self.fit.prefix}'" if self.fit.prefix else ""
        problems = self.fit.problems()
        loaded = len(self.fit.loaded)
        total = loaded + len(self.fit.unexpected) + len(self.fit.mismatched)
        which = f"{loaded:,} of" if problems else "all"
        fits = f"{which} {count(total, 'tensor')} fit{under}"
        return [f"{self.arch}{args}{how}: {fits}", *(f"  {problem}" for problem in problems)]

    def _data(self) -> Table:
        """Exact numbers, for programs."""
        names = ("path", "type", "kernel", "stride", "repeat", "calls", "out_shape", "tensors")
        numbers = ("params", "trainable", "buffers", "nbytes", "macs")
        columns = [Column({"nbytes": "bytes"}.get(name, name)) for name in (*names, *numbers)]
        rows = [[_cell(getattr(row, n)) for n in (*names, *numbers)] for row in self.summary.rows]
        return Table(columns, rows)


def _cell(value: Any) -> Any:
    if isinstance(value, Mapping):
        return shown(dict(value))
    return shown(value) if isinstance(value, tuple) else value


def _totals(totals: Totals) -> dict[str, Any]:
    return {
        **counts(totals),
        "bytes": totals.param_bytes + totals.buffer_bytes,
        "by_dtype": totals.by_dtype,
        "macs": totals.macs,
        "flops": totals.flops,
        "memory": {
            "forward": totals.activations,
            "saved_activations": totals.saved,
            "gradients": totals.gradients,
            "optimizer": totals.optimizer,
            "training": totals.training,
        },
    }


def _row(row: Layer) -> dict[str, Any]:
    return {
        "path": row.path,
        "level": row.level,
        "type": row.type,
        "kind": row.type,
        "inferred": False,
        "repeat": row.repeat,
        "tensors": row.tensors,
        "params": row.params,
        "buffers": row.buffers,
        "bytes": row.nbytes,
        "trainable": row.trainable,
        "kernel": _dims(row.kernel),
        "stride": _dims(row.stride),
        "calls": row.calls,
        "out_shape": _dims(row.out_shape),
        "macs": row.macs,
        "uncounted": list(row.uncounted),
    }


def _fit(fit: LoadReport) -> dict[str, Any]:
    return {
        "loaded": len(fit.loaded),
        "prefix": fit.prefix,
        "missing": list(fit.missing),
        "unexpected": list(fit.unexpected),
        "mismatched": [
            {"name": name, "found": list(theirs), "expected": list(own)}
            for name, theirs, own in fit.mismatched
        ],
    }


def _dims(shape: Any) -> Any:
    """A shape as a list, several as an object of lists."""
    if isinstance(shape, Mapping):
        return {name: _dims(one) for name, one in shape.items()}
    return None if shape is None else list(shape)
