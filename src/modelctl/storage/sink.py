"""Where an output's bytes go: all of what is given is written, by the kernel where it can."""

from __future__ import annotations

import errno
import os
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING

from ..core.storages import Run, RunStorage, Slice, Source, Storage, fastest_crc32
from ..core.tensors import announce
from ..errors import UnreadableError, WriteError
from .checksums import Passed, crc32_of_pieces
from .layout import Checksums, FileLayout, Late, Made, Piece, Segment

if TYPE_CHECKING:
    from concurrent.futures import Future, ThreadPoolExecutor

Progress = Callable[[int], object]

# No call of the system moves more: a call can't be interrupted, and Ctrl-C is to be prompt.
_PIECE = 64 << 20
# Smaller segments are put together in memory and written at once, up to so many bytes or segments:
# a call of the system takes longer than to move them.
_SMALL, _BATCH, _MOST = 64 << 10, 1 << 20, 4096
# How many storages may wait for the thread that compares checksums.
_BEHIND = 4
# Room for less is not worth asking for before it is filled.
_ALLOCATED = 16 << 20
# What the kernel says where two files can't share ranges: other file systems, old kernels,
# files that aren't plain, sandboxes.
_NO_RANGES = frozenset(
    (errno.EXDEV, errno.ENOSYS, errno.EOPNOTSUPP, errno.EINVAL, errno.EPERM, errno.EBADF)
)


