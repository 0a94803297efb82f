"""Which parameter is which by order, against every way there is."""

from __future__ import annotations

import itertools
from typing import Any

from hypothesis import given, settings
from hypothesis import strategies as st

from modelctl.core.matching.order import embeddings

SHAPES = st.sampled_from([(2,), (3,), (2, 2)])


@st.composite
def problems(draw: st.DrawFn) -> tuple[list[list[Any]], list[Any]]:
    candidates = draw(st.lists(SHAPES, min_size=1, max_size=6))
    order = list(range(len(candidates)))
    assigned = draw(
        st.lists(st.sampled_from([None, 0, 1]), min_size=len(order), max_size=len(order))
    )
    groups: list[list[Any]] = [[], []]
    for i, group in zip(order, assigned, strict=True):
        if group is not None:
            shape = candidates[i] if draw(st.integers(0, 4)) else None
            groups[group].append(shape)
    if draw(st.integers(0, 5)) == 0:  # sometimes one that may not fit at all
        groups[0].append(draw(SHAPES))
    return groups, candidates


def enumerated(groups: list[list[Any]], candidates: list[Any]) -> list[list[list[int]]]:
    """Every way to give each group an ordered subsequence of the candidates, all disjoint."""
    found = []
    indices = range(len(candidates))
    for first in itertools.combinations(indices, len(groups[0])):
        rest = [i for i in indices if i not in first]
        for second in itertools.combinations(rest, len(groups[1])):
            taken = [*zip(groups[0], first, strict=True), *zip(groups[1], second, strict=True)]
            if all(shape in (None, candidates[i]) for shape, i in taken):
                found.append([list(first), list(second)])
    return found


@settings(max_examples=300, deadline=None)
@given(problems())
def test_embeddings_are_counted_exactly(problem: tuple[list[list[Any]], list[Any]]) -> None:
    groups, candidates = problem
    every = enumerated(groups, candidates)
    found, count = embeddings(groups, candidates)
    assert count == len(every)
    if count:
        assert found in every


def test_many_fits_are_counted_not_enumerated() -> None:
    _, count = embeddings([[(2,)] * 40], [(2,)] * 80)
    assert count == 107507208733336176461620  # 80 choose 40


@settings(max_examples=200, deadline=None)
@given(st.lists(SHAPES, min_size=1, max_size=8), st.data())
def test_what_is_taken_is_found_again(candidates: list[Any], data: st.DataObject) -> None:
    """The parameters that an optimizer has keep their places, where no other places do."""
    kept = sorted(data.draw(st.sets(st.integers(0, len(candidates) - 1), min_size=1)))
    found, ways = embeddings([[candidates[i] for i in kept]], candidates)
    assert ways >= 1
    if ways == 1:
        assert found == [kept]
