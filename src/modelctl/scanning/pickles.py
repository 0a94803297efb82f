"""Pickles where they lie, one after the other, read for what they name alone."""

from __future__ import annotations

import re
from contextlib import suppress
from math import prod
from typing import Any, NamedTuple

from ..core.checkpoint import Finding
from ..core.nodes import ABSENT, Global, Obj, attributes, mapping
from ..core.storages import Source, Storage
from ..errors import UnreadableError
from ..formats.pytorch.storage_ids import storage_table
from ..pickles.interpreter import most_bytes, unpickle
from ..pickles.machine import CutOffError, Machine

# torch's legacy files are five pickles, and then storages.
_LEGACY, _MAGIC = 5, 0x1950A86A20F9469CFC6C
_MOST = 1000
_FIRST_READ, _TIMES = 1 << 20, 4
_PROTOCOLS = range(6)
# Of a stream with arrays in it, which is read whole.
_MOST_BYTES = 1 << 30
_CODE = re.compile(r"[<>|=]?([a-zA-Z?])(\d{0,9})")
_MOST_NESTED = 8


class Pickles(NamedTuple):
    """What was found in pickles.

    Attributes:
        findings: of all of them.
        read: how many there were.
        end: where the last one ended.
        error: why the one after that is none; None at the end of the bytes.
        legacy: whether they are those of torch's files from before 1.6.
        arrays: how many lie between their opcodes, as joblib has them.
    """

    findings: list[Finding]
    read: int
    end: int
    error: UnreadableError | None
    legacy: bool = False
    arrays: int = 0


class _Unread(Storage):
    """A storage that nobody looks into."""

    __slots__ = ()

    def read(self, start: int, size: int) -> bytes:
        raise UnreadableError("a storage whose bytes are not looked at")


def read_pickles(source: Source) -> Pickles:
    """The pickles from the start of a source, until there are no more."""
    findings: list[Finding] = []
    head = _Growing(source)
    at = count = 0
    legacy = False
    while at < source.size and count < _MOST:
        if legacy and count == _LEGACY:
            break
        if count and not legacy and not _begins(head.at(at, 2)):
            break
        try:
            value, at = head.unpickle(at, findings)
        except UnreadableError as e:
            return Pickles(findings, count, at, e, legacy, head.behind.arrays)
        legacy = legacy or (count == 0 and value == _MAGIC)
        count += 1
    return Pickles(findings, count, at, None, legacy, head.behind.arrays)


def _begins(head: bytes) -> bool:
    """Whether bytes begin as a pickle does, but one of the first two protocols."""
    return len(head) == 2 and head[0] == 0x80 and head[1] in _PROTOCOLS


class _Growing:
    """The start of a source, as much as was needed."""

    def __init__(self, source: Source) -> None:
        self.source, self.data = source, b""
        self.behind = _Behind()

    def at(self, start: int, size: int) -> bytes:
        self._grow(start + size)
        return self.data[start : start + size]

    def unpickle(self, at: int, findings: list[Finding]) -> tuple[Any, int]:
        """One pickle, and where it ends; its findings are added to the others."""
        most = min(self.source.size, at + min(most_bytes(self.source.size), _MOST_BYTES))
        self._grow(at + _FIRST_READ)
        while True:
            known: list[Finding] = []
            try:
                size = len(self.data) - at
                found = unpickle(self.data, at, _persistent(), known, size, self.behind)
            except CutOffError:
                if len(self.data) >= most:
                    findings += known
                    raise
            except UnreadableError:
                findings += known
                raise
            else:
                findings += known
                if self.behind.arrays:  # who is not joblib takes what lies there for opcodes
                    again: list[Finding] = []
                    with suppress(UnreadableError):
                        unpickle(self.data, at, _persistent(), again, size)
                    seen = {one[:4] for one in findings}
                    findings += [one for one in again if one[:4] not in seen]
                return found.value, found.end
            self._grow(min(most, _TIMES * len(self.data)))

    def _grow(self, size: int) -> None:
        size = min(size, self.source.size)
        if size > len(self.data):
            self.data += self.source.read(len(self.data), size - len(self.data))


# joblib's stand-in for an array, whose class reads it from the stream right behind
# (joblib/numpy_pickle.py, NumpyArrayWrapper.read_array).
_WRAPPER = Global("joblib.numpy_pickle", "NumpyArrayWrapper")


class _Behind:
    """Moves on over arrays of joblib's; one of objects is a pickle by itself, which is read."""

    def __init__(self, depth: int = 0) -> None:
        self.depth, self.arrays = depth, 0

    def __call__(self, machine: Machine, made: Obj) -> None:
        """Raises UnreadableError where it does not say how long it is, CutOffError where it ends
        later than the bytes that there are."""
        if made.func != _WRAPPER:
            return
        self.arrays += 1
        found = attributes(made)
        dtype, dims = found.get("dtype"), found.get("shape")
        dims = dims if isinstance(dims, tuple) else (None,)
        code = dtype.args[0] if isinstance(dtype, Obj) and dtype.args else None
        match = _CODE.fullmatch(code) if isinstance(code, str) else None
        known = all(type(n) is int and 0 <= n < 1 << 60 for n in dims)
        if match is None or not known or len(dims) > 64 or self.depth > _MOST_NESTED:
            raise machine.error("an array of joblib that does not say how long it is")
        if match[1] == "O" or _holds_objects(dtype):
            inner = _Behind(self.depth + 1)
            args = (machine.data, machine.pos, machine.persistent_load, machine.findings)
            machine.pos = unpickle(*args, behind=inner).end
            return
        size = prod(dims) * int(match[2] or 1) * (4 if match[1] == "U" else 1)
        if found.get("numpy_array_alignment_bytes") is not None:
            size += 1 + (machine.data[machine.pos] if machine.pos < len(machine.data) else 0)
        if machine.pos + size > len(machine.data):
            raise machine.cut_off(min(size, 1 << 60))
        machine.pos += size


def _holds_objects(dtype: Any, depth: int = 8) -> bool:
    """Whether a field of a structured dtype of numpy's is an object."""
    if not isinstance(dtype, Obj) or depth == 0:
        return depth == 0
    if dtype.args and isinstance(dtype.args[0], str) and dtype.args[0].startswith("O"):
        return True
    fields = mapping(dtype.state[4]) if isinstance(dtype.state, tuple) and dtype.state[4:] else None
    inner = [one[0] if isinstance(one, tuple) and one else one for one in (fields or {}).values()]
    return any(_holds_objects(one, depth - 1) for one in inner)


def _persistent() -> Any:
    """What stands for persistent ids: torch's storages, and whatever another reader would make of
    its own. What an id names is judged as everything that is named."""
    storages = storage_table(lambda key, location, nbytes, dtype: _Unread(nbytes, location))

    def load(pid: Any) -> Any:
        if type(pid) is tuple and pid and pid[0] == "storage":
            return storages(pid)
        if type(pid) is tuple and len(pid) == 4 and pid[0] == "module":
            return pid[1]  # a class with its source text beside it
        return Obj(None, (pid,), state=ABSENT)

    return load
