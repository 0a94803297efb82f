"""Where bytes come from: sources, which are read at offsets, and storages, which tensors view.

Nothing here opens anything; :mod:`modelctl.storage` does.
"""

from __future__ import annotations

import io
import zlib
from abc import ABC, abstractmethod
from bisect import bisect_right
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import cache
from itertools import accumulate
from threading import Lock
from typing import Any, BinaryIO, NamedTuple

from ..errors import DamagedError, ModelctlError, UnreadableError

CHUNK = 1 << 20
# A view that is not contiguous is gathered from at most this much of its storage read at once;
# beyond it the storage is mapped.
GATHER = 32 << 20
# Ranges that are no farther apart are read at once.
GAP, _MOST_AT_ONCE = 4096, 8 << 20
_ROOM = 1024 << 10


class Source(ABC):
    """Bytes that are read at offsets: a file, a part of one, an object far away.

    Counts what is read from it, and may be read by several threads at once. A subclass gives
    :meth:`_fetch`, and whatever else it can do better.

    Attributes:
        name: what errors call it.
        size: in bytes.
        costly: whether each read is a round trip, so that few large ones are better than many.
    """

    costly = False

    def __init__(self, name: str, size: int) -> None:
        self.name, self.size = name, size
        self._lock, self._read, self._closed = Lock(), 0, False

    @abstractmethod
    def _fetch(self, offset: int, size: int) -> bytes:
        """Up to ``size`` bytes at ``offset``, which lie inside; none where it has become shorter.
        Raises OSError."""

    @property
    def bytes_read(self) -> int:
        """How many bytes were read so far."""
        return self._read

    def _count(self, nbytes: int) -> None:
        with self._lock:
            self._read += nbytes

    def check(self, offset: int, size: int) -> None:
        """Raises where this range can't be read: it ends outside, or the source is closed."""
        if self._closed:
            raise ModelctlError(f"{self.name}: the checkpoint is closed")
        if offset < 0 or size < 0:
            raise UnreadableError(
                f"{size:,} bytes at {offset:,} are asked for, before its start", path=self.name
            )
        if offset + size > self.size:
            raise UnreadableError(
                f"cut off: {size:,} bytes are expected here, the file ends at {self.size:,}",
                path=self.name,
                offset=offset,
            )

    def read(self, offset: int, size: int) -> bytes:
        """Exactly ``size`` bytes at ``offset``.

        Raises:
            UnreadableError: the file ends before, or the disk failed.
        """
        if size <= 0:
            return b""
        self.check(offset, size)
        parts = []
        while size:
            try:
                part = self._fetch(offset, size)
            except OSError as e:
                raise self._failed(e, offset) from e
            if not part:
                raise self._shrunk(offset)
            self._count(len(part))
            offset += len(part)
            size -= len(part)
            parts.append(part)
        return parts[0] if len(parts) == 1 else b"".join(parts)

    def read_into(self, offset: int, out: memoryview) -> None:
        """The bytes at ``offset``, as many as ``out`` has room for, into it.

        Raises:
            UnreadableError: as :meth:`read`.
        """
        for at in range(0, len(out), CHUNK):
            part = self.read(offset + at, min(CHUNK, len(out) - at))
            out[at : at + len(part)] = part

    def read_many(self, ranges: Iterable[tuple[int, int]]) -> list[bytes]:
        """The bytes of many ranges (offset, size), in their order; those that lie close together
        are read at once.

        Raises:
            UnreadableError: as :meth:`read`.
        """
        wanted = list(ranges)
        order = sorted(range(len(wanted)), key=wanted.__getitem__)
        found = [b""] * len(wanted)
        group: list[int] = []
        begin = end = 0

        def fetch() -> None:
            data = self.read(begin, end - begin)
            for i in group:
                at, size = wanted[i]
                found[i] = data[at - begin : at - begin + size]

        for i in order:
            offset, size = wanted[i]
            if size <= 0:
                continue
            self.check(offset, size)
            reached = max(end, offset + size)
            if group and (offset > end + GAP or reached - begin > _MOST_AT_ONCE):
                fetch()
                group, begin, reached = [], offset, offset + size
            elif not group:
                begin, reached = offset, offset + size
            group.append(i)
            end = reached
        if group:
            fetch()
        return found

    def will_read(self, ranges: Sequence[tuple[int, int]]) -> None:  # noqa: B027
        """Say what will be read, and in which order, to one where reads are costly."""

    def has(self, offset: int, size: int) -> bool:
        """Whether a range can be read without cost."""
        return True

    def guard(self, start: int, payload: int, stop: int, check: Callable[[bytes], object]) -> None:
        """Have the bytes from ``start`` to ``payload`` looked at before any of those from
        ``payload`` to ``stop`` is given to anybody; ``check`` raises where they are not right."""
        check(self.read(start, payload - start))

    def map(self, offset: int, size: int) -> memoryview:
        """``size`` bytes at ``offset`` for random access: mapped, where the system can."""
        return memoryview(self.read(offset, size))

    def fileno(self) -> int | None:
        """A descriptor that the kernel can copy from, or None."""
        return None

    def outermost(self, offset: int) -> tuple[Source, int]:
        """Where ``offset`` lies in the source that this is a part of; itself where it is none."""
        return self, offset

    def stream(self) -> BinaryIO:
        """The bytes as a file object that reads and seeks, for libraries that want one."""
        return io.BufferedReader(_Stream(self))

    def close(self) -> None:
        """What was not read by then can't be read any more."""
        self._closed = True

    def _failed(self, e: OSError, offset: int) -> UnreadableError:
        return UnreadableError(f"can't be read: {e.strerror}", path=self.name, offset=offset)

    def _shrunk(self, offset: int) -> UnreadableError:
        return UnreadableError(
            "the file became shorter while it was read", path=self.name, offset=offset
        )


