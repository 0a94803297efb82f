"""Files that belong together appear all or not at all."""

from __future__ import annotations

import errno
import os
import stat
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest

from modelctl.errors import DurabilityError, WriteError
from modelctl.storage.layout import FileLayout, Late, Layout, LayoutBuilder
from modelctl.storage.source import FileSource
from modelctl.storage.staging import FileGroup, staged_files

from .faults import leftovers

pytestmark = pytest.mark.skipif(os.name != "posix", reason="modes and links of POSIX")
SHARDS = ["model-1.safetensors", "model-2.safetensors"]
INDEX = "model.safetensors.index.json"


def write(folder: Path, text: str = "new", names: Any = (*SHARDS, INDEX), **options: Any) -> None:
    with staged_files(folder, **options) as group:
        for name in names:
            with group.open(name) as sink:
                sink.write(f"{text} {name}".encode())


def content(folder: Path) -> dict[str, str]:
    return {name: (folder / name).read_text() for name in sorted(os.listdir(folder))}


def written(text: str = "new", names: Any = (*SHARDS, INDEX)) -> dict[str, str]:
    return {name: f"{text} {name}" for name in sorted(names)}


def test_a_new_folder(tmp_path: Path) -> None:
    old = os.umask(0o027)
    try:
        write(tmp_path / "m")
    finally:
        os.umask(old)
    assert os.listdir(tmp_path) == ["m"]
    assert content(tmp_path / "m") == written()
    assert stat.S_IMODE((tmp_path / "m").stat().st_mode) == 0o750
    assert stat.S_IMODE((tmp_path / "m" / INDEX).stat().st_mode) == 0o640


def test_it_is_not_there_before_it_is_whole(tmp_path: Path) -> None:
    with staged_files(tmp_path / "m") as group:
        for name in SHARDS:
            assert name not in group.names
            with group.open(name) as sink:
                sink.write(b"x")
            assert not (tmp_path / "m").exists()
    assert sorted(os.listdir(tmp_path / "m")) == SHARDS


@pytest.mark.parametrize("new", [True, False])
def test_an_error_leaves_nothing(new: bool, tmp_path: Path) -> None:
    folder = tmp_path / "m"
    if not new:
        write(folder, "old")

    def failing() -> None:
        with staged_files(folder, overwrite=True) as group:
            with group.open("more") as sink:
                sink.write(b"x")
            with group.open(SHARDS[0]) as sink:
                sink.write(b"x")
                raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        failing()
    assert os.listdir(tmp_path) == ([] if new else ["m"])
    assert new or content(folder) == written("old")


