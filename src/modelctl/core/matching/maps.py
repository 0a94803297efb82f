"""Maps of names, as ``rename`` takes them: OLD=NEW, by globs or regexes."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from fnmatch import translate

from ...errors import UsageError

# What becomes of a name; None where the map does not match it.
Renamer = Callable[[str], "str | None"]


def renamer(map: str, regex: bool = False) -> tuple[str, Renamer]:
    """What a map matches, and what it makes of a name.

    ``OLD=NEW`` is parted at its last ``=``. OLD is a glob over whole names, and the n-th ``*`` of
    NEW (which takes as little as it can) is what the n-th ``*`` of OLD stands for; without
    wildcards OLD is a tensor or a module, for all in it. With ``regex`` OLD is searched for and
    replaced wherever it is found, NEW may hold ``\\1`` (:func:`re.sub`).

    Raises:
        UsageError: not a map.
    """
    old, equals, new = map.rpartition("=")
    if not equals or not old:
        raise UsageError(f"'{map}' is no map: OLD=NEW is")
    return old, _by_regex(old, new) if regex else _by_glob(old, new)


def _by_glob(old: str, new: str) -> Renamer:
    parts = new.split("*")
    stars = _stars(old)
    if len(parts) - 1 > stars:
        raise UsageError(f"'{new}' has more '*' than '{old}'")
    plain = not re.search(r"[?\[]", old)
    if not stars and plain:
        return lambda name: new + name[len(old) :] if _is_in(name, old) else None
    match = _plain_stars(old) if plain else _any_stars(old)

    def renamed(name: str) -> str | None:
        found = match(name)
        if found is None:
            return None
        out = parts[0]
        for star, part in zip(found, parts[1:], strict=False):
            out += star + part
        return out

    return renamed


def _plain_stars(pattern: str) -> Callable[[str], Sequence[str] | None]:
    """What the ``*`` stand for, each as little as it can: what is between them stands where it is
    found first. (A regex would try all places, one star for another.)"""
    first, *between, last = pattern.split("*")

    def match(name: str) -> Sequence[str] | None:
        if not name.startswith(first):
            return None
        stars, at = [], len(first)
        for part in between:
            found = name.find(part, at)
            if found < 0:
                return None
            stars.append(name[at:found])
            at = found + len(part)
        end = len(name) - len(last)
        if end < at or not name.endswith(last):
            return None
        return [*stars, name[at:end]]

    return match


def _any_stars(pattern: str) -> Callable[[str], Sequence[str] | None]:
    regex = re.compile(_capturing(pattern), re.DOTALL)

    def match(name: str) -> Sequence[str] | None:
        found = regex.fullmatch(name)
        return None if found is None else found.groups()

    return match


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


def _by_regex(old: str, new: str) -> Renamer:
    try:
        pattern = re.compile(old)
        pattern.sub(new, "")
    except (re.error, IndexError) as e:
        raise UsageError(f"'{old}={new}' is no regular expression and replacement: {e}") from None
    return lambda name: pattern.sub(new, name) if pattern.search(name) else None
