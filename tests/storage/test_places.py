"""Places: what formats see of a file or a folder, and what may be named beside one."""

from __future__ import annotations

import io
import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from modelctl.core.storages import RunStorage
from modelctl.errors import ModelctlError, UnreadableError, UnsupportedError
from modelctl.storage.places import Place


def test_a_file_is_opened_once_and_when_it_is_asked_for(tmp_path: Path) -> None:
    (tmp_path / "f").write_bytes(b"x" * 5000)
    place = Place(tmp_path / "f")
    assert place.sources == []
    assert (len(place.head), place.size, place.is_folder, place.zip) == (4096, 5000, False, None)
    assert place.source is place.source
    assert place.sources == [place.source]
    place.close()
    with pytest.raises(ModelctlError, match="closed"):
        place.source.read(0, 1)
    with pytest.raises(ModelctlError, match="no such file"):
        _ = Place(tmp_path / "none").source


def test_a_folder_has_names_and_no_head(tmp_path: Path) -> None:
    (tmp_path / "b").write_bytes(b"b")
    (tmp_path / "a").write_bytes(b"a")
    place = Place(tmp_path)
    assert (place.is_folder, place.names, place.head, place.zip) == (True, ["a", "b"], b"", None)
    assert place.member("a").head == b"a"
    assert len(place.sources) == 1


def test_a_zip_inside_a_zip_is_read_where_it_lies(tmp_path: Path) -> None:
    inner, data = io.BytesIO(), os.urandom(300)
    with zipfile.ZipFile(inner, "w") as file:
        file.writestr("x", data)
    with zipfile.ZipFile(tmp_path / "f", "w") as file:
        file.writestr("other", b"o" * 77)
        file.writestr("inner.zip", inner.getvalue())
        file.writestr("packed.zip", inner.getvalue(), zipfile.ZIP_DEFLATED)
    place = Place(tmp_path / "f")
    assert place.zip is not None
    assert place.zip is place.zip
    window = place.zipped(place.zip.members["inner.zip"])
    assert window.zip is not None
    member = window.zip.members["x"]
    storage = RunStorage(window.source, member.offset, member.size)
    assert storage.read(0, 300) == data
    (run,) = storage.runs()
    assert run.source is place.source  # the kernel can copy from it
    assert (tmp_path / "f").read_bytes()[run.offset : run.offset + 300] == data
    assert window.source.fileno() is None
    with pytest.raises(UnsupportedError, match="compressed"):
        place.zipped(place.zip.members["packed.zip"])


@pytest.mark.parametrize("name", ["", ".", "..", "a/b", "/etc/passwd", "a\\b", "a\0", "index"])
def test_only_plain_names_beside_it(name: str, tmp_path: Path) -> None:
    (tmp_path / "index").write_text("{}")
    with pytest.raises(UnreadableError, match="not a plain file name"):
        Place(tmp_path / "index").beside(name)


def test_links_beside_it_are_followed_where_that_is_wanted(tmp_path: Path) -> None:
    (tmp_path / "index").write_text("{}")
    (tmp_path / "link").symlink_to("/etc/hostname")
    with pytest.raises(ModelctlError, match="symbolic link") as e:
        Place(tmp_path / "index").beside("link")
    assert e.value.hint == "--follow-symlinks"
    Place(tmp_path / "index", follow_links=True).beside("link")


@pytest.mark.skipif(not hasattr(os, "preadv"), reason="no limits of open files here")
def test_a_folder_may_hold_more_files_than_a_shell_lets_be_open(tmp_path: Path) -> None:
    for i in range(100):
        (tmp_path / f"{i}.bin").write_bytes(b"x")
    code = (
        "import resource, sys\n"
        "from modelctl.storage.places import Place\n"
        "_, hard = resource.getrlimit(resource.RLIMIT_NOFILE)\n"
        "resource.setrlimit(resource.RLIMIT_NOFILE, (32, hard))\n"
        "place = Place(sys.argv[1])\n"
        "assert sum(place.member(name).size for name in place.names) == 100\n"
    )
    subprocess.run([sys.executable, "-c", code, str(tmp_path)], check=True)
