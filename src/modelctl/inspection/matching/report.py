"""What fits a model, what doesn't, and what would mend it: the report of ``match``."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Sequence
from shlex import quote
from typing import Any, NamedTuple

from ...core.matching.matcher import COUNTER, Shape
from ...core.notes import Note
from ...core.pages import Column, Line, Page, Table
from ...core.text import count, prefix_command, shape
from .pairing import Unclear, any_number

# How many people want to read; JSON has all. And how wide their lines are.
_MOST, _MOST_ROWS, _MOST_MAPS, _WIDTH = 5, 30, 20, 80


class Mismatch(NamedTuple):
    """A tensor that both have, with other shapes (None: it is no tensor)."""

    name: str
    found: Shape | None
    expected: Shape | None


class Fit(NamedTuple):
    """What ``load_state_dict(strict=True)`` would say: how many tensors fit, and what doesn't;
    ``found`` and ``expected`` are all names."""

    matched: int
    missing: dict[str, Shape | None]
    unexpected: dict[str, Shape | None]
    mismatched: list[Mismatch]
    found: Collection[str]
    expected: Collection[str]

    @property
    def fits(self) -> bool:
        return not self.problems

    @property
    def problems(self) -> int:
        return len(self.missing) + len(self.unexpected) + len(self.mismatched)

    def as_dict(self) -> dict[str, Any]:
        return {
            "fits": self.fits,
            "matched": self.matched,
            "missing": [{"name": name, "shape": _dims(s)} for name, s in self.missing.items()],
            "unexpected": [{"name": n, "shape": _dims(s)} for n, s in self.unexpected.items()],
            "mismatched": [
                {"name": name, "found": _dims(a), "expected": _dims(b)}
                for name, a, b in self.mismatched
            ],
        }

    def rows(self) -> list[tuple[str, str, int, str]]:
        """What does not fit: what it is, the name, how many tensors, and shapes."""
        rows = [
            (what, name, n, "")
            for what, names, among in (
                ("missing", self.missing, self.expected),
                ("unexpected", self.unexpected, self.found),
            )
            for name, n in fold(names, among)
        ]
        for one in self.mismatched:
            shapes = f"{_shape(one.found)}, not {_shape(one.expected)}"
            rows.append(("mismatched", one.name, 1, shapes))
        return rows

    @property
    def verdict(self) -> str:
        if self.fits:
            return f"fits: load_state_dict takes all {count(self.matched, 'tensor')}"
        counts = [
            f"{len(names):,} {what}"
            for names, what in (
                (self.missing, "missing"),
                (self.unexpected, "unexpected"),
                (self.mismatched, "mismatched"),
            )
            if names
        ]
        return f"does not fit: {', '.join(counts)}; {self.matched:,} fit"


class Map(NamedTuple):
    """A map for ``rename``, how many tensors it moves, and the evidence: ``prefix``, ``shape``,
    ``order``."""

    map: str
    tensors: int
    why: tuple[str, ...]

    def lines(self) -> list[str]:
        """The map and why, in one line where that is not too long."""
        old, _, new = self.map.rpartition("=")
        why = f"({count(self.tensors, 'tensor')}, by {' and '.join(self.why)})"
        line = f"  {old}={new}"
        if len(line) + len(why) + 2 <= _WIDTH:
            return [f"{line}  {why}"]
        if len(line) <= _WIDTH:
            return [line, f"    {why}"]
        return [f"  {old}", f"    ={new}", f"    {why}"]


class Match(NamedTuple):
    """What fits as it is, the maps that mend what they can (in order), what fits ``after`` them,
    modules alike of which no evidence tells which is which (``unclear``), how many ``more`` maps
    it would take, which are too many or in each other's way, and options of the architecture with
    which more would fit. ``source`` is the file, ``target`` the other one or the architecture."""

    before: Fit
    maps: list[Map]
    after: Fit
    unclear: list[Unclear]
    more: int
    options: list[str]
    source: str | None = None
    target: str | None = None

    def as_dict(self) -> dict[str, Any]:
        return {
            "source": self.source,
            "like": self.target,
            **self.before.as_dict(),
            "maps": [
                {"map": one.map, "tensors": one.tensors, "why": list(one.why)} for one in self.maps
            ],
            "after": self.after.as_dict(),
            "unclear": [
                {"found": list(one.found), "expected": list(one.expected)} for one in self.unclear
            ],
            "more_maps": self.more,
            "arch_args": self.options,
        }

    def page(self, written: bool = False) -> Page:
        """What does not fit by module, the verdict, and the maps; ``written``: they are in a file
        already."""
        rows = self.before.rows()
        columns = [Column("what"), Column("name", "name"), Column("tensors", "count")]
        body: list[Line | Table] = []
        if rows:
            body = [Table([*columns, Column("")], rows, _MOST_ROWS), Line()]
        body.append(Line(self.before.verdict, strong=True))
        body += self._lines()
        notes = []
        if self.options:
            options = " ".join(f"--arch-arg {option}" for option in self.options)
            notes.append(Note("hint", f"as the file has it: {options}"))
        if self.maps and not written:
            notes.append(Note("hint", self._way_out()))
        return Page(body, Table([*columns, Column("shapes")], rows), notes=notes)

    def _way_out(self) -> str:
        source = self.source or "SRC"
        if len(self.maps) == 1 and self.maps[0].why == ("prefix",):
            old, _, new = self.maps[0].map.replace("*", "").rpartition("=")
            if old.endswith(new):
                return prefix_command("strip", source, old.removesuffix(new))
            if new.endswith(old):
                return prefix_command("add", source, new.removesuffix(old))
        how = f"modelctl rename {quote(source)} --map-file FILE"
        return f"--write-map FILE writes them for {how}"

    def _lines(self) -> Iterator[Line]:
        if self.maps:
            yield Line()
            yield Line(f"{count(len(self.maps), 'map')} for rename:")
            for one in self.maps[:_MOST_MAPS]:
                yield from map(Line, one.lines())
            yield from _rest(len(self.maps) - _MOST_MAPS, "; --write-map FILE writes all")
            them = "it" if len(self.maps) == 1 else "them"
            yield Line(f"with {them}: {self.after.verdict}", strong=True)
            left = self.after.rows()
            for what, name, n, shapes in left[:_MOST]:
                yield Line(f"  {what} {name}  {shapes or count(n, 'tensor')}")
            yield from _rest(len(left) - _MOST)
        for unclear in self.unclear[:_MOST]:
            yield Line(f"not clear, not renamed: {unclear_text(unclear)}")
        yield from _rest(len(self.unclear) - _MOST)
        if self.more:
            yield Line(f"not clear: it would take {count(self.more, 'more map')}")


def _rest(n: int, where: str = ": --format json has all") -> Iterator[Line]:
    if n > 0:
        yield Line(f"… and {n:,} more{where}")


def _dims(shape: Shape | None) -> list[int] | None:
    return None if shape is None else list(shape)


def _shape(dims: Shape | None) -> str:
    return "no tensor" if dims is None else shape(dims)


def unclear_text(one: Unclear) -> str:
    """Which could be which, in a line."""
    if one.found == ("",):
        return f"all names may get the prefix {_some(one.expected, ' or ')}"
    if one.expected == ("",):
        return f"the prefix may be {_some(one.found, ' or ')}"
    each = " each" if len(one.found) > 1 else ""
    return f"{_some(one.found)} could{each} be {_some(one.expected, ' or ')}"


def _some(names: Sequence[str], last: str = ", ") -> str:
    if len(names) > _MOST:
        return ", ".join(names[:_MOST]) + f" … ({len(names)})"
    return last.join(names)


def fold(names: Collection[str], among: Iterable[str]) -> list[tuple[str, int]]:
    """Names by module, as far up as all that is in a module is among them, and with ``*`` for
    numbers where several modules differ in nothing else; with how many names that are; in order.
    ``among`` are the names of all tensors that are there."""
    broken = {""}
    for name in among:
        if name not in names and name.rpartition(".")[2] != COUNTER:
            broken.update(_modules_of(name))
    folded: dict[str, int] = {}
    for name in names:
        top = next((module for module in _modules_of(name) if module not in broken), name)
        folded[top] = folded.get(top, 0) + 1
    alike: dict[str, list[str]] = {}
    for top in folded:
        alike.setdefault(any_number(top), []).append(top)
    return [
        (path if len(tops) > 1 else tops[0], sum(folded[top] for top in tops))
        for path, tops in alike.items()
    ]


def _modules_of(name: str) -> Iterator[str]:
    """The modules that a tensor is in, the outermost first."""
    at = name.find(".")
    while at >= 0:
        yield name[:at]
        at = name.find(".", at + 1)
