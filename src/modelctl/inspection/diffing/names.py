"""Names of two checkpoints that differ by a prefix."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from typing import Literal, NamedTuple, TypeVar

from ...core.names import nearest, unwrapped

T = TypeVar("T")
Which = Literal["a", "b"]
# Names that are looked up among others: to find a like one takes time for each.
_MOST_LOST, _MOST_NAMES = 3, 2_000


class Under(NamedTuple):
    """Which of two checkpoints has names of the other under a prefix."""

    which: Which
    prefix: str


def prefix_between(a: set[str], b: set[str]) -> Under | None:
    """Which of two has exactly the other's names under a prefix, and the prefix."""
    if not a or len(a) != len(b) or a == b:
        return None
    ways: tuple[tuple[Which, set[str], set[str]], ...] = (("a", a, b), ("b", b, a))
    for which, longer, shorter in ways:
        last, same = (max(names, key=lambda name: (len(name), name)) for names in (longer, shorter))
        prefix = last.removesuffix(same)
        if prefix.endswith(".") and longer == {prefix + name for name in shorter}:
            return Under(which, prefix)
    return None


def likely_prefix(a: Iterable[str], b: Iterable[str]) -> tuple[Under, int] | None:
    """The prefix without which most names that only one of two has are names that only the other
    has, and how many are; None where no two meet."""
    only_a, only_b = set(a) - set(b), set(b) - set(a)
    votes: Counter[Under] = Counter()
    ways: tuple[tuple[Which, set[str], set[str]], ...]
    ways = (("a", only_a, only_b), ("b", only_b, only_a))
    for which, names, others in ways:
        for name in names:
            parts = name.split(".")
            for end in range(1, len(parts)):
                if ".".join(parts[end:]) in others:
                    votes[Under(which, ".".join(parts[:end]) + ".")] += 1
    return min(votes.items(), key=lambda one: (-one[1], len(one[0].prefix), one[0]), default=None)


def without_wrappers(tensors: Mapping[str, T], model: set[str]) -> dict[str, T]:
    """Tensors by the names that they have without what DataParallel, torch.compile and others put
    before them; those of the ``model``, where no two of them meet."""
    bare = {name: unwrapped(name) for name in tensors if name in model}
    return _renamed(tensors, bare)


def without_prefix(tensors: Mapping[str, T], model: set[str], prefix: str) -> dict[str, T]:
    """Tensors of the ``model`` by their names without a prefix, where they have it."""
    bare = {name: name.removeprefix(prefix) for name in tensors if name in model and name != prefix}
    return _renamed(tensors, bare)


def _renamed(tensors: Mapping[str, T], names: Mapping[str, str]) -> dict[str, T]:
    times = Counter(names.get(name, name) for name in tensors)
    return {
        new if times[new := names.get(name, name)] == 1 else name: ref
        for name, ref in tensors.items()
    }


def likest(removed: list[str], added: list[str]) -> list[tuple[str, str]]:
    """The first few names of one side, each with that of the other that looks most like it."""
    if len(added) > _MOST_NAMES or len(removed) > _MOST_NAMES:
        return []
    known = set(added)
    found = []
    for name in removed[:_MOST_LOST]:
        near = [one for one in nearest(name, added) if one in known]
        found += [(name, near[0])] if near else []
    return found
