"""Runs of numbered modules that are alike, in one row: ``layers.{0-31}``."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from itertools import groupby
from typing import Protocol, TypeVar

# Of more only the first and the last number are said.
_MOST_RANGES = 3
_MOST_DIGITS = 18
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
            parted = [_parts(_segments(one[0])[level]) for one in run]
            label = f"{parted[0][0]}{{{_numbers([number or '' for _, number in parted])}}}"
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


def _numbers(numbers: Sequence[str]) -> str:
    """Numbers as ranges (``0-4,10-11``; a file may be sorted by name), or the least and the
    greatest where there are many ranges."""
    ordered = sorted(numbers, key=lambda number: (len(number), number))
    ranges = [[ordered[0], ordered[0]]]
    for number in ordered[1:]:
        before = ranges[-1][1]
        if len(number) <= _MOST_DIGITS and int(number) == int(before) + 1:
            ranges[-1][1] = number
        else:
            ranges.append([number, number])
    if len(ranges) > _MOST_RANGES:
        return f"{ordered[0]}-{ordered[-1]}"
    return ",".join(low if low == high else f"{low}-{high}" for low, high in ranges)
