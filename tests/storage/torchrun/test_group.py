"""Several ranks write what one would write, and where one of them dies, nothing is left."""

from __future__ import annotations

import os
import shutil
import zlib
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from modelctl.core.storages import MemoryStorage, RunStorage, Storage
from modelctl.errors import UnreadableError, WriteError
from modelctl.storage.layout import FileLayout, Layout, LayoutBuilder
from modelctl.storage.source import FileSource
from modelctl.storage.staging import staged_files
from modelctl.storage.torchrun.group import shared
from modelctl.storage.torchrun.ranks import LostRankError, RankError, Ranks

from ..faults import Counted, kill_me, leftovers, watched
from .processes import quiet, together

pytestmark = pytest.mark.skipif(os.name != "posix", reason="processes of POSIX")


@pytest.fixture(autouse=True)
def _no_disk(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is killed loses nothing that the kernel has: the disk may be left out."""
    monkeypatch.setattr(os, "fsync", lambda fd: None)


def checksum(storage: Storage, nbytes: int) -> Callable[[object], bytes]:
    return lambda sums: sums[id(storage)].to_bytes(nbytes, "little")  # type: ignore[index]


def a_file(name: str, source: FileSource, parts: Sequence[tuple[str, int]]) -> FileLayout:
    """A file of parts: what was made, what is copied, what is copied and summed."""
    out = LayoutBuilder()
    at = 0
    for kind, size in parts:
        if kind == "made":
            out.add(bytes([size % 251]) * size)
            continue
        nbytes = min(size, source.size - at)
        storage = RunStorage(source, at, nbytes)
        at += nbytes
        out.copy(storage, checksum="make" if kind == "summed" else "compare")
        if kind == "summed" and nbytes:
            out.late(4, checksum(storage, 4))
    return out.file(name)


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("source") / "s"
    path.write_bytes(os.urandom(3 << 20))
    return path


PARTS = st.lists(
    st.tuples(
        st.sampled_from(["made", "copied", "summed"]),
        st.integers(0, 50) | st.sampled_from([65_535, 65_536, 65_537, 300_000, 1_100_000]),
    ),
    max_size=12,
)


@settings(
    max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(files=st.lists(PARTS, min_size=1, max_size=3), size=st.sampled_from([2, 3, 5]))
def test_the_same_bytes_as_alone(
    files: list[list[tuple[str, int]]], size: int, source: Path, tmp_path: Path
) -> None:
    def layout() -> Layout:
        opened = FileSource(source)
        return Layout([a_file(f"f{i}", opened, parts) for i, parts in enumerate(files)])

    def act(ranks: Ranks) -> None:
        with shared(ranks, tmp_path / "all", is_folder=True) as group:
            assert [name for name in group.names if "modelctl" not in name] == []
            group.carry_out(layout())

    for folder in tmp_path.iterdir():  # of an example that failed
        shutil.rmtree(folder)
    with staged_files(tmp_path / "alone") as alone:
        alone.carry_out(layout())
    assert together(size, act) == [0] * size
    for i in range(len(files)):
        assert (tmp_path / "all" / f"f{i}").read_bytes() == (
            tmp_path / "alone" / f"f{i}"
        ).read_bytes()
    assert leftovers(tmp_path) == []


def test_each_rank_copies_its_share(source: Path, tmp_path: Path) -> None:
    nbytes = 3 << 20

    def act(ranks: Ranks) -> None:
        opened = FileSource(source)
        file = a_file("f", opened, [("made", 100), *[("summed", nbytes // 12)] * 12])
        before = opened.bytes_read
        with shared(ranks, tmp_path / "f", is_folder=False) as group:
            group.carry_out(Layout([file]))
        assert nbytes // 3 - 100 <= opened.bytes_read - before <= nbytes // 3 + 100

    assert together(3, act) == [0, 0, 0]
    assert (tmp_path / "f").stat().st_size == nbytes + 100 + 12 * 4


def test_progress_comes_to_the_end(source: Path, tmp_path: Path) -> None:
    def act(ranks: Ranks) -> None:
        opened = FileSource(source)
        layout = Layout([a_file(f"f{i}", opened, [("copied", 999_999)] * 3) for i in range(2)])
        told: list[int] = []
        with shared(ranks, tmp_path / "f", is_folder=True) as group:
            group.carry_out(layout, told.append)
        assert sum(told) == (layout.nbytes if ranks.is_first else 0)

    assert together(3, act) == [0, 0, 0]


# ------------------------------------------------------------------ what fails on one of them


def test_what_one_can_not_read_is_an_error_of_all(source: Path, tmp_path: Path) -> None:
    """Of one rank the source is cut off in its share."""
    target = tmp_path / "f"
    target.write_bytes(b"old")
    short = tmp_path / "short"
    short.write_bytes(source.read_bytes())

    def act(ranks: Ranks) -> None:
        opened = FileSource(short if ranks.rank == 2 else source)
        file = a_file("f", opened, [("copied", 500_000)] * 6)
        if ranks.rank == 2:
            os.truncate(short, 600_000)
        mine, theirs = (UnreadableError, "shorter|ends|cut"), (RankError, "^rank 2: ")
        kind, said = mine if ranks.rank == 2 else theirs
        with pytest.raises(kind, match=said):
            ranks.run(lambda: write(ranks, file))

    def write(ranks: Ranks, file: FileLayout) -> None:
        with shared(ranks, target, is_folder=False, overwrite=True) as group:
            group.carry_out(Layout([file]))

    assert together(3, act) == [0, 0, 0]
    assert target.read_bytes() == b"old"
    assert leftovers(tmp_path) == []


def test_what_the_first_refuses_is_refused_by_all(source: Path, tmp_path: Path) -> None:
    (tmp_path / "f").write_bytes(b"old")

    def act(ranks: Ranks) -> None:
        def write() -> None:
            with shared(ranks, tmp_path / "f", is_folder=False):
                pytest.fail("it was begun")

        with pytest.raises(WriteError if ranks.is_first else RankError, match="exists already"):
            ranks.run(write)

    assert together(3, act) == [0, 0, 0]


def test_different_layouts_are_refused(source: Path, tmp_path: Path) -> None:
    def act(ranks: Ranks) -> None:
        opened = FileSource(source)
        size = 100 if ranks.rank == 1 else 101
        with (
            pytest.raises(WriteError, match="see different files"),
            shared(ranks, tmp_path / "f", is_folder=False) as group,
        ):
            group.carry_out(Layout([a_file("f", opened, [("made", size)])]))

    assert together(2, act) == [0, 0]
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize("what", ["made", "copied"])
def test_an_older_copy_of_a_source_is_refused(what: str, source: Path, tmp_path: Path) -> None:
    """Of several machines, each with a copy of its own: as long, but of another step."""

    def act(ranks: Ranks) -> None:
        out = LayoutBuilder()
        if what == "made":
            out.add(b"epoch 3" if ranks.rank == 1 else b"epoch 4")
        else:
            opened, at = FileSource(source), 100 * ranks.rank
            crc = zlib.crc32(opened.read(at, 100))
            out.copy(RunStorage(opened, at, 100, crc32=crc))
        with (
            pytest.raises(WriteError, match="see different files"),
            shared(ranks, tmp_path / "f", is_folder=False) as group,
        ):
            group.carry_out(Layout([out.file("f")]))

    assert together(2, act) == [0, 0]
    assert os.listdir(tmp_path) == []


def test_a_damaged_source_is_found_by_the_rank_that_copies_it(tmp_path: Path) -> None:
    data = os.urandom(400_000)
    (tmp_path / "s").write_bytes(data)

    def act(ranks: Ranks) -> None:
        opened = FileSource(tmp_path / "s")
        out = LayoutBuilder()
        for i in range(4):
            part = data[i * 100_000 : (i + 1) * 100_000]
            crc = zlib.crc32(part) ^ (i == 3)  # of the last it is another
            out.copy(RunStorage(opened, i * 100_000, 100_000, crc32=crc))
        layout = Layout([out.file("f")])

        def write() -> None:
            with shared(ranks, tmp_path / "f", is_folder=False) as group:
                group.carry_out(layout)

        with pytest.raises(UnreadableError if ranks.rank == 1 else RankError):
            ranks.run(write)

    assert together(2, act) == [0, 0]
    assert sorted(os.listdir(tmp_path)) == ["s"]


# ------------------------------------------------------------------ who dies

OLD = b"old" * 100_000


def _prepared(kind: str, folder: Path) -> Path:
    """Where the output goes: a file, a new folder, or one that is there."""
    target = folder / "f"
    if kind == "file":
        target.write_bytes(OLD)
    elif kind == "there":
        target.mkdir()
        (target / "index").write_bytes(OLD)
        (target / "beside").write_bytes(OLD)
    return target


def _state(kind: str, target: Path, new: bytes) -> str:
    """Old or new, whole in either case."""
    if kind == "new":
        if not target.exists():
            return "old"
        assert sorted(os.listdir(target)) == ["a", "index"]
        assert (target / "a").read_bytes() == (target / "index").read_bytes() == new
        return "new"
    named = target if kind == "file" else target / "index"
    if kind == "there":
        assert (target / "beside").read_bytes() == OLD
    data = named.read_bytes()
    if data == OLD:
        return "old"
    assert data == new
    if kind == "there":
        assert (target / "a").read_bytes() == new
    return "new"


@pytest.mark.parametrize("kind", ["file", "new", "there"])
@pytest.mark.parametrize("dying", [0, 1, 2])
def test_killed_before_each_call(dying: int, kind: str, source: Path, tmp_path: Path) -> None:
    """Whoever dies, and when: the old or the new, and no temporary file or lock."""
    parts = [("made", 100_000), ("copied", 200_000), ("summed", 100_000), ("copied", 90_000)]
    names = ["f"] if kind == "file" else ["a", "index"]
    with staged_files(tmp_path / "expected") as alone:
        alone.carry_out(Layout([a_file("f", FileSource(source), parts)]))
    new = (tmp_path / "expected" / "f").read_bytes()
    seen = []
    for nth in range(1, 500):
        folder = tmp_path / "here"
        folder.mkdir()
        target = _prepared(kind, folder)

        def act(ranks: Ranks, target: Path = target, nth: int = nth) -> None:
            opened = FileSource(source)
            layout = Layout([a_file(name, opened, parts) for name in names])

            def write() -> None:
                with shared(ranks, target, is_folder=kind != "file", overwrite=True) as group:
                    group.carry_out(layout)

            if ranks.rank == dying:
                with watched(Counted(nth, kill_me)):
                    ranks.run(write)
            else:
                quiet()
                ranks.run(write)

        codes = together(3, act)
        seen.append(_state(kind, target, new))
        assert leftovers(folder) == [], (nth, codes)
        shutil.rmtree(folder)
        if codes[dying] == 0:
            assert codes == [0, 0, 0]
            break
        assert sum(code == 0 for code in codes) in (0, 2)
    assert seen == sorted(seen, reverse=True)
    assert len(seen) > (3 if dying else 15)
    assert (seen[0], seen[-1]) == ("old", "new")


def test_who_is_left_says_that_one_has_gone(tmp_path: Path) -> None:
    def act(ranks: Ranks) -> None:
        if ranks.rank == 1:
            kill_me()
        with pytest.raises(LostRankError, match="another of the 3 ranks has gone"):
            ranks.run(lambda: None)

    assert together(3, act) == [0, -9, 0]


def test_an_error_of_the_command_is_told_to_all(tmp_path: Path) -> None:
    def act(ranks: Ranks) -> None:
        def command() -> None:
            if ranks.rank == 1:
                raise ValueError("odd")

        with pytest.raises(ValueError if ranks.rank == 1 else RankError, match="odd"):
            ranks.run(command)

    assert together(2, act) == [0, 0]


def test_what_all_of_them_meet_each_says_for_itself() -> None:
    def act(ranks: Ranks) -> None:
        def command() -> None:
            raise WriteError("nowhere")

        with pytest.raises(WriteError, match=r"^nowhere"):
            ranks.run(command)

    assert together(3, act) == [0, 0, 0]


def test_memory_is_shared_out_as_files_are(tmp_path: Path) -> None:
    def act(ranks: Ranks) -> None:
        out = LayoutBuilder()
        for i in range(9):
            out.copy(MemoryStorage(bytes([i]) * 70_000))
        with shared(ranks, tmp_path / "f", is_folder=False) as group:
            group.carry_out(Layout([out.file("f")]))

    assert together(4, act) == [0] * 4
    assert (tmp_path / "f").read_bytes() == b"".join(bytes([i]) * 70_000 for i in range(9))
