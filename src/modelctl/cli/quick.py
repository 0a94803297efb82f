"""The quick way to read a command line: what is well said in a plain way, and nothing else.

Starting typer takes longer than most commands. What this module reads, typer reads alike (a test
compares the two); all that it doesn't is left to typer: help, mistakes, what is spelled unusually.
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from types import NoneType, UnionType
from typing import Any, Literal, NamedTuple, get_args, get_origin

from ..errors import UsageError
from ..storage.streams import is_stream
from .signature import Argument, Command, Option, as_path

_INTEGER = re.compile(r"\d{1,18}", re.ASCII)
_NUMBER = re.compile(r"\d{1,18}(\.\d{1,18})?(e[-+]?\d{1,2})?", re.ASCII)


class _Unclear(Exception):
    """Something for typer to say."""


class _Parameter(NamedTuple):
    """A parameter: what its values are, and whether there may be several."""

    name: str
    kind: Any
    several: bool
    needed: bool
    info: Argument | Option

    def value(self, text: str) -> Any:
        """A text as a value."""
        if get_origin(self.kind) is Literal:
            if text in get_args(self.kind):
                return text
        elif self.kind is Path:
            return as_path(text)
        elif self.kind is str:
            return text
        elif self.kind is int and _INTEGER.fullmatch(text):
            return int(text)
        elif self.kind is float and _NUMBER.fullmatch(text):
            return float(text)
        raise _Unclear


def said(command: Command, argv: Sequence[str]) -> dict[str, Any] | None:
    """The parameters of a command as its words say, or None where that is for typer to see."""
    signature = inspect.signature(command).parameters
    parameters = parameters_of(command)
    try:
        given, places = _options(parameters, argv)
        given.update(_arguments(parameters, places))
    except _Unclear:
        return None
    if any(one.needed and one.name not in given for one in parameters):
        return None
    return {name: given.get(name, one.default) for name, one in signature.items()}


def parameters_of(command: Command) -> list[_Parameter]:
    """The parameters of a command."""
    return [_parameter(one) for one in inspect.signature(command).parameters.values()]


def _parameter(one: inspect.Parameter) -> _Parameter:
    kind, info = get_args(one.annotation)[:2]
    if get_origin(kind) is UnionType:  # … | None
        (kind,) = (part for part in get_args(kind) if part is not NoneType)
    several = get_origin(kind) is list
    if several:
        (kind,) = get_args(kind)
    return _Parameter(one.name, kind, several, one.default is one.empty, info)


def _options(
    parameters: Sequence[_Parameter], argv: Sequence[str]
) -> tuple[dict[str, Any], list[str]]:
    """The options that were said, and the other words."""
    flags = flags_of(parameters)
    given: dict[str, Any] = {}
    places: list[str] = []
    words = iter(argv)
    for word in words:
        if not word.startswith("-") or is_stream(word):
            places.append(word)
            continue
        flag, equals, text = word.partition("=") if word.startswith("--") else (word, "", "")
        if flag not in flags:
            raise _Unclear
        one, switched = flags[flag]
        if one.kind is bool:
            if equals:
                raise _Unclear
            if given.setdefault(one.name, switched) != switched:
                raise _Unclear
            continue
        text = text if equals else next(words, "")
        if not text or (text.startswith("-") and not is_stream(text)):
            raise _Unclear
        value = one.value(text)
        if one.several:
            given.setdefault(one.name, []).append(value)
        elif given.setdefault(one.name, value) != value:
            raise _Unclear
    return given, places


def flags_of(parameters: Sequence[_Parameter]) -> dict[str, tuple[_Parameter, bool]]:
    """What each option is called, and which way a switch goes by that name."""
    flags = {}
    for one in parameters:
        if isinstance(one.info, Option):
            for flag in one.info.names(one.name):
                on, _, off = flag.partition("/")
                flags[on] = one, True
                if off:
                    flags[off] = one, False
    return flags


def check_once(command: Command, argv: Sequence[str]) -> None:
    """Raises UsageError where an option that takes one value was given two: typer would take the
    last one, and say nothing."""
    flags = flags_of(parameters_of(command))
    given: dict[str, str] = {}
    for flag, text in said_options(flags, argv):
        one, switched = flags[flag]
        before = given.setdefault(one.name, text)
        if one.several or before == text:
            continue
        if one.kind is bool:
            if flags[before][1] != switched:
                raise UsageError(f"{before} and {text}: one of them")
            continue
        raise UsageError(f"{flag} twice, {before} and {text}: it takes one value")


def said_options(
    flags: Mapping[str, tuple[_Parameter, bool]], argv: Sequence[str], *, unknown: bool = False
) -> Iterator[tuple[str, str]]:
    """The flags of a line, however they are spelled, each with its value; a switch with itself.
    With ``unknown`` those, too, that are none of the command's."""
    words = iter(argv)
    for word in words:
        if word == "--":
            return
        if word.startswith("--"):
            flag, equals, text = word.partition("=")
            if flag in flags and flags[flag][0].kind is not bool:
                yield flag, text if equals else next(words, "")
            elif flag in flags or unknown:
                yield flag, flag
            continue
        letters = word[1:] if word.startswith("-") else ""
        while letters and (flag := f"-{letters[0]}") in flags:
            letters = letters[1:]
            if flags[flag][0].kind is bool:
                yield flag, flag
            else:
                yield flag, letters or next(words, "")
                break
        if unknown and letters and f"-{letters[0]}" not in flags:
            yield f"-{letters[0]}", ""


def _arguments(parameters: Sequence[_Parameter], places: Sequence[str]) -> dict[str, Any]:
    """What the words that are no options are, by their places; the last one takes the rest."""
    given: dict[str, Any] = {}
    left = list(places)
    for one in parameters:
        if isinstance(one.info, Argument) and left:
            if one.several:
                given[one.name] = [one.value(text) for text in left]
                left = []
            else:
                given[one.name] = one.value(left.pop(0))
    if left or "" in places:
        raise _Unclear
    return given
