"""One writer at a time, no update lost, and nothing left of writers that were killed."""

from __future__ import annotations

import errno
import os
import signal
import subprocess
import threading
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest

from modelctl.errors import WriteError
from modelctl.storage import locks
from modelctl.storage.locks import Lock
from modelctl.storage.source import FileSource
from modelctl.storage.staging import staged, staged_files

from .faults import ended, forked, leftovers

pytestmark = pytest.mark.skipif(os.name != "posix", reason="locks of POSIX")
HOST = os.uname().nodename


def write(path: Path, data: bytes = b"new", overwrite: bool = True) -> None:
    with staged(path, overwrite=overwrite) as sink:
        sink.write(data)


@pytest.fixture(scope="module")
def dead() -> int:
    """The id of a process that is no more."""
    process = subprocess.Popen(["true"])
    process.wait()
    return process.pid


# ------------------------------------------------------------------ two writers at once


def test_a_second_writer_is_refused_at_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(locks.time, "sleep", None)
    (tmp_path / "f").write_bytes(b"old")
    with staged(tmp_path / "f", overwrite=True) as sink:
        sink.write(b"new")
        with pytest.raises(WriteError, match=rf"another modelctl \(process {os.getpid()}\)") as e:
            write(tmp_path / "f", b"another")
        assert "-o" in (e.value.hint or "")
        assert (tmp_path / "f").read_bytes() == b"old"
    assert (tmp_path / "f").read_bytes() == b"new"
    assert os.listdir(tmp_path) == ["f"]


def test_a_second_writer_on_another_way(tmp_path: Path) -> None:
    """A link to the folder leads to the same file, a link to the file is a place of its own."""
    (tmp_path / "way").symlink_to(".")
    (tmp_path / "link").symlink_to("f")
    with staged(tmp_path / "f") as sink:
        sink.write(b"new")
        with pytest.raises(WriteError, match="another modelctl"):
            write(tmp_path / "way" / "f")
        write(tmp_path / "link", b"other")
    assert (tmp_path / "f").read_bytes() == b"new"
    assert (tmp_path / "link").read_bytes() == b"other"


def test_other_targets_in_the_folder_do_not_matter(tmp_path: Path) -> None:
    names = ["f", "g", "f.pt", ".f", "n" * 255, "n" * 254 + "m"]
    with ExitStack() as all_at_once:
        for name in names:
            all_at_once.enter_context(staged(tmp_path / name)).write(name.encode())
            write(tmp_path / "h")
    assert sorted(os.listdir(tmp_path)) == sorted([*names, "h"])
    assert all((tmp_path / name).read_text() == name for name in names)