class _Stream(io.RawIOBase):
    """A source as a raw file."""

    def __init__(self, source: Source) -> None:
        super().__init__()
        self._source, self._at = source, 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def readinto(self, out: Any) -> int:
        room = memoryview(out).cast("B")
        size = max(0, min(len(room), self._source.size - self._at))
        self._source.read_into(self._at, room[:size])
        self._at += size
        return size

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        start = {io.SEEK_SET: 0, io.SEEK_CUR: self._at, io.SEEK_END: self._source.size}[whence]
        if start + offset < 0:
            raise ValueError("a place before the start")
        self._at = start + offset
        return self._at


class Run(NamedTuple):
    """Bytes that lie in a source as they are, one after the other."""

    source: Source
    offset: int
    nbytes: int


class Slice(NamedTuple):
    """The bytes of a storage from ``start`` to ``stop``."""

    storage: Storage
    start: int
    stop: int

    @property
    def nbytes(self) -> int:
        return self.stop - self.start


class Storage(ABC):
    """Bytes shared by the tensors that view them; the same object means tied.

    Attributes:
        location: the device tag that torch saved (``cpu``, ``cuda:0``, ``mps``); None where there
            is none.
        crc32: the checksum of all bytes, where the container recorded one.
        compared: whether nothing is left to compare with it.
        seekable: whether a part of it is read without what lies before that.
    """

    __slots__ = ("compared", "crc32", "location", "nbytes")
    seekable = True

    def __init__(self, nbytes: int, location: str | None = None, crc32: int | None = None) -> None:
        self.nbytes = nbytes
        self.location = location
        self.crc32 = crc32
        self.compared = crc32 is None

    @abstractmethod
    def read(self, start: int, size: int) -> bytes:
        """Exactly ``size`` bytes from ``start``, little-endian."""

    def runs(self, start: int = 0, stop: int | None = None) -> list[Run] | None:
        """Where the bytes from ``start`` to ``stop`` lie, in order, in whatever sources; None
        where they are made."""
        return None

    def slices(self, start: int = 0, stop: int | None = None) -> list[Slice]:
        """The storages with checksums of their own that have the bytes from ``start`` to ``stop``,
        in order: itself, but of one that is put together."""
        return [Slice(self, start, self.nbytes if stop is None else stop)]

    def recorded_crc32(self) -> int | None:
        """The checksum of all bytes, as far as containers recorded it, of its parts too."""
        return self.crc32

    def chunks(self, start: int = 0, stop: int | None = None) -> Iterator[bytes]:
        """The bytes from ``start`` to ``stop`` in pieces of at most 1 MiB."""
        stop = self.nbytes if stop is None else stop
        for at in range(start, stop, CHUNK):
            yield self.read(at, min(CHUNK, stop - at))

    def checked(self, start: int = 0, stop: int | None = None) -> Iterator[bytes | memoryview]:
        """The same as :meth:`chunks`, compared with the recorded checksum: while they pass where
        they are all, else before the first, by reading all of the storage once.

        Raises:
            DamagedError: they are not what was saved; after the last one at the latest.
        """
        stop = self.nbytes if stop is None else stop
        if self.compared or (start, stop) != (0, self.nbytes):
            self.check()
            yield from self.chunks(start, stop)
            return
        crc, crc32 = 0, fastest_crc32()
        for piece in self.chunks():
            crc = crc32(piece, crc)
            yield piece
        self.compare(crc)

    def check(self) -> None:
        """Read all bytes and compare them with the recorded checksum, unless that was done.

        Raises:
            DamagedError: they are not what was saved.
        """
        if not self.compared:
            for _ in self.checked():
                pass

    def compare(self, crc: int) -> None:
        """Raises DamagedError where the checksum of all bytes is not the recorded one, of which
        there must be one."""
        known = self.recorded_crc32()
        if known is not None and crc != known:
            raise self._damaged()
        self.compared = self.compared or known is not None

    def _damaged(self) -> DamagedError:
        runs = self.runs()
        at = (runs[0].source.name, runs[0].offset) if runs else (None, None)
        return DamagedError(self, *at)

    def buffer(self, start: int, size: int) -> memoryview:
        """``size`` bytes from ``start`` for random access: mapped where they lie in one piece."""
        runs = self.runs(start, start + size) if size > GATHER else None
        if runs is not None and len(runs) == 1:
            return runs[0].source.map(runs[0].offset, size)
        return memoryview(self.read(start, size))


