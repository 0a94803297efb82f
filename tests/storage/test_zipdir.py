# ruff: noqa: E501 - tables of lies
"""The strict zip directory: the same entries as zipfile sees, and each rule that it refuses by."""

from __future__ import annotations

import io
import struct
import zipfile
import zlib
from pathlib import Path
from typing import Any

import pytest

from modelctl.errors import ModelctlError, UnreadableError, UnsupportedError
from modelctl.storage.containers.zipdir import ZipDirectory
from modelctl.storage.source import FileSource


def local(name: bytes, data: bytes, /, **lies: Any) -> bytes:
    fields = {"flags": 0, "method": 0, "crc": zlib.crc32(data), "packed": len(data), "size": len(data), "name": name, "extra": b""} | lies  # fmt: skip
    head = struct.pack(
        "<4s5H3I2H",
        *(fields.get("signature", b"PK\3\4"), 20, fields["flags"], fields["method"], 0, 0),
        *(fields["crc"], fields["packed"], fields["size"]),
        *(len(fields["name"]), len(fields["extra"])),
    )
    return head + fields["name"] + fields["extra"] + data


def central(name: bytes, data: bytes, at: int, /, **lies: Any) -> bytes:
    fields = {"flags": 0, "method": 0, "crc": zlib.crc32(data), "packed": len(data), "size": len(data), "extra": b"", "at": at, "attributes": 0} | lies  # fmt: skip
    return (
        struct.pack(
            "<4s6H3I5H2I",
            *(fields.get("signature", b"PK\1\2"), 20, 20, fields["flags"], fields["method"]),
            *(0, 0, fields["crc"], fields["packed"], fields["size"]),
            *(len(name), len(fields["extra"]), 0, 0, 0, fields["attributes"], fields["at"]),
        )
        + name
        + fields["extra"]
    )


def end(count: int, size: int, at: int, /, **lies: Any) -> bytes:
    fields = {"disk": 0, "count": count, "here": count, "size": size, "at": at} | lies
    return struct.pack("<4s4H2IH", b"PK\5\6", fields["disk"], 0, fields["here"], fields["count"], fields["size"], fields["at"], 0)  # fmt: skip


NAMES = (b"a/data.pkl", b"a/data/0")


def build(
    names: tuple[bytes, ...] = NAMES,
    *,
    lie: int = 1,
    in_local: dict[str, Any] | None = None,
    in_central: dict[str, Any] | None = None,
    in_end: dict[str, Any] | None = None,
    gap: bytes = b"",
    before_end: bytes = b"",
    tail: bytes = b"",
    data: bytes = b"0123456789",
) -> bytes:
    out, directory = b"", b""
    for i, name in enumerate(names):
        mine = i == lie
        directory += central(name, data, len(out), **((in_central or {}) if mine else {}))
        out += local(name, data, **((in_local or {}) if mine else {})) + (gap if i == 0 else b"")
    return (
        out
        + directory
        + before_end
        + end(len(names), len(directory), len(out), **(in_end or {}))
        + tail
    )


def read(data: bytes, tmp_path: Path) -> ZipDirectory:
    (tmp_path / "z").write_bytes(data)
    return ZipDirectory(FileSource(tmp_path / "z"))


def test_the_honest_one(tmp_path: Path) -> None:
    found = read(build(), tmp_path)
    assert list(found.members) == ["a/data.pkl", "a/data/0"]
    assert found.read("a/data/0", 10) == b"0123456789"
    assert found.warnings == []


