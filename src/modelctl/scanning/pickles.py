"""Pickles where they lie, one after the other, read for what they name alone."""

from __future__ import annotations

from typing import Any, NamedTuple

from ..core.checkpoint import Finding
from ..core.nodes import ABSENT, Obj
from ..core.storages import Source, Storage
from ..errors import UnreadableError
from ..formats.pytorch.storage_ids import storage_table
from ..pickles.interpreter import most_bytes, unpickle
from ..pickles.machine import CutOffError

# torch's legacy files are five pickles, and then storages.
_LEGACY, _MAGIC = 5, 0x1950A86A20F9469CFC6C
_MOST = 1000
_FIRST_READ, _TIMES = 1 << 20, 4
_PROTOCOLS = range(6)


class Pickles(NamedTuple):
    """What was found in pickles.

    Attributes:
        findings: of all of them.
        read: how many there were.
        end: where the last one ended.
        error: why the one after that is none; None at the end of the bytes.
        legacy: whether they are those of torch's files from before 1.6.
    """

    findings: list[Finding]
    read: int
    end: int
    error: UnreadableError | None
    legacy: bool = False


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
            return Pickles(findings, count, at, e, legacy)
        legacy = legacy or (count == 0 and value == _MAGIC)
        count += 1
    return Pickles(findings, count, at, None, legacy)


def _begins(head: bytes) -> bool:
    """Whether bytes begin as a pickle does, but one of the first two protocols."""
    return len(head) == 2 and head[0] == 0x80 and head[1] in _PROTOCOLS


class _Growing:
    """The start of a source, as much as was needed."""

    def __init__(self, source: Source) -> None:
        self.source, self.data = source, b""

    def at(self, start: int, size: int) -> bytes:
        self._grow(start + size)
        return self.data[start : start + size]

    def unpickle(self, at: int, findings: list[Finding]) -> tuple[Any, int]:
        """One pickle, and where it ends; its findings are added to the others."""
        most = min(self.source.size, at + most_bytes(self.source.size))
        self._grow(at + _FIRST_READ)
        while True:
            known: list[Finding] = []
            try:
                found = unpickle(self.data, at, _persistent(), known, len(self.data) - at)
            except CutOffError:
                if len(self.data) >= most:
                    findings += known
                    raise
            except UnreadableError:
                findings += known
                raise
            else:
                findings += known
                return found.value, found.end
            self._grow(min(most, _TIMES * len(self.data)))

    def _grow(self, size: int) -> None:
        size = min(size, self.source.size)
        if size > len(self.data):
            self.data += self.source.read(len(self.data), size - len(self.data))


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
