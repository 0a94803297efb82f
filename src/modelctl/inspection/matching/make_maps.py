"""The maps for ``rename`` that do what a pairing of names says.

Names are compared from their end: what is the same there is a module that keeps what is in it, and
what is left is a map: a plain one, or, where several would say the same, one for all of them with
``*`` for what stays. Each map is tried on all names before it is taken: it moves nothing that is
right, nothing to a wrong place, and no two names to one.
"""

from __future__ import annotations

import re
from collections.abc import Container, Iterable, Iterator, Mapping, Sequence
from typing import NamedTuple

from ...core.matching.maps import renamer
from ...core.names import wrappers
from ...errors import UsageError

# Nobody reads more, and each is tried on all names.
MOST_MAPS = 200

_NUMBER = re.compile(r"(\d+)", re.ASCII)


class Maps(NamedTuple):
    """Maps in their order, each with the names that it moves; what every name is called then; how
    many more would be needed, where these would be too many or would stand in each other's way;
    and whether the first is that of the prefixes."""

    maps: list[tuple[str, list[str]]]
    now: dict[str, str]
    more: int
    prefix_first: bool


def make_maps(
    names: Sequence[str],
    prefixes: tuple[str, str],
    goal: Mapping[str, str],
    right: Container[str],
    places: Container[str],
) -> Maps:
    """The maps that take the first of ``prefixes`` away, put the second one before all names, and
    give each name the one that ``goal`` says. None moves a name that is ``right``; ``places`` are
    all names that the model takes."""
    left, added = prefixes
    work = _Work(names, goal, right)
    prefix_first = False
    if left or added:
        by_prefix = {name: added + name.removeprefix(left) for name in names}
        prefix_first = work.take(_prefix_map(names, left, added), by_prefix)
    by_prefix_alone = [*work.maps], dict(work.now)
    waiting = _waiting(work)
    left_over = list(waiting)
    if len(waiting) <= MOST_MAPS:
        left_over = work.take_all(waiting)
        # one by one, where what is alike can't be done at once
        plain = {(ladder,): None for some in left_over for ladder in waiting[some]}
        if len(plain) <= MOST_MAPS:
            left_over = work.take_all([some for (some,) in plain])
    unfinished = [now for name, now in work.now.items() if goal.get(name, now) != now]
    if any(now in places for now in unfinished):  # half of a shift: tensors in others' places
        return Maps(*by_prefix_alone, len(waiting), prefix_first)
    return Maps(work.maps, work.now, len(left_over) if unfinished else 0, prefix_first)


def _prefix_map(names: Sequence[str], left: str, added: str) -> str:
    """The map for prefixes. A star says 'all'; the one module that all is in says more."""
    if left and added:
        return f"{left[:-1]}={added[:-1]}"
    if left:
        return f"{left}*=*"
    tops = {name.partition(".")[0] for name in names}
    plain = len(tops) == 1 and not wrappers(added + "x")
    return "{0}={1}{0}".format(*tops, added) if plain else f"*={added}*"


_Ladder = tuple[str, ...]


def _waiting(work: _Work) -> dict[_Ladder, list[_Ladder]]:
    """What is to be done: maps of which the first that can be taken does it, and the plain ones
    for the same, of each its ladder: the whole module first, the tensor alone last."""
    todo: dict[str, tuple[str, str]] = {}  # by their plain map; all with one are done with it
    reach: dict[str, set[str]] = {}  # the plain maps that one with stars stands for
    ladders: dict[str, list[_Ladder]] = {}
    for name, new in work.goal.items():
        now = work.now[name]
        if now != new:
            ladder = (*_ladder(now, new),)
            todo.setdefault(ladder[0], (now, new))
            ladders.setdefault(ladder[0], []).append(ladder)
            for text in _starred_maps(now, new):
                reach.setdefault(text, set()).add(ladder[0])
    waiting: dict[_Ladder, list[_Ladder]] = {}
    for plain, (now, new) in todo.items():
        several = [text for text in _starred_maps(now, new) if len(reach[text]) > 1]
        several.sort(key=lambda text: -len(reach[text]))
        key = (*several,) or (plain,)
        waiting.setdefault(key, []).extend(dict.fromkeys(ladders[plain]))
    return waiting


