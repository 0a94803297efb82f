"""Recipes: several edits in one pass and one write."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from shlex import quote
from types import NoneType, UnionType
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

from ..core.checkpoint import Checkpoint
from ..core.names import nearest
from ..errors import ModelctlError, UsageError
from .convert import convert
from .freeze import freeze, unfreeze
from .head import strip_head
from .prefix import add_prefix, strip_prefix
from .rename import drop, keep, rename

# One line lets a recipe use an operation.
OPERATIONS: dict[str, Callable[..., Checkpoint]] = {
    "strip-prefix": strip_prefix,
    "add-prefix": add_prefix,
    "rename": rename,
    "keep": keep,
    "drop": drop,
    "strip-head": strip_head,
    "freeze": freeze,
    "unfreeze": unfreeze,
    "convert": convert,
}


def apply(ckpt: Checkpoint, edits: Sequence[Mapping[str, Any]]) -> Checkpoint:
    """Run edits one after the other: each is ``{"do": NAME, OPTION: VALUE, …}``, the options by
    their names on the command line.

    Raises:
        UsageError: an unknown edit or option, or a value of the wrong type.
        ModelctlError: whatever an edit raises, with its number.
    """
    return run(ckpt, parse_recipe(edits))


def run(ckpt: Checkpoint, edits: Sequence[tuple[str, Mapping[str, Any]]]) -> Checkpoint:
    """Run edits that were parsed; of several, an error says which one it was."""
    for number, (edit, options) in enumerate(edits, 1):
        try:
            ckpt = OPERATIONS[edit](ckpt, **options)
        except ModelctlError as e:
            if len(edits) > 1:
                e.message = f"edit {number}, {edit}: {e.message}"
                e.args = (e.message,)
            raise
    return ckpt


def parse_recipe(edits: Sequence[Mapping[str, Any]]) -> list[tuple[str, dict[str, Any]]]:
    """The edits of a recipe with their options as parameters, all checked before any runs.

    Raises:
        UsageError: an unknown edit or option, or a value of the wrong type.
    """
    return [_parse(number, edit) for number, edit in enumerate(edits, 1)]


def history_line(edit: str, options: Mapping[str, Any]) -> str:
    """An edit in one short line, as it would be typed: options that are not the default."""
    operation = OPERATIONS.get(edit)
    known = inspect.signature(operation).parameters if operation else {}
    words = [edit]
    for name, value in options.items():
        default = known[name].default if name in known else None
        if value is None or value is False or value == default or value in ((), []):
            continue
        flag = "--" + name.replace("_", "-")
        if value is True:
            words.append(flag)
        else:
            values = value if isinstance(value, list | tuple) else [value]
            words += [f"{flag} {quote(str(one))}" for one in values]
    return " ".join(words)


def _parse(number: int, edit: Mapping[str, Any]) -> tuple[str, dict[str, Any]]:
    if not isinstance(edit, Mapping) or not isinstance(edit.get("do"), str):
        raise UsageError(f'edit {number} of the recipe lacks do = "…"')
    name = edit["do"]
    operation = OPERATIONS.get(name)
    if operation is None:
        near = nearest(name, OPERATIONS) or list(OPERATIONS)
        raise UsageError(
            f"edit {number} of the recipe: there is no edit '{name}'",
            hint=f"there are {', '.join(near)}",
        )
    parameters = list(inspect.signature(operation).parameters.values())[1:]
    known = {parameter.name.replace("_", "-"): parameter for parameter in parameters}
    kinds = get_type_hints(operation)
    options: dict[str, Any] = {}
    for key, value in edit.items():
        if key == "do":
            continue
        parameter = known.get(key)
        if parameter is None:
            raise UsageError(
                f"edit {number} of the recipe: {name} has no option '{key}'",
                hint=f"it has {', '.join(known)}" if known else None,
            )
        kind = kinds[parameter.name]
        if not _is_of(value, kind):
            raise UsageError(f"edit {number} of the recipe: {key} is {_said(kind)}, not {value!r}")
        options[parameter.name] = value
    for parameter in parameters:
        if parameter.default is parameter.empty and parameter.name not in options:
            raise UsageError(
                f"edit {number} of the recipe: {name} needs {parameter.name.replace('_', '-')}"
            )
    return name, options


# What a value of a recipe may be, as people write it.
_WORDS = {bool: "true or false", str: "a text", int: "a whole number", float: "a number"}


def _is_of(value: Any, kind: Any) -> bool:
    """Whether a value is of the type that a parameter is annotated with."""
    origin, inside = get_origin(kind), get_args(kind)
    if origin in (Union, UnionType):
        return any(_is_of(value, one) for one in inside)
    if origin is Literal:
        return any(value == one for one in inside)
    if origin is not None and issubclass(origin, Sequence):
        return isinstance(value, list | tuple) and all(_is_of(one, inside[0]) for one in value)
    if kind in (int, float) and isinstance(value, bool):
        return False
    return isinstance(value, int | float if kind is float else kind)


def _said(kind: Any) -> str:
    """A type in words: ``'keep' or 'drop'``, ``a text, or a list of texts``."""
    origin, inside = get_origin(kind), get_args(kind)
    if origin in (Union, UnionType):
        return ", or ".join(_said(one) for one in inside if one is not NoneType)
    if origin is Literal:
        return " or ".join(map(repr, inside))
    if origin is not None:
        return f"a list of {_said(inside[0]).removeprefix('a ')}s"
    return _WORDS.get(kind, str(kind))
