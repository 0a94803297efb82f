"""The report of ``summary``, as people and programs read it."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Any

from ...core.checkpoint import Checkpoint
from ..output import Column, Output, count, shape, size

if TYPE_CHECKING:
    from ...inspection.stats import Stats
    from ...inspection.summary import summarize as s

_MOST = 12  # how many of many names a table shows


def print_summary(out: Output, ckpt: Checkpoint, found: s.Summary, seconds: float) -> None:
    if out.is_json:
        out.json("summary", summary_json(ckpt, found))
        return
    totals = found.totals
    if out.is_table:
        read = f"read {size(ckpt.bytes_read)}, {seconds:.1f} s, torch not loaded"
        out.line(file_line(ckpt, read), "bold")
    if totals.tensors:
        if out.is_table:
            out.line()
        _summary_table(out, found)
        if found.stats and out.format != "csv":
            out.line()
            _stats_table(out, found)
        if out.is_table:
            _summary_foot(out, ckpt, found)
    if out.is_table:
        _training_panel(out, found)
        for line in found.history:
            out.line(f" done: {line}")
    print_warnings(out, ckpt, found)


def print_warnings(out: Output, ckpt: Checkpoint, found: s.Summary) -> None:
    """What is odd about a file, and the next step."""
    for note in found.warnings:
        out.note(str(note), note.way_out)


def file_line(ckpt: Checkpoint, end: str) -> str:
    """What a file is, in a line."""
    sections, origin = ckpt.sections, ckpt.origin
    # a file without a model (an optimizer by itself) has tensors, too
    tensors = len(ckpt.state_dict() if sections.models else ckpt.tensors())
    name = os.path.basename(origin.path) if origin else "checkpoint"
    label = origin.label if origin else "in memory"
    on_disk = size(origin.bytes_on_disk) if origin else ""
    return f"{name}   {' · '.join((label, sections.kind, count(tensors, 'tensor'), on_disk, end))}"


def _summary_table(out: Output, found: s.Summary) -> None:
    total = found.totals.params_unique
    known = found.totals.trainable is not None
    ran = any(row.out_shape is not None for row in found.rows)  # recorded in the file
    inferred = "kind~" if any(row.inferred for row in found.rows) else "kind"
    columns = [
        Column("name", style="cyan"),
        Column(inferred),
        Column("weight"),
        *([Column("output")] if ran else []),
        Column("params", True),
        Column("%", True),
        *([Column("trainable", True)] if known else []),
        Column("buffers", True),
        Column("dtype"),
        Column("size", True),
    ]
    rows = []
    if out.format == "csv":
        _summary_csv(out, found)
        return
    for row in found.rows:
        kind = row.kind or ""
        if row.repeat > 1:
            kind = f"{row.repeat} x {kind}"
        weight = shape(row.weight) if row.weight is not None else f"{row.tensors} t"
        rows.append(
            [
                row.path or "(root)",
                kind,
                weight,
                *([shape(row.out_shape)] if ran else []),
                _number(row.params),
                f"{100 * row.params / total:.2f}" if total and row.params else "-",
                *([_number(row.trainable or 0)] if known else []),
                _number(row.buffers),
                "+".join(row.dtypes),
                size(row.nbytes),
            ]
        )
    out.table(columns, rows)


def _stats_table(out: Output, found: s.Summary) -> None:
    """A line a tensor: what its values are like."""
    columns = [Column("name", style="cyan"), *(Column(c, True) for c in ("min", "max", "mean"))]
    columns += [Column(c, True) for c in ("std", "zeros", "NaN", "Inf")]
    rows = []
    for name, one in found.stats.items():
        values = ["-" if v is None else f"{v:.4g}" for v in (one.min, one.max, one.mean, one.std)]
        rows.append([name, *values, *(_number(n) for n in (one.zeros, one.nan, one.inf))])
    out.table(columns, rows)


def _stats_json(one: Stats | None) -> dict[str, Any] | None:
    return None if one is None else one._asdict()


def _summary_csv(out: Output, found: s.Summary) -> None:
    """Exact numbers, for programs."""
    names = ("path", "kind", "repeat", "tensors", "params", "buffers", "bytes", "trainable")
    rows = []
    for row in found.rows:
        values = (row.path, row.kind, row.repeat, row.tensors, row.params, row.buffers)
        rows.append(["" if v is None else str(v) for v in (*values, row.nbytes, row.trainable)])
    out.table([Column(name) for name in names], rows)


def _summary_foot(out: Output, ckpt: Checkpoint, found: s.Summary) -> None:
    totals = found.totals
    parts = [
        f"params {totals.params_unique:,}",
        f"buffers {totals.buffers:,}",
        f"{size(totals.nbytes)} (stored {size(totals.bytes_stored)})",
        f"tied {sum(len(names) - 1 for names in found.tied)}",
    ]
    out.line()
    out.line(" " + " · ".join(parts), "bold")
    if totals.trainable is None:
        out.line(
            " trainable ?  a state_dict does not record it     ~ inferred from names and shapes"
        )
    else:
        guess = (
            "     ~ inferred from names and shapes" if any(r.inferred for r in found.rows) else ""
        )
        out.line(f" trainable {totals.trainable:,} · frozen {totals.frozen:,}{guess}")
    if found.module:
        out.line(f" whole module: {found.module}; its class was not needed")
    deeper = any(row.weight is None and row.params for row in found.rows)
    more = [f"--depth {found.depth + 1}", "--stats"] if found.depth is not None and deeper else []
    more += _live_view(ckpt) if found.module is None else []
    if more:
        out.line(f" more: {' · '.join(more)}")
    for names in found.tied[:4]:
        out.line(f" tied: {' = '.join(names)}")
    if found.removed:
        names = [str(one.get("name")) for one in found.removed if isinstance(one, dict)]
        out.line(f" removed earlier: {_some(names)}")


def _live_view(ckpt: Checkpoint) -> list[str]:
    """What asks for the live view, where the tensors tell the architecture for certain."""
    from ...inspection.architectures.identify import certain_of
    from ...inspection.architectures.index import example_input, find_architecture

    best = certain_of(ckpt) if ckpt.outside is None else None
    if best is None:
        return []
    example = example_input(find_architecture(best.names[0]))
    dims = ",".join(map(str, example)) if example is not None else "…"
    args = "".join(f" --arch-arg {arg}" for arg in best.args)
    return [f"--arch {best.names[0]}{args} --input-size {dims}"]


def _training_panel(out: Output, found: s.Summary) -> None:
    training = found.training
    if training is None:
        return
    parts = []
    if training.epoch is not None:
        parts.append(f"epoch {training.epoch}")
    if training.step is not None:
        parts.append(f"step {training.step:,}")
    if training.lr:
        parts.append("lr " + ", ".join(f"{lr:g}" for lr in training.lr[:4]))
    if training.groups:
        states = f"state of {count(training.states, 'parameter')}"
        groups = count(training.groups, "group")
        parts.append(
            f"optimizer {training.optimizer or 'of an unknown kind'} ({groups}, {states}, "
            f"{size(training.optimizer_bytes)})"
        )
    if training.scheduler:
        parts.append("scheduler")
    parts += [f"EMA copy {name}" for name in training.ema]
    if parts:
        out.line(" training: " + " · ".join(parts))


def counts(totals: Any) -> dict[str, int | None]:
    """What totals of a file and of a live model have in common, by the same names."""
    names = ("tensors", "params", "params_unique", "buffers", "trainable", "frozen")
    return {name: getattr(totals, name) for name in names}


def summary_json(ckpt: Checkpoint, found: s.Summary) -> dict[str, Any]:
    from ...inspection import ls as ls

    totals, training = found.totals, found.training
    grads = ls.trainability(ckpt)
    tied = {name: names[0] for names in found.tied for name in names[1:]}
    rows = ls.list_tensors(ckpt) if ckpt.sections.models else ls.list_tensors(ckpt, section="all")
    origin = ckpt.origin
    return {
        "source": {
            "path": origin.path if origin else None,
            "format": origin.format if origin else None,
            "kind": found.kind,
            "bytes_on_disk": origin.bytes_on_disk if origin else None,
            "bytes_read": ckpt.bytes_read,
        },
        "totals": {
            **counts(totals),
            "bytes": totals.nbytes,
            "bytes_stored": totals.bytes_stored,
            "by_dtype": totals.by_dtype,
            "macs": None,
        },
        "rows": [
            {
                "path": row.path,
                "level": row.level,
                "type": row.type,
                "kind": row.kind,
                "inferred": row.inferred,
                "repeat": row.repeat,
                "tensors": row.tensors,
                "params": row.params,
                "buffers": row.buffers,
                "bytes": row.nbytes,
                "trainable": row.trainable,
                "out_shape": None if row.out_shape is None else list(row.out_shape),
                "macs": None,
            }
            for row in found.rows
        ],
        "tensors": [
            {
                "name": row.name,
                "shape": list(row.shape),
                "dtype": row.dtype,
                "role": row.role,
                "requires_grad": grads.get(row.name),
                "bytes": row.nbytes,
                "tied_to": tied.get(row.name),
                "stats": _stats_json(found.stats.get(row.name)),
            }
            for row in rows
            if totals.tensors
        ],
        "tied": found.tied,
        "training": None
        if training is None
        else {
            "epoch": training.epoch,
            "step": training.step,
            "lr": training.lr,
            "optimizer": training.optimizer,
        },
        "metadata": dict(ckpt.metadata),
        "warnings": [note.text for note in found.warnings],
    }


# ---------------------------------------------------------------------- small things


def _number(n: int) -> str:
    return f"{n:,}" if n else "-"


def _some(names: list[str]) -> str:
    more = f", … ({len(names)} in all)" if len(names) > _MOST else ""
    return ", ".join(names[:_MOST]) + more
