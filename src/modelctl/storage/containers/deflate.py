"""Bytes that lie deflated in an archive."""

from __future__ import annotations

import zlib
from collections.abc import Iterator

from ...core.storages import CHUNK, Source, Storage, cut
from ...errors import DamagedError, UnreadableError


class InflatedStorage(Storage):
    """A storage that lies deflated in a zip: inflated from its start each time it is read."""

    __slots__ = ("compressed", "offset", "source")
    seekable = False

    def __init__(
        self,
        source: Source,
        offset: int,
        compressed: int,
        nbytes: int,
        location: str | None = None,
        crc32: int | None = None,
    ) -> None:
        super().__init__(nbytes, location, crc32)
        self.source, self.offset, self.compressed = source, offset, compressed

    def _damaged(self) -> DamagedError:
        return DamagedError(self, self.source.name, self.offset)

    def read(self, start: int, size: int) -> bytes:
        return b"".join(self.chunks(start, start + size))

    def chunks(self, start: int = 0, stop: int | None = None) -> Iterator[bytes]:
        pieces = inflate(self.source, self.offset, self.compressed, self.nbytes)
        yield from cut(pieces, start, self.nbytes if stop is None else stop)


def inflate(source: Source, offset: int, compressed: int, size: int) -> Iterator[bytes]:
    """The ``size`` bytes that a deflated range of a file declares, in pieces of bounded size.

    Raises:
        UnreadableError: what inflates is not exactly that long, or is no deflate stream.
    """

    def broken(what: str, at: int = 0) -> UnreadableError:
        return UnreadableError(what, path=source.name, offset=offset + at)

    engine = zlib.decompressobj(-15)
    left = size
    for at in range(0, compressed, CHUNK):
        data = source.read(offset + at, min(CHUNK, compressed - at))
        full = True
        while data or full:  # of what was taken in, zlib may hold back what had no room
            room = min(CHUNK, left + 1)  # one byte more than declared shows that it lied
            try:
                piece = engine.decompress(data, room)
            except zlib.error as e:
                raise broken(f"not a deflate stream: {e}", at) from None
            left -= len(piece)
            if left < 0:
                raise broken(f"inflates to more than the {size:,} bytes that it declares")
            if piece:
                yield piece
            full = len(piece) == room
            if data == engine.unconsumed_tail and not piece:
                break
            data = engine.unconsumed_tail
    if left or not engine.eof:
        raise broken(f"inflates to fewer than the {size:,} bytes that it declares")
