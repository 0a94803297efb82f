"""The records of zips that no tensor views: read to their end, and compared with their CRC."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

from ..core.storages import CHUNK, RunStorage, Source, Storage, fastest_crc32
from ..errors import UnreadableError
from ..storage.containers.deflate import inflate
from ..storage.containers.zipdir import STORED, Member, ZipDirectory


class Record(NamedTuple):
    """An entry of a zip."""

    directory: ZipDirectory
    member: Member

    def check(self) -> None:
        """Read all of it, inflated, and compare it with its checksum.

        Raises:
            UnreadableError: it is not what was saved, or no deflate stream.
        """
        member, source = self.member, self.directory.source
        crc, crc32 = 0, fastest_crc32()
        try:
            for piece in _pieces(source, member):
                crc = crc32(piece, crc)
        except UnreadableError as e:
            raise e.located(source.name, member.name) from None
        if self.directory.has_checksums and crc != member.crc32:
            raise UnreadableError(
                "its bytes don't have the CRC that the zip records",
                path=source.name,
                member=member.name,
                offset=member.offset,
            )


def others(directories: list[ZipDirectory], storages: list[Storage]) -> list[Record]:
    """The records of zips that are none of these storages."""
    seen = {(id(one.source), one.offset) for one in storages if isinstance(one, RunStorage)}
    found = []
    for directory in directories:
        for member in directory.members.values():
            source, offset = directory.source.outermost(member.offset)
            if (id(source), offset) not in seen or not member.size:
                found.append(Record(directory, member))
    return found


def _pieces(source: Source, member: Member) -> Iterator[bytes | memoryview]:
    if member.method != STORED:
        yield from inflate(source, member.offset, member.compressed, member.size)
        return
    room = memoryview(bytearray(min(CHUNK, member.size)))
    for at in range(0, member.size, CHUNK):
        part = room[: min(CHUNK, member.size - at)]
        source.read_into(member.offset + at, part)
        yield part
