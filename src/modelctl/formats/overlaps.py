"""Which tensors share bytes of a storage without being the same view of it."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

from ..core.tensors import TensorRef

# What it may take to find out: steps for a pair, pairs for a storage. Beyond, they count as shared.
_MOST_STEPS, _MOST_PAIRS = 10_000, 100_000


def overlapping(entries: Iterable[tuple[str, TensorRef]]) -> Iterator[tuple[str, str]]:
    """Pairs of names whose tensors share bytes; ties, the same view under two names, do not count.

    Each name comes second in one pair at most.
    """
    by_storage: dict[int, dict[Any, tuple[int, int, str, TensorRef]]] = {}
    for name, ref in entries:
        if ref.numel:
            span = (ref.start, ref.start + ref.span, name, ref)
            by_storage.setdefault(id(ref.storage), {}).setdefault(ref.identity, span)
    for views in by_storage.values():
        yield from _sweep(sorted(views.values(), key=lambda view: view[:3]))


def _sweep(views: list[tuple[int, int, str, TensorRef]]) -> Iterator[tuple[str, str]]:
    """Of views in the order in which they begin."""
    reaching: list[tuple[int, int, str, TensorRef]] = []  # as far as the next one's start
    left = _MOST_PAIRS
    for view in views:
        begin, _, name, ref = view
        if left < 0:  # one is enough now: the one that reaches farthest
            reaching = [max(reaching, key=lambda one: one[1])]
        reaching = [one for one in reaching if one[1] > begin]
        for _, _, before, other in reaching:
            left -= 1
            if left < 0 or share_bytes(other, ref):
                yield before, name
                break
        reaching.append(view)


def share_bytes(a: TensorRef, b: TensorRef) -> bool:
    """Whether two views of one storage have a byte in common; True where that is not known.

    An element of each lies at a sum of strides, so they meet where a sum of strides, each taken
    as often as the shapes allow, is the distance of the two starts.
    """
    times: dict[int, tuple[int, int]] = {1: (1 - b.dtype.itemsize, a.dtype.itemsize - 1)}
    for ref, sign in ((a, 1), (b, -1)):
        for n, stride in zip(ref.shape, ref.stride, strict=True):
            step = stride * ref.dtype.itemsize
            if n > 1 and step:
                low, high = times.get(step, (0, 0))
                times[step] = (low, high + n - 1) if sign > 0 else (low - (n - 1), high)
    terms = [(step, *times[step]) for step in sorted(times, reverse=True)]
    rest = [(0, 0)]  # the least and the most that the terms from here on make
    for step, low, high in reversed(terms):
        rest.append((rest[-1][0] + low * step, rest[-1][1] + high * step))
    rest.reverse()
    steps = 0
    todo = [(0, b.start - a.start)]
    while todo:
        at, distance = todo.pop()
        if at == len(terms):
            return True  # nothing is left of the distance
        step, low, high = terms[at]
        least, most = rest[at + 1]
        first, last = max(low, -((most - distance) // step)), min(high, (distance - least) // step)
        steps += max(0, last - first) + 1
        if steps > _MOST_STEPS:
            return True
        todo += [(at + 1, distance - times * step) for times in range(first, last + 1)]
    return False
