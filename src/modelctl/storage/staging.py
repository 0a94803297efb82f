"""Outputs that appear whole or not at all: staged beside their target, fsynced, renamed over it."""

from __future__ import annotations

import errno
import os
import re
import stat
import zlib
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from ..core.tensors import Storage
from ..errors import DurabilityError, UnreadableError, WriteError

_TEMP = re.compile(r"\.modelctl-(\d+)-[0-9a-f]{8}\.tmp$")
# One call of copy_file_range can't be interrupted: pieces keep Ctrl-C prompt.
_RANGE = 256 << 20


class Sink:
    """A file being written from its start. ``position`` counts the bytes that it holds."""

    def __init__(self, fd: int, path: Path) -> None:
        self.fd, self.path = fd, path
        self.position = 0

    def write(self, data: bytes | memoryview) -> None:
        """All of ``data``."""
        view = memoryview(data)
        while view:
            done = os.write(self.fd, view)
            if done == 0:
                raise OSError(errno.EIO, "nothing could be written")
            self.position += done
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
        crc = 0
        for piece in storage.chunks():
            crc = zlib.crc32(piece, crc)
            self.write(piece)
        return crc

    def _copy_range(self, fd: int, offset: int, size: int) -> int:
        """How much of the range the kernel copied; 0 where it can't."""
        done = 0
        while done < size and hasattr(os, "copy_file_range"):
            try:
                n = os.copy_file_range(fd, self.fd, min(size - done, _RANGE), offset + done)
            except OSError as e:
                if e.errno in _NO_RANGES:
                    break
                raise
            if n == 0:
                raise UnreadableError(
                    "the source became shorter while it was copied", offset=offset + done
                )
            done += n
            self.position += n
        return done


# What the kernel says where two files can't share ranges: other file systems, old kernels,
# files that aren't plain, sandboxes.
_NO_RANGES = frozenset(
    (errno.EXDEV, errno.ENOSYS, errno.EOPNOTSUPP, errno.EINVAL, errno.EPERM, errno.EBADF)
)


def resolve_target(path: str | os.PathLike[str]) -> Path:
    """Where an output for ``path`` really goes: through links, so that a link stays one."""
    target = Path(path)
    try:
        return target.resolve() if target.is_symlink() else target.absolute()
    except (OSError, RuntimeError, ValueError) as e:  # a loop of links, a NUL
        raise WriteError(f"{path}: not a place to write to: {e}") from None


@contextmanager
def staged(
    path: str | os.PathLike[str], *, overwrite: bool = False, expected: int = 0
) -> Iterator[Sink]:
    """A :class:`Sink` whose file stands under ``path`` once the block ends without an error.

    Until then ``path`` is as it was; afterwards it is the new file, with the old one's mode (or
    what the umask gives). ``expected`` is the size in bytes, to fail early when it can't fit.

    Raises:
        WriteError: nothing was changed; says why.
        DurabilityError: the new file is in place, but the directory could not be synced.
    """
    target = resolve_target(path)
    folder = target.parent
    try:
        mode = stat.S_IMODE(target.stat().st_mode)
        if target.is_dir():
            raise WriteError(f"{path}: is a directory")
        if not target.is_file():
            raise WriteError(f"{path}: not a regular file, so it is not replaced")
        if not overwrite:
            raise WriteError(f"{path}: exists already", hint="--overwrite replaces it")
    except FileNotFoundError:
        umask = os.umask(0)
        os.umask(umask)
        mode = 0o666 & ~umask
    except NotADirectoryError:
        raise WriteError(f"{path}: its parent is not a directory") from None
    except (OSError, ValueError) as e:
        raise WriteError(f"{path}: not a place to write to: {e}") from None
    if not folder.is_dir():
        raise WriteError(f"{path}: there is no directory {folder}", hint=f"mkdir -p {folder}")
    _remove_stale(folder)
    with suppress(OSError):
        import shutil

        free = shutil.disk_usage(folder).free
        if expected > free:
            raise WriteError(
                f"{path}: needs {expected:,} bytes, {free:,} are free there",
                hint="choose another disk with -o",
            )
    stem = os.fsdecode(os.fsencode(target.name)[:180])
    temp = folder / f".{stem}.modelctl-{os.getpid()}-{os.urandom(4).hex()}.tmp"
    flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | getattr(os, "O_CLOEXEC", 0)
    try:
        fd = os.open(temp, flags | getattr(os, "O_BINARY", 0), 0o600)
    except OSError as e:
        raise WriteError(f"{path}: can't be written there: {e.strerror}") from e
    try:
        sink = Sink(fd, temp)
        yield sink
        if os.fstat(fd).st_size != sink.position:
            raise OSError(errno.EIO, "the file is not as long as what was written")
        if hasattr(os, "fchmod"):
            os.fchmod(fd, mode)
        os.fsync(fd)
        os.close(fd)
        fd = -1
        os.replace(temp, target)
    except BaseException as e:
        if fd >= 0:
            with suppress(OSError):
                os.close(fd)
        with suppress(OSError):
            os.unlink(temp)
        if isinstance(e, OSError):
            raise WriteError(
                f"{path}: not written: {e.strerror or e}; what stood there is as it was",
                hint="free space or choose another place" if e.errno == errno.ENOSPC else None,
            ) from e
        raise
    _sync_folder(folder, path)


def _sync_folder(folder: Path, path: str | os.PathLike[str]) -> None:
    if not hasattr(os, "O_DIRECTORY"):
        return
    try:
        fd = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
        try:
            os.fsync(fd)
        finally:
            os.close(fd)
    except OSError as e:
        if e.errno in (errno.EINVAL, errno.ENOTSUP, errno.EACCES):
            return  # a file system whose directories can't be synced
        raise DurabilityError(
            f"{path}: written whole, but the disk did not confirm it: {e.strerror}"
        ) from e


def _remove_stale(folder: Path) -> None:
    """Remove what killed runs of ours left in ``folder``."""
    with suppress(OSError):
        for name in os.listdir(folder):
            found = _TEMP.search(name)
            if found and not _alive(int(found[1])):
                with suppress(OSError):
                    os.unlink(folder / name)


def _alive(pid: int) -> bool:
    if os.name != "posix":
        return True
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except OSError:
        return True
    return True
