"""Open files as sources: the file itself, a part of one, one without a name."""

from __future__ import annotations

import errno
import os
import stat
import threading
from collections.abc import Iterable, Sequence
from contextlib import suppress
from itertools import islice
from pathlib import Path
from shlex import quote

from ..core.storages import Source
from ..errors import ModelctlError, UnreadableError

Identity = tuple[int, int, int, int]
# A file of at most so many bytes is read once, as a whole, when it is first asked for something.
_SMALL = 128 << 10
_MOST_FILES = 1 << 20
# of a folder; to look for a name like another takes time for each
_MOST_NAMES = 5_000


def identity(status: os.stat_result) -> Identity:
    """Which file it is, and in what state: equal as long as nobody replaced or changed it."""
    return status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns


def no_such_file(path: str | os.PathLike[str]) -> ModelctlError:
    """The error for a file that isn't there; its hint has those in its folder of a like name."""
    import difflib

    folder, name = os.path.split(os.fspath(path))
    near: list[str] = []
    with suppress(OSError, ValueError):
        names = sorted(one.name for one in islice(os.scandir(folder or "."), _MOST_NAMES))
        near = difflib.get_close_matches(name, names, n=2, cutoff=0.6)
    meant = " or ".join(quote(os.path.join(folder, one)) for one in near)
    if not near and any(sign in name for sign in "*?["):
        return ModelctlError(
            f"{os.fspath(path)}: no such file or directory; is it a pattern of tensors?",
            hint="those go after SRC in ls, elsewhere to --pattern",
        )
    return ModelctlError(
        f"{os.fspath(path)}: no such file or directory", hint=f"{meant}?" if near else None
    )


class OpenFile(Source):
    """An open file, by its descriptor, which it closes."""

    def __init__(self, fd: int, name: str) -> None:
        super().__init__(name, os.fstat(fd).st_size)
        self._fd = fd
        self._seeking = threading.Lock()  # where reading at an offset takes two calls

    def _fetch(self, offset: int, size: int) -> bytes:
        if hasattr(os, "pread"):
            return os.pread(self._fd, size, offset)
        with self._seeking:
            os.lseek(self._fd, offset, os.SEEK_SET)
            return os.read(self._fd, size)

    def read_into(self, offset: int, out: memoryview) -> None:
        if not hasattr(os, "preadv"):
            super().read_into(offset, out)
            return
        if not out:
            return
        self.check(offset, len(out))
        done = 0
        while done < len(out):
            try:
                n = os.preadv(self._fd, [out[done:]], offset + done)
            except OSError as e:
                raise self._failed(e, offset + done) from e
            if n == 0:
                raise self._shrunk(offset + done)
            self._count(n)
            done += n

    def map(self, offset: int, size: int) -> memoryview:
        import mmap

        self.check(offset, size)  # mmap takes -1 for "no file", and gives zeros
        start = offset - offset % mmap.ALLOCATIONGRANULARITY
        try:
            mapped = mmap.mmap(
                self._fd, offset - start + size, offset=start, access=mmap.ACCESS_READ
            )
        except ValueError as e:  # it ends before
            raise self._shrunk(offset) from e
        except OSError as e:
            raise self._failed(e, offset) from e
        self._count(size)
        return memoryview(mapped)[offset - start :]

    def fileno(self) -> int | None:
        return None if self._closed else self._fd

    def close(self) -> None:
        if not self._closed:
            super().close()
            with suppress(OSError):
                os.close(self._fd)


def check_unchanged(sources: Iterable[Source]) -> None:
    """Raises UnreadableError where a file is not as it was when it was opened: what was read of it
    may be of two times."""
    for one in sources:
        if isinstance(one, FileSource) and one.changed:
            raise UnreadableError(
                "changed while it was read", path=one.name, hint="run it again, when it is written"
            )


