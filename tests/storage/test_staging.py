"""Outputs appear whole or not at all, whatever happens on the way."""

from __future__ import annotations

import errno
import os
import random
import stat
import struct
import sys
import zlib
from array import array
from pathlib import Path
from typing import Any

import pytest

from modelctl.core.storages import MemoryStorage, RunStorage, Storage, fastest_crc32
from modelctl.errors import DurabilityError, ModelctlError, UnreadableError, WriteError
from modelctl.storage import sink as sink_module
from modelctl.storage.layout import FileLayout, Late, Layout, LayoutBuilder
from modelctl.storage.source import FileSource
from modelctl.storage.staging import staged, staged_file

pytestmark = pytest.mark.skipif(os.name != "posix", reason="signals and modes of POSIX")
OLD = b"the old file" * 1000
NEW = b"the new one!" * 300_000


def temps(folder: Path) -> list[str]:
    return [name for name in os.listdir(folder) if ".modelctl-" in name]


def write(path: Path, data: bytes = NEW, **options: Any) -> None:
    with staged(path, **options) as sink:
        sink.write(data)


# ------------------------------------------------------------------ what comes out


def test_a_new_file(tmp_path: Path) -> None:
    old = os.umask(0o027)
    try:
        write(tmp_path / "f")
    finally:
        os.umask(old)
    assert (tmp_path / "f").read_bytes() == NEW
    assert stat.S_IMODE((tmp_path / "f").stat().st_mode) == 0o640
    assert temps(tmp_path) == []


@pytest.mark.parametrize("mode", [0o644, 0o600, 0o664])
def test_the_mode_is_kept(mode: int, tmp_path: Path) -> None:
    (tmp_path / "f").write_bytes(OLD)
    (tmp_path / "f").chmod(mode)
    write(tmp_path / "f", overwrite=True)
    assert stat.S_IMODE((tmp_path / "f").stat().st_mode) == mode


def test_extended_attributes_are_kept(tmp_path: Path) -> None:
    path = tmp_path / "f"
    path.write_bytes(OLD)
    try:
        os.setxattr(path, "user.origin", b"here")
    except (OSError, AttributeError):
        pytest.skip("no extended attributes here")
    write(path, overwrite=True)
    assert os.getxattr(path, "user.origin") == b"here"


def acl(*entries: tuple[int, int, int]) -> bytes:
    """A POSIX ACL as Linux keeps it: (tag, permissions, id) of each entry."""
    return struct.pack("<I", 2) + b"".join(struct.pack("<HHI", *one) for one in entries)


NOBODY = 0xFFFFFFFF
SHARED = acl((1, 6, NOBODY), (2, 4, 12345), (4, 0, NOBODY), (0x10, 4, NOBODY), (0x20, 0, NOBODY))


def test_an_acl_is_kept_and_none_is_inherited(tmp_path: Path) -> None:
    path, name = tmp_path / "f", "system.posix_acl_access"
    path.write_bytes(OLD)
    path.chmod(0o640)
    try:
        os.setxattr(path, name, SHARED)
    except (OSError, AttributeError):
        pytest.skip("no ACLs here")
    write(path, overwrite=True)
    assert os.getxattr(path, name) == SHARED
    path.unlink()
    path.write_bytes(OLD)
    path.chmod(0o600)
    os.setxattr(tmp_path, "system.posix_acl_default", SHARED)
    write(path, overwrite=True)
    assert name not in os.listxattr(path)
    assert stat.S_IMODE(path.stat().st_mode) == 0o600


def test_the_owner_is_kept(tmp_path: Path) -> None:
    if not hasattr(os, "geteuid") or os.geteuid() != 0:
        pytest.skip("only root gives files away")
    path = tmp_path / "f"
    path.write_bytes(OLD)
    os.chown(path, 12345, 23456)
    path.chmod(0o640)
    write(path, overwrite=True)
    status = path.stat()
    assert (status.st_uid, status.st_gid) == (12345, 23456)
    assert stat.S_IMODE(status.st_mode) == 0o640


