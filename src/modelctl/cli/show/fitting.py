"""How tables and lines fit a terminal: names are what people look for, and no number is ever cut.

How wide a text is on a screen says ``measure``: some letters take two places, some none.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from itertools import takewhile
from typing import NamedTuple

from ...core.pages import Column
from ...inspection.cells import is_number

Measure = Callable[[str], int]

_GAP = 2  # between columns
# What texts and names are cut to, while something else can go, and at last.
_TEXT, _NAME, _LEAST = 16, 28, 8
# What a text that is folded or cut keeps of its width.
_FEWEST = 10
# What stands for nothing in a column that says so.
_NOTHING = "-"


class Fitted(NamedTuple):
    """A table that fits: what all its names begin with, and the lines of each cell."""

    under: str
    columns: list[Column]
    widths: list[int]
    rows: list[list[list[str]]]


def fitted(
    columns: Sequence[Column], rows: Sequence[Sequence[str]], most: int, measure: Measure = len
) -> Fitted:
    """A table in ``most`` places: columns in which nothing stands go, what all names begin with is
    said once, then goes what can be spared, and at last names and texts get several lines."""
    kept, cells = _without_empty(columns, rows)
    under = ""
    if _over(kept, cells, most, measure) > 0:
        under = _shared([row[_names(kept)] for row in cells])
        for row in cells:
            row[_names(kept)] = row[_names(kept)].removeprefix(under)
    if any(column.spare for column in kept):
        kept, cells = without_spare(kept, cells, most, measure)
    found = widths(kept, cells, most, measure)
    lines = [
        [
            [cell] if measure(cell) <= width else wrapped(cell, width, measure)
            for cell, width in zip(row, found, strict=True)
        ]
        for row in cells
    ]
    return Fitted(under, kept, found, lines)


def widths(
    columns: Sequence[Column], rows: Sequence[Sequence[str]], most: int, measure: Measure = len
) -> list[int]:
    """The widths of columns whose cells are folded where they don't fit: texts give way first, the
    longest first, then names, each a part of it before any gives all; numbers and shapes are as
    wide as they are."""
    found = [
        max(measure(text) for text in (column.name, *(row[i] for row in rows)))
        for i, column in enumerate(columns)
    ]
    names = _names(columns)

    def give(i: int, least: int) -> None:
        over = sum(found) + _GAP * (len(found) - 1) - most
        found[i] = max(min(found[i], least), found[i] - max(over, 0))

    texts = [i for i, one in enumerate(columns) if i != names and not _whole(one)]
    for text, name in ((_TEXT, _NAME), (_FEWEST, _LEAST)):
        for i in sorted(texts, key=lambda i: -found[i]):
            give(i, text)
        if columns and not _whole(columns[names]):
            give(names, name)
    return found


def without_spare(
    columns: Sequence[Column], rows: Sequence[Sequence[str]], most: int, measure: Measure = len
) -> tuple[list[Column], list[list[str]]]:
    """A table whose rows keep to one line each: what the names share is said once, then numbers
    that can be spared go, long texts and names are cut, and the texts that can be spared go."""
    columns, cells = list(columns), [list(row) for row in rows]

    def over() -> int:
        return _over(columns, cells, most, measure)

    def leave_out(numbers: bool) -> None:
        spare = [one for one in columns if one.spare and is_number(one) is numbers]
        for one in sorted(spare, key=lambda one: one.spare):
            if over() > 0:
                at = columns.index(one)
                del columns[at]
                for row in cells:
                    del row[at]

    def cut(at: int, least: int) -> None:
        if at >= len(columns) or _whole(columns[at]):
            return
        longest = max((measure(row[at]) for row in cells), default=0)
        room = max(least, longest - max(over(), 0))
        for row in cells:
            row[at] = _cut(row[at], room, columns[at].kind == "name", measure)

    if over() > 0:
        for row, short in zip(cells, _under([row[0] for row in cells]), strict=True):
            row[0] = short
    leave_out(numbers=True)
    cut(1, _TEXT)
    cut(0, _NAME)
    leave_out(numbers=False)
    cut(0, _LEAST)
    return columns, cells


def wrapped(text: str, most: int, measure: Measure = len, end: str = "") -> list[str]:
    """A text in lines of at most ``most`` places, broken between its parts where it has some that
    fit, else between words; lines after the first are indented further, those before the last have
    ``end``. With an end it is a command that goes on after a backslash: a word of it is the same
    when it is pasted, and one in quotes stays whole."""
    if measure(text) <= most:
        return [text]
    indent = " " * min(len(text) - len(text.lstrip()) + 2, most // 4)
    room = max(most - measure(end), 1)
    lines, line = [], ""
    for word in _COMMAND.findall(text) if end else _words(text, room - len(indent), measure):
        if line.strip() and measure(line + word) > room:
            lines.append(line + end)
            line, word = indent, word.lstrip()
        line += word
        if measure(line) > room and not (end and "'" in line):
            *full, line = _pieces(line, room, "" if end else indent, measure)
            lines += [one + end.strip() for one in full]
    return [*lines, line]


def _words(text: str, room: int, measure: Measure) -> Iterator[str]:
    """What a line is not broken in: parts between dots or wide gaps, words of longer ones."""
    for part in _PARTS.findall(text):
        yield from [part] if measure(part.lstrip()) <= room else _WORDS.findall(part)


def _pieces(word: str, room: int, indent: str, measure: Measure) -> Iterator[str]:
    """A word that is longer than a line: cut between its parts, never in a number."""
    at, start = 0, ""
    while at < len(word):
        to = min(len(word), at + room)
        while to > at + 1 and measure(start + word[at:to]) > room:
            to -= 1
        if to < len(word):
            least = at + (to - at) // 3
            places = range(to, least, -1)
            modules = (i for i in places if _MODULE.match(word, i - 1))
            parts = (i for i in places if _PART.match(word, i - 1))
            plain = (i for i in places if not _NUMBER.match(word, i - 1))
            to = next(modules, None) or next(parts, None) or next(plain, to)
        yield start + word[at:to]
        at, start = to, indent


_PARTS = re.compile(r"\s*(?:(?! ·|\s{3,}).)+(?: ·)?", re.DOTALL)
# A number and its unit are one word.
_WORDS = re.compile(r"\s*(?:\(?\d[\d,.]* (?:[kMGT]?B|k|M|G|s)\b\S*|\S+)")
_COMMAND = re.compile(r"\s*(?:'[^']*'|\S)+")
_MODULE = re.compile(r"/|\.(?!\d)")
_PART = re.compile(r"[/_:=;|-]|[.,](?!\d)")
_NUMBER = re.compile(r"[\d.,]\d|\d[.,]")


def _whole(column: Column) -> bool:
    """Whether a cell is never folded or cut."""
    return is_number(column) or column.kind in ("shape", "answer", "change")


def _names(columns: Sequence[Column]) -> int:
    """Where the names stand."""
    return next((i for i, column in enumerate(columns) if column.kind == "name"), 0)


def _over(
    columns: Sequence[Column], rows: Sequence[Sequence[str]], most: int, measure: Measure
) -> int:
    """How many places a table lacks."""
    lines = [[column.name for column in columns], *rows]
    return sum(max(map(measure, one)) + _GAP for one in zip(*lines, strict=True)) - _GAP - most


def _without_empty(
    columns: Sequence[Column], rows: Sequence[Sequence[str]]
) -> tuple[list[Column], list[list[str]]]:
    kept = [
        i
        for i, column in enumerate(columns)
        if not rows or column.none != _NOTHING or any(row[i] != _NOTHING for row in rows)
    ]
    return [columns[i] for i in kept], [[row[i] for i in kept] for row in rows]


def _shared(names: Sequence[str]) -> str:
    """The modules that all names are in, with the dot; of one name none."""
    names = [name for name in names if name != "(root)"]
    if len(names) < 2:
        return ""
    least, last = (name.split(".")[:-1] for name in (min(names), max(names)))
    same = takewhile(lambda pair: pair[0] == pair[1], zip(least, last, strict=False))
    return "".join(f"{part}." for part, _ in same)


def _cut(text: str, most: int, from_left: bool, measure: Measure) -> str:
    if measure(text) <= most:
        return text
    short = text
    while short and measure(short) > most - 1:
        short = short[1:] if from_left else short[:-1]
    if not from_left:
        return f"{short}…"
    if not text.removesuffix(short).endswith("."):  # of a module's name no piece
        short = short[max(short.find(".", 0, len(short) // 2), 0) :]
    return f"…{short}"


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