def test_threads_one_wins(tmp_path: Path) -> None:
    start, told = threading.Barrier(4), []

    def run(data: bytes) -> None:
        start.wait()
        try:
            write(tmp_path / "f", data * 1_000_000, overwrite=False)
            told.append(data)
        except WriteError:
            pass

    threads = [threading.Thread(target=run, args=(bytes([65 + i]),)) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(told) == 1
    assert (tmp_path / "f").read_bytes() == told[0] * 1_000_000
    assert os.listdir(tmp_path) == ["f"]


def test_what_was_forked_does_not_keep_the_lock(tmp_path: Path) -> None:
    ready, go = os.pipe(), os.pipe()
    with staged(tmp_path / "f") as sink:
        sink.write(b"new")
        child = os.fork()
        if not child:
            os.close(go[1])
            os.write(ready[1], b"x")
            os.read(go[0], 1)
            os._exit(0)
        os.close(go[0])
        os.read(ready[0], 1)
    write(tmp_path / "f", b"newer")
    os.close(go[1])
    os.waitpid(child, 0)
    assert (tmp_path / "f").read_bytes() == b"newer"


class Held:
    """Another process, which holds the lock of a target until it is told to go on."""

    def __init__(self, target: Path) -> None:
        reads, ready = os.pipe()
        go, self.go = os.pipe()

        def hold() -> None:
            os.close(self.go)
            with staged(target, overwrite=True) as sink:
                sink.write(b"his")
                os.write(ready, b"x")
                os.read(go, 1)

        self.pid = forked(hold)
        os.close(go)
        assert os.read(reads, 1) == b"x"
        os.close(reads)
        os.close(ready)

    def end(self) -> int:
        os.close(self.go)
        return ended(self.pid)

    def kill(self) -> None:
        os.kill(self.pid, signal.SIGKILL)
        assert self.end() == -signal.SIGKILL


def test_two_processes(tmp_path: Path) -> None:
    (tmp_path / "f").write_bytes(b"old")
    other = Held(tmp_path / "f")
    with pytest.raises(WriteError, match=rf"modelctl \(process {other.pid}\) is writing it"):
        write(tmp_path / "f", b"mine")
    assert (tmp_path / "f").read_bytes() == b"old"
    assert other.end() == 0
    assert (tmp_path / "f").read_bytes() == b"his"
    write(tmp_path / "f", b"mine")
    assert (tmp_path / "f").read_bytes() == b"mine"
    assert os.listdir(tmp_path) == ["f"]


def test_another_process_in_the_folder(tmp_path: Path) -> None:
    """Its lock and its temporary file stay, and a folder may be written with other files."""
    other = Held(tmp_path / "f")
    before = sorted(os.listdir(tmp_path))
    write(tmp_path / "g", b"mine")
    with staged_files(tmp_path) as group, group.open("h") as sink:
        sink.write(b"mine")
    assert sorted(os.listdir(tmp_path)) == sorted([*before, "g", "h"])
    assert other.end() == 0
    assert sorted(os.listdir(tmp_path)) == ["f", "g", "h"]


def test_a_file_of_a_folder_that_another_writes(tmp_path: Path) -> None:
    other = Held(tmp_path / "f")

    def both() -> None:
        with staged_files(tmp_path, overwrite=True) as group:
            for name in ("e", "f"):
                with group.open(name) as sink:
                    sink.write(b"mine")

    with pytest.raises(WriteError, match="f: another modelctl"):
        both()
    assert other.end() == 0
    both()
    assert sorted(os.listdir(tmp_path)) == ["e", "f"]


@pytest.mark.parametrize("new", [True, False])
def test_two_that_write_one_folder(new: bool, tmp_path: Path) -> None:
    folder = tmp_path / "m"
    if not new:
        folder.mkdir()
    with staged_files(folder) as group:
        with group.open("f") as sink:
            sink.write(b"mine")
        with pytest.raises(WriteError, match="m: another modelctl"), staged_files(folder):
            pass
    assert os.listdir(folder) == ["f"]
    assert os.listdir(tmp_path) == ["m"]


@pytest.mark.parametrize("code", [errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOSYS])
def test_where_there_are_no_locks(
    code: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As it was before there were locks; but nobody knows what is left over."""

    def none(fd: int, what: int) -> None:
        raise OSError(code, os.strerror(code))

    stale = tmp_path / ".f.modelctl-1-0123abcd.tmp"
    stale.write_bytes(b"x")
    monkeypatch.setattr(locks.fcntl, "flock", none)
    write(tmp_path / "f")
    with staged_files(tmp_path / "m") as group, group.open("f") as sink:
        sink.write(b"new")
    assert sorted(os.listdir(tmp_path)) == [stale.name, "f", "m"]
    assert os.listdir(tmp_path / "m") == ["f"]


def test_a_system_without_fcntl(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(locks, "fcntl", None)
    for _ in range(2):
        write(tmp_path / "f")
        with staged_files(tmp_path / "m", overwrite=True) as group, group.open("f") as sink:
            sink.write(b"new")
    assert sorted(os.listdir(tmp_path)) == ["f", "m"]


@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() == 0, reason="root may do all")
def test_a_folder_that_cannot_be_written(tmp_path: Path) -> None:
    tmp_path.chmod(0o500)
    with pytest.raises(WriteError, match="Permission denied"):
        write(tmp_path / "f")


@pytest.mark.parametrize("kind", ["link", "dangling", "hard link", "folder", "pipe", "file"])
def test_what_was_planted_at_a_locks_name(kind: str, tmp_path: Path) -> None:
    """It is neither followed, nor written, nor removed."""
    lock, other = tmp_path / ".f.modelctl.lock", tmp_path / "other"
    other.write_bytes(b"precious")
    match kind:
        case "link":
            lock.symlink_to(other)
        case "dangling":
            lock.symlink_to("elsewhere")
        case "hard link":
            os.link(other, lock)
        case "folder":
            lock.mkdir()
        case "pipe":
            os.mkfifo(lock)
        case _:
            lock.write_bytes(b"somebody's")
    before = lock.lstat()
    with pytest.raises(WriteError, match=r"\.f\.modelctl\.lock beside it is no lock of modelctl"):
        write(tmp_path / "f")
    after = lock.lstat()
    assert (after.st_ino, after.st_size, after.st_nlink) == (
        before.st_ino,
        before.st_size,
        before.st_nlink,
    )
    assert other.read_bytes() == b"precious"
    assert {*os.listdir(tmp_path)} == {lock.name, "other"}


def test_a_lock_is_removed_while_it_is_held(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Or it would be removed from under who has just taken it."""
    real, told = os.unlink, []

    def unlink(path: Path) -> None:
        if path.suffix == ".lock":
            with open(path) as again, pytest.raises(BlockingIOError):
                locks.fcntl.flock(again, locks.fcntl.LOCK_EX | locks.fcntl.LOCK_NB)
            told.append(path.name)
        real(path)

    monkeypatch.setattr(os, "unlink", unlink)
    write(tmp_path / "f")
    assert told == [".f.modelctl.lock"]


def test_a_lock_that_took_the_place_of_another_stays(tmp_path: Path) -> None:
    with staged(tmp_path / "f") as sink:
        sink.write(b"new")
        os.unlink(tmp_path / ".f.modelctl.lock")
        (tmp_path / ".f.modelctl.lock").write_text("another")
    assert (tmp_path / ".f.modelctl.lock").read_text() == "another"


def test_the_lock_of_another_user(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It can't be opened for writing, but it can be held."""
    left_by(0, tmp_path, "f", signed="")
    real = os.open

    def opened(path: Any, flags: int, *mode: int) -> int:
        if flags & os.O_RDWR and str(path).endswith(".lock"):
            raise PermissionError(errno.EACCES, "Permission denied")
        return real(path, flags, *mode)

    monkeypatch.setattr(os, "open", opened)
    write(tmp_path / "f")
    assert os.listdir(tmp_path) == ["f"]
    with pytest.raises(WriteError, match="Permission denied"):
        write(tmp_path / "f")


# ------------------------------------------------------------------ what killed writers left


def left_by(pid: int, folder: Path, name: str, signed: str | None = None) -> list[str]:
    """A lock and a temporary file, as a writer of that process leaves them."""
    lock = folder / f".{name}.modelctl.lock"
    temp = folder / f".{name}.modelctl-{pid}-0123abcd.tmp"
    lock.write_text(f"{pid} {HOST}\n" if signed is None else signed)
    temp.write_bytes(b"x")
    return [lock.name, temp.name]


def test_a_killed_writer_blocks_nobody(tmp_path: Path) -> None:
    for name in ("f", "g"):
        (tmp_path / "f").write_bytes(b"old")
        killed = Held(tmp_path / "f")
        killed.kill()
        assert (tmp_path / "f").read_bytes() == b"old"
        assert len(leftovers(tmp_path)) == 2
        write(tmp_path / name, b"mine")
        assert leftovers(tmp_path) == []
        assert (tmp_path / name).read_bytes() == b"mine"


@pytest.mark.parametrize("target", ["f", "g"])
def test_leftovers_are_removed(target: str, dead: int, tmp_path: Path) -> None:
    left_by(dead, tmp_path, "f")
    left_by(dead, tmp_path, "")
    folder = tmp_path / f".m.modelctl-{dead}-0123abcd.tmp"
    folder.mkdir()
    (folder / "model.safetensors").write_bytes(b"x")
    (tmp_path / "outside").write_bytes(b"x")
    (folder / "link").symlink_to(tmp_path / "outside")
    (tmp_path / ".m.modelctl.lock").write_bytes(b"")  # killed before it was signed
    write(tmp_path / target)
    assert sorted(os.listdir(tmp_path)) == [target, "outside"]


def test_those_of_the_target_itself_whoever_left_them(tmp_path: Path) -> None:
    """Its lock is held: nobody else writes it, whatever machine or process it was."""
    left_by(os.getpid(), tmp_path, "f", signed="1 another-machine\n")
    write(tmp_path / "f")
    assert os.listdir(tmp_path) == ["f"]


def test_nothing_else_is_removed(dead: int, tmp_path: Path) -> None:
    left_by(os.getpid(), tmp_path, "living")
    left_by(dead, tmp_path, "elsewhere", signed=f"{dead} another-machine\n")
    left_by(dead, tmp_path, "no lock of ours", signed="something else")
    (tmp_path / "lock").write_text(f"{dead} {HOST}\n")
    (tmp_path / ".link.modelctl.lock").symlink_to("lock")
    for name in (
        f".g.modelctl-{dead}-0123abcd.tmp",  # without a lock
        f".f.modelctl-{dead}-0123abcd.tmp.bak",
        f"x.f.modelctl-{dead}-0123abcd.tmp",
        f".f.modelctl-{dead}-0123ABCD.tmp",
        f".f.modelctl-{dead}-0123abcd1.tmp",
        ".f.modelctl-x-0123abcd.tmp",
        ".f.other-1-0123abcd.tmp",
        "f.tmp",
        "f.modelctl.lock",
        ".f.modelctl.lock.bak",
    ):
        (tmp_path / name).write_bytes(b"")
    target = tmp_path / f".f.modelctl-{dead}-89abcdef.tmp"
    target.symlink_to("lock")
    os.mkfifo(tmp_path / f".f.modelctl-{dead}-88888888.tmp")
    folder = tmp_path / f".f.modelctl-{dead}-77777777.tmp"
    (folder / "folder").mkdir(parents=True)
    before = sorted(os.listdir(tmp_path))
    write(tmp_path / "f")
    assert sorted(os.listdir(tmp_path)) == sorted([*before, "f"])


def test_who_tidies_up_hinders_nobody(
    dead: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The lock of a dead writer is held by who removes it, for a moment."""
    left_by(dead, tmp_path, "f")
    tidying = Lock(tmp_path, "f", "")
    assert tidying._acquire(create=False)
    waited = []

    def sleep(seconds: float) -> None:
        waited.append(seconds)
        if len(waited) == 3:
            tidying.__exit__()

    monkeypatch.setattr(locks.time, "sleep", sleep)
    write(tmp_path / "f")
    assert len(waited) == 3
    assert os.listdir(tmp_path) == ["f"]


def test_a_lock_that_outlives_its_writer(
    dead: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What a dead writer forked may hold it still: nobody waits for ever."""
    left_by(dead, tmp_path, "f")
    with Lock(tmp_path, "f", "") as held:
        held.path.write_text(f"{dead} {HOST}\n")
        sleeps = iter(range(9))
        monkeypatch.setattr(locks.time, "sleep", lambda seconds: next(sleeps))
        monkeypatch.setattr(locks.time, "monotonic", iter(range(0, 100, 2)).__next__)
        with pytest.raises(WriteError, match="f: another modelctl is writing it"):
            write(tmp_path / "f")


def test_a_lock_that_is_removed_while_it_is_waited_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Who holds a lock file that stands there no more holds nothing."""
    real, removed = locks.fcntl.flock, []

    def flock(fd: int, what: int) -> None:
        if not removed:
            removed.append(os.fstat(fd).st_ino)
            os.rename(tmp_path / ".f.modelctl.lock", tmp_path / "gone")
        real(fd, what)

    monkeypatch.setattr(locks.fcntl, "flock", flock)
    with Lock(tmp_path, "f", "") as lock:
        assert os.stat(lock.path).st_ino == os.fstat(lock.fd).st_ino != removed[0]
    assert os.listdir(tmp_path) == ["gone"]


# ------------------------------------------------------------------ no update is lost


@pytest.mark.parametrize("how", ["same path", "a link", "a hard link"])
def test_what_was_read_and_replaced_since_is_not_replaced(how: str, tmp_path: Path) -> None:
    path = other = tmp_path / "f"
    path.write_bytes(b"old")
    if how == "a link":
        other = tmp_path / "link"
        other.symlink_to("f")
    elif how == "a hard link":
        other = tmp_path / "hard"
        os.link(path, other)
    source = FileSource(other)

    def edit() -> None:
        with staged(path, overwrite=True, sources=[source]) as sink:
            sink.write(b"mine")
            (tmp_path / "new").write_bytes(b"his")
            os.replace(tmp_path / "new", path)

    with pytest.raises(WriteError, match="changed while it was edited: nothing was written"):
        edit()
    assert path.read_bytes() == b"his"
    assert sorted(os.listdir(tmp_path)) == sorted({"f", other.name})


@pytest.mark.parametrize("change", ["replaced", "longer", "touched", "removed"])
@pytest.mark.parametrize("when", ["before", "during"])
def test_every_change_is_seen(change: str, when: str, tmp_path: Path) -> None:
    path = tmp_path / "f"
    path.write_bytes(b"old")
    source = FileSource(path)

    # by another way to the same place
    (tmp_path / "way").symlink_to(".")

    def his() -> None:
        if change == "replaced":
            (tmp_path / "new").write_bytes(b"his")
            os.replace(tmp_path / "new", path)
        elif change == "longer":
            status = path.stat()
            path.write_bytes(b"longer")
            os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))
        elif change == "touched":
            os.utime(path, ns=(1, 1))
        else:
            path.unlink()

    def edit() -> None:
        if when == "before":
            his()
        with staged(tmp_path / "way" / "f", overwrite=True, sources=[source]) as sink:
            assert when == "during"
            sink.write(b"mine")
            if when == "during":
                his()

    with pytest.raises(WriteError, match="changed while it was edited") as e:
        edit()
    assert e.value.hint == "run it again"
    assert not path.exists() or path.read_bytes() != b"mine"
    assert leftovers(tmp_path) == []


def test_what_was_not_read_may_change(tmp_path: Path) -> None:
    for name in ("read", "f"):
        (tmp_path / name).write_bytes(b"old")
    source = FileSource(tmp_path / "read")
    with staged(tmp_path / "f", overwrite=True, sources=[source]) as sink:
        sink.write(b"mine")
        (tmp_path / "f").write_bytes(b"changed")
    assert (tmp_path / "f").read_bytes() == b"mine"


def test_what_appears_meanwhile_is_not_replaced(tmp_path: Path) -> None:
    def new() -> None:
        with staged(tmp_path / "f") as sink:
            sink.write(b"mine")
            (tmp_path / "f").write_bytes(b"his")

    with pytest.raises(WriteError, match="exists already"):
        new()
    assert (tmp_path / "f").read_bytes() == b"his"
    assert os.listdir(tmp_path) == ["f"]


def test_edits_at_once_are_all_there(tmp_path: Path) -> None:
    """Four processes count to a hundred, in one file."""
    path = tmp_path / "f"
    path.write_bytes(b"0")

    def count() -> None:
        os.fsync = lambda fd: None
        done = 0
        while done < 25:
            source = FileSource(path)
            number = int(source.read(0, source.size))
            try:
                with staged(path, overwrite=True, sources=[source]) as sink:
                    sink.write(str(number + 1).encode())
                done += 1
            except WriteError:
                pass
            source.close()

    children = [forked(count) for _ in range(4)]
    assert [ended(child) for child in children] == [0] * 4
    assert path.read_bytes() == b"100"
    assert leftovers(tmp_path) == []


def test_writers_of_one_folder_that_are_killed_do_not_hinder_the_others(tmp_path: Path) -> None:
    """Three write their own files, one is killed again and again."""

    def forever(name: str) -> Callable[[], None]:
        def run() -> None:
            os.fsync = lambda fd: None
            os.close(stop)
            try:
                write(tmp_path / name)
                os.write(ready, b"x")
                while not _ended(going):
                    write(tmp_path / name)
            except BaseException:
                os.write(ready, b"!")
                raise

        return run

    reads, ready = os.pipe()
    going, stop = os.pipe()
    os.set_blocking(going, False)
    lasting = [forked(forever(name)) for name in ("f", "g")]
    assert os.read(reads, 1) + os.read(reads, 1) == b"xx"
    for _ in range(40):
        killed = forked(forever("h"))
        assert os.read(reads, 1) == b"x"
        os.kill(killed, signal.SIGKILL)
        assert ended(killed) == -signal.SIGKILL
    os.close(stop)
    assert [ended(child) for child in lasting] == [0, 0]
    for fd in (reads, ready, going):
        os.close(fd)
    write(tmp_path / "f")
    assert sorted(os.listdir(tmp_path)) == ["f", "g", "h"]


def _ended(fd: int) -> bool:
    """Whether the other end of a pipe that does not block was closed."""
    try:
        return os.read(fd, 1) == b""
    except BlockingIOError:
        return False
