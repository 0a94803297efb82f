"""Outputs that appear whole or not at all: staged beside their target, fsynced, renamed over it."""

from __future__ import annotations

import errno
import os
import stat
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import NoReturn

from ..errors import WriteError
from .layout import Layout, check_layout
from .locks import Lock, remove
from .sink import Checker, Progress, Sink
from .source import FileSource, Identity, check_unchanged, identity
from .targets import (
    PathLike,
    attributes,
    check_parent,
    check_space,
    confirm,
    give,
    plain_name,
    resolve_target,
    sync,
)


@contextmanager
def staged(
    path: PathLike,
    *,
    overwrite: bool = False,
    sources: Iterable[FileSource] = (),
) -> Iterator[Sink]:
    """A :class:`Sink` whose file stands under ``path`` once the block ends without an error: for
    what comes as a stream. Otherwise as :func:`staged_file`."""
    with (
        staged_file(path, overwrite=overwrite, sources=sources) as group,
        group.open(group.names[0]) as sink,
    ):
        yield sink


@contextmanager
def staged_file(
    path: PathLike,
    *,
    overwrite: bool = False,
    sources: Iterable[FileSource] = (),
) -> Iterator[FileGroup]:
    """A group of one: its file stands under ``path`` once the block ends without an error.

    Until then ``path`` is as it was; afterwards it is the new file, with the old one's mode (or
    what the umask gives). A link there is replaced, and what it led to is left alone. No other
    modelctl writes ``path`` meanwhile.

    Args:
        sources: what the content is made from. Where one of them is (or was, when it was opened)
            the file at ``path``, that file must still be as it was opened, so that of two edits
            at once none is lost.

    Raises:
        WriteError: nothing was changed; says why.
        DurabilityError: the new file is in place, but the directory could not be synced.
    """
    target = resolve_target(path)
    with _failing(path), ExitStack() as stack:
        check_parent(target, path)
        only = _Output(target, path, overwrite, sources)
        lock = stack.enter_context(Lock(target.parent, target.name, path))
        lock.remove_leftovers()
        group = FileGroup(os.path.dirname(path), lock, stack, overwrite, sources, only)
        with group.finished():
            yield group
        confirm(target.parent, path)


@contextmanager
def staged_files(
    folder: PathLike,
    *,
    overwrite: bool = False,
    sources: Iterable[FileSource] = (),
) -> Iterator[FileGroup]:
    """A :class:`FileGroup`: files that stand in ``folder`` once the block ends without an error.

    A folder that does not exist appears whole. In one that exists, the files are renamed into
    place in the order in which they were opened, when all are on the disk; so open last the one
    that names the others. Killed between two of these renames, the folder holds the first of
    the new files, whole, and the last one's old version.

    Args:
        overwrite: replace files of the same name; without it they are refused.
        sources: what the content is made from. One that is replaced or removed must still be as
            it was opened.

    Raises:
        WriteError: nothing was changed, or, where a rename failed, says what was; says why.
        DurabilityError: the files are in place, but the directory could not be synced.
    """
    target = resolve_target(folder, is_folder=True)
    with _failing(folder), ExitStack() as stack:
        new = not target.is_dir()
        if new:
            base = stack.enter_context(_new_folder(target, folder))
        else:
            base = target
            # of one that made it, and was killed at its end
            Lock(target.parent, target.name, folder).remove_if_dead()
        lock = stack.enter_context(Lock(base, "", folder))
        lock.remove_leftovers()
        group = FileGroup(folder, lock, stack, overwrite, sources)
        with group.finished():
            yield group
        if not new:  # a new one is not in place yet
            confirm(base, folder)
            group.remove_old()


