"""Open files as sources: short reads go on, nothing is read past the end."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import modelctl as mc
from modelctl.errors import ModelctlError, UnreadableError
from modelctl.storage import sink as sink_module
from modelctl.storage.source import FileSource, Window

DATA = bytes(range(256)) * 64


@pytest.fixture
def source(tmp_path: Path) -> FileSource:
    path = tmp_path / "a.bin"
    path.write_bytes(DATA)
    return FileSource(path)


@pytest.mark.skipif(not hasattr(os, "preadv"), reason="this system has no preadv")
def test_a_read_that_comes_in_pieces_goes_on(
    source: FileSource, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The system gives at most 2 GiB at once."""
    whole = os.preadv
    monkeypatch.setattr(
        os, "preadv", lambda fd, buffers, at: whole(fd, [buffers[0][:1000]], at), raising=False
    )
    out = bytearray(5500)
    source.read_into(300, memoryview(out))
    assert bytes(out) == DATA[300:5800]
    inner = bytearray(2500)
    Window(source, 100, 8000, "member").read_into(50, memoryview(inner))
    assert bytes(inner) == DATA[150:2650]


def test_nothing_is_mapped_past_the_end(source: FileSource) -> None:
    assert bytes(source.map(5000, 3000)) == DATA[5000:8000]
    for offset, size in ((len(DATA) - 1, 2), (0, len(DATA) + 1), (len(DATA) + 5000, 1)):
        with pytest.raises(UnreadableError, match="cut off"):
            source.map(offset, size)
    window = Window(source, 100, 200, "member")
    with pytest.raises(UnreadableError, match="cut off"):
        window.map(150, 51)
    assert bytes(window.map(150, 50)) == DATA[250:300]


# ---------------------------------------------------------------------- what changes meanwhile


def touched(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    with open(path, "r+b") as opened:
        opened.write(data)


def put_back(path: Path) -> None:
    """Written, and its time set to what it was: as rsync --inplace --times does."""
    before = path.stat()
    touched(path)
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))


def grown(path: Path) -> None:
    with open(path, "ab") as opened:
        opened.write(b"x")


def renamed(path: Path) -> None:
    path.rename(path.with_name("elsewhere"))


def replaced(path: Path) -> None:
    other = path.with_name("other")
    other.write_bytes(b"new")
    other.replace(path)


def linked(path: Path) -> None:
    os.link(path, path.with_name("link"))


def made_private(path: Path) -> None:
    path.chmod(0o600)


@pytest.mark.parametrize("how", [touched, put_back, grown])
@pytest.mark.parametrize("to", ["b.pt", "b.safetensors", "folder/", "-"])
def test_a_source_that_changes_while_it_is_copied(
    how: Callable[[Path], None], to: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from ..integrity.files import numbers, write

    monkeypatch.chdir(tmp_path)
    path, told = write(Path("a.pt"), {"module.w": numbers(300_000)}), []
    real = sink_module.Sink.put_segments

    def put(self: Any, *args: Any) -> Any:
        made = real(self, *args)
        told.append(how(path))
        return made

    monkeypatch.setattr(sink_module.Sink, "put_segments", put)
    if to == "-":
        out = os.open("out", os.O_CREAT | os.O_WRONLY)
        monkeypatch.setattr("modelctl.storage.streams.check_stdout", lambda: out)
    with (
        mc.open(path) as ckpt,
        pytest.raises(ModelctlError, match=r"a\.pt: changed while it was read"),
    ):
        mc.save(mc.strip_prefix(ckpt), to, to="torch" if to == "-" else None)
    assert told
    assert to == "-" or not Path(to).exists()


@pytest.mark.parametrize("how", [renamed, replaced, linked, made_private])
def test_a_source_whose_content_stays(how: Callable[[Path], None], tmp_path: Path) -> None:
    from ..integrity.files import numbers, write

    path = write(tmp_path / "a.pt", {"w": numbers(300)})
    with mc.open(path) as ckpt:
        how(path)
        mc.save(ckpt, tmp_path / "b.pt")
    assert (tmp_path / "b.pt").exists()