def test_into_a_folder_that_exists(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    write(tmp_path)
    assert content(tmp_path) == {"config.json": "{}", **written()}
    (tmp_path / INDEX).chmod(0o600)
    write(tmp_path, "newer", overwrite=True)
    assert content(tmp_path) == {"config.json": "{}", **written("newer")}
    assert stat.S_IMODE((tmp_path / INDEX).stat().st_mode) == 0o600
    assert stat.S_IMODE((tmp_path / SHARDS[0]).stat().st_mode) == 0o644


def test_overwrite_is_asked_for_at_open(tmp_path: Path) -> None:
    (tmp_path / INDEX).write_text("old")
    with pytest.raises(WriteError, match="exists already"):
        write(tmp_path)
    assert content(tmp_path) == {INDEX: "old"}


@pytest.mark.parametrize("name", ["", ".", "..", "a/b", "/a", "../a", "a\\b", "a\0b"])
def test_only_plain_names(name: str, tmp_path: Path) -> None:
    calls: list[Callable[[FileGroup], Any]] = [
        lambda group: group.open(name).__enter__(),
        lambda group: group.remove_after([name]),
    ]

    def run(call: Callable[[FileGroup], Any]) -> None:
        with staged_files(tmp_path / "m") as group:
            call(group)

    for call in calls:
        with pytest.raises(WriteError, match="not a plain file name"):
            run(call)
    assert os.listdir(tmp_path) == []


def test_a_folder_through_a_link(tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to("m")
    write(tmp_path / "link")
    write(tmp_path / "link", "newer", overwrite=True)
    assert sorted(os.listdir(tmp_path)) == ["link", "m"]
    assert (tmp_path / "link").is_symlink()
    assert content(tmp_path / "m") == written("newer")


@pytest.mark.parametrize("folder", [".", "../here", "m/", "m/..", "n/../m"])
def test_odd_names_of_a_folder(
    folder: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    with staged_files(folder) as group, group.open("f") as sink:
        sink.write(b"new")
    assert os.path.exists(os.path.join(os.path.normpath(folder), "f"))
    assert leftovers(tmp_path) == []


@pytest.mark.parametrize("folder", ["file", "none/m", "file/m", "loop", "fifo", "m\0", "n" * 300])
def test_odd_folders_are_refused(folder: str, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    (tmp_path / "loop").symlink_to("loop")
    os.mkfifo(tmp_path / "fifo")
    with pytest.raises(WriteError):
        write(tmp_path / folder)
    assert sorted(os.listdir(tmp_path)) == ["fifo", "file", "loop"]


@pytest.mark.parametrize("kind", ["folder", "fifo"])
def test_odd_files_are_refused(kind: str, tmp_path: Path) -> None:
    odd = tmp_path / "m" / INDEX
    odd.parent.mkdir()
    if kind == "folder":
        odd.mkdir()
    else:
        os.mkfifo(odd)
    with pytest.raises(WriteError, match=INDEX):
        write(odd.parent, overwrite=True)
    assert os.listdir(odd.parent) == [INDEX]


def test_a_link_in_a_folder_is_replaced_not_what_it_leads_to(tmp_path: Path) -> None:
    folder = tmp_path / "m"
    folder.mkdir()
    (tmp_path / "file").write_text("old")
    (folder / INDEX).symlink_to(tmp_path / "file")
    with pytest.raises(WriteError, match="exists already"):
        write(folder)
    write(folder, overwrite=True)
    assert not (folder / INDEX).is_symlink()
    assert content(folder) == written("new")
    assert (tmp_path / "file").read_text() == "old"


def test_a_folder_that_appears_meanwhile(tmp_path: Path) -> None:
    def new() -> None:
        with staged_files(tmp_path / "m") as group, group.open("f") as sink:
            sink.write(b"mine")
            (tmp_path / "m").mkdir()
            (tmp_path / "m" / "f").write_text("his")

    with pytest.raises(WriteError, match="not written"):
        new()
    assert content(tmp_path / "m") == {"f": "his"}
    assert os.listdir(tmp_path) == ["m"]


def test_no_name_twice(tmp_path: Path) -> None:
    with pytest.raises(WriteError, match="to be written twice"):
        write(tmp_path / "m", names=["a", "b", "a"])
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize("new", [True, False])
def test_too_big_for_the_disk(new: bool, tmp_path: Path) -> None:
    folder = tmp_path / "m" if new else tmp_path
    with (
        pytest.raises(WriteError, match="are free there"),
        staged_files(folder) as group,
    ):
        group.carry_out(Layout([FileLayout("a", 1 << 60, [Late(0, 1 << 60, str)])]))
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize("new", [True, False])
def test_a_file_that_failed_is_left_out(new: bool, tmp_path: Path) -> None:
    folder = tmp_path / "m" if new else tmp_path
    with staged_files(folder) as group:
        with group.open("a") as sink:
            sink.write(b"a")
        with suppress(ZeroDivisionError), group.open("b") as sink:
            sink.write(b"half")
            raise ZeroDivisionError
        with pytest.raises(WriteError, match="to be written twice"), group.open("b"):
            pass
    assert content(folder) == {"a": "a"}


@pytest.mark.parametrize("new", [True, False])
def test_all_are_synced_and_the_last_is_renamed_last(
    new: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    told: list[str] = []
    real_sync, real_replace, real_rename = os.fsync, os.replace, os.rename

    def fsync(fd: int) -> None:
        status = os.fstat(fd)
        told.append("sync folder" if stat.S_ISDIR(status.st_mode) else "sync")
        real_sync(fd)

    def replace(source: Path, target: Path) -> None:
        told.append(target.name)
        real_replace(source, target)

    def rename(source: Path, target: Path) -> None:
        told.append(f"to {target.name}")
        real_rename(source, target)

    folder = tmp_path / "m"
    if not new:
        folder.mkdir()
    monkeypatch.setattr(os, "fsync", fsync)
    monkeypatch.setattr(os, "replace", replace)
    monkeypatch.setattr(os, "rename", rename)
    write(folder)
    assert told == [
        *["sync"] * 3,
        *SHARDS,
        "sync folder",
        INDEX,
        "sync folder",
        *(["to m", "sync folder"] if new else []),
    ]


@pytest.mark.parametrize("new", [True, False])
def test_an_unsynced_folder_is_another_error(
    new: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Then the old files stay, too."""
    folder, real, synced = tmp_path / "m", os.fsync, 0
    if not new:
        write(folder, names=["old"])

    def failing(fd: int) -> None:
        nonlocal synced
        synced += stat.S_ISDIR(os.fstat(fd).st_mode)
        if synced == (3 if new else 2):
            raise OSError(errno.EIO, "I/O error")
        real(fd)

    def run() -> None:
        with staged_files(folder) as group:
            for name in SHARDS:
                with group.open(name) as sink:
                    sink.write(b"new")
            group.remove_after(["old"])

    monkeypatch.setattr(os, "fsync", failing)
    with pytest.raises(DurabilityError, match="m: written whole"):
        run()
    assert sorted(os.listdir(folder)) == sorted([*SHARDS, *([] if new else ["old"])])
    assert os.listdir(tmp_path) == ["m"]


@pytest.mark.parametrize("nth", [1, 2, 3])
def test_a_rename_that_fails(nth: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The new names go again; of what was replaced before, the error tells."""
    (tmp_path / SHARDS[0]).write_text("old")
    (tmp_path / INDEX).write_text("old")
    real, left = os.replace, nth

    def failing(source: Path, target: Path) -> None:
        nonlocal left
        left -= 1
        if left == 0:
            raise OSError(errno.EIO, "I/O error")
        real(source, target)

    monkeypatch.setattr(os, "replace", failing)
    with pytest.raises(WriteError, match="I/O error") as e:
        write(tmp_path, overwrite=True)
    changed = nth > 1
    assert content(tmp_path) == {
        SHARDS[0]: f"new {SHARDS[0]}" if changed else "old",
        INDEX: "old",
    }
    assert (f"new already: {SHARDS[0]}; the rest is as it was" in e.value.message) == changed
    assert ("what stood there is as it was" in e.value.message) != changed


# ------------------------------------------------------------------ what is not needed any more


def test_old_files_go_once_the_new_ones_stand(tmp_path: Path) -> None:
    write(tmp_path, "old", ["old-1", "old-2", "kept", "both", INDEX])
    (tmp_path / "link").symlink_to("kept")
    with staged_files(tmp_path, overwrite=True) as group:
        group.remove_after(["old-1", "old-2", "both", "none"])
        for name in ("both", INDEX):
            with group.open(name) as sink:
                sink.write(b"new")
        assert (tmp_path / "old-1").exists()
    assert sorted(os.listdir(tmp_path)) == sorted(["kept", "link", "both", INDEX])
    assert (tmp_path / "both").read_text() == "new"


@pytest.mark.parametrize("kind", ["link", "folder", "fifo"])
def test_only_plain_files_are_removed(kind: str, tmp_path: Path) -> None:
    odd = tmp_path / "odd"
    if kind == "link":
        odd.symlink_to("kept")
    elif kind == "folder":
        odd.mkdir()
    else:
        os.mkfifo(odd)
    write(tmp_path, names=["kept"])
    with staged_files(tmp_path) as group:
        group.remove_after(["odd"])
    assert sorted(os.listdir(tmp_path)) == ["kept", "odd"]


def test_what_cannot_be_removed_stays(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(tmp_path, "old", ["old-1", "old-2"])
    real = os.unlink

    def failing(path: Path) -> None:
        if str(path).endswith("old-1"):
            raise OSError(errno.EPERM, "no")
        real(path)

    monkeypatch.setattr(os, "unlink", failing)
    with staged_files(tmp_path) as group:
        group.remove_after(["old-1", "old-2"])
        with group.open(INDEX) as sink:
            sink.write(b"new")
    assert sorted(os.listdir(tmp_path)) == sorted(["old-1", INDEX])


# ------------------------------------------------------------------ no update is lost


@pytest.mark.parametrize("which", [SHARDS[0], SHARDS[1], INDEX, "old"])
def test_what_was_read_and_changed_since_is_not_replaced(which: str, tmp_path: Path) -> None:
    names = [*SHARDS, INDEX, "old"]
    write(tmp_path, "old", names)
    sources = [FileSource(tmp_path / name) for name in names]

    def edit() -> None:
        with staged_files(tmp_path, overwrite=True, sources=sources) as group:
            group.remove_after(["old"])
            for name in (*SHARDS, INDEX):
                with group.open(name) as sink:
                    sink.write(b"mine")
            (tmp_path / "his").write_text("his")
            os.replace(tmp_path / "his", tmp_path / which)

    with pytest.raises(WriteError, match=f"{which}: changed while it was edited"):
        edit()
    assert content(tmp_path) == written("old", names) | {which: "his"}


def test_progress(tmp_path: Path) -> None:
    told: list[int] = []
    files = []
    for name in SHARDS:
        out = LayoutBuilder()
        out.add(name.encode() * 100)
        files.append(out.file(name))
    with staged_files(tmp_path / "m") as group:
        group.carry_out(Layout(files), told.append)
    assert sum(told) == sum(path.stat().st_size for path in (tmp_path / "m").iterdir())
    assert len(told) == len(SHARDS)
