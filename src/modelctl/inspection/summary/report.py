"""What is in a checkpoint, at a glance: the report of ``summary``."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from ...core.checkpoint import Checkpoint
from ...core.notes import Note
from ...core.pages import Column, Line, Page, Table
from ...core.sections.devices import devices_text
from ...core.tensors import TensorRef
from ...core.text import count, size, some
from ..ls import TensorRow, list_tensors, trainability
from ..printed import Printed
from ..stats import Stats
from .quantized import Quantized
from .rows import Row
from .training import Training

# How many of many names, and of tied ones, people read.
_MOST, _MOST_TIED = 12, 4
_PLURALS = {
    "scale": "scales",
    "zero_point": "zero points",
    "group index": "group indices",
    "input scale": "input scales",
    "shape": "shapes",
    "codebook": "codebooks",
    "quant_state": "quant states",
}
_GUESSED = "     ~ inferred from names and shapes"


class Totals(NamedTuple):
    """``params`` counts by name, ``params_unique`` tied ones once (rows sum to that one);
    ``trainable`` and ``frozen`` are None where the file doesn't say; ``devices`` are those that
    tensors of the whole file were saved on, None where it doesn't say. ``param_bytes`` is what
    parameters are stored in; of quantized weights ``pieces`` counts the elements of what belongs to
    them (scales, zero points), which are neither parameters nor buffers."""

    tensors: int
    params: int
    params_unique: int
    buffers: int
    trainable: int | None
    frozen: int | None
    nbytes: int
    bytes_stored: int
    by_dtype: dict[str, int]
    devices: dict[str, int] | None = None
    param_bytes: int = 0
    quantized: Quantized | None = None
    pieces: Mapping[str, int] | None = None

    def as_dict(self) -> dict[str, Any]:
        return {
            **counts(self),
            "bytes": self.nbytes,
            "bytes_stored": self.bytes_stored,
            "by_dtype": self.by_dtype,
            "devices": self.devices,
            "macs": None,
            "quantization": self._quantization(),
        }

    def _quantization(self) -> dict[str, Any] | None:
        if self.quantized is None:
            return None
        return {**self.quantized.as_dict(), "pieces": dict(self.pieces or {})}


def counts(totals: Any) -> dict[str, int | None]:
    """What totals of a file and of a live model have in common, by the same names."""
    names = ("tensors", "params", "params_unique", "buffers", "trainable", "frozen")
    return {name: getattr(totals, name) for name in names}


@dataclass(frozen=True)
class Summary(Printed):
    """All of it. ``ckpt`` is the checkpoint, which may be closed; ``module`` a whole module's class
    and mode; ``depth`` how many levels of modules have rows, None for all, and ``deeper`` whether
    there are more; ``seconds`` how long it took, if somebody looked."""

    ckpt: Checkpoint = field(repr=False, compare=False)
    rows: list[Row]
    totals: Totals
    tied: list[list[str]]
    training: Training | None
    module: str | None = None
    depth: int | None = None
    stats: dict[str, Stats] = field(default_factory=dict)
    warnings: list[Note] = field(default_factory=list)
    history: list[str] = field(default_factory=list)
    removed: list[Any] = field(default_factory=list)
    seconds: float | None = None
    deeper: bool = False

    @property
    def kind(self) -> str:
        return self.ckpt.sections.kind

    @property
    def finding(self) -> bool:
        """Whether a value is no number."""
        return any(one.nan or one.inf for one in self.stats.values())

    def as_dict(self) -> dict[str, Any]:
        training = self.training
        return {
            "source": self._source(),
            "totals": self.totals.as_dict(),
            "rows": [row.as_dict() for row in self.rows],
            "tensors": self._tensors() if self.totals.tensors else [],
            "tied": self.tied,
            "training": None if training is None else training.as_dict(),
            "metadata": dict(self.ckpt.metadata),
            "warnings": [note.text for note in self.warnings],
            "remarks": [note.as_dict() for note in self.warnings],
        }

    def _source(self) -> dict[str, Any]:
        origin = self.ckpt.origin
        return {
            "path": origin.path if origin else None,
            "format": origin.format if origin else None,
            "kind": self.kind,
            "bytes_on_disk": origin.bytes_on_disk if origin else None,
            "bytes_read": self.ckpt.bytes_read,
        }

    def _tensors(self) -> list[dict[str, Any]]:
        grads = trainability(self.ckpt)
        tied = {name: names[0] for names in self.tied for name in names[1:]}
        section = "model" if self.ckpt.sections.models else "all"

        def tensor(row: TensorRow) -> dict[str, Any]:
            one = self.stats.get(row.name)
            return {
                "name": row.name,
                "shape": list(row.shape),
                "dtype": row.dtype,
                "role": row.role,
                "requires_grad": grads.get(row.name),
                "bytes": row.nbytes,
                "tied_to": tied.get(row.name),
                "stats": None if one is None else one._asdict(),
            }

        return [tensor(row) for row in list_tensors(self.ckpt, section=section)]

    # ------------------------------------------------------------------ for people

    def page(self) -> Page:
        """The file in a line, a row a module, totals, the training panel, what was done to it."""
        modules = self._modules()
        tables = [modules, self._values()] if self.stats else [modules]
        data = self._values() if self.stats else self._data()
        return Page(self._body(tables), data, tables, self.warnings)

    def _body(self, tables: Sequence[Table]) -> Iterator[Line | Table]:
        read = f"read {size(self.ckpt.bytes_read)}"
        took = "" if self.seconds is None else f", {self.seconds:.1f} s, torch not loaded"
        yield Line(file_line(self.ckpt, read + took, self.totals.devices), strong=True)
        if self.totals.tensors:
            for table in tables:
                yield Line()
                yield table
            yield from self._foot()
        if self.training is not None and self.training.text:
            yield Line(f" training: {self.training.text}")
        for line in self.history:
            yield Line(f" done: {line}")

    def _modules(self) -> Table:
        """A row a module."""
        total = self.totals.params_unique
        known = self.totals.trainable is not None
        ran = any(row.out_shape is not None for row in self.rows)  # recorded in the file
        inferred = any(row.inferred for row in self.rows)
        packed = self.totals.quantized is not None
        columns = [
            Column("name", "name"),
            Column("kind~" if inferred else "kind", spare=7),
            Column("weight", "shape", spare=5),
            *([Column("output", "shape", spare=6)] if ran else []),
            Column("params", "count", none="-"),
            Column("%", "percent", none="-", spare=3),
            *([Column("bits", "percent", none="-")] if packed else []),
            *([Column("trainable", "count", none="-", spare=2)] if known else []),
            Column("buffers", "count", none="-", spare=1),
            Column("dtype", spare=4),
            Column("size", "bytes"),
        ]
        rows = [
            (
                row.path or "(root)",
                f"{row.repeat} x {kind}" if row.repeat > 1 else kind,
                row.weight if row.weight is not None else f"{row.tensors} t",
                *([row.out_shape] if ran else []),
                row.params,
                100 * row.params / total if total and row.params else None,
                *([_bits(row.param_bytes, row.params)] if packed else []),
                *([row.trainable] if known else []),
                row.buffers,
                "+".join(row.dtypes),
                row.nbytes,
            )
            for row, kind in ((row, self._kind(row)) for row in self.rows)
        ]
        return Table(columns, rows)

    def _kind(self, row: Row) -> str:
        """What the row is; where all weights are quantized alike, the foot says how, once."""
        kind, packed = row.kind or "", self.totals.quantized
        if packed is not None and len(packed.schemes) == 1:
            label = next(iter(packed.schemes))
            if kind.endswith(label):
                return kind.removesuffix(label) + label.partition(" ")[0]
        return kind

    def _values(self) -> Table:
        """A row a tensor: what its values are like."""
        spare = {"zeros": 1, "std": 2, "mean": 3}
        numbers = [
            Column(name, "number", none="-", spare=spare.get(name, 0))
            for name in ("min", "max", "mean", "std")
        ]
        odd = [Column(name, "count", spare=spare.get(name, 0)) for name in ("zeros", "NaN", "Inf")]
        rows = [
            (name, one.min, one.max, one.mean, one.std, one.zeros, one.nan, one.inf)
            for name, one in self.stats.items()
        ]
        return Table([Column("name", "name"), *numbers, *odd], rows)

    def _data(self) -> Table:
        """Exact numbers, for programs."""
        names = ("path", "kind", "repeat", "tensors", "params", "buffers", "bytes", "trainable")
        rows = [
            (r.path, r.kind, r.repeat, r.tensors, r.params, r.buffers, r.nbytes, r.trainable)
            for r in self.rows
        ]
        return Table([Column(name) for name in names], rows)

    def _foot(self) -> Iterator[Line]:
        totals = self.totals
        parts = [
            f"params {totals.params_unique:,}",
            f"buffers {totals.buffers:,}",
            f"{size(totals.nbytes)} (stored {size(totals.bytes_stored)})",
            f"tied {sum(len(names) - 1 for names in self.tied)}",
        ]
        bits = _bits(totals.param_bytes, totals.params_unique)
        if totals.quantized is not None and bits is not None:
            parts.insert(1, f"{bits:.2f} bits each")
        yield Line()
        yield Line(" " + " · ".join(parts), strong=True)
        if totals.quantized is not None:
            found = totals.quantized
            names = [_PLURALS.get(piece, piece) for piece in totals.pieces or ()]
            beside = f" with {some(names, 6)}" if names else ""
            yield Line(f" quantized: {found} · {found.bits or 0:.2f} bits each{beside}")
            yield Line(f"   {found.known}")
        if totals.trainable is None:
            yield Line(f" trainable ?  a state_dict does not record it{_GUESSED}")
        else:
            guess = _GUESSED if any(row.inferred for row in self.rows) else ""
            yield Line(f" trainable {totals.trainable:,} · frozen {totals.frozen:,}{guess}")
        if self.module:
            yield Line(f" whole module: {self.module}; its class was not needed")
        more = self._more()
        if more:
            yield Line(f" more: {' · '.join(more)}")
        for names in self.tied[:_MOST_TIED]:
            yield Line(f" tied: {' = '.join(names)}")
        if self.removed:
            names = [str(one.get("name")) for one in self.removed if isinstance(one, dict)]
            rest = f", … ({len(names)} in all)" if len(names) > _MOST else ""
            yield Line(f" removed earlier: {', '.join(names[:_MOST])}{rest}")

    def _more(self) -> list[str]:
        """What shows more."""
        more = [f"--depth {self.depth + 1}"] if self.depth is not None and self.deeper else []
        if self.depth is not None and not self.stats:
            more.append("--stats")
        if self.module is None and self.ckpt.outside is None and not self.ckpt.packed:
            from ..architectures.identify import certain_of
            from ..architectures.index import example_input, find_architecture

            best = certain_of(self.ckpt)
            if best is not None:  # the tensors tell for certain what the live view takes
                example = example_input(find_architecture(best.names[0]))
                dims = ",".join(map(str, example)) if example is not None else "…"
                more.append(f"{best.options} --input-size {dims}")
        return more


def _bits(nbytes: int, params: int) -> float | None:
    """Bits that a parameter takes on average; None where there are none."""
    return 8 * nbytes / params if params else None


def file_line(ckpt: Checkpoint, end: str, devices: Mapping[str, int] | None = None) -> str:
    """What a file is, in a line, with the devices that tensors were saved on where these are not
    the cpu alone."""
    sections, origin = ckpt.sections, ckpt.origin
    # a file without a model (an optimizer by itself) has tensors, too
    entries = ckpt.shown if sections.models else ckpt.tensors()
    tensors = sum(
        isinstance(ref, TensorRef) or name in ckpt.packed.of for name, ref in entries.items()
    )
    name = os.path.basename(origin.path) if origin else "checkpoint"
    label = origin.label if origin else "in memory"
    on_disk = size(origin.bytes_on_disk) if origin else ""
    models = () if sections.certain else (count(len(sections.models), "model"),)
    on: tuple[str, ...] = ()
    if devices and [*devices] != ["cpu"]:
        on = (f"device{'s' * (len(devices) > 1)} {devices_text(devices)}",)
    said = (label, sections.kind, *models, count(tensors, "tensor"), *on, on_disk, end)
    return f"{name}   {' · '.join(said)}"
