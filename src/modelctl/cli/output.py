"""How reports reach people and pipes. The only user of tabulate, and of rich but for the bar."""

from __future__ import annotations

import math
import os
import re
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from itertools import islice
from typing import Any

from ..core.checkpoint import Checkpoint
from ..core.notes import Note
from ..core.pages import Line, Page, Progress, Report, Table
from ..core.text import printable, some
from ..core.text import table as aligned
from ..errors import ModelctlError
from ..inspection.cells import for_people, for_programs, is_number
from ..progress import Bar, on_terminal
from .show.fitting import fitted, wrapped

# The outputs that stand: what went wrong on stdout did not undo them.
_written: list[str] = []


@contextmanager
def to_stdout() -> Iterator[None]:
    """What goes wrong inside is stdout's.

    Raises:
        ModelctlError: it can't be written; says which outputs stand.
        BrokenPipeError: nobody reads any more.
    """
    try:
        yield
    except BrokenPipeError:
        raise
    except OSError as e:
        hint = f"written all the same: {some(_written)}" if _written else None
        raise ModelctlError(f"stdout: {e.strerror or e}", hint=hint) from e


def report_beside() -> None:
    """Print on stderr what belongs on stdout, which is for the output itself; until :func:`run`
    ends."""
    sys.stdout.flush()
    sys.stdout = sys.stderr


def degrade(e: UnicodeError) -> tuple[str | bytes, int]:
    """What an encoding lacks, in ASCII: for streams, by :func:`codecs.register_error`."""
    if not isinstance(e, UnicodeEncodeError):
        raise e
    text = e.object[e.start : e.end]
    return "".join(_ASCII.get(c) or _escaped(c) for c in text), e.end


_ASCII = {"…": "...", "·": "-", "×": "x", "→": "->", "─": "-", "━": "-", "│": "|", "±": "+-"}


def _escaped(c: str) -> str:
    return c.encode("ascii", "backslashreplace").decode()


class Output:
    """Reports on stdout, all else on stderr; colour and width never change what a pipe gets."""

    def __init__(
        self, command: str, format: str = "table", color: str = "auto", quiet: bool = False
    ) -> None:
        self.command, self.format, self.color, self.quiet = command, format, color, quiet
        _written.clear()
        self._bar: Bar | None = None

    @property
    def is_json(self) -> bool:
        return self.format == "json"

    @property
    def is_table(self) -> bool:
        """True where people read it: lines, totals and hints belong in it."""
        return self.format == "table"

    @property
    def fancy(self) -> bool:
        """True for a terminal, where rich may style and fit a table."""
        if self.color != "auto":
            return self.color == "always"
        return _is_terminal(sys.stdout)

    def show(self, report: Report, page: Callable[[], Page] | None = None) -> None:
        """A report, as it is asked for; ``page`` where people get another one than usual."""
        self._end_bar()
        _written.extend(getattr(report, "written", ()))
        if self.is_json:
            write_json(self.command, report.as_dict())
        else:
            with to_stdout():
                self._show(report, page)

    def done(self, report: Report) -> None:
        """What an edit did, unless it is to be quiet."""
        if self.quiet and self.is_table:
            self._end_bar()
            _written.extend(getattr(report, "written", ()))
        else:
            self.show(report)

    def _show(self, report: Report, page: Callable[[], Page] | None) -> None:
        made = report.page() if page is None else page()
        if self.format == "csv":
            _write_csv(made.data)
        elif self.format == "markdown":
            for i, table in enumerate(made.tables or (made.data,)):
                sys.stdout.write("\n" * bool(i))
                _write_markdown(table)
        else:
            for part in made.body:
                self._line(part) if isinstance(part, Line) else self._table(part)
        for note in made.notes:
            if self.is_table or note.level in ("advice", "warning"):
                self.note(note)

    def lines(self, texts: Sequence[str]) -> None:
        """Many plain lines at once."""
        with to_stdout():
            sys.stdout.write("".join(printable(text) + "\n" for text in texts))

    def note(self, note: Note) -> None:
        """A remark beside the report, on stderr."""
        if not self.quiet:
            say("" if note.level == "info" else note.level, note.text, self.color)
            if note.way_out:
                say("hint", note.way_out, self.color)

    def warn(self, *checkpoints: Checkpoint) -> None:
        """What unpickling these would run, on stderr."""
        from ..inspection.dangers import would_run

        for note in would_run(*checkpoints):
            self.note(note._replace(way_out=None))

    @contextmanager
    def progress(self) -> Iterator[Progress | None]:
        """What to tell of long work: see :mod:`modelctl.progress`."""
        with on_terminal(not self.quiet and self.color != "never") as self._bar:
            yield self._bar

    def _end_bar(self) -> None:
        """A bar is gone before anything else is printed."""
        if self._bar is not None:
            self._bar.end()

    # ------------------------------------------------------------------ for people

    def _line(self, line: Line, style: str = "bold") -> None:
        text = printable(line.text)
        if not self.fancy:
            sys.stdout.write(text + "\n")
            return
        screen = self._screen()
        for part in _lines(text, screen.width):
            _print(screen, part, style if line.strong else "")

    def _table(self, table: Table) -> None:
        """Rows under headings: in a terminal rich styles and fits them."""
        if not self.fancy:
            _write_plain(table)
            return
        self._rich_table(table)
        more = len(table.rows) - len(table.rows[: table.most])
        if more:
            self._line(Line(f"… and {more:,} more: --format json has all"))

    def _rich_table(self, table: Table) -> None:
        from rich.cells import cell_len
        from rich.table import Table as RichTable
        from rich.text import Text

        most = self._screen().width
        rows = for_people(table._replace(rows=table.rows[: table.most]))
        under, columns, widths, cells = fitted(table.columns, rows, most, cell_len)
        if under:
            self._line(Line(f"names under '{under}':", strong=True), style="dim")
        made = RichTable(box=None, pad_edge=False, padding=(0, 2, 0, 0), header_style="bold")
        for column, width in zip(columns, widths, strict=True):
            made.add_column(
                Text(column.name),
                justify="right" if is_number(column) else "left",
                style="cyan" if column.kind == "name" and columns[0].kind != "change" else "",
                no_wrap=True,
                width=width,
            )
        for row in cells:
            texts = [
                Text("\n".join(cell), _STYLES.get((column.kind, cell[0]), ""))
                for column, cell in zip(columns, row, strict=True)
            ]
            made.add_row(*texts, style=_ROWS.get(str(texts[0]), ""))
        # a terminal that is too narrow for the numbers wraps the lines
        self._screen(max(most, sum(widths) + 2 * (len(widths) - 1))).print(made)

    def _screen(self, width: int | None = None) -> Any:
        return _screen(self.color, width=width)


