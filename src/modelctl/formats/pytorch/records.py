"""The zip that ``torch.save`` writes, byte for byte (docs/formats.md#torch-zip): its layout."""

from __future__ import annotations

import struct
import zlib

from ...core.storages import Storage
from ...storage.layout import Checksums, LayoutBuilder

_ALIGNMENT = 64
_MAX16, _MAX32 = 0xFFFF, 0xFFFFFFFF
_ID = 40  # bytes of the id


class Records:
    """A zip as torch's own writer (miniz, PyTorchStreamWriter) lays it out.

    Sizes are known before anything is read; where a storage comes without its checksum, what
    depends on it (its descriptor, the directory, the id of the whole) is made late.
    """

    def __init__(self, prefix: str) -> None:
        self.prefix = prefix
        self.out = LayoutBuilder()
        self._central = bytearray()
        self._count = 0
        self._names_crc = 0
        self._crcs = bytearray()
        # places in the directory and in the list of checksums that wait for one
        self._unknown: list[tuple[int, int, Storage]] = []

    def add(self, name: str, data: Storage | bytes, *more: bytes) -> None:
        """A record; a storage is copied, bytes may come in pieces."""
        if isinstance(data, Storage):
            size, known = data.nbytes, data.recorded_crc32() if data.nbytes else 0
        else:
            size, known = len(data) + sum(map(len, more)), zlib.crc32(data)
            for piece in more:
                known = zlib.crc32(piece, known)
        raw = f"{self.prefix}/{name}".encode()
        flags, wide = self._begin(raw, size)
        if isinstance(data, Storage):
            self.out.copy(data, checksum="make" if known is None else "keep")
        else:
            for piece in (data, *more):
                self.out.add(piece)
        if size and known is not None:
            self.out.add(_descriptor(known, size, wide))
        elif size and isinstance(data, Storage):
            storage = data
            self.out.late(
                24 if wide else 16, lambda sums: _descriptor(sums[id(storage)], size, wide)
            )
            self._unknown.append((len(self._central) + 16, len(self._crcs), storage))
        self._end(name, raw, size, flags, known or 0)

    def finish(self, id_record: str) -> None:
        """The record that holds the id of the whole, the directory and the end records."""
        raw = f"{self.prefix}/{id_record}".encode()
        flags, wide = self._begin(raw, _ID)
        before, entry, start = self._names_crc, len(self._central), self.out.position + _ID + 16
        crcs = bytes(self._crcs)
        self._end(id_record, raw, _ID, flags, 0)

        def end(sums: Checksums) -> bytes:
            known, central = bytearray(crcs), bytearray(self._central)
            for in_central, in_list, storage in self._unknown:
                struct.pack_into("<I", central, in_central, sums[id(storage)])
                struct.pack_into("<I", known, in_list, sums[id(storage)])
            # as torch's: digits that depend on the records' names and contents
            made = f"{before:020d}{zlib.crc32(known):020d}".encode()
            crc = zlib.crc32(made)
            struct.pack_into("<I", central, entry + 16, crc)
            return made + _descriptor(crc, _ID, wide) + self._directory(central, start)

        if self._unknown:
            self.out.late(_ID + 16 + len(self._directory(self._central, start)), end)
        else:
            self.out.add(end({}))

    def _begin(self, raw: bytes, size: int) -> tuple[int, bool]:
        """The local header of a record: its flags, and whether its sizes take 64 bits."""
        self._header = self.out.position
        wide = size >= _MAX32
        extra = b""
        if wide or self._header >= _MAX32:
            sizes = struct.pack("<QQ", size, 0) if wide else b""
            place = struct.pack("<Q", self._header) if self._header >= _MAX32 else b""
            extra = struct.pack("<HH", 1, len(sizes) + len(place)) + sizes + place
        begin = self._header + 30 + len(raw) + len(extra) + 4
        pad = -begin % _ALIGNMENT
        extra += b"FB" + struct.pack("<H", pad) + b"Z" * pad
        flags = 0x0808 if size else 0x0800
        self.out.add(
            struct.pack("<4s5H3I2H", b"PK\3\4", 0, flags, 0, 0, 0, 0, 0, 0, len(raw), len(extra))
            + raw
            + extra
        )
        return flags, wide

    def _end(self, name: str, raw: bytes, size: int, flags: int, crc: int) -> None:
        """Its entry in the directory."""
        extra, header = b"", self._header
        if size >= _MAX32 or header >= _MAX32:
            wide = [value for value in (size, size, header) if value >= _MAX32]
            extra = struct.pack(f"<HH{len(wide)}Q", 1, 8 * len(wide), *wide)
            size, header = min(size, _MAX32), min(header, _MAX32)
        self._central += struct.pack(
            "<4s6H3I5H2I",
            *(b"PK\1\2", 0, 0, flags, 0, 0, 0, crc, size, size),
            *(len(raw), len(extra), 0, 0, 0, 0, header),
        )
        self._central += raw + extra
        self._count += 1
        self._names_crc = zlib.crc32(name.encode(), self._names_crc)
        self._crcs += struct.pack("<I", crc)

    def _directory(self, central: bytearray, start: int) -> bytes:
        length = len(central)
        counts = min(self._count, _MAX16)
        return (
            bytes(central)
            + struct.pack(
                "<4sQ2H2I4Q",
                *(b"PK\6\6", 44, 0x031E, 45, 0, 0, self._count, self._count, length, start),
            )
            + struct.pack("<4sIQI", b"PK\6\7", 0, start + length, 1)
            + struct.pack(
                "<4s4H2IH",
                *(b"PK\5\6", 0, 0, counts, counts, min(length, _MAX32), min(start, _MAX32), 0),
            )
        )


def _descriptor(crc: int, size: int, wide: bool) -> bytes:
    """What follows a record's bytes."""
    return struct.pack("<4sIQQ" if wide else "<4sIII", b"PK\7\x08", crc, size, size)