LIES: dict[str, dict[str, Any]] = {
    "encrypted": {"in_central": {"flags": 1}, "in_local": {"flags": 1}},
    "strongly encrypted": {"in_central": {"flags": 0x40}, "in_local": {"flags": 0x40}},
    "masked headers": {"in_central": {"flags": 0x2000}, "in_local": {"flags": 0x2000}},
    "flags that differ": {"in_local": {"flags": 0x800}},
    "name that differs": {"in_local": {"name": b"a/data/1"}},
    "longer local name": {"in_local": {"name": b"a/data/0x"}},
    "method that differs": {"in_local": {"method": 8}},
    "crc that differs": {"in_local": {"crc": 5}},
    "size that differs": {"in_local": {"size": 9}},
    "packed size that differs": {"in_local": {"packed": 9}},
    "stored of two sizes": {"in_central": {"packed": 9}, "in_local": {"packed": 9}},
    "no local header": {"in_local": {"signature": b"PK\3\5"}},
    "no central header": {"in_central": {"signature": b"PK\1\3"}},
    "duplicate": {"names": (b"a/data.pkl", b"a/data.pkl")},
    "case-equal": {"names": (b"a/data.pkl", b"A/DATA.PKL")},
    "parent": {"names": (b"a/data.pkl", b"a/../b")},
    "leading parent": {"names": (b"a/data.pkl", b"../b")},
    "dot": {"names": (b"a/data.pkl", b"a/./b")},
    "absolute": {"names": (b"a/data.pkl", b"/b")},
    "drive": {"names": (b"a/data.pkl", b"c:/b")},
    "backslash": {"names": (b"a/data.pkl", b"a\\b")},
    "NUL": {"names": (b"a/data.pkl", b"a/b\0c")},
    "empty name": {"names": (b"a/data.pkl", b"")},
    "empty part": {"names": (b"a/data.pkl", b"a//b")},
    "overlap": {"in_central": {"at": 0}, "names": (b"a/data.pkl", b"a/data.pkk")},
    "past the file": {"in_central": {"at": 1 << 30}},
    "into the directory": {
        "in_central": {"packed": 60, "size": 60},
        "in_local": {"packed": 60, "size": 60},
    },
    "local extra into the directory": {
        "in_local": {"extra": bytes(5)},
        "data": b"0123",
        "in_central": {"size": 9, "packed": 9},
    },
    "several disks": {"in_end": {"disk": 1}},
    "fewer here": {"in_end": {"here": 1}},
    "too many": {"in_end": {"count": 3, "here": 3}},
    "too few": {"in_end": {"count": 1, "here": 1}},
    "directory elsewhere": {"in_end": {"at": 10}},
    "directory outside": {"in_end": {"at": 1 << 30}},
    "gap before the end": {"before_end": b"x"},
    "no zip64 sizes": {"in_central": {"size": 0xFFFFFFFF, "packed": 0xFFFFFFFF}},
    "short zip64 sizes": {
        "in_central": {
            "size": 0xFFFFFFFF,
            "packed": 0xFFFFFFFF,
            "extra": struct.pack("<HHQ", 1, 8, 10),
        }
    },
    "zip64 of another kind": {
        "in_central": {"size": 0xFFFFFFFF, "extra": struct.pack("<HHQ", 2, 8, 10)}
    },
    "zip64 locator to nowhere": {"before_end": struct.pack("<4sIQI", b"PK\6\7", 0, 1 << 60, 1)},
    "zip64 locator to no record": {"before_end": struct.pack("<4sIQI", b"PK\6\7", 0, 0, 1)},
}


@pytest.mark.parametrize("lie", LIES)
def test_a_lie_is_refused(lie: str, tmp_path: Path) -> None:
    with pytest.raises(UnreadableError) as caught:
        read(build(**LIES[lie]), tmp_path)
    assert str(tmp_path / "z") in str(caught.value)


def by_hand(entries: list[tuple[bytes, bytes, int]], body: bytes) -> bytes:
    directory = b"".join(central(name, data, at) for name, data, at in entries)
    return body + directory + end(len(entries), len(directory), len(body))


def test_an_entry_inside_another(tmp_path: Path) -> None:
    inner = local(b"a/data/0", b"0123456789")
    outer = local(b"a/data.pkl", inner)
    entries = [(b"a/data.pkl", inner, 0), (b"a/data/0", b"0123456789", len(outer) - len(inner))]
    assert len(read(by_hand(entries[:1], outer), tmp_path).members) == 1
    assert len(read(by_hand(entries[1:], outer), tmp_path).members) == 1
    with pytest.raises(UnreadableError, match="overlaps"):
        read(by_hand(entries, outer), tmp_path)


def test_a_local_extra_that_pushes_the_data_out(tmp_path: Path) -> None:
    data = b"0123456789"
    lies = {"crc": zlib.crc32(data), "size": 10, "packed": 10}
    body = local(b"a/data/0", data[5:], extra=b"\7\0\1\0x", **lies)
    with pytest.raises(UnreadableError, match="outside"):
        read(by_hand([(b"a/data/0", data, 0)], body), tmp_path)


def test_two_end_records_that_disagree(tmp_path: Path) -> None:
    honest = build()
    start = honest.index(b"PK\1\2")
    size = len(honest) - 22 - start
    for count, length, at in ((3, size, start), (2, size - 1, start), (2, size, start - 1)):
        wide = struct.pack("<4sQ2H2I4Q", b"PK\6\6", 44, 45, 45, 0, 0, count, count, length, at)
        locator = struct.pack("<4sIQI", b"PK\6\7", 0, start + size, 1)
        with pytest.raises(UnreadableError):
            read(honest[:-22] + wide + locator + honest[-22:], tmp_path)
    wide = struct.pack("<4sQ2H2I4Q", b"PK\6\6", 44, 45, 45, 0, 0, 2, 2, size, start)
    assert len(read(honest[:-22] + wide + locator + honest[-22:], tmp_path).members) == 2


def test_what_is_odd_is_a_warning(tmp_path: Path) -> None:
    assert "after the end" in read(build(tail=b"x" * 9), tmp_path).warnings[0].text
    assert "no entry" in read(build(gap=bytes(25)), tmp_path).warnings[0].text
    assert read(build(gap=bytes(24)), tmp_path).warnings == []
    link = {"attributes": 0o120777 << 16}
    assert "link" in read(build(in_central=link), tmp_path).warnings[0].text


def test_another_compression(tmp_path: Path) -> None:
    with pytest.raises(UnsupportedError, match="method 12"):
        read(build(in_central={"method": 12}, in_local={"method": 12}), tmp_path)


def deflated(data: bytes) -> bytes:
    engine = zlib.compressobj(9, zlib.DEFLATED, -15)
    return engine.compress(data) + engine.flush()


