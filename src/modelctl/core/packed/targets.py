"""Which modules a config means: paths, and ``re:`` with a regular expression, which is somebody's
that may be made to take for ever. So only those are understood that take the time of the name:
``.*`` between pieces without other repetition, as makers write them (``re:.*self_attn.*``,
``re:.*(q|k)_proj$``)."""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import Any

_MOST = 500
# What stands at one place of a pattern: escaped, a set of characters, .*, a group that is not
# remembered, or a character.
_TOKEN = re.compile(r"\\.|\[\^?\]?[^\]\\]*\]|\.\*|\(\?:|.", re.DOTALL)

# The pieces between the .* of each alternative.
Pattern = list[list["re.Pattern[str]"]]


class Targets:
    """A list of targets, which is asked of many modules."""

    def __init__(self, listed: Any) -> None:
        texts = [one for one in listed if isinstance(one, str)] if isinstance(listed, list) else []
        self._paths = {one for one in texts if not one.startswith("re:")}
        self._patterns = [
            found for one in texts if one.startswith("re:") and (found := _pattern(one[3:]))
        ]

    def match(self, module: str) -> bool:
        """Whether one is the module, ends it, or holds it."""
        cuts = [0, *(i + 1 for i, sign in enumerate(module) if sign == ".")]
        return (
            any(module[cut:] in self._paths for cut in cuts)
            or any(module[: cut - 1] in self._paths for cut in cuts[1:])
            or any(_fits(pattern, module) for pattern in self._patterns)
        )


def _pattern(text: str) -> Pattern | None:
    """A regular expression by its pieces; None where it repeats anything but ``.*``."""
    pieces: list[list[str]] = [[""]]
    depth = 0
    for token in _TOKEN.findall(text) if len(text) <= _MOST else "*":
        depth += (token in ("(", "(?:")) - (token == ")")
        if token == "|" and not depth:
            pieces.append([""])
        elif token == ".*" and not depth:
            pieces[-1].append("")
        elif token in ("*", "+", "?", "{", ".*") or (len(token) == 2 and token[1].isdigit()):
            return None
        else:
            pieces[-1][-1] += token
    try:
        return [[re.compile(piece) for piece in alternative] for alternative in pieces]
    except re.error:
        return None


def _fits(pattern: Iterable[list[re.Pattern[str]]], module: str) -> bool:
    """Whether an alternative matches from the start on: each piece where it comes first."""
    for first, *rest in pattern:
        found = first.match(module)
        for piece in rest:
            found = piece.search(module, found.end()) if found is not None else None
        if found is not None:
            return True
    return False
