"""One writer at a time, no update lost, and nothing left of writers that were killed."""

from __future__ import annotations

import os
import subprocess
import threading
from pathlib import Path

import pytest

from modelctl.errors import WriteError
from modelctl.storage.source import FileSource
from modelctl.storage.staging import staged

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


def test_a_second_writer_is_refused_at_once(tmp_path: Path) -> None:
    (tmp_path / "f").write_bytes(b"old")
    with staged(tmp_path / "f", overwrite=True) as sink:
        sink.write(b"new")
        with pytest.raises(WriteError, match=rf"another modelctl \(process {os.getpid()}\)") as e:
            write(tmp_path / "f", b"another")
        assert "-o" in (e.value.hint or "")
        assert (tmp_path / "f").read_bytes() == b"old"
    assert (tmp_path / "f").read_bytes() == b"new"
    assert os.listdir(tmp_path) == ["f"]


def test_a_second_writer_through_a_link(tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to("f")
    with staged(tmp_path / "f") as sink:
        sink.write(b"new")
        with pytest.raises(WriteError, match="another modelctl"):
            write(tmp_path / "link")
    assert (tmp_path / "f").read_bytes() == b"new"


def test_other_targets_in_the_folder_do_not_matter(tmp_path: Path) -> None:
    names = ["f", "g", "f.pt", ".f", "n" * 255, "n" * 254 + "m"]
    with staged(tmp_path / "e") as sink:
        sink.write(b"new")
        for name in names:
            with staged(tmp_path / name) as other:
                other.write(name.encode())
                write(tmp_path / "h")
    assert sorted(os.listdir(tmp_path)) == sorted([*names, "e", "h"])
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
