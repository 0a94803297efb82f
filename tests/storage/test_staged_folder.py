"""A folder that others write into appears whole, and what stood there is as it was until then."""

from __future__ import annotations

import os

import pytest

from modelctl.errors import WriteError
from modelctl.storage import staging
from modelctl.storage.staging import staged_folder


def write(path, text, **how):
    with staged_folder(path, **how) as temp:
        (temp / "a").write_text(text)
        (temp / f"{text}.x").write_text(text)


def held(path):
    return {name: (path / name).read_text() for name in os.listdir(path)}


def test_it_appears_whole_and_replaces_what_stood_there(tmp_path):
    path = tmp_path / "run"
    write(path, "one")
    assert held(path) == {"a": "one", "one.x": "one"}
    with pytest.raises(WriteError, match="exists already"):
        write(path, "two")
    write(path, "two", overwrite=True)
    assert held(path) == {"a": "two", "two.x": "two"}
    assert os.listdir(tmp_path) == ["run"]


def test_a_file_is_replaced_and_a_link_is_not(tmp_path):
    (tmp_path / "file").write_text("old")
    write(tmp_path / "file", "new", overwrite=True)
    assert held(tmp_path / "file")["a"] == "new"
    (tmp_path / "link").symlink_to("file")
    with pytest.raises(WriteError, match="exists already"):
        write(tmp_path / "link", "newer", overwrite=True)
    assert held(tmp_path / "file")["a"] == "new"
    assert sorted(os.listdir(tmp_path)) == ["file", "link"]


def test_an_error_leaves_all_as_it_was(tmp_path, monkeypatch):
    path = tmp_path / "run"
    write(path, "one")
    with pytest.raises(TypeError):
        write(path, 2, overwrite=True)
    assert held(path) == {"a": "one", "one.x": "one"}
    rename = os.rename

    def fails(source, target):  # the new one, once the old one is aside
        if str(source).endswith(".tmp"):
            raise OSError(5, "the disk is gone")
        rename(source, target)

    monkeypatch.setattr(staging.os, "rename", fails)
    with pytest.raises(WriteError, match="the disk is gone"):
        write(path, "two", overwrite=True)
    assert held(path) == {"a": "one", "one.x": "one"}
    assert os.listdir(tmp_path) == ["run"]


@pytest.mark.parametrize("at", [1, 2])
def test_one_that_was_killed_between_the_renames_is_mended(tmp_path, monkeypatch, at):
    """What stood there is put back, or, where the new one stands, removed."""
    path = tmp_path / "run"
    write(path, "one")
    calls = []
    rename = os.rename

    class Killed(BaseException):
        pass

    def dies(source, target):
        if calls:
            raise Killed  # nothing is done any more
        rename(source, target)
        if str(source).endswith(".tmp") or at == 1:
            calls.append(source)

    with monkeypatch.context() as patched:
        patched.setattr(staging.os, "rename", dies)
        if at == 2:
            patched.setattr(staging, "confirm", lambda *_: dies(None, None))
        with pytest.raises(Killed):
            write(path, "two", overwrite=True)
    assert path.exists() == (at == 2)
    assert len(os.listdir(tmp_path)) == at
    with pytest.raises(WriteError, match="exists already"):
        write(path, "three")
    assert held(path)["a"] == ("one" if at == 1 else "two")
    write(path, "three", overwrite=True)
    assert held(path) == {"a": "three", "three.x": "three"}
    assert os.listdir(tmp_path) == ["run"]
