"""How a table fits a terminal: names are what people look for, and no number is ever cut."""

from __future__ import annotations

from collections.abc import Sequence

from ...core.pages import Column
from ...inspection.cells import is_number

_GAP = 2  # between columns
# What texts and names are cut to, while something else can go, and at last.
_TEXT, _NAME, _LEAST = 16, 28, 8
# What a text that is folded or cut keeps of its width.
_FEWEST = 10


def widths(columns: Sequence[Column], rows: Sequence[Sequence[str]], most: int) -> list[int]:
    """The widths of columns whose cells are folded or cut where they don't fit: texts give way
    first, the longest first, then names; numbers are as wide as they are."""
    last = len(columns) - 1
    found = [
        max(len(text) for text in (column.name, *(row[i] for row in rows)))
        for i, column in enumerate(columns)
    ]

    def give(i: int, least: int) -> None:
        over = sum(found) + _GAP * last - most
        found[i] = max(min(found[i], least), found[i] - max(over, 0))

    texts = [i for i, column in enumerate(columns) if i and not is_number(column)]
    for i in sorted(texts, key=lambda i: -found[i]):
        give(i, _FEWEST)
    give(0, most * 3 // 5)
    return found


def without_spare(
    columns: Sequence[Column], rows: Sequence[Sequence[str]], most: int
) -> tuple[list[Column], list[list[str]]]:
    """A table whose rows keep to one line each: what the names share is said once, then numbers
    that can be spared go, long texts and names are cut, and the texts that can be spared go."""
    columns, cells = list(columns), [list(row) for row in rows]

    def over() -> int:
        lines = [[column.name for column in columns], *cells]
        return (
            sum(max(map(len, column)) + _GAP for column in zip(*lines, strict=True)) - _GAP - most
        )

    def leave_out(numbers: bool) -> None:
        spare = [one for one in columns if one.spare and is_number(one) is numbers]
        for one in sorted(spare, key=lambda one: one.spare):
            if over() > 0:
                at = columns.index(one)
                del columns[at]
                for row in cells:
                    del row[at]

    def cut(at: int, least: int) -> None:
        if at >= len(columns) or is_number(columns[at]):
            return
        longest = max((len(row[at]) for row in cells), default=0)
        room = max(least, longest - max(over(), 0))
        for row in cells:
            row[at] = _cut(row[at], room, from_left=columns[at].kind == "name")

    if over() > 0:
        for row, short in zip(cells, _under([row[0] for row in cells]), strict=True):
            row[0] = short
    leave_out(numbers=True)
    cut(1, _TEXT)
    cut(0, _NAME)
    leave_out(numbers=False)
    cut(0, _LEAST)
    return columns, cells


def _cut(text: str, most: int, from_left: bool) -> str:
    if len(text) <= most:
        return text
    return f"…{text[1 - most :]}" if from_left else f"{text[: most - 1]}…"


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
