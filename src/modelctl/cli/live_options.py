"""What the options of the live view say."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from ..errors import UsageError


def inputs(sizes: Sequence[str], dtypes: Sequence[str]) -> tuple[Any, Any]:
    """Shapes and dtypes of the inputs, as :func:`modelctl.nn.view.from_file.view` takes them: in
    order, or by keyword.

    Raises:
        UsageError: not shapes, names for some of them, or another number of dtypes.
    """
    shapes: dict[str, tuple[int, ...]] = {}
    named = 0
    for i, text in enumerate(sizes):
        name, equals, dims = text.rpartition("=")
        named += bool(equals)
        shapes[name if equals else str(i)] = _shape(dims)
    if named not in (0, len(shapes)) or len(shapes) != len(sizes):
        raise UsageError("--input-size: give each input a name of its own, or none")
    if len(dtypes) not in (0, 1, len(shapes)):
        raise UsageError(f"{len(dtypes)} times --input-dtype for {len(shapes)} inputs")
    kinds = list(dtypes) * len(shapes) if len(dtypes) == 1 else list(dtypes)
    found = (shapes if named else list(shapes.values())) if shapes else None
    return found, dict(zip(shapes, kinds, strict=True)) if named and kinds else kinds


def _shape(text: str) -> tuple[int, ...]:
    parts = [part.strip() for part in text.replace("x", ",").strip("()[] ").split(",")]
    if not all(part.isdecimal() for part in parts):
        raise UsageError(f"--input-size: '{text}' is not a shape", hint="1,3,224,224 is")
    return tuple(map(int, parts))
