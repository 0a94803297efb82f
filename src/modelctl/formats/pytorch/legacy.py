"""Legacy torch files: five pickles, then the storages' bytes (before 1.6;
docs/formats.md#legacy)."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from itertools import accumulate
from typing import Any

from ...core.checkpoint import Checkpoint, Finding, Origin
from ...core.dtypes import DType
from ...core.nodes import mapping
from ...core.notes import warning
from ...core.storages import RunStorage, Source, Storage
from ...core.tensors import StorageRef
from ...errors import UnreadableError, UnsupportedError
from ...pickles.interpreter import Unpickled, unpickle
from ...pickles.machine import CutOffError
from ...storage.places import Place
from ..base import Format
from .storage_ids import storage_table

_MAGIC = 0x1950A86A20F9469CFC6C
_MAGIC_BYTES = _MAGIC.to_bytes(10, "little")
_MAGIC_TEXT = b"L%dL\n." % _MAGIC  # of pickle protocol 1
_FIRST_READ = 1 << 16
_AT_ONCE = 1 << 12  # storages


class TorchLegacy(Format):
    """The legacy format of ``torch.save``: read only, torch zip takes its place."""

    name = "torch-legacy"
    label = "torch legacy"

    def sniff(self, place: Place) -> bool:
        head = place.head
        return (head[:1] == b"\x80" and _MAGIC_BYTES in head[:64]) or head.startswith(_MAGIC_TEXT)

    def read(self, place: Place) -> Checkpoint:
        return self._read(place)

    def salvage(self, place: Place) -> Checkpoint | None:
        return self._read(place, torn=True) if self.sniff(place) else None

    def _read(self, place: Place, *, torn: bool = False) -> Checkpoint:
        """What is in a file; ``torn`` where it may end before its last storage does."""
        source = place.source
        storages: dict[str, StorageRef] = {}

        def storage(key: str, location: str, nbytes: int, dtype: DType | None) -> Storage:
            return RunStorage(source, 0, nbytes, location)

        load = storage_table(storage, storages)
        findings: list[Finding] = []
        head = Head(source)

        def next_pickle(at: int, what: str, persistent: Any = None) -> tuple[Any, int]:
            value, end, found = head.unpickle(at, what, persistent)
            findings.extend(found)
            return value, end

        magic, at = next_pickle(0, "magic number")
        version, at = next_pickle(at, "protocol version")
        if magic != _MAGIC or version != 1001:
            raise UnreadableError("not torch's magic number and version", path=source.name)
        system, at = next_pickle(at, "system info")
        if (mapping(system) or {}).get("little_endian") is False:
            raise UnsupportedError(f"{source.name}: a big-endian legacy file: not read yet")
        root, at = next_pickle(at, "object", _class_or_storage(load))
        keys, at = next_pickle(at, "storage keys")
        at = self._place(source, keys, at, storages, torn=torn)
        trailing = max(source.size - at, 0)
        return Checkpoint(
            root,
            Origin(source.name, self.name, self.label, source.size),
            warnings=(warning(f"{trailing:,} bytes after the last storage"),) if trailing else (),
            findings=tuple(findings),
        )

    def _place(
        self, source: Source, keys: Any, at: int, storages: dict[str, StorageRef], *, torn: bool
    ) -> int:
        """Where each storage lies: an int64 of its length, then its bytes, in the keys' order."""
        if (
            not isinstance(keys, list)
            or any(type(key) not in (str, int) for key in keys)
            or len(keys) != len({str(key) for key in keys})
        ):
            raise UnreadableError("a broken list of storage keys", path=source.name, offset=at)
        begin = at
        for key in map(str, keys):
            if key not in storages:
                raise UnreadableError(
                    f"the storage '{key:.40}' belongs to no tensor", path=source.name, offset=at
                )
            end = at + 8 + storages[key].storage.nbytes
            if end > source.size and not torn:
                raise UnreadableError(
                    f"cut off: the storage '{key:.40}' ends at {end:,}, "
                    f"the file at {source.size:,}",
                    path=source.name,
                    offset=at,
                    hint="download or save it again",
                )
            at = end
        for some in range(0, len(keys), _AT_ONCE):
            begin = self._find(
                source, [str(k) for k in keys[some : some + _AT_ONCE]], begin, storages
            )
        if len(storages) > len(keys):
            raise UnreadableError(
                f"{len(storages) - len(keys)} storages are missing", path=source.name, offset=at
            )
        return at

    def _find(
        self, source: Source, keys: list[str], at: int, storages: dict[str, StorageRef]
    ) -> int:
        """Some of them, from ``at`` on; where the next one begins."""
        ends = list(accumulate((8 + storages[key].storage.nbytes for key in keys), initial=at))

        def check(raw: bytes, key: str, begin: int) -> None:
            storage, dtype, _ = storages[key]
            itemsize = dtype.itemsize if dtype else 1
            numel = int.from_bytes(raw, "little", signed=True)
            if numel * itemsize != storage.nbytes:
                raise UnreadableError(
                    f"the storage '{key:.40}' has {numel:,} elements here, "
                    f"{storage.nbytes // itemsize:,} in the pickle",
                    path=source.name,
                    offset=begin,
                )

        if not source.costly:
            there = [begin for begin in ends[:-1] if begin + 8 <= source.size]
            lengths = source.read_many((begin, 8) for begin in there)
            for raw, key, begin in zip(lengths, keys, ends, strict=False):
                check(raw, key, begin)
        for key, begin in zip(keys, ends, strict=False):
            storage = storages[key].storage
            assert isinstance(storage, RunStorage)
            storage.source, storage.offset = source.outermost(begin + 8)
            if source.costly:  # looked at with the bytes that it is the length of
                at, stop = storage.offset, storage.offset + storage.nbytes
                storage.source.guard(at - 8, at, stop, partial(check, key=key, begin=begin))
        return ends[-1]


def _class_or_storage(load: Callable[[Any], StorageRef]) -> Callable[[Any], Any]:
    def persistent(pid: Any) -> Any:
        # a class with its source text beside it (container modules were saved so until 1.13)
        if type(pid) is tuple and len(pid) == 4 and pid[0] == "module":
            return pid[1]
        return load(pid)

    return persistent


class Head:
    """The start of a file that holds pickles of unknown length: read on until they end."""

    def __init__(self, source: Source) -> None:
        self.source = source
        self.data = b""

    def unpickle(self, at: int, what: str, persistent: Any) -> Unpickled:
        source = self.source
        limit = source.size
        if len(self.data) <= at:
            self.grow(min(limit, at + _FIRST_READ))
        while True:
            try:
                return unpickle(self.data, at, persistent, on_disk=len(self.data) - at)
            except CutOffError as e:
                if len(self.data) >= limit:
                    raise self.located(e, what) from None
            except UnreadableError as e:
                raise self.located(e, what) from None
            self.grow(min(limit, 4 * len(self.data)))

    def grow(self, size: int) -> None:
        self.data += self.source.read(len(self.data), size - len(self.data))

    def located(self, e: UnreadableError, what: str) -> UnreadableError:
        return UnreadableError(
            e.reason,
            path=e.path or self.source.name,
            member=e.member or what,
            offset=e.offset,
            hint="download or save it again",
        )
