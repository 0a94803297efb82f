"""Which optimizer is whose, where a file has several models: by their names, then by what fits."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Sequence
from functools import cache
from itertools import permutations
from typing import Any

from ..tensors import TensorRef
from ..tree import Path
from .kinds import StateDict
from .optimizers import Groups, may_belong, read_groups, trainable

# Words of keys that say what a part is, not whose.
_KINDS = frozenset(
    (
        *("model", "models", "net", "nets", "network", "networks", "module", "state", "states"),
        *("dict", "dicts", "sd", "weights", "params", "parameters", "pth", "pt", "ckpt"),
        *("checkpoint", "optimizer", "optimizers", "optimiser", "optim", "optims", "opt", "opts"),
        *("scheduler", "schedulers", "sched", "lr"),
    )
)
# Words of keys that say that a part is a copy of another one.
COPY_WORDS = frozenset(
    (
        *("ema", "avg", "average", "averaged", "averaging", "mean", "shadow", "swa", "polyak"),
        *("target", "targ", "tgt", "teacher", "best", "last", "latest", "prev", "previous", "old"),
        *("copy", "backup", "raw", "current", "slow", "momentum", "master", "fp32", "initial"),
    )
)
_WORD = re.compile(r"[A-Z]?[a-z]+|[A-Z]+(?![a-z])|\d+")
# More models are not tried together.
_MOST_TOGETHER = 4

Words = tuple[str, ...]


@cache
def _words(text: str) -> Words:
    found = []
    for word in _WORD.findall(text):
        word = word.lower()
        if word in _KINDS:
            continue
        found.append(_inside(word))
    return tuple(found)


def _inside(word: str) -> str:
    """``netg``, ``goptim``: what is left of a word without what it is."""
    for kind in sorted(_KINDS, key=len, reverse=True):
        for rest in (word.removeprefix(kind), word.removesuffix(kind)):
            if len(kind) > 2 and len(rest) < len(word) and 1 <= len(rest) <= 2:
                return rest
    return word


def words(path: Path) -> Words:
    """What the path of a part says of whose it is: ``netG_state_dict`` says ``g``."""
    return tuple(word for label in path for word in _words(str(label)))


def without_copy_words(found: Words) -> Words:
    return tuple(word for word in found if word not in COPY_WORDS)


def alike(one: Words, other: Words) -> bool:
    """Whether two parts are called the same, shortened or not: ``g``, ``gen``, ``generator``."""
    return len(one) == len(other) and all(
        a == b or (not a.isdigit() and not b.isdigit() and (a.startswith(b) or b.startswith(a)))
        for a, b in zip(one, other, strict=True)
    )


def owners(path: Path, node: Any, models: Sequence[StateDict]) -> tuple[int, ...]:
    """The models that an optimizer is over, in its order, as places in ``models``; none where it
    isn't clear.

    What its name says counts first, if it fits so; then what its parameters fit alone; then what
    they fit together.
    """
    if len(models) <= 1:
        return (0,) * len(models)
    groups = read_groups(node)
    tensors = [model.tensors() for model in models]
    fits = _fitting(groups, models)
    own = words(path)
    of_models = [words(model.path) for model in models]
    named = [i for i, other in enumerate(of_models) if own and alike(own, other)]
    if len(named) == 1 and fits(named):
        return (named[0],)
    together = [i for i, other in enumerate(of_models) if own and alike(own, other[: len(own)])]
    if len(together) > 1 and fits(together):
        return tuple(together)
    sizes = [len(trainable(one)) for one in tensors]
    for equal in (True, False):
        alone = [i for i, n in enumerate(sizes) if (n == groups.total or not equal) and fits([i])]
        if len(alone) == 1:
            return (alone[0],)
        if alone:
            return ()
    return _joint(groups, sizes, fits, named)


def _joint(
    groups: Groups,
    sizes: Sequence[int],
    fits: Callable[[Sequence[int]], bool],
    named: Iterable[int],
) -> tuple[int, ...]:
    found: list[tuple[int, ...]] = []
    for count in range(2, min(len(sizes), _MOST_TOGETHER) + 1):
        for several in permutations(range(len(sizes)), count):
            total = sum(sizes[i] for i in several)
            if total == groups.total and fits(several):
                found.append(several)
    best = [one for one in found if set(named) <= set(one)] or found
    in_order = [one for one in best if list(one) == sorted(one)]
    best = in_order or best
    return best[0] if len(best) == 1 else ()


def _fitting(groups: Groups, models: Sequence[StateDict]) -> Callable[[Sequence[int]], bool]:
    def fits(several: Sequence[int]) -> bool:
        return may_belong(groups, merged([models[i] for i in several]))

    return fits


def merged(models: Sequence[StateDict]) -> dict[str, TensorRef]:
    """The tensors of one model; of several, one after the other, under the paths of each."""
    if len(models) == 1:
        return models[0].tensors()
    return {under(model) + name: ref for model in models for name, ref in model.tensors().items()}


def under(model: StateDict) -> str:
    """What :func:`merged` puts before the names of one of several models."""
    return "".join(f"{label}." for label in model.path)