class Sink:
    """A file being written: from its start, or as a layout says.

    ``position`` counts the bytes that it holds. ``progress`` is called with the number of bytes
    that are new, after each piece of at most 64 MiB.
    """

    def __init__(self, fd: int, path: Path, progress: Progress | None = None) -> None:
        self.fd, self.path = fd, path
        self.position = 0
        self._sent = 0  # what the disk was told to begin with
        self._progress = progress

    def write(self, data: bytes | memoryview) -> None:
        """All of ``data``, after what was written before."""
        self._put(memoryview(data).cast("B"), self.position)

    def carry_out(self, file: FileLayout, checker: Checker) -> None:
        """All of a file, by its layout; nothing was written before.

        Args:
            checker: what compares checksums that the output does not keep.

        Raises:
            UnreadableError: what it is made from can't be read.
            OSError: it can't be written.
        """
        self.begin(file.nbytes)
        sums: dict[int, int] = {}
        self.put_late(self.put_segments(file.segments, sums, checker), sums)

    def put_segments(
        self, segments: Sequence[Segment], sums: dict[int, int], checker: Checker
    ) -> list[Late]:
        """Segments of a file, one after the other: all of it, or some.

        Args:
            sums: gets the checksums that were made.

        Returns:
            What asks for checksums that are not known yet.
        """
        pieces = (one for one in segments if isinstance(one, Piece))
        announce((one.storage, one.start, one.stop) for one in pieces)
        waiting: list[Late] = []
        batch: list[Segment] = []
        size = 0
        for segment in segments:
            large = segment.nbytes > _SMALL and not isinstance(segment, Late)
            apart = bool(batch) and segment.offset != batch[0].offset + size
            if large or apart or size >= _BATCH or len(batch) >= _MOST:
                self._put_batch(batch, sums, waiting, checker)
                batch, size = [], 0
            if isinstance(segment, Piece) and large:
                self._copy(segment, sums, checker)
            elif large:
                self._put_batch([segment], sums, waiting, checker)  # by itself it is not copied
            else:
                batch.append(segment)
                size += segment.nbytes
        self._put_batch(batch, sums, waiting, checker)
        return waiting

    def put_late(self, waiting: Sequence[Late], sums: Checksums) -> None:
        """What had to wait, now that all checksums are known."""
        for late in waiting:
            self._put(memoryview(_as_long(late, late.make(sums))), late.offset, new=False)

    def begin(self, nbytes: int) -> None:
        """Ask for room for all of it."""
        _allocate(self.fd, nbytes)

    def _put_batch(
        self,
        batch: Sequence[Segment],
        sums: dict[int, int],
        waiting: list[Late],
        checker: Checker,
    ) -> None:
        """Neighbouring small segments, in one write."""
        if not batch:
            return
        read = iter(_read_small([one for one in batch if isinstance(one, Piece)]))
        parts: list[bytes] = []
        for segment in batch:
            if isinstance(segment, Made):
                parts.append(segment.data)
            elif isinstance(segment, Piece):
                parts.append(_as_long(segment, next(read)))
                _check_small(segment, parts[-1], sums, checker)
            else:
                parts.append(_made(segment, sums, waiting))
        self._put(memoryview(b"".join(parts)), batch[0].offset)

    def _copy(self, piece: Piece, sums: dict[int, int], checker: Checker) -> None:
        """A range of a storage: copied by the kernel where it lies in a file as it is."""
        at = piece.offset
        runs = piece.storage.runs(piece.start, piece.stop)
        # what is far is not read twice for its checksum
        far = checker.follows and any(run.source.costly for run in runs or ())
        if runs is None or piece.checksum == "make" or (far and piece.checksum == "compare"):
            self._pass(piece, sums, checker)
            return
        if sum(run.nbytes for run in runs) != piece.nbytes:
            raise _other_length(piece, "other")
        if piece.checksum == "compare":
            checker.check(piece.storage)
        for run in runs:
            done = self._copy_range(run, at)
            for start in range(done, run.nbytes, _BATCH):
                part = run.source.read(run.offset + start, min(_BATCH, run.nbytes - start))
                self._put(memoryview(part), at + start)
            at += run.nbytes

    def _pass(self, piece: Piece, sums: dict[int, int], checker: Checker) -> None:
        """A range of a storage by way of memory, read once: for its checksum, too."""
        if not checker.follows:
            checker.check(piece.storage)
        at, end = piece.offset, piece.offset + piece.nbytes
        crc32, found = fastest_crc32(), []
        for part in piece.storage.slices(piece.start, piece.stop):
            one, crc, begin = part.storage, 0, at
            passing = one.passing if isinstance(one, RunStorage) else one.checked
            for data in passing(part.start, part.stop):
                crc = crc32(data, crc)
                if at + len(data) > end:
                    raise _other_length(piece, "more")
                at = self._put(memoryview(data), at)
            checker.passed(part, crc, piece.storage)
            found.append((crc, at - begin))
        if at != end:
            raise _other_length(piece, "fewer")
        sums[id(piece.storage)] = crc32_of_pieces(found)

    def _copy_range(self, run: Run, at: int) -> int:
        """How much of the run the kernel copied to ``at``; 0 where it can't."""
        run.source.check(run.offset, run.nbytes)
        fd = run.source.fileno()
        done = 0
        while fd is not None and done < run.nbytes and hasattr(os, "copy_file_range"):
            size = min(run.nbytes - done, _PIECE)
            try:
                n = os.copy_file_range(fd, self.fd, size, run.offset + done, at + done)
            except OSError as e:
                if e.errno in _NO_RANGES:
                    break
                raise
            if n == 0:
                raise UnreadableError(
                    "the file became shorter while it was copied",
                    path=run.source.name,
                    offset=run.offset + done,
                )
            self._advance(at + done, n)
            done += n
        return done

    def _put(self, view: memoryview, at: int, *, new: bool = True) -> int:
        """Write all of it to ``at``; where that ends."""
        while view:
            done = _pwrite(self.fd, view[:_PIECE], at)
            if done == 0:
                raise OSError(errno.EIO, "nothing could be written")
            if new:
                self._advance(at, done)
            at += done
            view = view[done:]
        return at

    def _advance(self, at: int, size: int) -> None:
        self.position = max(self.position, at + size)
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


