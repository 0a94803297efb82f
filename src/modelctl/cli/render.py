"""Reports as people and programs read them."""

from __future__ import annotations

import math
import os
from typing import TYPE_CHECKING, Any

from ..core.checkpoint import Checkpoint
from ..core.tensors import TensorRef
from ..errors import NoMatchError
from .output import Column, Output, count, shape, size

if TYPE_CHECKING:  # each report loads what it needs: start-up is a feature
    from ..inspection import diff as d
    from ..inspection import listing as ls
    from ..inspection import summary as s

_MOST = 12  # how many of many names a table shows


# ---------------------------------------------------------------------- summary


def print_summary(out: Output, ckpt: Checkpoint, found: s.Summary, seconds: float) -> None:
    if out.is_json:
        out.json("summary", _summary_json(ckpt, found))
        return
    totals = found.totals
    if out.is_table:
        read = f"read {size(ckpt.bytes_read)}, {seconds:.1f} s, torch not loaded"
        # a file without a model (an optimizer by itself) has tensors, too
        tensors = totals.tensors or len(ckpt.tensors())
        parts = [_label(ckpt), found.kind, count(tensors, "tensor"), _on_disk(ckpt), read]
        out.line(f"{_name(ckpt)}   {' · '.join(parts)}", "bold")
    if totals.tensors:
        if out.is_table:
            out.line()
        _summary_table(out, found)
        if out.is_table:
            _summary_foot(out, found)
    if out.is_table:
        _training_panel(out, found)
        for line in found.history:
            out.line(f" done: {line}")
    for text, hint in found.warnings:
        if _is_command(hint):
            hint = f"{hint} {ckpt.origin.path if ckpt.origin else 'FILE'} -o NEW.pt"
        out.note(f"warning: {text}", hint)


def _is_command(hint: str | None) -> bool:
    return hint is not None and hint.startswith("modelctl ")


def _summary_table(out: Output, found: s.Summary) -> None:
    total = found.totals.params_unique
    known = found.totals.trainable is not None
    inferred = "kind~" if any(row.inferred for row in found.rows) else "kind"
    columns = [
        Column("name", style="cyan"),
        Column(inferred),
        Column("weight"),
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
                _number(row.params),
                f"{100 * row.params / total:.2f}" if total and row.params else "-",
                *([_number(row.trainable or 0)] if known else []),
                _number(row.buffers),
                "+".join(row.dtypes),
                size(row.nbytes),
            ]
        )
    out.table(columns, rows)


def _summary_csv(out: Output, found: s.Summary) -> None:
    """Exact numbers, for programs."""
    names = ("path", "kind", "repeat", "tensors", "params", "buffers", "bytes", "trainable")
    rows = []
    for row in found.rows:
        values = (row.path, row.kind, row.repeat, row.tensors, row.params, row.buffers)
        rows.append(["" if v is None else str(v) for v in (*values, row.nbytes, row.trainable)])
    out.table([Column(name) for name in names], rows)


def _summary_foot(out: Output, found: s.Summary) -> None:
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
    if found.depth is not None and any(row.weight is None and row.params for row in found.rows):
        out.line(f" more: --depth {found.depth + 1}")
    for names in found.tied[:4]:
        out.line(f" tied: {' = '.join(names)}")
    if found.removed:
        names = [str(one.get("name")) for one in found.removed if isinstance(one, dict)]
        out.line(f" removed earlier: {_some(names)}")


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


def _summary_json(ckpt: Checkpoint, found: s.Summary) -> dict[str, Any]:
    from ..inspection import listing as ls

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
            "tensors": totals.tensors,
            "params": totals.params,
            "params_unique": totals.params_unique,
            "buffers": totals.buffers,
            "trainable": totals.trainable,
            "frozen": totals.frozen,
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
                "out_shape": None,
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
                "stats": None,
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
        "warnings": [text for text, _ in found.warnings],
    }


# ---------------------------------------------------------------------- ls


def print_tensors(out: Output, ckpt: Checkpoint, rows: list[ls.TensorRow], long: bool) -> None:
    if out.is_json:
        out.json(
            "ls",
            {
                "tensors": [
                    {
                        "name": row.name,
                        "dtype": row.dtype,
                        "shape": list(row.shape),
                        "bytes": row.nbytes,
                        "section": row.section,
                        "role": row.role,
                        "requires_grad": row.requires_grad,
                        "layout": row.layout,
                    }
                    for row in rows
                ]
            },
        )
        return
    if out.is_table and not long and not out.fancy:  # a pipe gets names
        out.lines([row.name for row in rows])
        return
    columns = [Column("name", style="cyan"), Column("dtype"), Column("shape")]
    if long:
        columns += [Column("bytes", True), Column("role"), Column("grad")]
    cells = []
    for row in rows:
        dtype = f"{row.short_dtype} {row.layout}" if row.layout else row.short_dtype
        line = [row.name, dtype, shape(row.shape)]
        if long:
            grad = {True: "yes", False: "no", None: "?"}[row.requires_grad]
            if row.role != "parameter" and row.requires_grad is None:
                grad = "-"
            role = {"parameter": "param", None: ""}.get(row.role, row.role)
            nbytes = str(row.nbytes) if out.format == "csv" else f"{row.nbytes:,}"
            line += [nbytes, f"{role}{'~' * row.inferred}", grad]
        cells.append(line)
    out.table(columns, cells)
    if out.is_table and long and any(row.inferred for row in rows):
        out.note("~ inferred from name and dtype; ? the file does not say")


