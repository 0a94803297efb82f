"""``-``: stdin as a file to read, stdout as what an output goes to."""

from __future__ import annotations

import errno
import os
import stat
import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TextIO

from ..core.storages import CHUNK, Run, Source, Storage
from ..errors import ModelctlError, UnreadableError, UsageError, WriteError
from .layout import Layout, check_layout
from .sink import Checker, Progress, Sink
from .source import FileSource, OpenFile, check_unchanged

# What stands for both, wherever a path is taken.
STREAM = "-"


def is_stream(path: str | os.PathLike[str] | None) -> bool:
    """Whether a path stands for stdin, or for stdout."""
    return path is not None and os.fspath(path) == STREAM


# ---------------------------------------------------------------------- what comes in


def stdin() -> OpenFile:
    """What comes in on stdin. A file that is redirected there is read where it lies; what comes
    through a pipe is kept in a file without a name, for as long as it is open.

    Raises:
        UsageError: it is a terminal.
        UnreadableError: nothing comes.
        ModelctlError: it is closed; there is no room for what comes.
    """
    fd = _descriptor(sys.stdin)
    if fd is None:
        raise ModelctlError(f"{STREAM}: stdin is closed")
    if os.isatty(fd):
        raise UsageError(
            f"{STREAM}: stdin is a terminal, and no checkpoint is typed",
            hint="modelctl COMMAND - < FILE",
        )
    mode = os.fstat(fd).st_mode
    if stat.S_ISREG(mode) and os.lseek(fd, 0, os.SEEK_CUR) == 0:
        found: OpenFile = FileSource(STREAM, fd=os.dup(fd))
    else:
        found = _spooled(fd)
    if found.size == 0:
        found.close()
        raise UnreadableError(
            "nothing came in on stdin",
            path=STREAM,
            hint="what was to write to it may have failed; it can be read once",
        )
    return found


def _spooled(fd: int) -> OpenFile:
    """All that is left to read, in a file without a name."""
    import tempfile

    done = 0
    try:
        with tempfile.TemporaryFile(buffering=0) as file:
            while data := os.read(fd, CHUNK):
                view = memoryview(data)
                while view:
                    n = file.write(view)
                    view, done = view[n:], done + n
            return OpenFile(os.dup(file.fileno()), STREAM)
    except OSError as e:
        raise ModelctlError(
            f"{STREAM}: no room for what comes in on stdin, in {tempfile.gettempdir()}: "
            f"{e.strerror or e} after {done:,} bytes",
            hint="TMPDIR=FOLDER names another disk; a file that is named, or redirected (< FILE), "
            "takes none",
        ) from e


# ---------------------------------------------------------------------- what goes out


class Stdout:
    """Where the one file of a layout goes that is not to be a file."""

    names: list[str] = []  # noqa: RUF012 - of what stands there already, nothing

    def __init__(self, fd: int) -> None:
        self._fd = fd

    def carry_out(self, layout: Layout, progress: Progress | None = None) -> None:
        """Write the file, from its start to its end.

        Args:
            progress: called with the number of bytes that were written since the last call.

        Raises:
            UnreadableError: what it is made from can't be read; what was written is cut off.
            BrokenPipeError: nobody reads any more.
            WriteError: it can't be written; the layout is wrong.
        """
        check_layout(layout.main)
        with _BeforeItGoes() as checker:
            _StreamSink(self._fd, Path(STREAM), progress).carry_out(layout.main, checker)


@contextmanager
def stdout(sources: Iterable[Source] = ()) -> Iterator[Stdout]:
    """What takes the layout of an output that goes to stdout.

    Args:
        sources: what it is made from; they must still be as they were opened at the end.

    Raises:
        UsageError: it is a terminal.
        WriteError: it is closed, or can't be written.
        BrokenPipeError: nobody reads any more.
    """
    fd = check_stdout()
    try:
        yield Stdout(fd)
        check_unchanged(sources)
    except BrokenPipeError:
        raise
    except OSError as e:
        raise WriteError(f"stdout: not written whole: {e.strerror or e}") from e


def check_stdout() -> int:
    """The descriptor of stdout, where a checkpoint can go to it. It is the one of the process:
    what is printed may be on its way elsewhere.

    Raises:
        UsageError: it is a terminal.
        WriteError: it is closed.
    """
    fd = _descriptor(sys.__stdout__)
    if fd is None:
        raise WriteError("stdout is closed")
    if os.isatty(fd):
        raise UsageError(
            "stdout is a terminal, and a checkpoint is no text",
            hint="> FILE, | COMMAND or -o FILE",
        )
    return fd


class _StreamSink(Sink):
    """A sink that has no places to go back to."""

    def begin(self, nbytes: int) -> None:
        """A stream has no room to ask for."""

    def _put(self, view: memoryview, at: int, *, new: bool = True) -> int:
        if at != self.position:
            raise WriteError(
                f"stdout: what stands at {at:,} is known when more was written, which a stream "
                "can't hold",
                hint="-o FILE",
            )
        while view:
            done = os.write(self.fd, view[:CHUNK])
            self._advance(at, done)
            at, view = at + done, view[done:]
        return at

    def _copy_range(self, run: Run, at: int) -> int:
        """How much of the run the kernel sent; 0 where it can't."""
        run.source.check(run.offset, run.nbytes)
        fd = run.source.fileno()
        done = 0
        while fd is not None and done < run.nbytes and hasattr(os, "sendfile"):
            try:
                n = os.sendfile(self.fd, fd, run.offset + done, min(run.nbytes - done, _AT_ONCE))
            except OSError as e:
                if e.errno in (errno.EINVAL, errno.ENOTSOCK, errno.ENOSYS, errno.EOPNOTSUPP):
                    break
                raise
            if n == 0:
                break  # its end; who reads it by itself says so
            self._advance(at + done, n)
            done += n
        return done

    def _begin_writing(self) -> None:
        self._sent = self.position


# No call of the system sends more: a call can't be interrupted, and Ctrl-C is to be prompt.
_AT_ONCE = 64 << 20


class _BeforeItGoes(Checker):
    """Compares storages before a byte of them is out: nothing takes it back."""

    follows = False

    def check(self, storage: Storage) -> None:
        storage.check()


def _descriptor(stream: TextIO | None) -> int | None:
    with suppress(OSError, ValueError, AttributeError):
        if stream is not None:
            stream.flush()
            return stream.fileno()
    return None