class FileSource(OpenFile):
    """A regular file, opened for reading at offsets.

    ``place`` is where it stood when it was opened, with no links in it (of one that came open,
    nothing), and ``identity`` which file that was: what replaces it must know whether it still is.

    Args:
        fd: a descriptor that is open already, for what ``path`` only calls by a name.

    Raises:
        ModelctlError: it can't be opened, or is no regular file.
    """

    def __init__(self, path: str | os.PathLike[str], *, fd: int | None = None) -> None:
        self.path = Path(path)
        self.place = os.path.realpath(path) if fd is None else ""
        fd = _open(path) if fd is None else fd
        status = os.fstat(fd)
        if not stat.S_ISREG(status.st_mode):
            os.close(fd)
            what = "a directory" if stat.S_ISDIR(status.st_mode) else "not a regular file"
            raise ModelctlError(f"{path}: {what}, so it is no checkpoint")
        super().__init__(fd, str(path))
        self.identity = identity(status)
        self._opened = status
        self._whole: bytes | None = None

    @property
    def changed(self) -> bool:
        """Whether somebody wrote to it since it was opened: its size, the time of that, or, where
        that was put back, the time of any change. Another file may take its place, and its
        names, mode and owner may be others: what is in this one is as it was."""
        if self._closed:
            return False
        now, then = os.fstat(self._fd), self._opened
        if identity(now) != self.identity:
            return True
        if now.st_ctime_ns == then.st_ctime_ns:
            return False
        names = ("st_nlink", "st_mode", "st_uid", "st_gid")
        if any(getattr(now, name) != getattr(then, name) for name in names):
            return False
        try:  # renamed
            return not self.place or os.path.samestat(now, os.stat(self.place))
        except OSError:
            return False

    def read(self, offset: int, size: int) -> bytes:
        if not 0 < self.size <= _SMALL:
            return super().read(offset, size)
        if size <= 0:
            return b""
        self.check(offset, size)
        if self._whole is None:  # a format looks at it several times
            self._whole = super().read(0, self.size)
        return self._whole[offset : offset + size]


class Reopened(Source):
    """A file that is opened for each read: of thousands, few are open at once.

    Raises:
        ModelctlError: it can't be opened, or is no regular file.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        file = FileSource(path)
        file.close()
        super().__init__(str(path), file.size)

    def _fetch(self, offset: int, size: int) -> bytes:
        file = FileSource(self.name)
        try:
            return file.read(offset, min(size, file.size - offset))
        finally:
            file.close()


def _open(path: str | os.PathLike[str]) -> int:
    flags = os.O_RDONLY | getattr(os, "O_BINARY", 0) | getattr(os, "O_CLOEXEC", 0)
    try:
        # O_NONBLOCK: opening a FIFO must not hang
        return os.open(path, flags | getattr(os, "O_NONBLOCK", 0))
    except FileNotFoundError:
        raise no_such_file(path) from None
    except OSError as e:
        if e.errno == errno.EMFILE and _more_files():
            return _open(path)
        hint = "ulimit -n 100000 allows more" if e.errno == errno.EMFILE else None
        raise ModelctlError(f"{path}: {e.strerror or e}", hint=hint) from None


def _more_files() -> bool:
    """As many open files as the system lets this process have, where that is more than it has now:
    a folder may hold thousands, and a shell lets its children have 1,024."""
    try:
        import resource
    except ImportError:  # not on Windows
        return False
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    most = _MOST_FILES if hard == resource.RLIM_INFINITY else min(hard, _MOST_FILES)
    if soft == resource.RLIM_INFINITY or soft >= most:
        return False
    with suppress(OSError, ValueError):
        resource.setrlimit(resource.RLIMIT_NOFILE, (min(most, 8 * soft), hard))
        return True
    return False


class Window(Source):
    """A range of a source, read as if it were one of its own: an archive inside an archive.

    The kernel copies from what it is a window of: what a window holds has its runs there (see
    :meth:`run`).
    """

    def __init__(self, parent: Source, offset: int, size: int, member: str) -> None:
        super().__init__(f"{parent.name}, {member}", size)
        self.parent, self.base = parent, offset
        self.costly = parent.costly

    def _fetch(self, offset: int, size: int) -> bytes:
        return self.parent.read(self.base + offset, size)

    def read_into(self, offset: int, out: memoryview) -> None:
        self.check(offset, len(out))
        self._count(len(out))
        self.parent.read_into(self.base + offset, out)

    def map(self, offset: int, size: int) -> memoryview:
        self.check(offset, size)
        self._count(size)
        return self.parent.map(self.base + offset, size)

    def will_read(self, ranges: Sequence[tuple[int, int]]) -> None:
        self.parent.will_read([(self.base + offset, size) for offset, size in ranges])

    def has(self, offset: int, size: int) -> bool:
        return self.parent.has(self.base + offset, size)

    def outermost(self, offset: int) -> tuple[Source, int]:
        return self.parent.outermost(self.base + offset)