class _Work:
    """What each name is called by now."""

    def __init__(
        self, names: Sequence[str], goal: Mapping[str, str], right: Container[str]
    ) -> None:
        self.now = {name: name for name in names}
        self.used = set(names)
        self.goal, self.right = goal, right
        self.maps: list[tuple[str, list[str]]] = []

    def take_all(self, todo: Iterable[_Ladder]) -> list[_Ladder]:
        """Of each some maps the first that can be taken; those of which none can."""
        left = list(todo)
        while left:
            blocked = [
                some for some in left if not any(self.take(text, self.goal) for text in some)
            ]
            if len(blocked) == len(left):
                break
            left = blocked[::-1]  # the last one moves first where all move up
        return left

    def _take_one(self, some: _Ladder) -> bool:
        return any(self.take(text, self.goal) for text in some)

    def take(self, text: str, goal: Mapping[str, str]) -> bool:
        """Do a map if it does what it should; False if not."""
        try:
            _, rename = renamer(text)
        except UsageError:
            return False
        moved = {}
        for name, now in self.now.items():
            new = rename(now)
            if new is None or new == now:
                continue
            if goal.get(name, new) != new or (name in self.right and self.goal.get(name) != new):
                return False
            if name not in goal and _last(new) != _last(now):  # it may go with its module only
                return False
            moved[name] = new
        if not moved:
            return False
        stay = self.used.difference(self.now[name] for name in moved)
        after = set(moved.values())
        if len(after) < len(moved) or after & stay or not all(map(_is_name, after)):
            return False
        self.now.update(moved)
        self.used = stay | after
        self.maps.append((text, list(moved)))
        return True


def _last(name: str) -> str:
    return name.rpartition(".")[2]


def _is_name(name: str) -> bool:
    return all(name.split("."))


def _parted(old: str, new: str) -> tuple[list[str], list[str], list[str], int]:
    """Both names without the end that they share, that end, and how many segments they share at
    their start; neither is ever empty."""
    a, b = old.split("."), new.split(".")
    same = 0
    while same + 1 < min(len(a), len(b)) and a[-1 - same] == b[-1 - same]:
        same += 1
    a, b, end = a[: len(a) - same], b[: len(b) - same], a[len(a) - same :]
    above = 0
    while above + 1 < min(len(a), len(b)) and a[above] == b[above]:
        above += 1
    return a, b, end, above


def _ladder(old: str, new: str) -> Iterator[str]:
    """The plain maps that give a name another one: for the module first, for it alone last."""
    a, b, end, _ = _parted(old, new)
    for steps in range(len(end) + 1):
        yield f"{'.'.join([*a, *end[:steps]])}={'.'.join([*b, *end[:steps]])}"


def _starred_maps(old: str, new: str) -> Iterator[str]:
    """Those with ``*`` for numbers, and for what is above, the shortest first."""
    a, b, end, above = _parted(old, new)
    some = [_starred(".".join(a), ".".join(b))]
    if above:
        below = ".".join(a[above:]), ".".join(b[above:])
        starred = _starred(*below)
        some = [None if starred is None else (f"*.{starred[0]}", f"*.{starred[1]}"), *some]
        some.append((f"*.{below[0]}", f"*.{below[1]}"))
    for one in some:
        if one is None:
            continue
        if not end or (one[0].endswith("*") and one[1].endswith("*")):
            yield f"{one[0]}={one[1]}"
        if end:
            yield f"{one[0]}.*={one[1]}.*"


def _starred(old: str, new: str) -> tuple[str, str] | None:
    """Both paths with ``*`` for the numbers that are the same in both; None where there is none."""
    a, b = _NUMBER.split(old), _NUMBER.split(new)
    places = range(1, min(len(a), len(b)), 2)
    if len(a) == len(b):
        stay = [i for i in places if a[i] == b[i]]
    else:  # those before the first that differs
        differ = next((i for i in places if a[i] != b[i]), places.stop)
        stay = [i for i in places if i < differ]
    if not stay:
        return None
    for i in stay:
        a[i] = b[i] = "*"
    return "".join(a), "".join(b)
