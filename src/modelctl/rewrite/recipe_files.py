"""Files that say what to do: recipes, and maps for ``rename``."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any

from ..core.text import printable
from ..errors import ModelctlError, UsageError
from ..files import PathLike
from ..inspection.matching.report import Match, unclear_text
from ..surgery.recipe import parse_recipe


def read_recipe(path: PathLike) -> list[dict[str, Any]]:
    """The edits of a recipe, as :func:`modelctl.edit` and :func:`modelctl.apply` take them:
    checked, and with the maps of a ``map-file``, which lies beside the recipe.

    Raises:
        UsageError: not TOML, or not a recipe.
        ModelctlError: it can't be read.
    """
    if sys.version_info >= (3, 11):
        import tomllib
    else:
        import tomli as tomllib

    path = Path(path)
    try:
        document = tomllib.loads(path.read_text("utf-8"))
    except OSError as e:
        raise ModelctlError(f"{path}: {e.strerror}") from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as e:
        raise UsageError(f"{path}: not TOML: {e}") from None
    edits = document.pop("edit", None)
    if document or not isinstance(edits, list) or not edits:
        extra = f", not {', '.join(map(repr, document))}" if document else ""
        raise UsageError(
            f"{path}: a recipe is a list of [[edit]] tables{extra}",
            hint='[[edit]]  do = "strip-prefix"',
        )
    for edit in edits:
        if isinstance(edit, dict) and isinstance(edit.get("map-file"), str) and "map" not in edit:
            edit["map"] = read_maps(path.parent / edit.pop("map-file"))
    try:
        parse_recipe(edits)
    except UsageError as e:
        raise UsageError(f"{path}: {e.message}", hint=e.hint) from None
    return edits


def read_maps(path: PathLike) -> list[str]:
    """The maps of a file, a line each; empty lines and comments left out.

    Raises:
        UsageError: not text, or no map in it.
        ModelctlError: it can't be read.
    """
    try:
        lines = [line.strip() for line in Path(path).read_text("utf-8").splitlines()]
    except OSError as e:
        raise ModelctlError(f"{os.fspath(path)}: {e.strerror}") from None
    except UnicodeDecodeError:
        raise UsageError(f"{os.fspath(path)}: not text, a map a line is (OLD=NEW)") from None
    found = [line for line in lines if line and not line.startswith("#")]
    if not found:
        raise UsageError(f"{os.fspath(path)}: no map in it, OLD=NEW a line")
    return found


def write_maps(path: PathLike, found: Match) -> None:
    """Write the maps of a match into a new file, for :func:`read_maps`; what is not clear as
    comments.

    Raises:
        UsageError: a line of text can't hold every map.
        ModelctlError: the file exists.
    """
    maps = [one.map for one in found.maps]
    if any(not one.isprintable() or one != one.strip() or one[0] == "#" for one in maps):
        raise UsageError(
            f"{os.fspath(path)} is not written: a line of text can't hold every map",
            hint="--format json has them",
        )
    notes = [f"not clear: {unclear_text(one)}" for one in found.unclear]
    about = [f"{found.source} -> {found.target}, by modelctl match", *notes]
    lines = [*(f"# {printable(line)}" for line in about), *maps]
    try:
        with open(path, "x", encoding="utf-8") as file:
            file.write("".join(f"{line}\n" for line in lines))
    except FileExistsError:
        raise ModelctlError(
            f"{os.fspath(path)} exists", hint="name another file, or remove it first"
        ) from None