class RunStorage(Storage):
    """A storage that is a range of a source."""

    __slots__ = ("offset", "source")

    def __init__(
        self,
        source: Source,
        offset: int,
        nbytes: int,
        location: str | None = None,
        crc32: int | None = None,
    ) -> None:
        self.nbytes, self.location, self.crc32 = nbytes, location, crc32
        self.compared = crc32 is None
        self.source, self.offset = source.outermost(offset)  # the kernel copies from that

    def read(self, start: int, size: int) -> bytes:
        return self.source.read(self.offset + start, size)

    def check(self) -> None:
        if self.compared:
            return
        crc, crc32 = 0, fastest_crc32()
        for part in self.passing():
            crc = crc32(part, crc)
        self.compare(crc)

    def passing(self, start: int = 0, stop: int | None = None) -> Iterator[memoryview]:
        """The bytes from ``start`` to ``stop`` in pieces, each of which is gone with the next."""
        stop = self.nbytes if stop is None else stop
        # one place for all, small enough for the cache; what is far is asked for in large pieces
        size = min(CHUNK if self.source.costly else _ROOM, stop - start)
        room = memoryview(bytearray(size))
        for at in range(start, stop, size or 1):
            part = room[: min(size, stop - at)]
            self.source.read_into(self.offset + at, part)
            yield part

    def runs(self, start: int = 0, stop: int | None = None) -> list[Run]:
        stop = self.nbytes if stop is None else stop
        return [Run(self.source, self.offset + start, stop - start)]


class SpreadStorage(Storage):
    """A storage in several pieces, which may lie in several sources: a tensor that was sharded."""

    __slots__ = ("_ends", "pieces")

    def __init__(
        self, pieces: Sequence[Run], location: str | None = None, crc32: int | None = None
    ) -> None:
        super().__init__(sum(run.nbytes for run in pieces), location, crc32)
        self.pieces = tuple(pieces)
        self._ends = list(accumulate(run.nbytes for run in pieces))

    def read(self, start: int, size: int) -> bytes:
        return b"".join(
            run.source.read(run.offset, run.nbytes) for run in self.runs(start, start + size)
        )

    def runs(self, start: int = 0, stop: int | None = None) -> list[Run]:
        stop = self.nbytes if stop is None else stop
        found = []
        at = bisect_right(self._ends, start)
        while start < stop:
            run = self.pieces[at]
            skipped = start - (self._ends[at] - run.nbytes)
            size = min(run.nbytes - skipped, stop - start)
            if size:
                found.append(Run(run.source, run.offset + skipped, size))
            start += size
            at += 1
        return found


class MemoryStorage(Storage):
    """A storage whose bytes are already in memory."""

    __slots__ = ("data",)

    def __init__(self, data: bytes, location: str | None = None) -> None:
        super().__init__(len(data), location)
        self.data = data

    def read(self, start: int, size: int) -> bytes:
        return self.data[start : start + size]


@cache
def fastest_crc32() -> Callable[[bytes | memoryview, int], int]:
    """ISA-L's, ten times as fast as zlib's, where it is installed."""
    try:
        from isal import isal_zlib
    except ImportError:
        return zlib.crc32
    crc32: Callable[[bytes | memoryview, int], int] = isal_zlib.crc32
    return crc32


def cut(pieces: Iterable[bytes], start: int, stop: int) -> Iterator[bytes]:
    """The bytes from ``start`` to ``stop`` of a stream that comes in pieces; it is read to its end,
    so that what is wrong with it comes to light."""
    at = 0
    for piece in pieces:
        if at + len(piece) > start and at < stop:
            yield piece[max(start - at, 0) : stop - at]
        at += len(piece)
