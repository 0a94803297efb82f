"""Reports by themselves: ``print(report)`` gives what the command prints."""

from __future__ import annotations

from html import escape

from ..core.pages import Line, Page
from ..core.text import printable, table
from .cells import for_people, is_number


class Printed:
    """A report whose text is its page, as a pipe gets it; remarks come after it."""

    def page(self) -> Page:
        raise NotImplementedError

    def __str__(self) -> str:
        return "\n".join(_lines(self.page()))

    def _repr_html_(self) -> str:
        return f"<pre>{escape(str(self))}</pre>"


def _lines(page: Page) -> list[str]:
    lines = []
    for part in page.body:
        if isinstance(part, Line):
            lines.append(printable(part.text))
            continue
        right = [i for i, column in enumerate(part.columns) if is_number(column)]
        lines.append(table([c.name for c in part.columns], for_people(part), right, beside=2))
    for note in page.notes:
        lines.append(printable(str(note)))
        lines += [f"hint: {printable(note.way_out)}"] if note.way_out else []
    return lines
