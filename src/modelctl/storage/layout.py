"""What an output will be, before a byte of it moves: files of known sizes, made of segments at
known offsets.

A segment is bytes that were made, a range of a storage, or, where it holds a checksum of what is
not known before it was read, one that is made late. Whoever has the layout can carry it out in any
order, and knows what it takes.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Literal, NamedTuple

from ..core.notes import Note
from ..core.storages import CHUNK, Storage
from ..errors import WriteError

# The CRC-32 of storages whose container recorded none, by their ``id``: known once they were read.
Checksums = Mapping[int, int]


class Made(NamedTuple):
    """Bytes that are there already: headers, pickles, directories."""

    offset: int
    data: bytes

    @property
    def nbytes(self) -> int:
        return len(self.data)


# What becomes of the checksum of a storage that is copied: it is compared with the bytes, since the
# output has none; it is kept in the output, where damage goes on to be seen; or it is made while
# all of the storage is read, since a late segment asks for it.
Checksum = Literal["compare", "keep", "make"]


class Piece(NamedTuple):
    """The bytes of a storage from ``start`` to ``stop``."""

    offset: int
    storage: Storage
    start: int
    stop: int
    checksum: Checksum = "compare"

    @property
    def nbytes(self) -> int:
        return self.stop - self.start


class Late(NamedTuple):
    """Bytes that depend on checksums of pieces, ``nbytes`` of them."""

    offset: int
    nbytes: int
    make: Callable[[Checksums], bytes]


Segment = Made | Piece | Late


class FileLayout(NamedTuple):
    """A file that is to be: its name, its size, and its segments, one after the other."""

    name: str
    nbytes: int
    segments: Sequence[Segment]


def check_layout(file: FileLayout) -> None:
    """Raises WriteError where segments are not one after the other, do not fill the file, or are
    of what a storage does not have: the format that made the layout is wrong."""
    at = 0
    for i, segment in enumerate(file.segments):
        size = segment.nbytes
        if segment.offset != at or size < 0:
            where = f"{size:,} bytes at {segment.offset:,}, where {at:,} is reached"
            raise _wrong(file, f"segment {i} is {where}")
        if isinstance(segment, Piece) and not 0 <= segment.start <= segment.stop <= (
            segment.storage.nbytes
        ):
            where = f"bytes {segment.start:,} to {segment.stop:,}"
            raise _wrong(file, f"segment {i} is {where} of a storage of {segment.storage.nbytes:,}")
        at += size
    if at != file.nbytes:
        raise _wrong(file, f"its segments have {at:,} bytes, it says {file.nbytes:,}")


def _wrong(file: FileLayout, what: str) -> WriteError:
    return WriteError(
        f"{file.name}: not written, its format made a wrong layout of it: {what}",
        hint="this is a fault of the format; another one with --to",
    )


class Layout(NamedTuple):
    """Files that are to appear together, or none of them.

    Attributes:
        files: in the order in which they are put in place: what names the others comes last.
        superseded: names of files that these take the place of, removed when they stand.
        notes: what there is to say of it.
    """

    files: Sequence[FileLayout]
    superseded: Sequence[str] = ()
    notes: Sequence[Note] = ()

    @property
    def nbytes(self) -> int:
        return sum(file.nbytes for file in self.files)

    @property
    def main(self) -> FileLayout:
        """The file that is opened to read all of them."""
        return self.files[-1]


class LayoutBuilder:
    """A :class:`FileLayout` in the making, from its start to its end.

    ``position`` is where the next segment goes.
    """

    def __init__(self) -> None:
        self.position = 0
        self._segments: list[Segment] = []
        self._made: list[bytes] = []  # what will be one segment
        self._made_at = 0

    def add(self, data: bytes) -> None:
        """Bytes that are known: a segment of their own where they are many, without a copy."""
        if len(data) > CHUNK:
            self._place(Made(self.position, data))
            return
        if not self._made:
            self._made_at = self.position
        self._made.append(data)
        self.position += len(data)

    def copy(
        self,
        storage: Storage,
        start: int = 0,
        stop: int | None = None,
        *,
        checksum: Checksum = "compare",
    ) -> None:
        """A range of a storage, all of it where its checksum is not only compared."""
        stop = storage.nbytes if stop is None else stop
        if start < stop:
            self._place(Piece(self.position, storage, start, stop, checksum))

    def late(self, nbytes: int, make: Callable[[Checksums], bytes]) -> None:
        """``nbytes`` bytes that ``make`` gives once all checksums are known."""
        self._place(Late(self.position, nbytes, make))

    def append(self, file: FileLayout) -> None:
        """All of a file that is a part of this one."""
        start = self.position
        self._flush()
        self._segments += [
            segment._replace(offset=start + segment.offset) for segment in file.segments
        ]
        self.position = start + file.nbytes

    def _place(self, segment: Segment) -> None:
        self._flush()
        self._segments.append(segment)
        self.position += segment.nbytes

    def _flush(self) -> None:
        if self._made:
            self._segments.append(Made(self._made_at, b"".join(self._made)))
            self._made.clear()

    def file(self, name: str) -> FileLayout:
        """What was put together, as a file of that name."""
        self._flush()
        return FileLayout(name, self.position, tuple(self._segments))
