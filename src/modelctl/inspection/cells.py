"""Values as people read them, and as programs do."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from ..core.pages import Column, Table
from ..core.text import printable, shape, size

_ANSWERS = {True: "yes", False: "no", None: "?"}
_RIGHT = ("count", "number", "percent", "bytes")


def is_number(column: Column) -> bool:
    """Whether a column's cells are flush right, and never cut."""
    return column.kind in _RIGHT


def for_people(table: Table) -> list[list[str]]:
    """The cells of a table: thousands parted, bytes with their unit."""
    columns = table.columns
    return [[_shown(*pair) for pair in zip(columns, row, strict=True)] for row in table.rows]


def for_programs(table: Table) -> list[list[str]]:
    """The cells of a table: exact numbers, and nothing where nothing is known."""
    columns = table.columns
    return [[_exact(*pair) for pair in zip(columns, row, strict=True)] for row in table.rows]


def _shown(column: Column, value: Any) -> str:
    if isinstance(value, str):
        return printable(value)
    if column.kind == "answer":
        return _ANSWERS[value]
    if value is None or (column.none and value == 0 and column.kind != "number"):
        return column.none
    if column.kind == "shape":
        return shape(value)
    if column.kind == "bytes":
        return size(value)
    if column.kind == "percent":
        return f"{value:.2f}"
    if column.kind == "number" and isinstance(value, float):
        return f"{value:.4g}"
    return f"{value:,}" if column.kind == "count" else str(value)


def _exact(column: Column, value: Any) -> str:
    if isinstance(value, str):
        return printable(value)
    if column.kind == "answer":
        return _ANSWERS[value]
    if isinstance(value, Sequence):
        return shape(value)
    return "" if value is None else str(value)
