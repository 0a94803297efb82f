"""A disk that fails, at each call: what stood there is as it was, or the new is there whole."""

from __future__ import annotations

import errno
import os
from pathlib import Path

import pytest

from modelctl.errors import DurabilityError, ModelctlError, WriteError

from .faults import Counted, leftovers, watched
from .writers import AFile, AFolder, ANewFile, Case, Files, InPlace, SameNames

pytestmark = pytest.mark.skipif(os.name != "posix", reason="calls of POSIX")
CALLS = (
    *("os.open", "os.write", "os.pwrite", "os.ftruncate", "os.copy_file_range", "os.fchmod"),
    *("os.fsync", "os.replace", "os.rename", "os.mkdir"),
)


def snapshot(folder: Path) -> dict[str, tuple[int, bytes]]:
    return {
        str(path): (path.stat().st_mode, path.read_bytes())
        for path in folder.rglob("*")
        if path.is_file()
    }


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EIO, errno.EINTR])
@pytest.mark.parametrize("case", [ANewFile, AFile, InPlace, AFolder, Files, SameNames])
def test_each_call_fails(
    case: Case, code: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "fsync", lambda fd: None)

    def fail() -> None:
        raise OSError(code, os.strerror(code))

    failed: dict[str, list[str]] = {}
    for nth in range(1, 1000):
        folder = tmp_path / str(nth)
        folder.mkdir()
        tried = case(folder)
        tried.prepare()
        before = snapshot(folder)
        fault = Counted(nth, fail)
        told: ModelctlError | None = None
        with watched(fault, CALLS):
            try:
                tried.run("new")
            except ModelctlError as e:
                told = e
        assert leftovers(folder) == []
        if told is None or isinstance(told, DurabilityError):
            assert tried.state() == "new"
        elif "new already: " in told.message:
            assert case is SameNames
            names = told.message.partition("new already: ")[2].partition(";")[0].split(", ")
            now = {name for name, value in snapshot(folder).items() if before[name] != value}
            assert {str(folder / "m" / name) for name in names} == now
        else:
            assert snapshot(folder) == before
            assert tried.state() == "old"
        if fault.at is None:
            assert told is None
            break
        failed.setdefault(fault.at, []).append(type(told).__name__)
    assert nth > 10
    # that of the source is the one that is no error of writing
    assert failed.pop("os.open").count("ModelctlError") <= 1
    # a lock that is not signed is one
    assert set(failed.pop("os.ftruncate")) == {"NoneType"}
    assert set(failed.pop("os.pwrite")) == {"NoneType", "WriteError"}
    assert failed.pop("os.fsync")[-1] == ("DurabilityError")
    assert {name for names in failed.values() for name in names} == {"WriteError"}
    assert "os.replace" in failed


def test_the_error_says_what_to_do(tmp_path: Path) -> None:
    def fail() -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with (
        pytest.raises(WriteError, match=f"{tmp_path}/f: not written: No space left") as e,
        watched(Counted(2, fail), ("os.pwrite",)),  # the first signs the lock
    ):
        AFile(tmp_path).run("new")
    assert "what stood there is as it was" in e.value.message
    assert "free space" in (e.value.hint or "")


@pytest.mark.skipif(not os.path.isdir("/proc/self/fd"), reason="no /proc")
@pytest.mark.parametrize("case", [AFile, AFolder, Files])
def test_a_close_that_fails(case: Case, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """On a network, data may fail to arrive when the file is closed."""
    tried = case(tmp_path)
    tried.prepare()
    real = os.close

    def failing(fd: int) -> None:
        path = os.readlink(f"/proc/self/fd/{fd}")
        real(fd)
        if path.endswith(".tmp"):
            raise OSError(errno.EIO, os.strerror(errno.EIO))

    monkeypatch.setattr(os, "close", failing)
    with pytest.raises(WriteError, match="not written"):
        tried.run("new")
    assert tried.state() == "old"
    assert leftovers(tmp_path) == []