class Checker:
    """Compares storages with their checksums while they are copied: the kernel shows nothing of
    what it moves, but another thread finds it in memory.

    Attributes:
        follows: whether bytes may be out before they are compared: they can be taken back.
    """

    follows = True

    def __init__(self) -> None:
        self._pool: ThreadPoolExecutor | None = None
        self._jobs: list[Future[None]] = []
        self._passed = Passed()

    def __enter__(self) -> Checker:
        return self

    def check(self, storage: Storage) -> None:
        """Begin with a storage; done when the block ends, or a few storages later: what is far
        behind the copy may have left the memory."""
        if storage.compared:
            return
        if self._pool is None:
            from concurrent.futures import ThreadPoolExecutor

            self._pool = ThreadPoolExecutor(1, "modelctl-crc")
        if len(self._jobs) > _BEHIND:
            self._jobs.pop(0).result()
        self._jobs.append(self._pool.submit(storage.check))

    def passed(self, part: Slice, crc: int, of: Storage) -> None:
        """What was read, compared once all of its storage was; ``of`` is what errors name."""
        self._passed.add(part, crc, of)

    def __exit__(
        self,
        kind: type[BaseException] | None,
        value: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        try:
            if kind is None:
                for job in self._jobs:
                    job.result()
                self._passed.finish()
        finally:
            if self._pool is not None:
                self._pool.shutdown(cancel_futures=True)


def _check_small(piece: Piece, data: bytes, sums: dict[int, int], checker: Checker) -> None:
    """What a small piece's checksum asks for, given its bytes."""
    storage, crc32 = piece.storage, fastest_crc32()
    if piece.checksum == "make":
        sums[id(storage)] = crc32(data, 0)
    if piece.checksum == "keep" or storage.compared:
        return
    if not checker.follows:
        checker.check(storage)
    at = 0
    for part in storage.slices(piece.start, piece.stop):
        checker.passed(part, crc32(data[at : at + part.nbytes], 0), storage)
        at += part.nbytes


def _made(late: Late, sums: Checksums, waiting: list[Late]) -> bytes:
    """A late segment, where it can be made by now; else room for it."""
    try:
        made = late.make(sums)
    except KeyError:
        waiting.append(late)
        return bytes(late.nbytes)
    return _as_long(late, made)


def _as_long(segment: Piece | Late, data: bytes) -> bytes:
    """What was made for a segment, which must be as long as the layout says."""
    if len(data) == segment.nbytes:
        return data
    if isinstance(segment, Piece):
        raise _other_length(segment, "more" if len(data) > segment.nbytes else "fewer")
    raise WriteError(
        f"not written, its format made a wrong layout of it: {len(data):,} bytes at "
        f"{segment.offset:,}, where it says {segment.nbytes:,}",
        hint="this is a fault of the format; another one with --to",
    )


def _other_length(piece: Piece, what: str) -> UnreadableError:
    kind = type(piece.storage).__name__
    return UnreadableError(
        f"a storage ({kind}) gives {what} bytes than the {piece.nbytes:,} that it says",
        hint="this is a fault of the format that read it",
    )


def _read_small(pieces: Sequence[Piece]) -> list[bytes]:
    """The bytes of small pieces; those of one source are asked for at once."""
    found: list[list[bytes]] = []
    wanted: dict[Source, list[tuple[list[bytes], int, Run]]] = {}
    for piece in pieces:
        runs = piece.storage.runs(piece.start, piece.stop)
        if runs is None:
            found.append([*piece.storage.chunks(piece.start, piece.stop)])
            continue
        parts = [b""] * len(runs)
        found.append(parts)
        for i, run in enumerate(runs):
            wanted.setdefault(run.source, []).append((parts, i, run))
    for source, alike in wanted.items():
        data = source.read_many([(run.offset, run.nbytes) for _, _, run in alike])
        for (parts, i, _), read in zip(alike, data, strict=True):
            parts[i] = read
    return [b"".join(parts) for parts in found]


def _pwrite(fd: int, data: memoryview, offset: int) -> int:
    if hasattr(os, "pwrite"):
        return os.pwrite(fd, data, offset)
    os.lseek(fd, offset, os.SEEK_SET)
    return os.write(fd, data)


def _allocate(fd: int, size: int) -> None:
    """Room for all of a large file, in one piece if the disk has one; so a full disk shows now.

    Not ``posix_fallocate``: where the file system can't, the C library writes to every block.

    Raises:
        OSError: there is no room.
    """
    if size < _ALLOCATED or os.name != "posix":
        return
    import ctypes

    call = getattr(ctypes.CDLL(None, use_errno=True), "fallocate", None)  # Linux has it
    if call is None or ctypes.sizeof(ctypes.c_long) < 8:
        return
    if call(fd, 0, ctypes.c_long(0), ctypes.c_long(size)):
        code = ctypes.get_errno()
        if code == errno.ENOSPC:
            raise OSError(code, os.strerror(code))
