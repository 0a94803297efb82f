"""Which optimizer is whose, where a file has several models: by their names, then by what fits."""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from functools import lru_cache
from itertools import combinations, islice, permutations
from typing import Any

from ..matching.matcher import Shape
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
_LONG_KINDS = sorted((kind for kind in _KINDS if len(kind) > 2), key=len, reverse=True)
# Words of keys that say that a part is a copy of another one.
COPY_WORDS = frozenset(
    (
        *("ema", "avg", "average", "averaged", "averaging", "mean", "shadow", "swa", "polyak"),
        *("target", "targ", "tgt", "teacher", "best", "last", "latest", "prev", "previous", "old"),
        *("copy", "backup", "raw", "current", "slow", "momentum", "master", "fp32", "initial"),
        *("running", "moving", "smooth", "smoothed", "delayed", "reference", "ref"),
    )
)
_WORD = re.compile(r"[A-Z]?[a-z]+|[A-Z]+(?![a-z])|\d+")
# More models are not tried together, nor tried where so many might be.
_MOST_TOGETHER, _MOST_TRIED = 4, 12

Words = tuple[str, ...]


@lru_cache(100_000)
def _words(text: str) -> Words:
    found = []
    for word in _WORD.findall(text):
        word = word.lower()
        if word in _KINDS:
            continue
        found.append(word if word.isdigit() else _inside(word))
    return tuple(found)


@lru_cache(10_000)
def _inside(word: str) -> str:
    """``netg``, ``goptim``: what is left of a word without what it is."""
    if word[:-1] in COPY_WORDS:  # ``targets``
        return word[:-1]
    for kind in _LONG_KINDS:
        if 1 <= len(word) - len(kind) <= 2:
            for rest in (word.removeprefix(kind), word.removesuffix(kind)):
                if rest != word:
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


def owners(
    optimizers: Sequence[tuple[Path, Any]],
    models: Sequence[StateDict],
    tensors: Mapping[Path, Shape],
) -> list[tuple[int, ...] | None]:
    """For each optimizer the models that it is over, as places in ``models``, in its order; ()
    where it is over none of them, None where that isn't clear.

    What its name says counts first, if it fits so; then what its parameters fit alone; then what
    they fit together. What is left may be over a part of a model that no other is over.
    ``tensors`` stand beside the optimizers, and may have one, too (``log_alpha``).
    """
    if not models or len(models) == len(optimizers) == 1:
        return [tuple(range(len(models)))] * len(optimizers)
    known = [(path, read_groups(node)) for path, node in optimizers]
    sizes = [len(trainable(model.tensors())) for model in models]
    said = [words(model.path) for model in models]
    found = [_whole(path, groups, models, sizes, said) for path, groups in known]
    covered = {
        i
        for (_, groups), of in zip(known, found, strict=True)
        if of and groups.total == sum(sizes[i] for i in of)
        for i in of
    }
    for at, (path, groups) in enumerate(known):
        if found[at] is None:
            found[at] = _part(path, groups, models, said, covered)
        if groups.total == 1 and not _named(words(path), said):
            (shown,) = (shape for group in groups.shapes for shape in group)
            if any(
                shown in (None, shape) and _of_tensor(path, one) for one, shape in tensors.items()
            ):
                found[at] = ()
    return found


def _of_tensor(path: Path, tensor: Path) -> bool:
    """Whether an optimizer is called like a tensor: ``alpha_optimizer`` like ``log_alpha``."""
    own, other = words(path), words(tensor)
    least = min(len(own), len(other))
    return least > 0 and alike(own[-least:], other[-least:])


def _named(own: Words, said: Sequence[Words]) -> list[int]:
    return [i for i, other in enumerate(said) if own and alike(own, other)]


def _whole(
    path: Path,
    groups: Groups,
    models: Sequence[StateDict],
    sizes: Sequence[int],
    said: Sequence[Words],
) -> tuple[int, ...] | None:
    """The models that an optimizer is called like, or that have just its parameters."""
    fits = _fitting(groups, models)
    own = words(path)
    named = _named(own, said)
    if len(named) == 1 and fits(named):
        return (named[0],)
    together = [i for i, other in enumerate(said) if own and alike(own, other[: len(own)])]
    if len(together) > 1 and groups.total == sum(sizes[i] for i in together):
        if len(together) > _MOST_TOGETHER:
            return tuple(together) if fits(together) else None
        orders = [one for one in permutations(together) if fits(one)]
        if orders:
            return orders[0]
    alone = _first_two(i for i, size in enumerate(sizes) if size == groups.total and fits([i]))
    if alone:
        return (alone[0],) if len(alone) == 1 else None
    return _joint(groups, sizes, fits, named)


def _part(
    path: Path,
    groups: Groups,
    models: Sequence[StateDict],
    said: Sequence[Words],
    covered: Collection[int],
) -> tuple[int, ...] | None:
    """The model that an optimizer may be over a part of."""
    if len(models) == 1 and not covered:
        return (0,)  # whose else, even where it doesn't seem to fit
    fits = _fitting(groups, models)
    free = [i for i in range(len(models)) if i not in covered]
    possible = _first_two(i for i in free if fits([i]))
    if possible or free:
        return (possible[0],) if len(possible) == 1 else None
    # each model has its optimizer: this one is none's, unless it may be a second one
    if words(path) and all(said):
        return ()
    possible = _first_two(i for i in range(len(models)) if fits([i]))
    return (possible[0],) if len(possible) == 1 else None if possible else ()


def _first_two(found: Iterator[int]) -> list[int]:
    """As many as tell whether there is one."""
    return [*islice(found, 2)]


def _joint(
    groups: Groups,
    sizes: Sequence[int],
    fits: Callable[[Sequence[int]], bool],
    named: Iterable[int],
) -> tuple[int, ...] | None:
    found: list[tuple[int, ...]] = []
    small = [i for i, size in enumerate(sizes) if size < groups.total]
    for count in range(2, _MOST_TOGETHER + 1) if len(small) <= _MOST_TRIED else ():
        for several in combinations(small, count):
            if sum(sizes[i] for i in several) == groups.total:
                found += [one for one in permutations(several) if fits(one)][:1]
    best = [one for one in found if set(named) <= set(one)] or found
    return best[0] if len(best) == 1 else None


def is_ordered(node: Any, of: Sequence[StateDict]) -> bool:
    """Whether an optimizer over several models can have them in this order alone."""
    groups = read_groups(node)
    if groups.names is not None:
        return True
    fits = _fitting(groups, of)
    if len(of) > _MOST_TOGETHER:
        return False
    others = [one for one in permutations(range(len(of))) if list(one) != sorted(one)]
    return not any(fits(one) for one in others)


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
