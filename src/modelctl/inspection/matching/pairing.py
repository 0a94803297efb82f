"""Which tensor of a file is which of a model where their names differ: the evidence for a rename.

What has its name, or has it under another prefix, is what it is. The rest is compared in groups:
modules whose paths differ in their numbers only (all ``layers.*.norm``), with the shapes of all of
them in the order of their numbers. A group belongs to the one that has just these shapes; where
several have them, place and names must tell which is which, or it is unclear. Each step is n log n.
"""

from __future__ import annotations

import re
from bisect import bisect_left
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from itertools import groupby, pairwise
from typing import NamedTuple

from ...core.matching.matcher import COUNTER, Shape, Shapes, as_written, find_prefixes, fits
from ...core.names import alphabetical, common_prefix, wrappers

# More groups that are alike are not told apart by their names.
_MOST_ALIKE = 30

_NUMBER = re.compile(r"\d+", re.ASCII)
_WORD = re.compile(r"[A-Z]?[a-z]+|[A-Z]+|\d+")


class Unclear(NamedTuple):
    """Modules or prefixes of the file and of the model that are alike; ``*`` stands for numbers."""

    found: tuple[str, ...]
    expected: tuple[str, ...]


class Pairing(NamedTuple):
    """The prefixes that the file and the model have for themselves; for names of the file the
    model's names that they belong to (both without these prefixes), and why: ``shape`` (no other
    has it), ``order``, ``name`` (it is like the other). Equal names are not in it."""

    prefixes: tuple[str, str]
    pairs: dict[str, str]
    why: dict[str, str]
    unclear: list[Unclear]


def pair(found: Shapes, expected: Shapes) -> Pairing:
    """Pair the tensors of a file with those of a model that have the same shape.

    Where all in all little agrees, nothing is paired.
    """
    s, t = _told(found), _told(expected)
    left, right, rivals = _prefixes(s, t)
    if rivals:
        return Pairing(("", ""), {}, {}, [rivals])
    s, t = _without(s, left), _without(t, right)
    work = _Work(s, t, not (alphabetical(list(found)) or alphabetical(list(expected))))
    for split in (_module, str):
        for template in (any_number, _outer_numbers, str):
            work.pair_groups(split, template)
    unclear = [
        Unclear(tuple(left + one.path for one in a), tuple(right + one.path for one in b))
        for a, b in work.unclear()
    ]
    least = min(len(s), len(t)) / 2
    if len(work.pairs) >= least:
        return Pairing((left, right), work.pairs, work.why, unclear)
    agree = len(work.pairs) + sum(len(one.names) for a, _ in work.unclear() for one in a)
    return Pairing(("", ""), {}, {}, unclear if agree >= least else [])


def _told(names: Shapes) -> dict[str, Shape]:
    """The tensors that say something."""
    return {
        name: shape
        for name, shape in names.items()
        if shape is not None and name.rpartition(".")[2] != COUNTER
    }


# ---------------------------------------------------------------------- prefixes


def _without(names: Mapping[str, Shape], prefix: str) -> dict[str, Shape]:
    return {n.removeprefix(prefix): shape for n, shape in names.items() if n.startswith(prefix)}


def _prefixes(s: Mapping[str, Shape], t: Mapping[str, Shape]) -> tuple[str, str, Unclear | None]:
    """The prefixes under which the names of either side are the other's, wrappers and all, or
    those that all names have; several that would do are unclear."""
    found = find_prefixes(s, t)
    if found.rivals:
        some = tuple(as_written(t if found.of_model else s, one) for one in found.rivals)
        return "", "", Unclear(("",), some) if found.of_model else Unclear(some, ("",))
    if found.tensors:
        left, right = as_written(s, found.found), as_written(t, found.expected)
        return (left, right, None) if left != right else ("", "", None)
    left, right = common_prefix(s), common_prefix(t)
    if not (left and right):
        left, right = wrappers(left), wrappers(right)
    return (left, right, None) if left != right else ("", "", None)


# ---------------------------------------------------------------------- groups


def any_number(path: str) -> str:
    """The path with ``*`` for its numbers."""
    return _NUMBER.sub("*", path)


def _outer_numbers(path: str) -> str:
    """The path without its numbers, but for those of its last segment."""
    outer, dot, last = path.rpartition(".")
    return any_number(outer) + dot + last


def _module(name: str) -> str:
    return name.rpartition(".")[0]


def _last(name: str) -> str:
    return name.rpartition(".")[2]


def _numbers(path: str) -> tuple[int, ...]:
    return tuple(int(found) for found in _NUMBER.findall(path) if len(found) < 10)