def say(label: str, text: str, color: str = "auto") -> None:
    """A line on stderr: ``label`` says what it is (error, warning, hint), if it has one."""
    said = printable(f"{label}: {text}" if label else text)
    if color == "never" or (color == "auto" and not _is_terminal(sys.stderr)):
        print(said, file=sys.stderr)
        return
    screen = _screen(color, stderr=True)
    # a command goes on after a backslash, and can be pasted
    end = " \\" if text.startswith("modelctl ") else ""
    for i, part in enumerate(_lines(said, screen.width, end)):
        _print(screen, part, _LABELS.get(label, ""), len(label) + 1 if i == 0 else 0)


_LABELS = {"error": "bold red", "warning": "yellow", "advice": "yellow", "hint": "cyan"}
# What would end a cell of Markdown, or be a link, HTML, code or emphasis in it (GFM 6).
_MARKS = re.compile(r"[\\`*\[\]<|]|(?<!\w)_|_(?!\w)|~(?=~)")
_STYLES = {("answer", "yes"): "green", ("answer", "no"): "dim"}
_ROWS = {"+": "green", "-": "red"}


def _is_terminal(stream: Any) -> bool:
    return stream.isatty() and os.environ.get("TERM") != "dumb"


def _screen(color: str, stderr: bool = False, width: int | None = None) -> Any:
    from rich.console import Console

    return Console(
        stderr=stderr,
        width=width,
        force_terminal=color == "always" or None,
        no_color=bool(os.environ.get("NO_COLOR")) or None,
        highlight=False,
    )


def _lines(text: str, width: int, end: str = "") -> list[str]:
    from rich.cells import cell_len

    return wrapped(text, width, cell_len, end)


def _print(screen: Any, text: str, style: str, most: int | None = None) -> None:
    """A line that fits; ``style`` is for its first ``most`` letters."""
    from rich.text import Text

    made = Text(text)
    made.stylize(style, 0, most)
    screen.print(made, soft_wrap=True)


def write_json(schema: str | None, data: dict[str, Any]) -> None:
    """One JSON object, with its schema where it is one of ours; exact integers, null for unknown
    and for what is no number there (NaN, infinities)."""
    import json

    document = data if schema is None else {"schema": f"modelctl.{schema}/1", **data}
    encoder = json.JSONEncoder(indent=2, allow_nan=False)
    pieces = encoder.iterencode(_finite(document))  # one text would be as large as its tree
    with to_stdout():
        while piece := "".join(islice(pieces, 10_000)):
            sys.stdout.write(piece)
        sys.stdout.write("\n")


def _finite(value: Any) -> Any:
    """JSON knows no NaN and no infinities: null; what has none is the same object."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, dict):
        found = {key: _finite(one) for key, one in value.items()}
        return found if any(found[key] is not one for key, one in value.items()) else value
    if isinstance(value, list | tuple):
        made = [_finite(one) for one in value]
        return made if any(a is not b for a, b in zip(made, value, strict=True)) else value
    return value


def _write_csv(table: Table) -> None:
    import csv

    writer = csv.writer(sys.stdout, lineterminator="\n")
    writer.writerow([column.name for column in table.columns])
    writer.writerows([_no_formula(cell) for cell in row] for row in for_programs(table))


def _no_formula(cell: str) -> str:
    """A cell that a spreadsheet would compute, as text there (OWASP, CSV Injection): a name in a
    file is whatever its writer wanted. Signs alone and numbers are none."""
    if len(cell) < 2 or cell[0] not in "=+-@\t\r":
        return cell
    try:
        float(cell)
    except ValueError:
        return f"'{cell}"
    return cell


def _write_plain(table: Table) -> None:
    right = [i for i, column in enumerate(table.columns) if is_number(column)]
    names = [column.name for column in table.columns]
    sys.stdout.write(aligned(names, for_people(table), right, beside=2) + "\n")


def _write_markdown(table: Table) -> None:
    from tabulate import tabulate

    rows = [[_MARKS.sub(r"\\\g<0>", cell) for cell in row] for row in for_people(table)]
    text = tabulate(
        rows,
        headers=[column.name for column in table.columns],
        tablefmt="github",
        colalign=["right" if is_number(c) else "left" for c in table.columns] if rows else None,
        disable_numparse=True,
    )
    sys.stdout.write(text + "\n")
