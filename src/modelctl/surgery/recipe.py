"""Recipes: several edits in one pass and one write."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from typing import Any

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
            words += [f"{flag} {one}" for one in values]
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
        if not _fits(value, str(parameter.annotation)):
            raise UsageError(f"edit {number} of the recipe: {key} = {value!r} is of the wrong type")
        options[parameter.name] = value
    for parameter in parameters:
        if parameter.default is parameter.empty and parameter.name not in options:
            raise UsageError(
                f"edit {number} of the recipe: {name} needs {parameter.name.replace('_', '-')}"
            )
    return name, options


def _fits(value: Any, annotation: str) -> bool:
    if annotation == "bool":
        return isinstance(value, bool)
    if annotation == "Patterns":
        return isinstance(value, str) or (
            isinstance(value, list) and all(isinstance(one, str) for one in value)
        )
    return isinstance(value, str)
