"""Which of a model's parameters is which of a list that records no names: proved by order.

An optimizer, group by group, and an EMA copy that is a list have parameters in the model's order.
What is known of each is its shape at most. Only where a single assignment keeps order and shapes
is anything proved.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence

from .matcher import Shape

# The assignments that are followed at once; beyond it the answer is "ambiguous" anyway.
_MOST_STATES = 200_000


def embeddings(
    groups: Sequence[Sequence[Shape | None]],
    candidates: Sequence[Shape],
    where: Sequence[Collection[int]] | None = None,
) -> tuple[list[list[int]], int]:
    """One way to take each group's shapes from the candidates in order (None is any shape), each
    candidate at most once: their places; and how many ways there are. ``where`` says for each
    candidate which groups it may be in.

    Dynamic programming over the candidates: a state is how far each group has got; a candidate
    is taken by a group whose next shape it has (or that shows none), or skipped. As many
    candidates may be skipped as there are more than wanted.
    """
    total = sum(map(len, groups))
    spare = len(candidates) - total
    states: dict[tuple[int, ...], int] = {tuple(0 for _ in groups): 1}
    history: list[dict[tuple[int, ...], tuple[tuple[int, ...], int | None]]] = []
    for i, shape in enumerate(candidates):
        reached: dict[tuple[int, ...], int] = {}
        came: dict[tuple[int, ...], tuple[tuple[int, ...], int | None]] = {}
        for state, count in states.items():
            if i - sum(state) < spare:
                reached[state] = reached.get(state, 0) + count
                came.setdefault(state, (state, None))
            for g, at in enumerate(state):
                if where is not None and g not in where[i]:
                    continue
                if at < len(groups[g]) and groups[g][at] in (None, shape):
                    after = (*state[:g], at + 1, *state[g + 1 :])
                    reached[after] = reached.get(after, 0) + count
                    came.setdefault(after, (state, g))
        if len(reached) > _MOST_STATES:
            return [], len(reached)
        history.append(came)
        states = reached
    state = tuple(map(len, groups))
    count = states.get(state, 0)
    if count == 0:
        return [], 0
    found: list[list[int]] = [[] for _ in groups]
    for i in range(len(candidates) - 1, -1, -1):
        state, taken_by = history[i][state]
        if taken_by is not None:
            found[taken_by].append(i)
    return [group[::-1] for group in found], count
