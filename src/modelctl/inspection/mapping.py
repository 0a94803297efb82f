"""The fewest maps that rename as a pairing of names says, in the syntax of ``rename --map``.

Renaming goes from the outer modules to the inner ones, a level at a time; what is renamed alike on
a level is one map, with ``*`` for what differs. Each map is tried on all names before it is taken:
it may move nothing that is right already, nothing to a wrong place, and no two names to one.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import combinations
from typing import NamedTuple

from ..core.maps import renamer
from ..core.names import common_prefix
from ..errors import UsageError

# Numbers in a path that may become a `*`: the last ones.
_MOST_NUMBERS = 4


class _Step(NamedTuple):
    """A module (or a tensor) and its new path, and the names in it; '' is the root."""

    old: str
    new: str
    is_tensor: bool
    names: list[str]

    def moved(self, now: str) -> str:
        """What a name in it is called afterwards."""
        tail = now[len(self.old) :] if self.old else "." + now
        return self.new + tail if self.new else tail[1:]


def make_maps(
    names: Sequence[str], pairs: Mapping[str, str]
) -> tuple[list[tuple[str, list[str]]], dict[str, str]]:
    """The maps that give names what ``pairs`` says, in order, each with the names that it moves;
    and what every name is called in the end. Names that have no pair go where their module goes."""
    work = _Work(names, pairs)
    maps: list[tuple[str, list[str]]] = []
    groups = [("", list(names))]
    while groups:
        steps: list[_Step] = []
        below: list[tuple[str, str, list[str]]] = []
        for path, inside in groups:
            work.plan(path, inside, steps, below)
        maps += work.take(steps)
        groups = []
        for old, new, inside in below:
            done = all(work.now[name].startswith(f"{new}.") for name in inside)
            groups.append((new if done else old, inside))
    return maps, work.now


class _Work:
    """What each name is called by now, and what it is to be called."""

    def __init__(self, names: Sequence[str], pairs: Mapping[str, str]) -> None:
        self.now = {name: name for name in names}
        # what no name can be moved to, since another one stays there
        stays = {name for name in names if name not in pairs}
        self.pairs = {name: new for name, new in pairs.items() if new not in stays}

    # ------------------------------------------------------------------ a level

    def plan(
        self,
        path: str,
        names: Sequence[str],
        steps: list[_Step],
        below: list[tuple[str, str, list[str]]],
    ) -> None:
        """Say what becomes of the modules and tensors right under ``path``; ``below`` gets those
        in which there is more to do, by their old and new paths."""
        if not path and (added := self._added(names)):
            steps.append(_Step("", added, False, list(names)))
            return
        start = len(path) + 1 if path else 0
        modules: dict[str, list[str]] = {}
        for name in names:
            first, dot, _ = self.now[name][start:].partition(".")
            if dot:
                modules.setdefault(self.now[name][: start + len(first)], []).append(name)
            elif self.pairs.get(name, self.now[name]) != self.now[name]:
                steps.append(_Step(self.now[name], self.pairs[name], True, [name]))
        for module, inside in modules.items():
            paired = [name for name in inside if name in self.pairs]
            right = sum(self.pairs[name] == self.now[name] for name in paired)
            if right == len(paired):
                continue
            new = module
            if not right:
                new, done = self._new_path(module, paired)
                if new != module:
                    steps.append(_Step(module, new, False, inside))
                if done:
                    continue
            below.append((module, new, inside))

    def _added(self, names: Iterable[str]) -> str:
        """The prefix that all names get, or ''."""
        found = set()
        for name in names:
            if name in self.pairs:
                new, now = self.pairs[name], "." + self.now[name]
                found.add(new.removesuffix(now) if new.endswith(now) else "")
        return found.pop() if len(found) == 1 else ""

    def _new_path(self, module: str, names: Sequence[str]) -> tuple[str, bool]:
        """Where a module goes, and whether all in it is right then."""
        heads = set()
        for name in names:
            tail = self.now[name][len(module) :]
            new = "." + self.pairs[name]
            heads.add(new.removesuffix(tail) if new.endswith(tail) else None)
        head = heads.pop()
        if not heads and head is not None:
            return head[1:], True
        start = len(module) + 1
        if len({self.now[name][start:].partition(".")[0] for name in names}) == 1:
            return module, False  # what is in it may go there as a whole
        return common_prefix(self.pairs[name] for name in names)[:-1] or module, False

    # ------------------------------------------------------------------ its maps

    def take(self, steps: list[_Step], again: bool = True) -> list[tuple[str, list[str]]]:
        """Do the steps, in maps that do several at once where they can."""
        goal = {name: step.moved(self.now[name]) for step in steps for name in step.names}
        maps = []
        waiting = steps
        while waiting:
            blocked = []
            for step in waiting:
                if all(self.now[name] == goal[name] for name in step.names):
                    continue
                best = self._best(step, goal)
                if best is None:
                    blocked.append(step)
                else:
                    maps.append((best[0], list(best[1])))
                    self.now.update(best[1])
            if len(blocked) == len(waiting):  # each waits for the place of another
                if again:
                    aside = [step._replace(new=f"{step.old}.tmp") for step in blocked]
                    maps += self.take(aside, False)
                    back = [step._replace(old=f"{step.old}.tmp") for step in blocked]
                    maps += self.take([step for step in back if self._stands(step)], False)
                break
            waiting = blocked
        return maps

    def _stands(self, step: _Step) -> bool:
        return all(f"{self.now[name]}.".startswith(f"{step.old}.") for name in step.names)

    def _best(self, step: _Step, goal: Mapping[str, str]) -> tuple[str, dict[str, str]] | None:
        """The map that does this step and most others, the plainest of those; with what it
        moves."""
        best: tuple[str, dict[str, str]] | None = None
        for text in _spellings(step):
            moved = self._moved(text, goal)
            if moved and step.names[0] in moved and (best is None or len(moved) > len(best[1])):
                best = text, moved
        return best

    def _moved(self, text: str, goal: Mapping[str, str]) -> dict[str, str] | None:
        """What a map makes of the names that it changes; None where that would be wrong."""
        try:
            _, rename = renamer(text)
        except UsageError:
            return None
        moved = {}
        for name, now in self.now.items():
            new = rename(now)
            if new is not None and new != now:
                if goal.get(name) != new:
                    return None
                moved[name] = new
        after = {**self.now, **moved}
        return moved if len(set(after.values())) == len(after) else None


def _spellings(step: _Step) -> Iterator[str]:
    """The maps that may do a step, the plainest first."""
    old, new = step.old, step.new
    if not old or not new:
        yield f"{old}.*=*" if old else f"*={new}.*"
        return
    yield f"{old}={new}"
    end = "" if step.is_tensor else ".*"
    above = common_prefix([f"{old}.", f"{new}."])
    if above and old != above[:-1] and new != above[:-1]:
        yield f"*.{old[len(above) :]}{end}=*.{new[len(above) :]}{end}"
    left, right = re.split(r"(\d+)", old), re.split(r"(\d+)", new)
    places, there = (range(len(parts))[1::2][-_MOST_NUMBERS:] for parts in (left, right))
    for n in range(1, min(len(places), len(there)) + 1):
        for some in combinations(places, n):
            for others in combinations(there, n):
                if [left[i] for i in some] == [right[i] for i in others]:
                    yield f"{_starred(left, some)}{end}={_starred(right, others)}{end}"


def _starred(parts: Sequence[str], places: Sequence[int]) -> str:
    return "".join("*" if i in places else part for i, part in enumerate(parts))