def _kind(name: str) -> str:
    """What every implementation of a module calls a tensor alike, in a word."""
    last = name.rpartition(".")[2].lower()
    for kind, others in (("weight", ("gamma",)), ("bias", ("beta",))):
        if kind in last or last in others:
            return kind
    return last if last.startswith("running_") else ""


_Split = Callable[[str], str]


class _Group(NamedTuple):
    """Modules (or tensors) whose paths differ in their numbers only; ``at`` is the place of the
    first, ``shapes`` are all that they have, in the order of ``names``."""

    path: str
    at: int
    names: list[str]
    shapes: tuple[tuple[tuple[str, Shape], ...], ...]

    @property
    def is_weak(self) -> bool:
        """Whether its shapes are no evidence: a norm by itself, a bias."""
        return len(self.shapes) == 1 and all(len(shape) < 2 for _, shape in self.shapes[0])

    def pairs_with(self, other: _Group) -> bool:
        """Whether it is clear which tensor is which in them: two of a kind in one module go by
        their names (``weight_ih``, ``weight_hh``)."""
        several = (kinds.count(kind) > 1 for kinds in self.shapes for kind in kinds)
        return all(
            _last(name) == _last(there)
            for name, there, among in zip(self.names, other.names, several, strict=True)
            if among
        )


_Found = tuple[_Group, _Group, str]


class _Side:
    """One side: shapes by name, the place of each, and what has no pair yet."""

    def __init__(self, shapes: dict[str, Shape]) -> None:
        self.shapes = shapes
        self.place = {name: i for i, name in enumerate(shapes)}
        self.keys = {name: (_kind(name), shape) for name, shape in shapes.items()}
        self.open = dict.fromkeys(shapes)

    def groups(self, split: _Split, template: _Split) -> list[_Group]:
        """What has no pair, in groups, in the order of the first of each."""
        modules: dict[str, list[str]] = {}
        for name in self.open:
            modules.setdefault(split(name), []).append(name)
        shapes: dict[str, tuple[tuple[str, Shape], ...]] = {}
        alike: dict[Hashable, list[str]] = {}
        for path, names in modules.items():
            names.sort(key=lambda name: (self.keys[name], name))
            shapes[path] = tuple(map(self.keys.__getitem__, names))
            kinds = tuple((kind, len(shape)) for kind, shape in shapes[path])
            alike.setdefault((template(path), kinds), []).append(path)
        found = []
        for paths in alike.values():
            paths.sort(key=_numbers)
            names = [name for path in paths for name in modules[path]]
            at = min(self.place[name] for name in names)
            found.append(
                _Group(template(paths[0]), at, names, tuple(shapes[path] for path in paths))
            )
        return sorted(found, key=lambda group: group.at)


