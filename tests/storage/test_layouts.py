"""Layouts that are wrong, as a format of somebody else's may make them: nothing is written."""

from __future__ import annotations

import os
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from modelctl.core.storages import MemoryStorage, Run, Source, Storage
from modelctl.errors import ModelctlError, UnreadableError, WriteError
from modelctl.storage.containers.deflate import InflatedStorage, inflate
from modelctl.storage.layout import FileLayout, Late, Layout, Made, Piece, Segment
from modelctl.storage.source import FileSource, Window
from modelctl.storage.staging import staged_file
from tests.core.test_storages import Memory

SMALL, LARGE = 100, 1 << 17


class Lies(Storage):
    """A storage that gives other bytes than it says."""

    def __init__(self, nbytes: int, gives: int, in_runs: bool = False) -> None:
        super().__init__(nbytes)
        self.gives, self.in_runs = gives, in_runs

    def read(self, start: int, size: int) -> bytes:
        return bytes(self.gives)

    def chunks(self, start: int = 0, stop: int | None = None) -> Iterator[bytes]:
        yield bytes(self.gives)

    def runs(self, start: int = 0, stop: int | None = None) -> list[Run] | None:
        return [Run(Memory(bytes(self.gives)), 0, self.gives)] if self.in_runs else None


def write(path: Path, file: FileLayout) -> None:
    with staged_file(path) as group:
        group.carry_out(Layout([file]))


ABC = MemoryStorage(b"abc")
WRONG: dict[str, tuple[int, list[Segment], str]] = {
    "too long": (5, [Made(0, b"abc")], "its segments have 3 bytes, it says 5"),
    "too short": (2, [Made(0, b"abc")], "its segments have 3 bytes, it says 2"),
    "none": (1, [], "its segments have 0 bytes"),
    "overlap": (5, [Made(0, b"abc"), Made(2, b"abc")], "segment 1 is 3 bytes at 2, where 3"),
    "gap": (7, [Made(0, b"abc"), Made(4, b"abc")], "segment 1 is 3 bytes at 4, where 3"),
    "order": (6, [Made(3, b"abc"), Made(0, b"abc")], "segment 0 is 3 bytes at 3, where 0"),
    "negative": (3, [Made(0, b"abc"), Late(3, -1, lambda _: b"")], "segment 1 is -1 bytes"),
    "before": (4, [Piece(0, ABC, -1, 3)], "bytes -1 to 3 of a storage of 3"),
    "behind": (4, [Piece(0, ABC, 0, 4)], "bytes 0 to 4 of a storage of 3"),
    "backwards": (0, [Piece(0, ABC, 3, 1)], "segment 0 is -2 bytes"),
    "late": (3, [Late(0, 3, lambda _: b"ab")], "2 bytes at 0, where it says 3"),
    "later": (
        9,
        [Late(0, 6, lambda sums: bytes(sums[id(ABC)] % 2 + 4)), Piece(6, ABC, 0, 3, "make")],
        "bytes at 0, where it says 6",
    ),
}


@pytest.mark.parametrize(("nbytes", "segments", "said"), WRONG.values(), ids=WRONG)
def test_a_wrong_layout(tmp_path: Path, nbytes: int, segments: list[Segment], said: str) -> None:
    with pytest.raises(WriteError, match=said) as e:
        write(tmp_path / "x", FileLayout("x", nbytes, segments))
    assert "its format made a wrong layout" in e.value.message
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize("in_runs", [False, True])
@pytest.mark.parametrize("checked", [False, True])
@pytest.mark.parametrize("more", [-1, 1])
@pytest.mark.parametrize("nbytes", [SMALL, LARGE])
def test_a_storage_that_lies(
    tmp_path: Path, nbytes: int, more: int, checked: bool, in_runs: bool
) -> None:
    lies = Lies(nbytes, nbytes + more, in_runs)
    segments = [Piece(0, lies, 0, nbytes, checked), Made(nbytes, b"end")]
    with pytest.raises(UnreadableError, match=r"a storage \(Lies\) gives"):
        write(tmp_path / "x", FileLayout("x", nbytes + 3, segments))
    assert os.listdir(tmp_path) == []


def test_a_right_one(tmp_path: Path) -> None:
    segments = [Made(0, b"ab"), Piece(2, ABC, 1, 3), Late(4, 1, lambda _: b"!")]
    write(tmp_path / "x", FileLayout("x", 5, segments))
    assert (tmp_path / "x").read_bytes() == b"abbc!"


# ------------------------------------------------------------------ sources


def test_nothing_is_read_before_the_start(tmp_path: Path) -> None:
    (tmp_path / "f").write_bytes(bytes(range(100)))
    source = FileSource(tmp_path / "f")
    window = Window(source, 10, 20, "inside")
    asks: list[Callable[[Source], Any]] = [
        lambda one: one.read(-1, 1),
        lambda one: one.read_into(-1, memoryview(bytearray(1))),
        lambda one: one.read_many([(-1, 1)]),
        lambda one: one.map(-1, 1),
    ]
    for one in (source, window):
        for ask in asks:
            with pytest.raises(UnreadableError, match="before its start"):
                ask(one)
    assert window.read(0, 1) == b"\n"
    source.close()


@pytest.mark.skipif(os.name != "posix", reason="an open file is not cut there")
def test_a_file_that_becomes_shorter_while_it_is_open(tmp_path: Path) -> None:
    path = tmp_path / "f"
    path.write_bytes(bytes(1 << 20))
    source = FileSource(path)
    os.truncate(path, 10)
    with pytest.raises(UnreadableError, match="became shorter") as e:
        source.map(1 << 18, 1 << 18)
    assert str(path) in e.value.message
    storage = Piece(0, _of(source, 1 << 20), 0, 1 << 20)
    with pytest.raises(ModelctlError, match="became shorter") as e:
        write(tmp_path / "out", FileLayout("out", 1 << 20, [storage]))
    assert str(path) in e.value.message
    assert os.listdir(tmp_path) == ["f"]
    source.close()


def _of(source: Source, nbytes: int) -> Storage:
    from modelctl.core.storages import RunStorage

    return RunStorage(source, 0, nbytes)


# ------------------------------------------------------------------ deflated


@pytest.mark.parametrize("extra", [-1, 0, 1, 4, 100, 1 << 19])
@pytest.mark.parametrize("mib", [1, 2, 3])
def test_what_zlib_holds_back_is_read(mib: int, extra: int) -> None:
    data = bytes((mib << 20) + extra)
    engine = zlib.compressobj(9, zlib.DEFLATED, -15)
    packed = engine.compress(data) + engine.flush()
    source = Memory(packed)
    assert b"".join(inflate(source, 0, len(packed), len(data))) == data
    storage = InflatedStorage(source, 0, len(packed), len(data))
    assert storage.read(len(data) - 7, 7) == bytes(7)
    for size, said in ((len(data) + 1, "fewer"), (len(data) - 1, "more")):
        with pytest.raises(UnreadableError, match=rf"memory.*inflates to {said} than"):
            list(inflate(source, 0, len(packed), size))
