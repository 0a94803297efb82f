"""Rename tensors by maps, keep or drop a part of them: in every section."""

from __future__ import annotations

from ..core.checkpoint import Checkpoint
from ..core.matching.maps import renamer
from ..core.names import Patterns, as_list, no_match, select
from ..core.notes import info
from ..errors import UsageError
from .carry.sections import OptimizerPolicy, remap
from .carry.state_dict import following


def rename(ckpt: Checkpoint, map: Patterns, regex: bool = False) -> Checkpoint:
    """Rename tensors in the model, its EMA copies, the optimizer and the records.

    Each map is ``OLD=NEW``, parted at its last ``=``; they run in order, each on what the one
    before made. OLD is a glob over whole names, and the n-th ``*`` of NEW (which takes as little
    as it can) is what the n-th ``*`` of OLD stands for; without wildcards OLD is a tensor or a
    module, for all in it. With ``regex`` OLD is searched for and replaced wherever it is found,
    NEW may hold ``\\1`` (:func:`re.sub`).

    Raises:
        UsageError: not a map, or one that makes something that is no name.
        NoMatchError: a map matches no name.
        CollisionError: two tensors would get one name.
        RefusedError: the model is a whole module, whose names are its class's.
    """
    if not as_list(map):
        raise UsageError("what is renamed?", hint="--map OLD=NEW, or --map-file with one a line")
    names = list(ckpt.sections.model().entries)
    current = dict(zip(names, names, strict=True))
    for text in as_list(map):
        old, renamed = renamer(text, regex)
        found = {name: renamed(now) for name, now in current.items()}
        if all(now is None for now in found.values()):
            raise no_match(old, list(current.values()))
        for name, now in found.items():
            if now is not None:
                if not all(now.split(".")):
                    raise UsageError(f"'{text}' would rename '{current[name]}' to '{now}'")
                current[name] = now
    renaming = {name: new for name, new in current.items() if name != new}
    out = remap(ckpt, following(names, renaming))
    return out if renaming else out.noting(info("every name is as the maps would have it"))


def keep(
    ckpt: Checkpoint,
    pattern: Patterns,
    exclude: Patterns = (),
    regex: bool = False,
    optimizer: OptimizerPolicy = "keep",
) -> Checkpoint:
    """The checkpoint with only the tensors that ``pattern`` matches, and their optimizer state.

    Raises:
        NoMatchError: a pattern matches nothing.
        RefusedError, AmbiguousError: the optimizer can't be kept in step (``optimizer="drop"``
            leaves it out), or a whole module can't lose that.
    """
    names = list(ckpt.sections.model().entries)
    chosen = set(select(names, pattern, exclude=exclude, regex=regex))
    return _without(ckpt, [name for name in names if name not in chosen], optimizer)


def drop(
    ckpt: Checkpoint,
    pattern: Patterns,
    exclude: Patterns = (),
    regex: bool = False,
    optimizer: OptimizerPolicy = "keep",
) -> Checkpoint:
    """The checkpoint without the tensors that ``pattern`` matches and their optimizer state.

    Raises:
        As :func:`keep`.
    """
    names = list(ckpt.sections.model().entries)
    return _without(ckpt, select(names, pattern, exclude=exclude, regex=regex), optimizer)


def _without(ckpt: Checkpoint, gone: list[str], optimizer: OptimizerPolicy) -> Checkpoint:
    names = ckpt.sections.model().entries
    out = remap(ckpt, following(names, dict.fromkeys(gone)), optimizer=optimizer)
    return out if gone else out.noting(info("every tensor is kept"))
