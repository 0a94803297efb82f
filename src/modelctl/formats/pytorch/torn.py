"""What is whole of a torch zip whose end is missing: its entries, told by their own headers.

torch writes them one after the other: ``data.pkl`` first, which says how long each storage is, and
behind each a descriptor with its checksum and length (docs/formats.md#torch-zip).
"""

from __future__ import annotations

import struct
from collections.abc import Iterator, Mapping
from typing import NamedTuple

from ...core.storages import RunStorage, Source, Storage
from ...core.tensors import StorageRef
from ...errors import UnreadableError
from ...storage.containers.zipdir import STORED, Member, ZipDirectory
from ...storage.places import Place
from .legacy import Head
from .storage_ids import storage_table

_LOCAL = struct.Struct("<4s5H3I2H")
_STREAMED = 0x0008
_MAX32 = 0xFFFFFFFF
# of 64-bit sizes, as torch has it, or of 32-bit ones
_DESCRIPTORS = (struct.Struct("<4sIQQ"), struct.Struct("<4sIII"))
# What is searched for the end of a record whose length nothing else tells.
_MOST_RECORD = 1 << 16


class TornDirectory(ZipDirectory):
    """The entries of a zip as far as they are there; those that ``sizes`` names and that are not,
    behind its end."""

    def __init__(self, source: Source, sizes: Mapping[str, int], pickle: str, end: int) -> None:
        self.source, self.warnings = source, []
        self.members = {one.name: one for one in _whole(source, sizes, pickle, end)}
        self.has_checksums = any(one.crc32 for one in self.members.values())
        for name, size in sizes.items():
            lost = Member(name, STORED, 0, size, size, source.size, source.size)
            self.members.setdefault(name, lost)


class _Header(NamedTuple):
    """A local header: what it says, and where the bytes begin."""

    name: str
    flags: int
    method: int
    crc32: int
    size: int
    start: int


def torn_directory(place: Place) -> TornDirectory | None:
    """The entries of a zip of ``torch.save`` that lost its end; None where it is none.

    Raises:
        UnreadableError: its structure, ``data.pkl``, is not whole.
    """
    source = place.source
    first = _header(source, 0)
    if first is None or not first.name.endswith("/data.pkl") or first.method != STORED:
        return None
    storages: dict[str, StorageRef] = {}

    def nowhere(key: str, location: str, nbytes: int, dtype: object) -> Storage:
        return RunStorage(source, 0, nbytes, location)

    try:
        _, end, _ = Head(source).unpickle(first.start, first.name, storage_table(nowhere, storages))
    except UnreadableError as e:
        raise UnreadableError(
            f"cut off in its structure, before any tensor: {e.reason}",
            path=source.name,
            member=first.name,
            offset=e.offset,
            hint="nothing of it can be kept: get the file again",
        ) from None
    folder = first.name.removesuffix("data.pkl") + "data/"
    sizes = {folder + key: ref.storage.nbytes for key, ref in storages.items()}
    return TornDirectory(source, sizes, first.name, end)


def _whole(source: Source, sizes: Mapping[str, int], pickle: str, end: int) -> Iterator[Member]:
    """The entries that are there to their end, from the first on."""
    at = 0
    while (header := _header(source, at)) is not None and header.method == STORED:
        size, crc, after = header.size, header.crc32, header.start + header.size
        if header.flags & _STREAMED:
            known = end - header.start if header.name == pickle else sizes.get(header.name)
            found = _descriptor(source, header.start, known)
            if found is None:
                return
            crc, size, after = found
        if after > source.size:
            return
        yield Member(header.name, STORED, crc, size, size, at, header.start)
        at = after


def _header(source: Source, at: int) -> _Header | None:
    if at + _LOCAL.size > source.size:
        return None
    fields = _LOCAL.unpack(source.read(at, _LOCAL.size))
    signature, _, flags, method, _, _, crc, packed, size, n_name, n_extra = fields
    start = at + _LOCAL.size + n_name + n_extra
    if signature != b"PK\3\4" or start > source.size or _MAX32 in (size, packed):
        return None
    name = source.read(at + _LOCAL.size, n_name).decode("utf-8", "replace")
    return _Header(name, flags, method, crc, size, start)


def _descriptor(source: Source, start: int, known: int | None) -> tuple[int, int, int] | None:
    """The checksum and the length of what begins at ``start``, and where its descriptor ends; None
    where that is not there."""
    room = source.read(start, min(_MOST_RECORD, source.size - start)) if known is None else b""
    at = 0 if known is None else known
    while True:
        if known is None and (at := room.find(b"PK\7\10", at)) < 0:
            return None
        for form in _DESCRIPTORS:
            if start + at + form.size > source.size:
                continue
            signature, crc, packed, size = form.unpack(source.read(start + at, form.size))
            if signature == b"PK\7\10" and packed == size == at:
                return crc, size, start + at + form.size
        if known is not None:
            return None
        at += 1