# ---------------------------------------------------------------------- show


def print_tree(out: Output, ckpt: Checkpoint) -> None:
    from ..inspection import values as v

    if out.is_json:
        out.json("show", {"metadata": dict(ckpt.metadata), "value": v.as_json(ckpt.root)})
        return
    width = _outline(out, ckpt.root)
    for name, text in ckpt.metadata.items():
        out.line(f"{f'metadata {name}'.ljust(width)}  {text}")


def print_value(out: Output, ckpt: Checkpoint, path: str) -> None:
    from ..inspection import values as v

    try:
        node = v.find(ckpt, path)
    except NoMatchError:
        node = ckpt.metadata.get(path)
        if node is None:
            raise
    if out.is_json:
        out.json("show", {"path": path, "value": v.as_json(node)})
    elif isinstance(node, str):
        out.line(node)
    else:
        text = v.item(node) if isinstance(node, TensorRef) else v.literal(node)
        if text is not None:
            out.line(text)
            return
        _outline(out, node)


def _outline(out: Output, node: Any) -> int:
    """The tree under a node, indented; its root only where it is all there is."""
    from ..inspection import values as v

    lines = list(v.outline(node))
    if len(lines) > 1:
        lines = [line._replace(depth=line.depth - 1) for line in lines[1:]]
    width = min(max(2 * line.depth + len(line.label) for line in lines), 40)
    for line in lines:
        label = f"{'  ' * line.depth}{line.label}".ljust(width)
        out.line(f"{label}  {line.text}".rstrip() if line.label else line.text)
    return width


# ---------------------------------------------------------------------- diff


def print_diff(out: Output, a: str, b: str, found: d.Diff) -> None:
    if out.is_json:
        out.json("diff", _diff_json(a, b, found))
        return
    rows = [["-", name, "only in A", ""] for name in found.removed]
    rows += [["+", name, "only in B", ""] for name in found.added]
    rows += [["~", change.name, change.what, _change(change)] for change in found.changed]
    rows += [["~", change.path, "value", _values(change)] for change in found.values]
    if not out.is_table:
        out.table([Column(""), Column("name"), Column("what"), Column("how")], rows)
        return
    counts = [
        count(len(names), f"tensor{suffix}").replace(f"tensor{suffix}s", f"tensors{suffix}")
        for names, suffix in (
            (found.removed, " only in A"),
            (found.added, " only in B"),
            (found.changed, " changed"),
        )
        if names
    ]
    if found.values:
        counts.append(count(len(found.values), "other value"))
    if rows:
        shown = rows if not out.fancy else rows[:200]
        out.table([Column("name", style="cyan"), Column(""), Column("")], [_flat(r) for r in shown])
        if len(shown) < len(rows):
            out.line(f"… and {len(rows) - len(shown)} more: --format json has all")
        out.line()
    wrapped = [
        bool(names) and all(n.startswith("module.") for n in names)
        for names in (found.removed, found.added)
    ]
    if wrapped[0] != wrapped[1] and found.same == 0:
        out.note(
            f"hint: the names of {'A' if wrapped[0] else 'B'} start with 'module.': compare after "
            "'modelctl strip-prefix'"
        )
    verdict = ", ".join(counts) + "; " if counts else "no difference; "
    out.line(f"{verdict}{count(found.same, 'tensor')} bit-equal", "bold")


def _flat(row: list[str]) -> list[str]:
    return [f"{row[0]} {row[1]}", row[2], row[3]]


def _change(change: d.Change) -> str:
    if change.what != "values":
        return f"{change.before} -> {change.after}"
    text = f"{change.elements:,} of {change.numel:,}"
    if change.max_abs is not None:
        most = "a NaN against a number" if math.isnan(change.max_abs) else f"{change.max_abs:.3g}"
        text += f", at most {most}"
    return text


def _values(change: d.ValueChange) -> str:
    before, after = (
        "(none)" if text is None else text if len(text) <= 40 else text[:39] + "…"
        for text in (change.before, change.after)
    )
    return f"{before} -> {after}"


def _diff_json(a: str, b: str, found: d.Diff) -> dict[str, Any]:
    def number(value: float | None) -> float | str | None:
        return value if value is None or math.isfinite(value) else repr(value)

    return {
        "a": a,
        "b": b,
        "differs": found.differs,
        "same": found.same,
        "added": found.added,
        "removed": found.removed,
        "changed": [
            {
                "name": change.name,
                "what": change.what,
                "before": change.before,
                "after": change.after,
                "elements": change.elements,
                "numel": change.numel,
                "max_abs": number(change.max_abs),
            }
            for change in found.changed
        ],
        "values": [change._asdict() for change in found.values],
    }


# ---------------------------------------------------------------------- small things


def _label(ckpt: Checkpoint) -> str:
    return ckpt.origin.label if ckpt.origin else "in memory"


def _name(ckpt: Checkpoint) -> str:
    return os.path.basename(ckpt.origin.path) if ckpt.origin else "checkpoint"


def _on_disk(ckpt: Checkpoint) -> str:
    return size(ckpt.origin.bytes_on_disk) if ckpt.origin else ""


def _number(n: int) -> str:
    return f"{n:,}" if n else "-"


def _some(names: list[str]) -> str:
    more = f", … ({len(names)} in all)" if len(names) > _MOST else ""
    return ", ".join(names[:_MOST]) + more
