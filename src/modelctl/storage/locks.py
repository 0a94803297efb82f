"""One writer at a time: a lock beside what is written, and the end of what killed writers left.

A lock is a small file whose ``flock`` its writer holds: the kernel lets go of it when the writer
dies, so a lock file that was left behind hinders nobody. It names its writer, and whoever finds
that one dead removes the lock file and the temporary files that belong to it.
"""

from __future__ import annotations

import errno
import os
import re
import stat
import time
import zlib
from contextlib import suppress
from pathlib import Path
from shlex import quote
from typing import Any

from ..errors import WriteError

fcntl: Any
try:
    import fcntl
except ImportError:  # Windows: no locks, and nothing of killed writers is removed
    fcntl = None

_LOCK = re.compile(r"\.(.*)\.modelctl\.lock", re.DOTALL)
_TEMP = re.compile(r"\.(.*)\.modelctl-\d+-[0-9a-f]{8}\.tmp", re.DOTALL)
_OWNER = re.compile(rb"(\d{1,10}) (\S{1,255})\n")
# A file system that has no locks says one of these.
_NO_LOCKS = frozenset((errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP, errno.EINVAL, errno.EBADF))
# What stands at a lock's name is a link, or a folder.
_PLANTED = frozenset((errno.ELOOP, errno.EISDIR, errno.ENXIO))
_STRANGER = (0, "?")
_LONGEST = 180  # bytes of a name, so that what is added to it fits into 255
_PATIENCE = 5.0  # seconds in which a lock whose writer is dead should be free


class Lock:
    """The right to write what is called ``name`` in ``folder``, for a ``with`` block.

    The name ``""``, which no file has, stands for the folder itself.

    Raises:
        WriteError: another modelctl holds it; names the process.
    """

    def __init__(self, folder: Path, name: str, shown: str | os.PathLike[str]) -> None:
        self.folder, self.shown = folder, shown
        self.stem = _stem(name)
        self.path = folder / f".{self.stem}.modelctl.lock"
        self.fd = -1

    def __enter__(self) -> Lock:
        if fcntl is None:
            return self
        try:
            self._wait()
        except OSError as e:
            if e.errno in _PLANTED:
                raise self._in_the_way() from None
            if e.errno not in _NO_LOCKS:
                raise
            with suppress(OSError):
                os.unlink(self.path)
            return self
        try:
            with suppress(OSError):  # a full disk: what is held need not be signed
                os.ftruncate(self.fd, 0)
                os.pwrite(self.fd, f"{os.getpid()} {_host()}\n".encode(), 0)
        except BaseException:
            self.__exit__()
            raise
        return self

    def _wait(self) -> None:
        until = time.monotonic() + _PATIENCE
        while not self._acquire():
            owner = self._owner()
            if owner == _STRANGER:
                raise self._in_the_way()
            writer = f" (process {owner[0]})" if _may_live(owner) and owner else ""
            if writer or time.monotonic() > until:
                raise WriteError(
                    f"{self.shown}: another modelctl{writer} is writing it",
                    hint="wait until it is done, or choose another place with -o",
                )
            # its holder is about to sign it, or to remove it for a dead one
            time.sleep(0.001)

    def _in_the_way(self) -> WriteError:
        """Whatever it is is neither written nor removed: it may be another name of a file."""
        return WriteError(
            f"{self.shown}: {self.path.name} beside it is no lock of modelctl",
            hint=f"look at it, and remove it: rm {quote(str(self.path))}",
        )

    def __exit__(self, *error: object) -> None:
        if self.fd < 0:
            return
        with suppress(OSError):
            if _is_at(self.fd, self.path):  # while it is held: nobody else can have made it
                os.unlink(self.path)
        with suppress(OSError):
            os.close(self.fd)
        self.fd = -1

    def temp(self) -> Path:
        """A new name for what its holder is writing."""
        return self.folder / f".{self.stem}.modelctl-{os.getpid()}-{os.urandom(4).hex()}.tmp"

    def aside(self) -> Path:
        """Where what its holder replaces is for a moment: and stays, if that is killed then."""
        return self.folder / f".{self.stem}.modelctl-old"

    def remove_leftovers(self) -> None:
        """Remove what killed writers left in the folder: the holder's predecessors, and those of
        this machine whose locks are here. Nothing else, and no failure is one of the holder."""
        if self.fd < 0:
            return
        with suppress(OSError):
            names = os.listdir(self.folder)
            self._remove_temps(names)
            for name in names:
                found = _LOCK.fullmatch(name)
                if found and found[1] != self.stem:
                    Lock(self.folder, found[1], "").remove_if_dead()

    def remove_if_dead(self) -> None:
        """Without being its holder: remove the lock of a killed writer, and what it left."""
        with suppress(OSError):
            if not _may_live(self._owner()):
                self._remove_if_free()

    def remove_of_dying(self) -> None:
        """As :meth:`remove_if_dead`, where its writer is known to have gone, on any machine."""
        until = time.monotonic() + _PATIENCE
        with suppress(OSError):
            while not self._remove_if_free() and time.monotonic() < until:
                time.sleep(0.01)  # the system has not let go of all of it

    def _remove_if_free(self) -> bool:
        """Whether nobody holds it; then it goes, and what was left with it."""
        if fcntl is None or not os.path.lexists(self.path):
            return True
        if not self._acquire(create=False):
            return False
        try:
            self._remove_temps(os.listdir(self.folder))
        finally:
            self.__exit__()
        return True

    def _remove_temps(self, names: list[str]) -> None:
        for name in names:
            found = _TEMP.fullmatch(name)
            if found and found[1] == self.stem:
                with suppress(OSError):
                    remove(self.folder / name)

    def _acquire(self, create: bool = True) -> bool:
        """Try once. What was removed before it could be held, is not the lock any more."""
        fd = _open(self.path, create)
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if _is_at(fd, self.path) and _owner_in(fd) != _STRANGER:
                self.fd = fd
        except BlockingIOError:
            pass
        finally:
            if self.fd != fd:
                os.close(fd)
        return self.fd == fd

    def _owner(self) -> tuple[int, str] | None:
        """The process that says it holds the lock, and its machine; None where nobody does yet."""
        try:
            fd = _open(self.path, create=False)
        except FileNotFoundError:
            return None
        try:
            return _owner_in(fd)
        finally:
            os.close(fd)


