"""How things read: names in a row, shapes, counts and sizes, and plain tables."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from shlex import quote
from typing import Literal


def printable(text: str) -> str:
    """The text with control and other unprintable characters escaped, for a terminal."""
    if text.isprintable():
        return text
    return "".join(
        c if c.isprintable() else c.encode("unicode_escape", "backslashreplace").decode()
        for c in text
    )


def some(names: Sequence[str], most: int = 5) -> str:
    """The first few of many names, and how many more there are."""
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(names[:most]) + more


def either(words: Iterable[str]) -> str:
    """Words of which one is meant: ``a, b or c``."""
    *others, last = words
    return f"{', '.join(others)} or {last}" if others else last


def shape(dims: Sequence[int | str] | None) -> str:
    """A shape: ``64x3x7x7``; ``scalar`` has no dimensions, and what has no shape is ''."""
    return "" if dims is None else "x".join(map(str, dims)) or "scalar"


def count(n: int, what: str) -> str:
    """``1 tensor``, ``97 tensors``, ``1,000 tensors``."""
    return f"{n:,} {what}{'' if n == 1 else 's'}"


def size(nbytes: int) -> str:
    """Bytes in decimal units: ``512 B``, ``1.5 kB``, ``102.4 MB``."""
    if nbytes < 1000:
        return f"{nbytes} B"
    value = float(nbytes)
    for unit in ("kB", "MB", "GB", "TB", "PB"):
        value /= 1000
        if value < 999.95 or unit == "PB":
            return f"{value:.1f} {unit}"
    raise AssertionError


def short(n: int, of: str = "") -> str:
    """A number in three digits and a unit: ``4.09 G``, and ``of`` something: ``102 MB``."""
    if n < 1000:
        return f"{n} {of}".rstrip()
    value = float(n)
    for unit in ("k", "M", "G", "T", "P"):
        value /= 1000
        if value < 999.5 or unit == "P":
            digits = 2 if value < 9.995 else 1 if value < 99.95 else 0
            return f"{value:.{digits}f} {unit}{of}"
    raise AssertionError


def prefix_command(do: Literal["strip", "add"], path: str, prefix: str) -> str:
    """The command that takes a prefix away from the names of a file, or gives them one."""
    command = {"strip": "modelctl strip-prefix", "add": "modelctl add-prefix"}[do]
    return f"{command} {quote(path)} --prefix {quote(prefix)} -o NEW.pt"


def table(
    header: Sequence[str],
    rows: Sequence[Sequence[str]],
    right: Sequence[int] = (),
    beside: int = 0,
) -> str:
    """Rows under a header, in aligned columns; those whose index is in ``right`` flush right.
    ``beside`` is the room that a heading has at least to itself."""
    lines = [header, *rows]
    widths = [
        max([len(name) + beside * bool(name), *(len(row[i]) for row in rows)])
        for i, name in enumerate(header)
    ]
    return "\n".join(
        "  ".join(
            cell.rjust(width) if i in right else cell.ljust(width)
            for i, (cell, width) in enumerate(zip(line, widths, strict=True))
        ).rstrip()
        for line in lines
    )
