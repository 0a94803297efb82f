"""What somebody meant who said it another way: a command, an option, a value or a file by another
name, a pattern where a file is wanted, two words in each other's places."""

from __future__ import annotations

import difflib  # only mistakes need this module
import inspect
import os
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from shlex import quote
from typing import Literal, NoReturn, get_args, get_origin

from ..core.text import either
from ..errors import UsageError
from ..storage.places import is_there
from ..storage.source import no_such_file
from .quick import flags_of, parameters_of, said_options
from .signature import Command

# What other programs call it; the words after a command are what to say with it.
SYNONYMS: Mapping[str, tuple[str, ...]] = {
    **dict.fromkeys(("info", "inspect", "describe", "view", "head"), ("summary",)),
    **dict.fromkeys(("tree", "cat", "print", "dump", "get", "meta"), ("show",)),
    **dict.fromkeys(("list", "dir", "keys", "names", "find", "grep"), ("ls",)),
    **dict.fromkeys(("rm", "remove", "delete", "del", "exclude"), ("drop",)),
    **dict.fromkeys(("select", "extract", "filter", "only", "slice"), ("keep",)),
    **dict.fromkeys(("cp", "copy", "export", "save", "shard", "unshard"), ("convert",)),
    **dict.fromkeys(("mv", "move", "map", "remap"), ("rename",)),
    **dict.fromkeys(("cut", "trim"), ("drop", "keep", "strip-head")),
    **dict.fromkeys(("cmp", "compare"), ("diff",)),
    **dict.fromkeys(("join", "combine"), ("merge",)),
    **dict.fromkeys(("recipe", "run", "edit"), ("apply",)),
    **dict.fromkeys(("unwrap", "strip"), ("strip-prefix",)),
    **dict.fromkeys(("thaw", "melt"), ("unfreeze",)),
    **dict.fromkeys(("stats", "nan"), ("summary --stats",)),
    **dict.fromkeys(("which", "arch"), ("identify",)),
    "set": ("merge --set",),
}
_WILDCARDS = re.compile(r"[*?\[]")


def is_file(word: str) -> bool:
    """Whether the first word of a line, which is no command, names a file: ``modelctl FILE``."""
    looks_so = os.sep in word or "/" in word or os.path.splitext(word)[1] != ""
    return looks_so or is_there(word)


def no_such_command(word: str, commands: Iterable[str]) -> NoReturn:
    """Raises UsageError: there is no command ``word``; names the one that does it."""
    near = SYNONYMS.get(word.lower()) or tuple(_near(word, commands))
    meant = "see 'modelctl --help'"
    if near:
        meant = either(f"'modelctl {one}'" for one in near) + "?"
    raise UsageError(f"there is no command '{word}'", hint=meant)


def check_said(command: Command, argv: Sequence[str], commands: Iterable[Command]) -> None:
    """Raises UsageError where an option or its value is not one of the command's, or a pattern
    stands alone where it goes to an option; says what was meant."""
    flags = flags_of(parameters_of(command))
    given: dict[str, list[str]] = {}
    for flag, text in said_options(flags, argv, unknown=True):
        if flag not in flags:
            _no_such_option(command, flag, flags, commands)
        one, _ = flags[flag]
        given.setdefault(one.name, []).append(text)
        if get_origin(one.kind) is Literal and text not in get_args(one.kind):
            choices = get_args(one.kind)
            near = _near(text, choices)
            raise UsageError(
                f"{flag} takes {either(choices)}, not '{text}'",
                hint=f"{flag} {near[0]}?" if near else f"see 'modelctl {command.name} --help'",
            )
    if "pattern" in _options_of(command) and "pattern" not in given:
        values = {text for texts in given.values() for text in texts}
        for word in argv:
            if word not in values:
                _check_pattern(command, word)


def no_source(command: Command, path: Path) -> NoReturn:
    """Raises an error: a source of a command is no file; what was meant is a pattern,
    a map, or a file of another name."""
    _check_pattern(command, str(path))
    raise no_such_file(path)


def check_recipe(recipe: Path, sources: Sequence[Path]) -> None:
    """Raises UsageError where the recipe of ``apply`` stands behind what it is for."""
    swapped = [one for one in sources if Path(one).suffix == ".toml"]
    if swapped and recipe.suffix != ".toml":
        others = [recipe, *(one for one in sources if one != swapped[0])]
        words = " ".join(quote(str(path)) for path in (swapped[0], *others))
        raise UsageError(
            f"{recipe} stands where the recipe is wanted, {swapped[0]} where a checkpoint is",
            hint=f"modelctl apply {words}",
        )


def _check_pattern(command: Command, word: str) -> None:
    options = _options_of(command)
    if not word or word.startswith("-") or is_there(word):
        return
    if "map" in options and "=" in word:
        raise UsageError(f"'{word}' is a map, no file", hint=f"--map {quote(word)}")
    if "pattern" in options and _WILDCARDS.search(word):
        raise UsageError(f"'{word}' is a pattern, no file", hint=f"--pattern {quote(word)}")
    if "pattern" in options and "/" not in word and not Path(word).suffix:
        raise UsageError(
            f"{word}: no such file or directory",
            hint=f"--pattern {quote(word)}, if it is the name of a tensor or a module",
        )


def _no_such_option(
    command: Command, flag: str, flags: Iterable[str], commands: Iterable[Command]
) -> NoReturn:
    near = _near(flag, flags) if flag.startswith("--") else []
    others = [
        other.name
        for other in commands
        if flag in {one for info in _options_of(other).values() for one in info.split("/")}
    ]
    hint = f"see 'modelctl {command.name} --help'"
    if others and not near:
        hint = "it belongs to " + either(f"'modelctl {name}'" for name in others[:3])
    raise UsageError(
        f"'modelctl {command.name}' has no option {flag}",
        hint=f"{either(near)}?" if near else hint,
    )


def _options_of(command: Command) -> dict[str, str]:
    """The options of a command: the parameter, and its flags with slashes between."""
    return {
        name: "/".join(get_args(one.annotation)[1].names(name))
        for name, one in inspect.signature(command).parameters.items()
        if hasattr(get_args(one.annotation)[1], "names")
    }


def _near(word: str, known: Iterable[str]) -> list[str]:
    return difflib.get_close_matches(word, list(known), n=2, cutoff=0.6)
