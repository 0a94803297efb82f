"""Open files that are read at offsets, and the storages that are ranges of them."""

from __future__ import annotations

import os
import stat
import zlib
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

from ..core.tensors import CHUNK, Extent, Storage
from ..errors import ModelctlError, UnreadableError

Identity = tuple[int, int, int, int]


def identity(status: os.stat_result) -> Identity:
    """Which file it is, and in what state: equal as long as nobody replaced or changed it."""
    return status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns


class FileSource:
    """A regular file, opened for reading at offsets. Counts what is read from it.

    ``place`` is where it stood when it was opened, with no links in it, and ``identity`` which
    file that was: what replaces it must know whether it still is.
    """

    def __init__(self, path: str | os.PathLike[str], *, follow: bool = True) -> None:
        """Open ``path``; with ``follow=False`` a link only where it stays inside one cache of the
        Hugging Face hub."""
        self.path = Path(path)
        self.name = str(path)
        self.bytes_read = 0
        self.follow_links = False  # of what this file names: shards
        if not follow and self.path.is_symlink() and not _in_one_cache(self.path):
            raise ModelctlError(
                f"{path}: a symbolic link, which is not followed here", hint="--follow-symlinks"
            )
        flags = os.O_RDONLY | getattr(os, "O_BINARY", 0) | getattr(os, "O_CLOEXEC", 0)
        try:
            # O_NONBLOCK: opening a FIFO must not hang
            self._fd = os.open(path, flags | getattr(os, "O_NONBLOCK", 0))
        except FileNotFoundError:
            raise ModelctlError(f"{path}: no such file or directory") from None
        except OSError as e:
            raise ModelctlError(f"{path}: {e.strerror or e}") from None
        status = os.fstat(self._fd)
        if not stat.S_ISREG(status.st_mode):
            os.close(self._fd)
            what = "a directory" if stat.S_ISDIR(status.st_mode) else "not a regular file"
            raise ModelctlError(f"{path}: {what}, so it is no checkpoint")
        self.identity = identity(status)
        self.place = os.path.realpath(path)
        self.size = status.st_size
        self.mode = stat.S_IMODE(status.st_mode)

    @classmethod
    def of(cls, fd: int, parent: FileSource, member: str) -> FileSource:
        """An open file that holds what was packed in ``parent``; ``fd`` is duplicated."""
        made = cls.__new__(cls)
        made.path, made.name = parent.path, f"{parent.name}, {member}"
        made.bytes_read, made.mode, made.follow_links = 0, parent.mode, False
        made.identity, made.place = parent.identity, parent.place
        made._fd = os.dup(fd)
        made.size = os.fstat(fd).st_size
        return made

    def fileno(self) -> int:
        return self._fd

    def read(self, offset: int, size: int) -> bytes:
        """Exactly ``size`` bytes at ``offset``.

        Raises:
            UnreadableError: the file ends before, or the disk failed.
        """
        if size <= 0:
            return b""
        if self._fd < 0:
            raise ModelctlError(f"{self.name}: the checkpoint is closed")
        if offset + size > self.size:
            raise UnreadableError(
                f"cut off: {size:,} bytes are expected here, the file ends at {self.size:,}",
                path=self.name,
                offset=offset,
            )
        parts = []
        while size:
            try:
                part = self._pread(size, offset)
            except OSError as e:
                raise UnreadableError(
                    f"can't be read: {e.strerror}", path=self.name, offset=offset
                ) from e
            if not part:
                raise UnreadableError(
                    "the file became shorter while it was read", path=self.name, offset=offset
                )
            self.bytes_read += len(part)
            offset += len(part)
            size -= len(part)
            parts.append(part)
        return parts[0] if len(parts) == 1 else b"".join(parts)

    def _pread(self, size: int, offset: int) -> bytes:
        if hasattr(os, "pread"):
            return os.pread(self._fd, size, offset)
        os.lseek(self._fd, offset, os.SEEK_SET)
        return os.read(self._fd, size)

    def map(self, offset: int, size: int) -> memoryview:
        """The bytes at ``offset``, mapped: for views that gather from all over a storage."""
        import mmap

        if self._fd < 0:  # mmap takes -1 for "no file", and gives zeros
            raise ModelctlError(f"{self.name}: the checkpoint is closed")
        if offset + size > self.size:
            self.read(offset, size)  # raises
        start = offset - offset % mmap.ALLOCATIONGRANULARITY
        mapped = mmap.mmap(self._fd, offset - start + size, offset=start, access=mmap.ACCESS_READ)
        self.bytes_read += size
        return memoryview(mapped)[offset - start :]

    def close(self) -> None:
        if self._fd >= 0:
            with suppress(OSError):
                os.close(self._fd)
            self._fd = -1


