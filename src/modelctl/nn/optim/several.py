"""One optimizer or scheduler, or several of them as a list or by name; and the same when saved."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, TypeAlias, TypeVar, cast

from torch.optim import Optimizer

from ...core.text import some
from ...core.tree import path_text
from ...errors import RefusedError

T = TypeVar("T")
Several: TypeAlias = T | Sequence[T] | Mapping[str, T] | None
Label: TypeAlias = str | int | None


def labelled(given: Several[T]) -> dict[Label, T]:
    """By name as given, by place in a list; one alone is called None."""
    if given is None:
        return {}
    if isinstance(given, Mapping):
        return {**given}
    if isinstance(given, list | tuple):
        return dict(enumerate(given))
    return {None: cast(T, given)}


def with_inner(given: Several[Optimizer]) -> list[Optimizer]:
    """Optimizers, and those that they wrap (Lookahead's), each once."""
    found: dict[int, Optimizer] = {}
    rest = list(labelled(given).values())
    while rest:
        one = rest.pop(0)
        if id(one) not in found:
            found[id(one)] = one
            rest += [inner for inner in vars(one).values() if isinstance(inner, Optimizer)]
    return list(found.values())


def packed(states: Mapping[Label, Any]) -> Any:
    """What is saved for labelled ones: one as it is, a list, or a dict."""
    if set(states) == {None}:
        return states[None]
    if all(isinstance(label, int) for label in states):
        return list(states.values())
    return dict(states)


def by_label(found: Sequence[tuple[tuple[Any, ...], T]]) -> dict[Label, T]:
    """Saved ones, as (path, state), by what they are called: a name, or a place in a list."""
    if len(found) == 1 and len(found[0][0]) < 2:
        return {None: found[0][1]}
    last = [path[-1] if path else None for path, _ in found]
    labels = last if len({*last}) == len(last) else [path_text(path) for path, _ in found]
    return {label: node for label, (_, node) in zip(labels, found, strict=True)}


def called(what: str, label: Label) -> str:
    """What a message calls one: ``optimizer``, ``optimizer 'disc'``, ``optimizer 1``."""
    return what if label is None else f"{what} {label!r}"


def paired(
    what: str, live: Mapping[Label, T], saved: Mapping[Label, Any]
) -> dict[Label, tuple[T, Any]]:
    """Each live one with what was saved of it: one with the only one, several by name or place.

    Of those that were saved by name some may be left out.

    Raises:
        RefusedError: which is which can't be told.
    """
    named = [label for label in (*live, *saved) if isinstance(label, str)]
    if len(live) == len(saved) == 1 and len({*named}) < 2:
        ((label, one),), (state,) = live.items(), saved.values()
        return {label: (one, state)}
    if live.keys() == saved.keys() or (len(named) > len(saved) and live.keys() <= saved.keys()):
        return {label: (one, saved[label]) for label, one in live.items()}
    names = some([str(label) for label in saved])
    raise RefusedError(
        f"the checkpoint has {_count(saved, what)}, {_count(live, what)} "
        f"{'is' if len(live) == 1 else 'are'} given",
        hint=f"give {what}= a dict with the names that were saved: {names}"
        if any(isinstance(label, str) for label in saved)
        else f"give {what}= a list in the order that was saved",
    )


def _count(ones: Mapping[Label, Any], what: str) -> str:
    names = [label for label in ones if isinstance(label, str)]
    shown = f" ({some(names)})" if names else ""
    return f"{len(ones)} {what}{'' if len(ones) == 1 else 's'}{shown}"
