"""Maps of names, as ``rename`` takes them: OLD=NEW, by globs or regexes."""

from __future__ import annotations

import re
from collections.abc import Callable
from fnmatch import translate

from ..errors import UsageError

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


def _by_regex(old: str, new: str) -> Renamer:
    try:
        pattern = re.compile(old)
        pattern.sub(new, "")
    except (re.error, IndexError) as e:
        raise UsageError(f"'{old}={new}' is no regular expression and replacement: {e}") from None
    return lambda name: pattern.sub(new, name) if pattern.search(name) else None
