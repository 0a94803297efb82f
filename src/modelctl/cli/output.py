"""How reports reach people and pipes. The only user of rich and tabulate."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

from ..core.text import printable

# Seconds before a bar appears.
_PATIENCE = 0.5


class Column(NamedTuple):
    """A column: its heading, whether it holds numbers, and a colour for a terminal."""

    name: str
    right: bool = False
    style: str = ""


class Output:
    """Reports on stdout, all else on stderr; colour and width never change what a pipe gets."""

    def __init__(self, format: str = "table", color: str = "auto", quiet: bool = False) -> None:
        self.format, self.color, self.quiet = format, color, quiet

    @property
    def is_json(self) -> bool:
        return self.format == "json"

    @property
    def is_table(self) -> bool:
        """True where people read it: headings, totals and notes belong in it."""
        return self.format == "table"

    @property
    def fancy(self) -> bool:
        """True for a terminal, where rich may style and fit a table."""
        if self.color != "auto":
            return self.color == "always"
        return sys.stdout.isatty() and os.environ.get("TERM") != "dumb"

    @property
    def width(self) -> int | None:
        """Columns of the terminal; None where width is nothing to care for."""
        return self._console().width if self.is_table and self.fancy else None

    def json(self, command: str, data: dict[str, Any]) -> None:
        """One JSON object with its schema; exact integers, null for unknown."""
        import json

        document = {"schema": f"modelctl.{command}/1", **data}
        sys.stdout.write(json.dumps(document, indent=2, allow_nan=False) + "\n")

    def line(self, text: str = "", style: str = "") -> None:
        """A line of the report."""
        text = printable(text)
        if style and self.fancy and not os.environ.get("NO_COLOR"):
            self._console().print(text, style=style, markup=False, highlight=False, soft_wrap=True)
        else:
            sys.stdout.write(text + "\n")

    def lines(self, texts: Sequence[str]) -> None:
        """Many plain lines at once."""
        sys.stdout.write("".join(printable(text) + "\n" for text in texts))

    def note(self, text: str, hint: str | None = None) -> None:
        """A remark beside the report, on stderr; warnings begin with ``warning:``."""
        if not self.quiet:
            print(printable(text), file=sys.stderr)
            if hint:
                print(f"hint: {printable(hint)}", file=sys.stderr)

    @contextmanager
    def progress(self, what: str) -> Iterator[Callable[[int, int], None] | None]:
        """What to call with the bytes done since the last call, and how many there are in all: a
        bar on stderr, where that is a terminal and it takes a while."""
        if self.quiet or self.color == "never" or not sys.stderr.isatty():
            yield None
            return
        bar: Any = None
        done = 0
        started = time.monotonic()

        def advance(more: int, total: int) -> None:
            nonlocal bar, done
            done += more
            if bar is None and time.monotonic() - started > _PATIENCE:
                bar = _bar()
                bar.start()
                bar.add_task(printable(what), total=total, completed=done)
            elif bar is not None:
                bar.update(bar.task_ids[0], completed=done, total=max(done, total))

        try:
            yield advance
        finally:
            if bar is not None:
                bar.stop()

    def table(self, columns: Sequence[Column], rows: Sequence[Sequence[str]]) -> None:
        """Rows under headings: rich in a terminal, tabulate elsewhere, csv for spreadsheets."""
        clean = [[printable(cell) for cell in row] for row in rows]
        if self.format == "csv":
            import csv

            writer = csv.writer(sys.stdout, lineterminator="\n")
            writer.writerow([column.name for column in columns])
            writer.writerows(clean)
        elif self.format == "table" and self.fancy:
            self._rich_table(columns, clean)
        else:
            from tabulate import tabulate

            text = tabulate(
                clean,
                headers=[column.name for column in columns],
                tablefmt="github" if self.format == "markdown" else "plain",
                colalign=["right" if column.right else "left" for column in columns]
                if clean
                else None,
                disable_numparse=True,
            )
            sys.stdout.write("".join(line.rstrip() + "\n" for line in text.splitlines()))

    def _rich_table(self, columns: Sequence[Column], rows: Sequence[Sequence[str]]) -> None:
        from rich.table import Table
        from rich.text import Text

        last, width = len(columns) - 1, self._console().width
        widths = [
            max(len(text) for text in (column.name, *(row[i] for row in rows)))
            for i, column in enumerate(columns)
        ]

        def give(i: int, least: int) -> None:
            over = sum(widths) + 2 * last - width
            widths[i] = max(min(widths[i], least), widths[i] - max(over, 0))

        # names are what people look for, and numbers are never cut: the rest gives way
        texts = [i for i, column in enumerate(columns) if i and not column.right]
        for i in sorted(texts, key=lambda i: -widths[i]):
            give(i, 10)
        give(0, width * 3 // 5)
        table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), header_style="bold")
        for i, column in enumerate(columns):
            whole = i == 0 or (i == last and not column.right)  # in several lines if need be
            table.add_column(
                Text(column.name),
                justify="right" if column.right else "left",
                style=column.style,
                no_wrap=not whole,
                overflow="fold" if whole else "ellipsis",
                width=widths[i],
            )
        for row in rows:
            table.add_row(*(Text(cell) for cell in row))
        # a terminal that is too narrow wraps the lines
        self._console(max(width, sum(widths) + 2 * last)).print(table)

    def _console(self, width: int | None = None) -> Any:
        from rich.console import Console

        return Console(
            width=width,
            force_terminal=self.color == "always" or None,
            no_color=bool(os.environ.get("NO_COLOR")) or None,
            highlight=False,
        )


def _bar() -> Any:
    from rich.console import Console
    from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TransferSpeedColumn

    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        DownloadColumn(),
        TransferSpeedColumn(),
    )
    return Progress(*columns, console=Console(stderr=True), transient=True)


def size(nbytes: int) -> str:
    """Bytes for people: decimal units, three digits."""
    if nbytes < 1000:
        return f"{nbytes} B"
    value = float(nbytes)
    for unit in ("kB", "MB", "GB", "TB", "PB"):
        value /= 1000
        if value < 999.95 or unit == "PB":
            return f"{value:.1f} {unit}"
    raise AssertionError


def shape(dims: Sequence[int | str] | None) -> str:
    """A shape for people: ``64x3x7x7``; a scalar has none."""
    return "" if dims is None else "x".join(map(str, dims)) or "scalar"


def count(n: int, what: str) -> str:
    """``1 tensor``, ``97 tensors``."""
    return f"{n:,} {what}{'' if n == 1 else 's'}"