@pytest.mark.parametrize("size", [0, 9, 11, 1 << 17])
def test_inflating_stops_at_the_declared_size(size: int, tmp_path: Path) -> None:
    raw = deflated(b"0123456789")
    lies = {"method": 8, "size": size, "crc": zlib.crc32(b"0123456789")}
    found = read(build(data=raw, in_central=lies, in_local=lies, lie=0), tmp_path)
    with pytest.raises(UnreadableError, match="more than" if size < 10 else "fewer than"):
        found.read("a/data.pkl", 1 << 30)


def test_a_bomb_is_not_inflated(tmp_path: Path) -> None:
    raw = deflated(bytes(64 << 20))
    lies = {"method": 8, "size": 64 << 20, "crc": 0}
    found = read(build(data=raw, in_central=lies, in_local=lies, lie=0), tmp_path)
    with pytest.raises(UnreadableError, match="limit"):
        found.read("a/data.pkl", 1 << 20)


def test_crc_and_broken_streams(tmp_path: Path) -> None:
    lies = {"crc": 5}
    with pytest.raises(UnreadableError, match="CRC"):
        read(build(in_central=lies, in_local=lies), tmp_path).read("a/data/0", 99)
    lies = {"method": 8}
    with pytest.raises(UnreadableError, match="deflate"):
        read(build(in_central=lies, in_local=lies, data=b"\xff" * 10), tmp_path).read(
            "a/data/0", 99
        )


@pytest.mark.parametrize("method", [zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED])
@pytest.mark.parametrize("streamed", [False, True])
def test_as_zipfile_sees_it(method: int, streamed: bool, tmp_path: Path) -> None:
    class Stream(io.BytesIO):
        def seekable(self) -> bool:
            return not streamed

    buffer = Stream()
    with zipfile.ZipFile(buffer, "w", method) as made:
        made.comment = b"" if streamed else b"a comment"
        for i in range(20):
            made.writestr(f"dir/entry{i} é", b"some text " * i * 50)
        with made.open("dir/large", "w", force_zip64=True) as entry:
            entry.write(b"x" * 99)
    found = read(buffer.getvalue(), tmp_path)
    with zipfile.ZipFile(buffer) as made:
        assert list(found.members) == made.namelist()
        for one in made.infolist():
            member = found.members[one.filename]
            assert (member.size, member.compressed, member.crc32, member.header) == (
                *(one.file_size, one.compress_size, one.CRC, one.header_offset),
            )
            assert found.read(one.filename, 1 << 20) == made.read(one)


def test_every_wrong_byte(tmp_path: Path) -> None:
    data = build()
    for at in range(len(data)):
        for wrong in (0, 1, 0x80, 0xFF):
            changed = bytearray(data)
            changed[at] = wrong
            try:
                found = read(bytes(changed), tmp_path)
                for name in found.members:
                    found.read(name, 1 << 20)
            except ModelctlError:
                continue


class Streamed(io.BytesIO):
    def seekable(self) -> bool:
        return False


def seen(path: Path) -> Any:
    try:
        directory = ZipDirectory(FileSource(path))
    except ModelctlError as e:
        return type(e), str(e)
    return list(directory.members.items()), directory.warnings


def test_the_usual_entry_is_judged_by_all_rules(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What is told in one look is what the rules one by one would say, whatever byte is wrong."""
    path = tmp_path / "a.zip"
    with zipfile.ZipFile(path, "w") as z:
        for name in ("a/data.pkl", "a/data/0", "a/data/1", "a/.format", "B/ü"):
            z.writestr(name, name * 3)
        with z.open(zipfile.ZipInfo("a/data/2"), "w", force_zip64=True) as member:
            member.write(b"long")
    streamed = Streamed()
    with zipfile.ZipFile(streamed, "w") as z:
        z.writestr("s/data.pkl", "x")
        z.writestr("s/data/0", "y" * 9)
    usual = ZipDirectory._usual
    taken = 0

    def counted(self: ZipDirectory, *args: Any) -> Any:
        nonlocal taken
        found = usual(self, *args)
        taken += found is not None
        return found

    for data in (path.read_bytes(), streamed.getvalue()):
        for at in range(len(data)):
            for byte in (data[at] ^ 1, data[at] ^ 0x80, 0xFF):
                changed = tmp_path / "changed.zip"
                changed.write_bytes(data[:at] + bytes([byte]) + data[at + 1 :])
                monkeypatch.setattr(ZipDirectory, "_usual", counted)
                found = seen(changed)
                monkeypatch.setattr(ZipDirectory, "_usual", lambda *_: None)
                assert found == seen(changed), (at, byte)
    assert taken > 1000


@pytest.mark.parametrize("size", range(4, 26))
def test_a_few_bytes_that_start_as_a_zip(size: int, tmp_path: Path) -> None:
    """Too few for an end record, even where its signature is."""
    for at in range(4, size):
        data = b"PK\3\4" + bytes(at - 4) + b"PK\5\6" + bytes(30)
        with pytest.raises(UnreadableError):
            read(data[:size], tmp_path)
