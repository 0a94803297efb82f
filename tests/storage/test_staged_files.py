"""Files that belong together appear all or not at all."""

from __future__ import annotations

import os
import stat
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from modelctl.errors import WriteError
from modelctl.storage.staging import FileGroup, staged_files

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
            assert not group.exists(name)
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
        lambda group: group.exists(name),
        lambda group: group.remove_after([name]),
    ]

    def run(call: Callable[[FileGroup], Any]) -> None:
        with staged_files(tmp_path / "m") as group:
            call(group)

    for call in calls:
        with pytest.raises(WriteError, match="not a plain file name"):
            run(call)
    assert os.listdir(tmp_path) == []