def test_an_owner_that_cannot_be_given(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The group is tried by itself, and the file stands all the same."""
    path, tried = tmp_path / "f", []
    path.write_bytes(OLD)
    real = os.stat

    def other(*args: Any, **options: Any) -> Any:
        found = real(*args, **options)
        return os.stat_result((*found[:4], 1, 2, *found[6:])) if args[0] == path else found

    def refuse(fd: int, uid: int, gid: int) -> None:
        tried.append((uid, gid))
        raise PermissionError

    monkeypatch.setattr(os, "fchown", refuse)
    monkeypatch.setattr("modelctl.storage.targets.os.stat", other)
    write(path, overwrite=True)
    assert tried == [(1, 2), (-1, 2)]
    assert path.read_bytes() != OLD


def test_what_replaces_a_private_file_is_private_from_the_start(tmp_path: Path) -> None:
    (tmp_path / "f").write_bytes(OLD)
    (tmp_path / "f").chmod(0o600)
    with staged(tmp_path / "f", overwrite=True) as sink:
        assert stat.S_IMODE(sink.path.stat().st_mode) == 0o600


@pytest.mark.parametrize("target", ["real/f", "real/none", "link"])
def test_a_link_is_replaced_not_what_it_leads_to(target: str, tmp_path: Path) -> None:
    (tmp_path / "real").mkdir()
    (tmp_path / "real" / "f").write_bytes(OLD)
    (tmp_path / "real" / "f").chmod(0o600)
    (tmp_path / "link").symlink_to(target)
    with pytest.raises(WriteError, match="link: exists already"):
        write(tmp_path / "link")
    assert os.readlink(tmp_path / "link") == target
    write(tmp_path / "link", overwrite=True)
    assert not (tmp_path / "link").is_symlink()
    assert (tmp_path / "link").read_bytes() == NEW
    if target == "real/f":  # what was private stays so
        assert stat.S_IMODE((tmp_path / "link").stat().st_mode) == 0o600
    assert {path.name: path.read_bytes() for path in (tmp_path / "real").iterdir()} == {"f": OLD}
    assert temps(tmp_path) == []


def test_the_way_to_a_file_may_be_a_link(tmp_path: Path) -> None:
    (tmp_path / "real").mkdir()
    (tmp_path / "real" / "f").write_bytes(OLD)
    (tmp_path / "way").symlink_to("real")
    write(tmp_path / "way" / "f", overwrite=True)
    assert (tmp_path / "way").is_symlink()
    assert (tmp_path / "real" / "f").read_bytes() == NEW


def test_a_link_to_a_folder_is_no_place_for_a_file(tmp_path: Path) -> None:
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to("real")
    with pytest.raises(WriteError, match="is a directory"):
        write(tmp_path / "link", overwrite=True)
    assert (tmp_path / "link").is_symlink()


def test_overwrite_is_asked_for(tmp_path: Path) -> None:
    (tmp_path / "f").write_bytes(OLD)
    with pytest.raises(WriteError, match="exists"):
        write(tmp_path / "f")
    assert (tmp_path / "f").read_bytes() == OLD


def odd_targets(folder: Path) -> dict[str, Path]:
    (folder / "file").write_bytes(b"")
    (folder / "dir").mkdir()
    (folder / "loop").symlink_to("loop")
    os.mkfifo(folder / "fifo")
    return {
        "directory": folder / "dir",
        "no folder": folder / "none" / "f",
        "file as folder": folder / "file" / "f",
        "loop as folder": folder / "loop" / "f",
        "fifo": folder / "fifo",
        "device": Path("/dev/null"),
        "NUL": folder / "a\0b",
        "too long": folder / ("n" * 300),
    }


@pytest.mark.parametrize("which", ["directory", "no folder", "file as folder", "loop as folder", "fifo", "device", "NUL", "too long"])  # fmt: skip # noqa: E501
def test_odd_targets_are_refused(which: str, tmp_path: Path) -> None:
    with pytest.raises(WriteError):
        write(odd_targets(tmp_path)[which], overwrite=True)
    assert temps(tmp_path) == []
    assert stat.S_ISCHR(os.stat("/dev/null").st_mode)


@pytest.mark.parametrize("name", ["n" * 255, "é" * 120, "模" * 80])
def test_long_names(name: str, tmp_path: Path) -> None:
    write(tmp_path / name)
    assert os.listdir(tmp_path) == [name]


def test_too_big_for_the_disk(tmp_path: Path) -> None:
    with (
        pytest.raises(WriteError, match="are free there"),
        staged_file(tmp_path / "f") as group,
    ):
        group.carry_out(Layout([FileLayout("f", 1 << 60, [Late(0, 1 << 60, str)])]))
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize("error", [KeyboardInterrupt, ValueError, UnreadableError])
def test_an_error_in_the_block(error: Any, tmp_path: Path) -> None:
    (tmp_path / "f").write_bytes(OLD)

    def failing() -> None:
        with staged(tmp_path / "f", overwrite=True) as sink:
            sink.write(NEW)
            raise error("x")

    with pytest.raises(error):
        failing()
    assert (tmp_path / "f").read_bytes() == OLD
    assert temps(tmp_path) == []


@pytest.mark.parametrize("by_kernel", [True, False])
def test_progress(by_kernel: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert sink_module._PIECE <= 64 << 20
    monkeypatch.setattr(sink_module, "_PIECE", 100_000)
    if not by_kernel:
        monkeypatch.delattr(os, "copy_file_range", raising=False)
    storage = source(tmp_path)
    told: list[int] = []
    carry_out(tmp_path / "f", [bytes(array("I", range(100_000))), storage], told.append)
    assert sum(told) == 400_000 + storage.nbytes
    assert 0 < min(told) <= max(told) <= 100_000
    assert (tmp_path / "f").read_bytes()[400_000:] == storage.read(0, storage.nbytes)


@pytest.mark.parametrize("fast", [True, False])
def test_a_checksum_of_what_passes(
    fast: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if fast:
        pytest.importorskip("isal")
    else:
        monkeypatch.setitem(sys.modules, "isal", None)
    fastest_crc32.cache_clear()
    storage = source(tmp_path, (3 << 20) + 5)
    data = storage.read(0, storage.nbytes)
    small = MemoryStorage(b"small")
    out = LayoutBuilder()
    for one in (storage, small):
        out.copy(one, checksum="make")
        out.late(4, lambda sums, one=one: sums[id(one)].to_bytes(4, "little"))
    try:
        carried(tmp_path / "f", out)
    finally:
        fastest_crc32.cache_clear()
    expected = data + zlib.crc32(data).to_bytes(4, "little")
    expected += b"small" + zlib.crc32(b"small").to_bytes(4, "little")
    assert (tmp_path / "f").read_bytes() == expected


def test_what_is_made_late_may_stand_before_what_it_is_made_of(tmp_path: Path) -> None:
    storages = [source(tmp_path), MemoryStorage(b"small")]
    out = LayoutBuilder()
    for one in storages:
        out.late(4, lambda sums, one=one: sums[id(one)].to_bytes(4, "little"))
    for one in storages:
        out.copy(one, checksum="make")
    told: list[int] = []
    carried(tmp_path / "f", out, told.append)
    assert sum(told) == out.position  # room that is filled later counts once
    data = [one.read(0, one.nbytes) for one in storages]
    sums = b"".join(zlib.crc32(one).to_bytes(4, "little") for one in data)
    assert (tmp_path / "f").read_bytes() == sums + b"".join(data)


# ------------------------------------------------------------------ a disk that fails


def source(tmp_path: Path, size: int = 3 << 20) -> RunStorage:
    path = tmp_path / "source"
    path.write_bytes(random.Random(0).randbytes(size))
    return RunStorage(FileSource(path), 0, size)


def carry_out(path: Path, parts: list[bytes | Storage], progress: Any = None) -> None:
    out = LayoutBuilder()
    for part in parts:
        out.add(part) if isinstance(part, bytes) else out.copy(part)
    carried(path, out, progress)


def carried(path: Path, out: LayoutBuilder, progress: Any = None) -> None:
    with staged_file(path) as group:
        group.carry_out(Layout([out.file(path.name)]), progress)
    assert path.stat().st_size == out.position


def test_an_unsynced_folder_is_another_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = os.fsync

    def failing(fd: int) -> None:
        if stat.S_ISDIR(os.fstat(fd).st_mode):
            raise OSError(errno.EIO, "I/O error")
        real(fd)

    monkeypatch.setattr(os, "fsync", failing)
    with pytest.raises(DurabilityError, match="written whole"):
        write(tmp_path / "f")
    assert (tmp_path / "f").read_bytes() == NEW


def test_data_then_folder_are_synced(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    told: list[str] = []
    real_sync, real_replace = os.fsync, os.replace

    def fsync(fd: int) -> None:
        told.append("folder" if stat.S_ISDIR(os.fstat(fd).st_mode) else "file")
        real_sync(fd)

    def replace(*args: Any) -> None:
        told.append("replace")
        real_replace(*args)

    monkeypatch.setattr(os, "fsync", fsync)
    monkeypatch.setattr(os, "replace", replace)
    write(tmp_path / "f")
    assert told == ["file", "replace", "folder"]


def test_short_writes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = os.pwrite
    monkeypatch.setattr(os, "pwrite", lambda fd, data, at: real(fd, bytes(data[:70_001]), at))
    write(tmp_path / "f")
    assert (tmp_path / "f").read_bytes() == NEW


def test_a_write_that_writes_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "f").write_bytes(OLD)
    monkeypatch.setattr(os, "pwrite", lambda fd, data, at: 0)
    with pytest.raises(WriteError, match="nothing could be written"):
        write(tmp_path / "f", overwrite=True)
    assert (tmp_path / "f").read_bytes() == OLD


def test_a_file_that_is_not_as_long_as_what_was_written(tmp_path: Path) -> None:
    (tmp_path / "f").write_bytes(OLD)

    def more() -> None:
        with staged(tmp_path / "f", overwrite=True) as sink:
            sink.write(NEW)
            os.pwrite(sink.fd, b"x", len(NEW))

    with pytest.raises(WriteError, match="not as long as what was written"):
        more()
    assert (tmp_path / "f").read_bytes() == OLD


@pytest.mark.skipif(not hasattr(os, "copy_file_range"), reason="no copy_file_range")
@pytest.mark.parametrize("code", [errno.EXDEV, errno.ENOSYS, errno.EOPNOTSUPP, errno.EINVAL])
@pytest.mark.parametrize("nth", [1, 2])
def test_a_kernel_that_copies_no_ranges(
    code: int, nth: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    storage, real, count = source(tmp_path), os.copy_file_range, 0

    def failing(src: int, dst: int, size: int, offset: int, at: int) -> int:
        nonlocal count
        count += 1
        if count == nth:
            raise OSError(code, "no")
        return real(src, dst, min(size, 100_003), offset, at)

    monkeypatch.setattr(os, "copy_file_range", failing)
    carry_out(tmp_path / "f", [b"head", storage, b"tail"])
    assert (tmp_path / "f").read_bytes() == b"head" + storage.read(0, storage.nbytes) + b"tail"


@pytest.mark.parametrize("size", [0, 5, 2 << 20])
def test_a_source_that_became_shorter(size: int, tmp_path: Path) -> None:
    storage = source(tmp_path)
    os.truncate(tmp_path / "source", size)
    with pytest.raises(ModelctlError):
        carry_out(tmp_path / "f", [storage])
    assert sorted(os.listdir(tmp_path)) == ["source"]


# ------------------------------------------------------------------ room that is asked for first


class _Fallocate:
    """The C library's, as far as a test needs it: notes what is asked, and answers."""

    def __init__(self, code: int) -> None:
        self.code, self.asked = code, [0]

    def __call__(self, fd: int, mode: int, offset: Any, size: Any) -> int:
        self.asked.append(size.value)
        return -1 if self.code else 0


def _asking(monkeypatch: pytest.MonkeyPatch, code: int) -> _Fallocate:
    import ctypes

    call = _Fallocate(code)
    library = type("Library", (), {"fallocate": staticmethod(call)})()
    monkeypatch.setattr(ctypes, "CDLL", lambda *args, **options: library)
    monkeypatch.setattr(ctypes, "get_errno", lambda: code)
    monkeypatch.setattr(sink_module, "_ALLOCATED", 1 << 20)
    return call


def test_a_large_file_asks_for_all_of_its_room(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    call = _asking(monkeypatch, 0)
    storage = source(tmp_path)
    carry_out(tmp_path / "f", [b"head", storage])
    assert call.asked[1:] == [4 + storage.nbytes]
    carry_out(tmp_path / "small", [b"head"])
    assert len(call.asked) == 2


def test_a_disk_without_room_says_so_before_a_byte_moves(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    storage = source(tmp_path)
    _asking(monkeypatch, errno.ENOSPC)
    with pytest.raises(WriteError, match="No space left"):
        carry_out(tmp_path / "f", [storage])
    assert storage.source.bytes_read == 0
    assert os.listdir(tmp_path) == ["source"]


def test_a_file_system_that_gives_no_room_beforehand(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    storage = source(tmp_path)
    _asking(monkeypatch, errno.EOPNOTSUPP)
    carry_out(tmp_path / "f", [storage])
    assert (tmp_path / "f").read_bytes() == storage.read(0, storage.nbytes)