class FileGroup:
    """Files on their way into one folder, where all appear or none."""

    def __init__(
        self,
        shown: PathLike,
        lock: Lock,
        locks: ExitStack,
        overwrite: bool,
        sources: Iterable[FileSource],
        only: _Output | None = None,
    ) -> None:
        """``lock`` is the folder's, or that of the ``only`` file of a group of one."""
        self._shown, self._lock, self._locks = shown, lock, locks
        self._overwrite, self._sources = overwrite, tuple(sources)
        self._only = only
        self._outputs: dict[str, _Output] = {}  # in the order of opening
        self._old: dict[str, _Output] = {}

    @property
    def names(self) -> list[str]:
        """What the folder holds already; of a group of one the name of its file."""
        if self._only is not None:
            return [self._only.target.name]
        return os.listdir(self._lock.folder)

    def carry_out(self, layout: Layout, progress: Progress | None = None) -> None:
        """Write all files of a layout.

        Args:
            progress: called with the number of bytes that were written since the last call.

        Raises:
            UnreadableError: what they are made from can't be read.
            WriteError: as :meth:`open`; there is no room for them; the layout is wrong.
        """
        self.check(layout)
        with Checker() as checker:  # goes on while the disk is waited for
            for file in layout.files:
                with self.open(file.name, progress) as sink:
                    sink.carry_out(file, checker)
        self.remove_after(layout.superseded)

    def check(self, layout: Layout) -> None:
        """Raises WriteError where a layout is wrong, or there is no room for it."""
        for file in layout.files:
            check_layout(file)
        check_space(self._lock.folder, layout.nbytes, self._path())

    @contextmanager
    def open(self, name: str, progress: Progress | None = None) -> Iterator[Sink]:
        """A :class:`Sink` for the file ``name`` of the folder: a name, no path.

        Raises:
            WriteError: it exists and is not to be replaced, or was opened before.
        """
        if name in self._outputs:
            raise WriteError(f"{self._path(name)}: to be written twice")
        output = self._only or self._new_output(name)
        output.check()
        self._outputs[name] = output
        try:
            with output.written(self._lock.temp(), progress) as sink:
                yield sink
        except BaseException:
            output.discard()
            raise

    def _new_output(self, name: str) -> _Output:
        target = self._lock.folder / plain_name(name)
        output = _Output(target, self._path(name), self._overwrite, self._sources)
        self._locks.enter_context(Lock(self._lock.folder, name, self._path(name)))
        return output

    def remove_after(self, names: Iterable[str]) -> None:
        """Files of the folder that are removed once all the others stand: those that nothing
        names any more. What is no plain file, or can't be removed then, stays."""
        for name in set(names) - self._outputs.keys():
            target = self._lock.folder / plain_name(name)
            if target.is_file() and not target.is_symlink():
                self._old[name] = _Output(target, self._path(name), True, self._sources)

    @contextmanager
    def finished(self) -> Iterator[None]:
        """All are put in place once the block ends without an error."""
        try:
            yield
            self._put_in_place()
        except BaseException:
            for output in self._outputs.values():
                output.discard()
            raise

    def _path(self, name: str = "") -> PathLike:
        return self._only.shown if self._only is not None else os.path.join(self._shown, name)

    def _put_in_place(self) -> None:
        outputs = list(self._outputs.values())
        for output in (*outputs, *self._old.values()):
            output.check()
        check_unchanged(self._sources)
        fresh = [output for output in outputs if not os.path.lexists(output.target)]
        try:
            for output in outputs:
                if output is outputs[-1] and output is not self._only:
                    sync(self._lock.folder)  # what it names must not come to the disk after it
                output.place()
        except BaseException as e:
            for output in fresh:
                output.withdraw()
            placed = [name for name, output in self._outputs.items() if output.placed]
            if placed:
                raise WriteError(
                    f"{self._shown}: {e}; new already: {', '.join(placed)}; the rest is as it was",
                    hint="run it again",
                ) from e
            raise

    def remove_old(self) -> None:
        """Remove what is superseded, now that the new files stand."""
        for name, output in self._old.items():
            if name not in self._outputs:
                with suppress(OSError):
                    os.unlink(output.target)