class _Work:
    """Two sides, and what is paired so far."""

    def __init__(self, s: dict[str, Shape], t: dict[str, Shape], ordered: bool) -> None:
        self.left, self.right = _Side(s), _Side(t)
        self.ordered = ordered  # as the model makes them, and not by name
        self.pairs: dict[str, str] = {}
        self.why: dict[str, str] = {}
        self._keep_names()

    def _keep_names(self) -> None:
        """What has the name and the shape of a tensor is that one, but where a group counts from
        another number: then each one would be its neighbour."""
        groups, others = self._groups(_module, any_number)
        there = {(group.path, group.shapes): group for group in others}
        shifted = [
            (group, other)
            for group in groups
            if (other := there.get((group.path, group.shapes))) is not None
            if {*group.names} != {*other.names}
            if [*map(_last, group.names)] == [*map(_last, other.names)]
        ]
        for group, other in shifted:
            self._add(group, other, "order")
        for name, shape in self.left.shapes.items():
            is_open = name in self.left.open and name in self.right.open
            if is_open and fits(shape, self.right.shapes[name]):
                self._add_names([name], [name], "name")
        # in one module a gamma is the weight
        inside = {one.path: one for one in self.right.groups(_module, str)}
        for group in self.left.groups(_module, str):
            same = inside.get(group.path)
            if same is None or same.shapes != group.shapes or not group.pairs_with(same):
                continue
            if all(kind for kind, _ in group.shapes[0]):
                self._add(group, same, "name")

    def _add(self, group: _Group, other: _Group, why: str) -> None:
        self._add_names(group.names, other.names, why)

    def _add_names(self, names: Sequence[str], others: Sequence[str], why: str) -> None:
        for name, other in zip(names, others, strict=True):
            self.pairs[name], self.why[name] = other, why
            del self.left.open[name], self.right.open[other]

    def pair_groups(self, split: _Split, template: _Split) -> None:
        """Pair groups that have the same shapes: those that no other one has, those in the same
        place, those whose names tell which is which."""
        groups = self._groups(split, template)
        # tensors by themselves stand in turn (weight, bias, …) whatever they belong to
        placed = [self._placed] if self.ordered and split is _module else []
        for step in (self._only, *placed, self._named):
            before = len(self.pairs)
            for group, other, why in step(*groups):
                if group.pairs_with(other):
                    self._add(group, other, why)
            if len(self.pairs) > before:
                groups = self._groups(split, template)

    def _groups(self, split: _Split, template: _Split) -> tuple[list[_Group], list[_Group]]:
        return self.left.groups(split, template), self.right.groups(split, template)

    def _only(self, left: list[_Group], right: list[_Group]) -> Iterator[_Found]:
        for a, b in _classes(left, right):
            if len(a) == len(b) == 1 and not a[0].is_weak:
                yield a[0], b[0], "shape"

    def _placed(self, left: list[_Group], right: list[_Group]) -> Iterator[_Found]:
        """Groups between the same pairs, if they stand in one order on both sides."""
        places = sorted((self.left.place[s], self.right.place[t]) for s, t in self.pairs.items())
        fixed = rising(places)
        gaps: dict[int, tuple[list[_Group], list[_Group]]] = {}
        for side, groups in enumerate((left, right)):
            ends = [places[side] for places in fixed]
            for group in groups:
                gaps.setdefault(bisect_left(ends, group.at), ([], []))[side].append(group)
        for a, b in gaps.values():
            common = {group.shapes for group in a} & {group.shapes for group in b}
            a, b = ([group for group in some if group.shapes in common] for some in (a, b))
            if [group.shapes for group in a] != [group.shapes for group in b]:
                continue
            both = zip(a, b, strict=True)
            for _, alike in groupby(both, key=lambda pair: pair[0].shapes):
                run = list(alike)
                if len(run) == 1 or all(map(_ascend, zip(*run, strict=True))):
                    yield from ((one, other, "order") for one, other in run)

    def _named(self, left: list[_Group], right: list[_Group]) -> Iterator[_Found]:
        for a, b in _classes(left, right):
            if len(a) != len(b) or len(a) > _MOST_ALIKE:
                continue
            rows = [[_likeness(one.path, other.path) for other in b] for one in a]
            best = [max(range(len(b)), key=row.__getitem__) for row in rows]
            if len({*best}) == len(best) and all(
                row[k] > 0 and sum(n >= row[k] for n in row) == 1
                for row, k in zip(rows, best, strict=True)
            ):
                yield from ((one, b[k], "name") for one, k in zip(a, best, strict=True))

    def unclear(self) -> list[tuple[list[_Group], list[_Group]]]:
        """Groups that are alike and have no pair."""
        return _classes(*self._groups(_module, any_number))


def _classes(left: list[_Group], right: list[_Group]) -> list[tuple[list[_Group], list[_Group]]]:
    """The groups of both sides by their shapes, where both have some."""
    classes: dict[Hashable, tuple[list[_Group], list[_Group]]] = {}
    for side, groups in enumerate((left, right)):
        for group in groups:
            classes.setdefault(group.shapes, ([], []))[side].append(group)
    return [(a, b) for a, b in classes.values() if a and b]


def rising(places: Sequence[tuple[int, int]]) -> list[tuple[int, int]]:
    """The longest part of (i, j) with rising i in which j rises, too."""
    ends: list[int] = []  # the least j that a part of that length may end with
    last: list[int] = []  # and where that is
    before: list[int] = []
    for at, (_, j) in enumerate(places):
        k = bisect_left(ends, j)
        before.append(last[k - 1] if k else -1)
        ends[k : k + 1], last[k : k + 1] = [j], [at]
    found = []
    at = last[-1] if last else -1
    while at >= 0:
        found.append(places[at])
        at = before[at]
    return found[::-1]


def _ascend(groups: Sequence[_Group]) -> bool:
    """Whether the paths of groups count up."""
    numbers = [_numbers(group.path) for group in groups]
    return bool(numbers[0]) and all(one < other for one, other in pairwise(numbers))


def _likeness(a: str, b: str) -> int:
    """How many words of one path are, or begin, one of the other (``q``, ``query``)."""
    words, others = (
        [word.lower() for word in _WORD.findall(path) if word not in ("weight", "bias")]
        for path in (a, b)
    )
    return sum(
        any(word == other or (word.isalpha() and _begins(word, other)) for other in others)
        for word in words
    )


def _begins(a: str, b: str) -> bool:
    return a.startswith(b) or b.startswith(a)
