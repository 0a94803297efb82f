"""Rename tensors by maps, keep or drop a part of them: in every section."""

from __future__ import annotations

import re
from collections.abc import Callable
from fnmatch import translate

from ..core.checkpoint import Checkpoint
from ..core.names import Patterns, as_list, no_match, select
from ..errors import UsageError
from .remap import OptimizerPolicy, remap
from .renaming import following


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
        old, equals, new = text.rpartition("=")
        if not equals or not old:
            raise UsageError(f"'{text}' is no map: OLD=NEW is")
        renamed = _by_regex(old, new) if regex else _by_glob(old, new)
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
    return out if renaming else out.noting("every name is as the maps would have it")


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
    return out if gone else out.noting("every tensor is kept")


def _by_glob(old: str, new: str) -> Callable[[str], str | None]:
    parts = new.split("*")
    stars = _stars(old)
    if len(parts) - 1 > stars:
        raise UsageError(f"'{new}' has more '*' than '{old}'")
    if not stars and not re.search(r"[?\[]", old):
        return lambda name: new + name[len(old) :] if _is_in(name, old) else None
    pattern = re.compile(_capturing(old), re.DOTALL)

    def renamed(name: str) -> str | None:
        found = pattern.fullmatch(name)
        if found is None:
            return None
        out = parts[0]
        for star, part in zip(found.groups(), parts[1:], strict=False):
            out += star + part
        return out

    return renamed


def _is_in(name: str, module: str) -> bool:
    return name == module or name.startswith(module + ".")


# A set in brackets, or any other character: what a glob is made of.
_GLOB_PARTS = re.compile(r"\[!?\]?[^\]]*\]|.", re.DOTALL)


def _stars(pattern: str) -> int:
    return _GLOB_PARTS.findall(pattern).count("*")


def _capturing(pattern: str) -> str:
    """The regex of a glob, with a group for each ``*``; the rest as :mod:`fnmatch` reads it."""
    out = ""
    for part in _GLOB_PARTS.findall(pattern):
        if part == "*":
            out += "(.*?)"
        else:  # fnmatch wraps what it translates: (?s:…)\Z
            out += translate(part).removesuffix("\\Z").removesuffix("\\z")
    return out


def _by_regex(old: str, new: str) -> Callable[[str], str | None]:
    try:
        pattern = re.compile(old)
        pattern.sub(new, "")
    except (re.error, IndexError) as e:
        raise UsageError(f"'{old}={new}' is no regular expression and replacement: {e}") from None
    return lambda name: pattern.sub(new, name) if pattern.search(name) else None