class _Output:
    """One file on its way: written beside its target, then renamed over it."""

    def __init__(
        self, target: Path, shown: PathLike, overwrite: bool, sources: Iterable[FileSource]
    ) -> None:
        self.target, self.shown, self.overwrite = target, shown, overwrite
        self.temp: Path | None = None
        self.placed = False
        now = self._now()
        if now is not None and not overwrite:
            self._refuse()
        # those that stand there, or stood there when they were opened
        self.sources = [
            source
            for source in sources
            if source.place == str(target) or (now and source.identity[:2] == now[:2])
        ]

    def _now(self) -> Identity | None:
        """What stands at the target, which must be something that can be replaced: a file, or a
        link by itself, whatever it leads to."""
        try:
            status = os.lstat(self.target)
        except FileNotFoundError:
            return None
        except OSError as e:
            raise WriteError(f"{self.shown}: not a place to write to: {e.strerror}") from None
        if os.path.isdir(self.target):
            raise WriteError(f"{self.shown}: is a directory")
        if not (stat.S_ISREG(status.st_mode) or stat.S_ISLNK(status.st_mode)):
            raise WriteError(f"{self.shown}: not a regular file, so it is not replaced")
        return identity(status)

    def _refuse(self) -> NoReturn:
        raise WriteError(f"{self.shown}: exists already", hint="--overwrite replaces it")

    def check(self) -> None:
        """Raises WriteError where something else stands there than what may be replaced."""
        now = self._now()
        if any(source.identity != now for source in self.sources):
            raise WriteError(
                f"{self.shown}: changed while it was edited: nothing was written",
                hint="run it again",
            )
        if now is not None and not self.overwrite:
            self._refuse()

    @contextmanager
    def written(self, temp: Path, progress: Progress | None) -> Iterator[Sink]:
        """What to write to; at the end all of it is on the disk, with the owner, the attributes and
        the mode of what it replaces."""
        before = attributes(self.target)
        flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL
        flags |= getattr(os, "O_CLOEXEC", 0) | getattr(os, "O_BINARY", 0)
        # the umask gives a new file its mode; what replaces one must not be more open than it
        fd = os.open(temp, flags, 0o666 if before is None else 0o600)
        self.temp = temp
        try:
            sink = Sink(fd, temp, progress)
            yield sink
            if os.fstat(fd).st_size != sink.position:
                raise OSError(errno.EIO, "the file is not as long as what was written")
            if before is not None:
                give(fd, before)
            os.fsync(fd)
        except BaseException:
            with suppress(OSError):
                os.close(fd)
            raise
        os.close(fd)

    def place(self) -> None:
        if self.temp is not None:
            os.replace(self.temp, self.target)
            self.temp, self.placed = None, True

    def withdraw(self) -> None:
        """Take away what was placed where nothing stood."""
        if self.placed:
            with suppress(OSError):
                os.unlink(self.target)
                self.placed = False

    def discard(self) -> None:
        if self.temp is not None:
            with suppress(OSError):
                os.unlink(self.temp)
            self.temp = None


def check_file(path: PathLike, *, overwrite: bool) -> None:
    """Looks whether a file can stand under ``path``: what :func:`staged_file` would find, before
    anything is made.

    Raises:
        WriteError: it exists and is not to be replaced, or there is no folder to write to.
    """
    target = resolve_target(path)
    check_parent(target, path)
    _Output(target, path, overwrite, ())


def check_folder(path: PathLike) -> None:
    """Looks whether files can be written to a folder, which may be one that is to be made.

    Raises:
        WriteError: a file is in the way, or there is no folder to make it in.
    """
    target = resolve_target(path, is_folder=True)
    if target.is_dir():
        return
    check_parent(target, path)
    if os.path.lexists(target):
        raise WriteError(f"{path}: exists already, and is no directory")


@contextmanager
def staged_folder(path: PathLike, *, overwrite: bool = False) -> Iterator[Path]:
    """A new folder, for others to write files into, that stands under ``path`` once the block ends
    without an error. What stood there, a file or a folder of files, is put aside for that, and
    removed after it; killed in between, the next call puts it back.

    Raises:
        WriteError: nothing was changed; says why.
        DurabilityError: it is in place, but the directory could not be synced.
    """
    with _failing(path), _new_folder(resolve_target(path), path, overwrite) as temp:
        yield temp


@contextmanager
def _new_folder(target: Path, shown: PathLike, overwrite: bool = False) -> Iterator[Path]:
    """A folder that becomes ``target`` once the block ends without an error."""
    check_parent(target, shown)
    with Lock(target.parent, target.name, shown) as lock:
        lock.remove_leftovers()
        aside = lock.aside()
        old = os.path.lexists(target)
        if os.path.lexists(aside):
            remove(aside) if old else os.rename(aside, target)
            old = True
        if old and (not overwrite or target.is_symlink()):
            what = "" if target.is_dir() else ", and is no directory"
            raise WriteError(f"{shown}: exists already{what}")
        temp = lock.temp()
        try:
            os.mkdir(temp)
            yield temp
            sync(temp)
            if old:
                os.rename(target, aside)
            try:
                os.rename(temp, target)
            except BaseException:
                if old:
                    os.rename(aside, target)
                raise
        except BaseException:
            with suppress(OSError):
                remove(temp)
            raise
        confirm(target.parent, shown)
        if old:
            remove(aside)


@contextmanager
def _failing(shown: PathLike) -> Iterator[None]:
    """An error of the disk says what could not be written, and what that means."""
    try:
        yield
    except OSError as e:
        raise WriteError(
            f"{shown}: not written: {e.strerror or e}; what stood there is as it was",
            hint="free space or choose another place" if e.errno == errno.ENOSPC else None,
        ) from e
