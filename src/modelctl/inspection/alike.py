"""Lists that are alike: the same things in two of them, and names that tell which is which."""

from __future__ import annotations

import re
from bisect import bisect_left
from collections import Counter
from collections.abc import Hashable, Sequence
from itertools import combinations, pairwise

from ..core.names import common_prefix

_WORDS = re.compile(r"[A-Z]?[a-z]+|[A-Z]+|\d+")


def aligned(a: Sequence[Hashable], b: Sequence[Hashable]) -> list[tuple[int, int]]:
    """Places of the same things in two lists, where there is one way to see it: the lists are the
    same but for what only one of them has, or what both have once parts them into such lists."""
    common = set(a) & set(b)
    left = [i for i, key in enumerate(a) if key in common]
    right = [j for j, key in enumerate(b) if key in common]
    if not left or 2 * len(left) < min(len(a), len(b)):
        return []
    if [a[i] for i in left] == [b[j] for j in right]:
        return list(zip(left, right, strict=True))
    counts = Counter(a), Counter(b)
    once = {key: j for j, key in enumerate(b) if counts[0][key] == counts[1][key] == 1}
    anchors = rising([(i, once[key]) for i, key in enumerate(a) if key in once])
    if not anchors:
        return []
    found = list(anchors)
    for (i, j), (k, m) in pairwise([(-1, -1), *anchors, (len(a), len(b))]):
        inside = aligned(a[i + 1 : k], b[j + 1 : m])
        found += [(i + 1 + x, j + 1 + y) for x, y in inside]
    return found


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


def tell_apart(a: Sequence[str], b: Sequence[str]) -> bool:
    """Whether names tell that each of ``a`` is the one of ``b`` in the same place: by what is not
    the same in all of them."""
    a, b = ([path[len(common_prefix(paths)) :] for path in paths] for paths in (a, b))
    if ascending(a) and ascending(b):
        return True
    same = [likeness(one, other) for one, other in zip(a, b, strict=True)]
    return all(
        same[i] + same[j] > likeness(a[i], b[j]) + likeness(a[j], b[i])
        for i, j in combinations(range(len(a)), 2)
    )


def numbers(name: str) -> tuple[int, ...]:
    """The numbers in a name."""
    return tuple(map(int, re.findall(r"\d+", name)))


def ascending(names: Sequence[str]) -> bool:
    """Whether names have numbers, and each higher ones than the name before it."""
    found = [numbers(name) for name in names]
    return bool(found[0]) and all(one < other for one, other in pairwise(found))


def likeness(a: str, b: str) -> int:
    """How many words of one name are, or begin, one of the other; 0 where numbers differ."""
    words, others = ([word.lower() for word in _WORDS.findall(name)] for name in (a, b))
    left, right = numbers(a), numbers(b)
    if left and right and left != right:
        return 0
    return sum(
        any(word == other or (word.isalpha() and _begins(word, other)) for other in others)
        for word in words
    )


def _begins(a: str, b: str) -> bool:
    return a.startswith(b) or b.startswith(a)