def _in_one_cache(link: Path) -> bool:
    """``models--*/snapshots/…/name`` that points to a blob of the same ``models--*`` folder."""
    here = link.parent.resolve()
    trees = [above for above in here.parents if above.name.startswith(("models--", "datasets--"))]
    return bool(trees) and link.resolve().parent == trees[0] / "blobs"


class Window(FileSource):
    """A range of a file, read as if it were a file of its own: an archive inside an archive."""

    def __init__(self, parent: FileSource, offset: int, size: int, member: str) -> None:
        self.parent, self.base, self.size = parent, offset, size
        self.path, self.name = parent.path, f"{parent.name}, {member}"
        self.mode = parent.mode
        self.identity, self.place = parent.identity, parent.place
        self.bytes_read = 0
        self._fd = parent.fileno()

    def fileno(self) -> int:
        return self.parent.fileno()

    def _pread(self, size: int, offset: int) -> bytes:
        # read() has checked the range against this window's own size
        return self.parent.read(self.base + offset, min(size, self.size - offset))

    def map(self, offset: int, size: int) -> memoryview:
        return self.parent.map(self.base + offset, size)

    def outermost(self, offset: int) -> tuple[FileSource, int]:
        """The file that this window is in, and where ``offset`` lies there."""
        if isinstance(self.parent, Window):
            return self.parent.outermost(self.base + offset)
        return self.parent, self.base + offset

    def close(self) -> None:
        """The file is its opener's to close."""


class FileStorage(Storage):
    """A storage that is a range of a file."""

    __slots__ = ("offset", "source")

    def __init__(
        self,
        source: FileSource,
        offset: int,
        nbytes: int,
        location: str = "cpu",
        crc32: int | None = None,
    ) -> None:
        if isinstance(source, Window):  # the kernel copies from the file itself
            source, offset = source.outermost(offset)
        self.nbytes, self.location, self.crc32 = nbytes, location, crc32
        self.source, self.offset = source, offset

    def read(self, start: int, size: int) -> bytes:
        return self.source.read(self.offset + start, size)

    def extent(self) -> Extent:
        return Extent(self.source, self.offset, self.nbytes)


class InflatedStorage(Storage):
    """A storage that lies deflated in a zip: inflated from its start each time it is read."""

    __slots__ = ("compressed", "offset", "source")

    def __init__(
        self,
        source: FileSource,
        offset: int,
        compressed: int,
        nbytes: int,
        location: str = "cpu",
        crc32: int | None = None,
    ) -> None:
        super().__init__(nbytes, location, crc32)
        self.source, self.offset, self.compressed = source, offset, compressed

    def read(self, start: int, size: int) -> bytes:
        return b"".join(self.chunks(start, start + size))

    def chunks(self, start: int = 0, stop: int | None = None) -> Iterator[bytes]:
        stop = self.nbytes if stop is None else stop
        at = 0
        for piece in inflate(self.source, self.offset, self.compressed, self.nbytes):
            if at + len(piece) > start and at < stop:
                yield piece[max(start - at, 0) : stop - at]
            at += len(piece)


def inflate(source: FileSource, offset: int, compressed: int, size: int) -> Iterator[bytes]:
    """The ``size`` bytes that a deflated range of a file declares, in pieces of bounded size.

    Raises:
        UnreadableError: what inflates is not exactly that long, or is no deflate stream.
    """
    engine = zlib.decompressobj(-15)
    left = size
    for at in range(0, compressed, CHUNK):
        data = source.read(offset + at, min(CHUNK, compressed - at))
        while data:
            try:
                # one byte more than declared shows that it lied
                piece = engine.decompress(data, min(CHUNK, left + 1))
            except zlib.error as e:
                raise UnreadableError(f"not a deflate stream: {e}", offset=offset + at) from None
            left -= len(piece)
            if left < 0:
                raise UnreadableError(
                    f"inflates to more than the {size:,} bytes that it declares", offset=offset
                )
            if piece:
                yield piece
            if data == engine.unconsumed_tail and not piece:
                break
            data = engine.unconsumed_tail
    if left or not engine.eof:
        raise UnreadableError(
            f"inflates to fewer than the {size:,} bytes that it declares", offset=offset
        )
