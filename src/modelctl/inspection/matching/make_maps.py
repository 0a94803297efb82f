"""The maps for ``rename`` that do what a pairing of names says.

Names are compared from their end: what is the same there is a module that keeps what is in it, and
what is left is one map for all that have it alike, with ``*`` for numbers that stay. Each map is
tried on all names before it is taken: it moves nothing that is right, nothing to a wrong place, and
no two names to one.
"""

from __future__ import annotations

import re
from collections.abc import Container, Iterator, Mapping, Sequence
from typing import NamedTuple

from ...core.matching.maps import renamer
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
    pairs: Mapping[str, str],
    right: Container[str],
    places: Container[str],
) -> Maps:
    """The maps that take the first of ``prefixes`` away, put the second one before all names, and
    give what is left the name that ``pairs`` says. None moves a name that is ``right``; ``places``
    are all names of the model."""
    left, added = prefixes
    goal = {left + name: added + new for name, new in pairs.items()}
    work = _Work(names, goal, right)
    prefix_first = False
    if left or added:
        by_prefix = {name: added + name.removeprefix(left) for name in names}
        text = f"{left[:-1]}={added[:-1]}" if left and added else f"{left}*={added}*"
        prefix_first = work.take(text, by_prefix)
    by_prefix_alone = [*work.maps], dict(work.now)
    waiting = {
        tuple(_spellings(work.now[name], new)): None
        for name, new in goal.items()
        if work.now[name] != new
    }
    todo = list(waiting)
    while todo and len(waiting) <= MOST_MAPS:
        blocked = [some for some in todo if not any(work.take(text, goal) for text in some)]
        if len(blocked) == len(todo):
            break
        todo = blocked[::-1]  # the last one moves first where all move up
    unfinished = [now for name, now in work.now.items() if goal.get(name, now) != now]
    if any(now in places for now in unfinished):  # half of a shift: tensors in others' places
        return Maps(*by_prefix_alone, len(waiting), prefix_first)
    return Maps(work.maps, work.now, len(todo) if unfinished else 0, prefix_first)


class _Work:
    """What each name is called by now."""

    def __init__(
        self, names: Sequence[str], goal: Mapping[str, str], right: Container[str]
    ) -> None:
        self.now = {name: name for name in names}
        self.used = set(names)
        self.goal, self.right = goal, right
        self.maps: list[tuple[str, list[str]]] = []

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


def _spellings(old: str, new: str) -> Iterator[str]:
    """The maps that may give a name another one, the shortest first."""
    a, b = old.split("."), new.split(".")
    same = 0
    while same + 1 < min(len(a), len(b)) and a[-1 - same] == b[-1 - same]:
        same += 1
    a, b = a[: len(a) - same], b[: len(b) - same]
    above = 0
    while above + 1 < min(len(a), len(b)) and a[above] == b[above]:
        above += 1
    starred = _starred(".".join(a), ".".join(b))
    if starred is None:
        yield f"{'.'.join(a)}={'.'.join(b)}"
        return
    some = [starred]
    if above:
        below = _starred(".".join(a[above:]), ".".join(b[above:]))
        if below is not None:
            some = [(f"*.{below[0]}", f"*.{below[1]}"), starred]
    for old, new in some:
        if not same or (old.endswith("*") and new.endswith("*")):
            yield f"{old}={new}"
        if same:
            yield f"{old}.*={new}.*"


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
