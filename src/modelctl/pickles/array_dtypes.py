"""numpy's dtypes, by their states in a pickle: numpy believes what these say of where in an array
objects lie, so that a state can have it take an array's bytes for the addresses of objects, or read
outside an array."""

from __future__ import annotations

from typing import Any

from ..core.checkpoint import Finding
from ..core.nodes import Global, Obj, mapping

DTYPE = Global("numpy", "dtype")
# A state is (3 or 4, byte order, (dtype, shape) or None, names, {name: (dtype, offset)}, bytes of
# an item, alignment, flags, …); of one with flags numpy looks for no objects itself.
_WHOLE, _PART, _FIELDS, _SIZE, _FLAGS = 8, 2, 4, 5, 7
_HAS_OBJECTS = 1
_MOST_LEVELS = 32


def judge_dtype(dtype: Obj, offset: int) -> Finding | None:
    """What it means that a pickle makes this dtype."""
    what = _Judge().of(dtype, 0)[2]
    if what is None:
        return None
    return Finding("dangerous", "array-dtype", what, str(DTYPE), "BUILD", offset)


class _Judge:
    """Judges a dtype by those in it; each of them once."""

    def __init__(self) -> None:
        self.known: dict[int, tuple[bool, int | None, str | None]] = {}

    def of(self, dtype: Any, level: int) -> tuple[bool, int | None, str | None]:
        """Whether there are objects in it, how long an item is (None: unknown), what is wrong."""
        if isinstance(dtype, Global):  # numpy.object_
            return dtype.name in ("object", "object_"), None, None
        if not isinstance(dtype, Obj) or dtype.func != DTYPE:
            return False, None, None
        if level > _MOST_LEVELS:
            return False, None, "nests dtypes of numpy's without end"
        if id(dtype) not in self.known:
            self.known[id(dtype)] = self._of(dtype, level)
        return self.known[id(dtype)]

    def _of(self, dtype: Obj, level: int) -> tuple[bool, int | None, str | None]:
        code = dtype.args[0] if isinstance(dtype.args, tuple) and dtype.args else None
        has_objects, size = _code(code)
        state = dtype.state
        if not isinstance(state, tuple) or len(state) < _WHOLE:
            return has_objects, size, None
        if type(state[_SIZE]) is int and state[_SIZE] >= 0:
            size = state[_SIZE]
        wrong = None
        for inner, at, times in _inside(state):
            objects, length, broken = self.of(inner, level + 1)
            has_objects, wrong = has_objects or objects, wrong or broken
            ends = at if length is None else at + length * times
            if at < 0 or (size is not None and ends > size):
                wrong = wrong or "has numpy read outside an array"
        flags = state[_FLAGS]
        if has_objects and not (type(flags) is int and flags & _HAS_OBJECTS):
            wrong = wrong or "has numpy take an array's bytes for the addresses of objects"
        return has_objects, size, wrong


def _code(code: Any) -> tuple[bool, int | None]:
    """Whether a code of numpy's (``f4``, ``O8``) is that of objects, and how long it is."""
    if isinstance(code, Global):
        return code.name in ("object", "object_"), None
    if not isinstance(code, str):
        return False, None
    kind, digits = code.lstrip("<>=|")[:1], code.lstrip("<>=|")[1:]
    is_size = digits.isascii() and digits.isdigit() and len(digits) < 10
    length = int(digits) * (4 if kind == "U" else 1) if is_size else None
    return kind == "O" or code.startswith("object"), length


def _inside(state: tuple[Any, ...]) -> list[tuple[Any, int, int]]:
    """The dtypes in a state: each where, and how often in a row."""
    found: list[tuple[Any, int, int]] = []
    part = state[_PART]
    if isinstance(part, tuple) and len(part) == 2:
        times = 1
        for n in part[1] if isinstance(part[1], tuple) else (part[1],):
            times *= n if type(n) is int and n >= 0 else 1
        found.append((part[0], 0, times))
    for field in (mapping(state[_FIELDS]) or {}).values():
        if isinstance(field, tuple) and len(field) > 1 and type(field[1]) is int:
            found.append((field[0], field[1], 1))
    return found
