"""Reports as people and programs read them."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

from ...core.checkpoint import Checkpoint
from ...core.tensors import TensorRef
from ...errors import NoMatchError
from ..output import Column, Output, count, shape

if TYPE_CHECKING:  # each report loads what it needs: start-up is a feature
    from ...inspection import diff as d
    from ...inspection import ls as ls


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
    from ...inspection import show as v

    if out.is_json:
        out.json("show", {"metadata": dict(ckpt.metadata), "value": v.as_json(ckpt.root)})
        return
    width = _outline(out, ckpt.root)
    for name, text in ckpt.metadata.items():
        out.line(f"{f'metadata {name}'.ljust(width)}  {text}")


def print_value(out: Output, ckpt: Checkpoint, path: str) -> None:
    from ...inspection import show as v

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
    from ...inspection import show as v

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