def _owner_in(fd: int) -> tuple[int, str] | None:
    """What a lock file says of its holder; of what is none of ours, or has other names, that it is
    a stranger's."""
    status = os.fstat(fd)
    if not stat.S_ISREG(status.st_mode) or status.st_nlink > 1:
        return _STRANGER
    text = os.pread(fd, 300, 0)
    found = _OWNER.fullmatch(text)
    if found is None:
        return _STRANGER if text else None
    return int(found[1]), os.fsdecode(found[2])


def remove(path: Path) -> None:
    """Remove a temporary file, or a temporary folder of files. Follows no link."""
    mode = os.lstat(path).st_mode
    if stat.S_ISREG(mode):
        os.unlink(path)
    elif stat.S_ISDIR(mode):
        for name in os.listdir(path):
            os.unlink(path / name)
        os.rmdir(path)


def _stem(name: str) -> str:
    """The name, or, where there is no room for more, one that is as good as unique."""
    raw = os.fsencode(name)
    if len(raw) <= _LONGEST:
        return name
    return f"{raw[: _LONGEST - 9].decode(errors='ignore')}-{zlib.crc32(raw):08x}"


def _open(path: Path, create: bool) -> int:
    flags = os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK
    try:
        return os.open(path, os.O_RDWR | flags | (os.O_CREAT if create else 0), 0o666)
    except PermissionError:
        if not os.path.lexists(path):
            raise
        return os.open(path, os.O_RDONLY | flags)  # another user's, which can be held as well


def _is_at(fd: int, path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(fd), os.lstat(path))
    except FileNotFoundError:
        return False


def _may_live(owner: tuple[int, str] | None) -> bool:
    if owner is None:
        return False
    if owner[1] != _host():
        return True
    try:
        os.kill(owner[0], 0)
    except ProcessLookupError:
        return False
    except OSError:
        return True
    return True


def _host() -> str:
    return os.uname().nodename or "-"
