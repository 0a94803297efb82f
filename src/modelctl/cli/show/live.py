"""``summary`` with an architecture or an input: the live view, for people and programs."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ...core.checkpoint import Checkpoint
from ...core.names import natural
from ...errors import UsageError
from ..output import Column, Output, count

if TYPE_CHECKING:
    from ...nn.view.from_file import View
    from ...nn.view.rows import Layer

# Where a terminal is too narrow: what names and types are cut to.
_NAME, _TYPE, _LEAST = 28, 16, 8
_LEFT = ("name", "type", "output")


def show(
    ask: dict[str, Any],
    src: Path,
    key: str | None,
    follow_symlinks: bool,
    sort: str,
    out: Output,
) -> None:
    """Open the file, find its model, and print the view."""
    from ... import files
    from ...inspection.summary.summarize import summarize
    from ...nn.view.from_file import view
    from .summary import print_warnings, summary_json

    if out.is_json:
        ask = {**ask, "depth": "all", "fold": False}
    start = time.perf_counter()
    with files.open(src, key=key, follow_symlinks=follow_symlinks) as ckpt:
        found = view(ckpt, **ask)
        seconds = time.perf_counter() - start
        if sort != "file":
            found.summary.rows.sort(key=_order(sort))
        of_file = summarize(ckpt, None, False)
        if out.is_json:
            document = summary_json(ckpt, of_file)
            out.json("summary", {**document, **_json(document, found)})
        else:
            _print(out, ckpt, found, seconds)
            print_warnings(out, ckpt, of_file)


def parse(
    arch: str | None,
    arch_args: Sequence[str] | None,
    sizes: Sequence[str] | None,
    dtypes: Sequence[str] | None,
    device: str,
    trust: bool,
    depth: str | None,
    fold: bool | None,
) -> dict[str, Any]:
    """What the options say, as :func:`modelctl.nn.view.from_file.view` takes it."""
    shapes: dict[str, tuple[int, ...]] = {}
    named = 0
    for i, text in enumerate(sizes or ()):
        name, equals, dims = text.rpartition("=")
        named += bool(equals)
        shapes[name if equals else str(i)] = _shape(dims)
    if named not in (0, len(shapes)) or len(shapes) != len(sizes or ()):
        raise UsageError("--input-size: give each input a name of its own, or none")
    kinds = list(dtypes or ())
    if len(kinds) not in (0, 1, len(shapes)):
        raise UsageError(f"{len(kinds)} times --input-dtype for {len(shapes)} inputs")
    if len(kinds) == 1:
        kinds *= len(shapes)
    return {
        "sizes": (shapes if named else list(shapes.values())) if shapes else None,
        "arch": arch,
        "arch_args": tuple(arch_args or ()),
        "dtypes": dict(zip(shapes, kinds, strict=True)) if named and kinds else kinds,
        "trust": trust,
        "device": device,
        "depth": int(depth) if depth and depth.isdecimal() else depth or "auto",
        "fold": fold,
    }


def _shape(text: str) -> tuple[int, ...]:
    parts = [part.strip() for part in text.replace("x", ",").strip("()[] ").split(",")]
    if not all(part.isdecimal() for part in parts):
        raise UsageError(f"--input-size: '{text}' is not a shape", hint="1,3,224,224 is")
    return tuple(map(int, parts))


def _order(sort: str) -> Any:
    return {
        "name": lambda row: natural(row.path),
        "params": lambda row: -row.params,
        "size": lambda row: -row.nbytes,
    }[sort]


# ---------------------------------------------------------------------- for people


def _print(out: Output, ckpt: Checkpoint, found: View, seconds: float) -> None:
    from ...nn.view.summary import cells_of, foot, title
    from .summary import file_line

    data = found.summary
    if out.format == "csv":
        _csv(out, data.rows)
        return
    if out.is_table:
        read = "no tensor read" if found.fit is not None else "loaded by torch"
        out.line(file_line(ckpt, f"{seconds:.1f} s, {read}"), "bold")
        for line in _model_lines(found):
            out.line(f" {line}")
        out.line(f" {title(data)}")
        out.line()
    names, cells, _ = cells_of(data)
    if out.width is not None:
        names, cells = _fitted(names, cells, out.width)
    columns = [Column(name, name not in _LEFT, "cyan" if name == "name" else "") for name in names]
    out.table(columns, cells)
    if out.is_table:
        out.line()
        for i, line in enumerate(foot(data)):
            out.line(f" {line}", "" if i else "bold")
        if data.depth is not None and data.depth < data.deepest:
            next_one = f"--depth {data.depth + 1} · " if data.depth + 1 < data.deepest else ""
            out.line(f" more: {next_one}--depth all")
    for note in data.advice:
        out.note(str(note), note.way_out)


def _fitted(
    names: list[str], cells: list[list[str]], width: int
) -> tuple[list[str], list[list[str]]]:
    """The table as a terminal takes it: what rows share is said once, then columns give way, then
    long types and names are cut."""
    names, cells = list(names), [list(row) for row in cells]

    def over() -> int:
        columns = zip(names, *cells, strict=True)
        return sum(max(map(len, column)) + 2 for column in columns) - 2 - width

    if over() > 0:
        for row, short in zip(cells, _under([row[0] for row in cells]), strict=True):
            row[0] = short
    for least in ("%", "%", "buffers", "trainable"):
        if over() > 0 and least in names:
            at = len(names) - 1 - names[::-1].index(least)
            for row in (names, *cells):
                del row[at]
    for column, fewest in ((1, _TYPE), (0, _NAME)):
        longest = max((len(row[column]) for row in cells), default=0)
        most = max(fewest, longest - max(over(), 0))
        for row in cells:
            if len(row[column]) > most:
                cut = slice(1 - most, None) if column == 0 else slice(most - 1)
                row[column] = f"…{row[column][cut]}" if column == 0 else f"{row[column][cut]}…"
    # no number is ever cut
    for least in ("output", "type"):
        if over() > 0 and least in names:
            at = names.index(least)
            for row in (names, *cells):
                del row[at]
    most = max(_LEAST, max((len(row[0]) for row in cells), default=0) - max(over(), 0))
    for row in cells:
        row[0] = row[0] if len(row[0]) <= most else "…" + row[0][1 - most :]
    return names, cells


def _under(paths: list[str]) -> list[str]:
    """Names without the module that the last one written out is in: ``  .conv2``."""
    short, module = [], ""
    for path in paths:
        inner = path.removeprefix(module)
        if module and inner != path and inner.count(".") < 2:
            short.append(f"  .{inner}")
            continue
        short.append(path)
        module = path.rpartition(".")[0]
        module += "." * bool(module)
    return short


def _model_lines(found: View) -> list[str]:
    if found.arch is None or found.fit is None:
        return ["the module that the file holds, run since it is trusted"]
    args = "".join(f" --arch-arg {arg}" for arg in found.args)
    fit = found.fit
    how = ", identified by its tensors" if found.identified else ""
    under = f" without '{fit.prefix}'" if fit.prefix else ""
    problems = fit.problems()
    total = len(fit.loaded) + len(fit.unexpected) + len(fit.mismatched)
    which = f"{len(fit.loaded):,} of" if problems else "all"
    counts = f"{which} {count(total, 'tensor')} fit{under}"
    lines = [f"{found.arch}{args}{how}: {counts}"]
    return [*lines, *(f"  {problem}" for problem in problems)]


def _csv(out: Output, rows: Sequence[Layer]) -> None:
    """Exact numbers, for programs."""
    names = ("path", "type", "kernel", "stride", "repeat", "calls", "out_shape", "tensors")
    numbers = ("params", "trainable", "buffers", "nbytes", "macs")
    cells = [[_cell(getattr(row, name)) for name in (*names, *numbers)] for row in rows]
    columns = (*names, *(name if name != "nbytes" else "bytes" for name in numbers))
    out.table([Column(name) for name in columns], cells)


def _cell(value: Any) -> str:
    from ...nn.view.summary import shown

    if isinstance(value, tuple):
        return "x".join(map(str, value))
    if isinstance(value, Mapping):
        return shown(dict(value))
    return "" if value is None else str(value)


# ---------------------------------------------------------------------- for programs


def _json(document: Mapping[str, Any], found: View) -> dict[str, Any]:
    from .summary import counts

    data, fit = found.summary, found.fit
    totals = data.totals
    return {
        "totals": {
            **document["totals"],
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
        },
        "rows": [_row(row) for row in data.rows],
        "model": {
            "class": data.name,
            "arch": found.arch,
            "arch_args": list(found.args),
            "identified": found.identified,
            "mode": data.mode,
            "device": data.device,
            "input": data.inputs,
            "output": _dims(data.output),
        },
        "fit": None
        if fit is None
        else {
            "loaded": len(fit.loaded),
            "prefix": fit.prefix,
            "missing": list(fit.missing),
            "unexpected": list(fit.unexpected),
            "mismatched": [
                {"name": name, "found": list(theirs), "expected": list(own)}
                for name, theirs, own in fit.mismatched
            ],
        },
        "uncounted": [
            {"op": op, "module": module, "calls": calls} for op, module, calls in data.uncounted
        ],
        "advice": [note.text for note in data.advice],
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


def _dims(shape: Any) -> Any:
    """A shape as a list, several as an object of lists."""
    if isinstance(shape, Mapping):
        return {name: _dims(one) for name, one in shape.items()}
    return None if shape is None else list(shape)
