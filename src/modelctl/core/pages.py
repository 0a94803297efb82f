"""Pages: what a report says, before it is known who reads it.

A report is data that knows its own dict, for programs, and its page, for people. A page has lines
and tables whose cells are values; how they look on a screen, in a pipe, a spreadsheet or a document
is the business of who shows the page.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple, Protocol

from .notes import Note

# What the cells of a column are; a text in a column of another kind stands for itself. A change is
# a sign: + - ~.
Kind = Literal["text", "name", "count", "number", "percent", "bytes", "shape", "answer", "change"]

# What long work is told to: a name, the bytes done since the last call, how many there are in all.
Progress = Callable[[str, int, int], object]


def told(progress: Progress | None, name: str) -> Callable[[int, int], object] | None:
    """The progress of one thing, by its name."""
    return None if progress is None else lambda more, total: progress(name, more, total)


class Column(NamedTuple):
    """A column of a table.

    Attributes:
        none: what people read where there is nothing: None, or 0 of something that is counted.
        spare: where a screen is too narrow, columns with a number here are left out, the lowest
            first, those of numbers before those of texts; with 0 a column stays.
    """

    name: str
    kind: Kind = "text"
    none: str = ""
    spare: int = 0


class Table(NamedTuple):
    """Rows of values under columns. On a terminal, ``most`` rows are enough to read."""

    columns: Sequence[Column]
    rows: Sequence[Sequence[Any]]
    most: int | None = None


class Line(NamedTuple):
    """A line of text; ``strong`` where the eye is to fall first."""

    text: str = ""
    strong: bool = False


@dataclass(frozen=True)
class Page:
    """What a report says.

    Attributes:
        body: lines and tables, for people.
        data: the report as one table, for programs.
        tables: what a document takes of it, where that is not ``data``.
        notes: remarks beside the report.
    """

    body: Iterable[Line | Table]
    data: Table
    tables: Sequence[Table] = ()
    notes: Sequence[Note] = ()


class Report(Protocol):
    """What an operation found or did."""

    def as_dict(self) -> dict[str, Any]:
        """All of it, in values that JSON knows: exact integers, None for unknown."""
        ...

    def page(self) -> Page:
        """What people read of it."""
        ...
