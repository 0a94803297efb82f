"""Where an output's bytes go: all of what is given is written, by the kernel where it can."""

from __future__ import annotations

import errno
import os
import zlib
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

from ..core.tensors import Storage
from ..errors import UnreadableError

# No call of the system moves more: a call can't be interrupted, and Ctrl-C is to be prompt.
_PIECE = 64 << 20

# What the kernel says where two files can't share ranges: other file systems, old kernels,
# files that aren't plain, sandboxes.
_NO_RANGES = frozenset(
    (errno.EXDEV, errno.ENOSYS, errno.EOPNOTSUPP, errno.EINVAL, errno.EPERM, errno.EBADF)
)


class Sink:
    """A file being written from its start.

    ``position`` counts the bytes that it holds. ``progress`` is called with the number of bytes
    that are new, after each piece of at most 64 MiB.
    """

    def __init__(
        self, fd: int, path: Path, progress: Callable[[int], object] | None = None
    ) -> None:
        self.fd, self.path = fd, path
        self.position = 0
        self._sent = 0  # what the disk was told to begin with
        self._progress = progress

    def write(self, data: bytes | memoryview) -> None:
        """All of ``data``."""
        view = memoryview(data).cast("B")
        while view:
            done = os.write(self.fd, view[:_PIECE])
            if done == 0:
                raise OSError(errno.EIO, "nothing could be written")
            self._advance(done)
            view = view[done:]

    def copy(self, storage: Storage, start: int = 0, stop: int | None = None) -> None:
        """The bytes of a storage: copied by the kernel where they lie in a file as they are."""
        stop = storage.nbytes if stop is None else stop
        extent = storage.extent()
        if extent is not None:
            if extent.offset + stop > extent.source.size:
                extent.source.read(extent.offset + start, stop - start)  # raises
            start += self._copy_range(extent.source.fileno(), extent.offset + start, stop - start)
        for piece in storage.chunks(start, stop):
            self.write(piece)

    def copy_with_crc(self, storage: Storage) -> int:
        """All bytes of a storage, and their CRC-32: the recorded one, or that of what passes."""
        if storage.crc32 is not None:
            self.copy(storage)
            return storage.crc32
        crc, crc32 = 0, _fastest_crc32()
        for piece in storage.chunks():
            crc = crc32(piece, crc)
            self.write(piece)
        return crc

    def _copy_range(self, fd: int, offset: int, size: int) -> int:
        """How much of the range the kernel copied; 0 where it can't."""
        done = 0
        while done < size and hasattr(os, "copy_file_range"):
            try:
                n = os.copy_file_range(fd, self.fd, min(size - done, _PIECE), offset + done)
            except OSError as e:
                if e.errno in _NO_RANGES:
                    break
                raise
            if n == 0:
                raise UnreadableError(
                    "the source became shorter while it was copied", offset=offset + done
                )
            done += n
            self._advance(n)
        return done

    def _advance(self, size: int) -> None:
        self.position += size
        if self.position - self._sent >= _PIECE:
            self._begin_writing()
        if self._progress is not None:
            self._progress(size)

    def _begin_writing(self) -> None:
        """Have the disk begin with what is new, so that the last fsync has little to wait for.

        That is what the advice does to dirty pages; those that are clean by then leave the cache.
        """
        if hasattr(os, "posix_fadvise"):
            with suppress(OSError):
                os.posix_fadvise(
                    self.fd, self._sent, self.position - self._sent, os.POSIX_FADV_DONTNEED
                )
        self._sent = self.position


def _fastest_crc32() -> Callable[[bytes, int], int]:
    """ISA-L's, ten times as fast as zlib's, where it is installed."""
    try:
        from isal import isal_zlib
    except ImportError:
        return zlib.crc32
    crc32: Callable[[bytes, int], int] = isal_zlib.crc32
    return crc32
