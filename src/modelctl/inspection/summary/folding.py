"""Runs of numbered modules that are alike, in one row: ``layers.{0-31}``."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from itertools import groupby
from typing import Protocol, TypeVar

_NUMBERED = re.compile(r"(.*?)(\d+)$", re.DOTALL)


class _HasPath(Protocol):
    @property
    def path(self) -> str: ...


R = TypeVar("R", bound=_HasPath)


def folded(
    rows: Sequence[R], makeup: Callable[[R], object], join: Callable[[str, list[R]], R]
) -> list[R]:
    """Rows in which neighbours that differ by their number alone are one.

    From the outermost modules inwards: what stands side by side, is called the same but for the
    number at its end (``layers.0``, ``encoder_layer_0``), and has the same rows inside.

    Args:
        rows: in the order of the model.
        makeup: what has to be the same, beside the names inside.
        join: one row under a new path for several that are alike.
    """
    return _folded(list(rows), 0, makeup, join)


def _folded(
    rows: list[R],
    level: int,
    makeup: Callable[[R], object],
    join: Callable[[str, list[R]], R],
) -> list[R]:
    out: list[R] = []
    run: list[list[R]] = []

    def flush() -> None:
        if len(run) > 1:
            first, last = (_segments(one[0])[level] for one in (run[0], run[-1]))
            stem, low = _parts(first)
            label = f"{stem}{{{low}-{_parts(last)[1]}}}"
            for alike in zip(*run, strict=True):
                parts = _segments(alike[0])
                join_path = ".".join((*parts[:level], label, *parts[level + 1 :]))
                out.append(join(join_path, list(alike)))
        elif run:
            deeper = [row for row in run[0] if len(_segments(row)) > level + 1]
            if deeper and len(run[0]) > 1:
                out.extend(_folded(run[0], level + 1, makeup, join))
            else:
                out.extend(run[0])
        run.clear()

    before: object = None
    groups = groupby(rows, lambda row: _segments(row)[: level + 1])
    for segments, grouped in groups:
        inside = list(grouped)
        if len(segments) <= level:  # the row of the module that all are in
            flush()
            out.extend(inside)
            before = None
            continue
        stem, number = _parts(segments[level])
        alike = (stem, [(_segments(row)[level + 1 :], makeup(row)) for row in inside])
        if not run or number is None or alike != before:
            flush()
        run.append(inside)
        before = alike if number is not None else None
    flush()
    return out


def _segments(row: _HasPath) -> list[str]:
    return row.path.split(".")


def _parts(segment: str) -> tuple[str, str | None]:
    found = _NUMBERED.fullmatch(segment)
    return (found[1], found[2]) if found else (segment, None)
