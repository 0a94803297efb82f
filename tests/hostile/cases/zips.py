"""Zips that two readers would understand differently, and zips that lie (APPNOTE 4.3)."""

from __future__ import annotations

import struct
import zlib
from collections.abc import Iterator
from typing import Any

from ..build.containers import BIAS, CLEAN, WEIGHT, Entry, torch_members, torch_zip, zipped
from ..build.pickles import POP
from ..case import Case, Odd, Refused, one_file
from .execution import SYSTEM

EVIL = b"\x80\x02" + SYSTEM + POP + CLEAN[2:]
ANY = -1


def cases() -> Iterator[Case]:
    yield from _headers()
    yield from _names()
    yield from _layout()
    yield from _directory()
    yield from _members()


def _headers() -> Iterator[Case]:
    """The two headers of a member disagree, or say what is not read."""

    def lies(what: str, why: str, at: int | None = ANY, **where: dict[str, Any]) -> Case:
        return one_file(what, torch_zip(data_0=where), Refused(why, "a/data/0", at))

    disagree = "its local header and the directory disagree"
    for bit, what in ((1, "encrypted"), (0x40, "strongly encrypted"), (0x2000, "masked")):
        yield lies(f"{what}", "encrypted", lies={"flags": bit})
    yield lies("flags of the local header alone", disagree, local={"flags": 0x800})
    yield lies("another name in the local header", "another name", local={"name": b"a/data/9"})
    yield lies("a longer name in the local header", "another name", local={"name": b"a/data/00"})
    yield lies("another method in the local header", disagree, local={"method": 8})
    yield lies("another size in the local header", disagree, local={"size": 60})
    yield lies("another packed size in the local header", disagree, local={"packed": 60})
    yield lies("another checksum in the local header", disagree, local={"crc": 7})
    yield lies("stored, of two sizes", "stored, but of two sizes", lies={"packed": 60})
    yield lies(
        "a directory that says twice the size", disagree, central={"size": 128, "packed": 128}
    )
    yield lies(
        "no zip64 sizes",
        "zip64 sizes are missing",
        None,
        central={"size": 2**32 - 1, "packed": 2**32 - 1},
    )
    extra = struct.pack("<HHQ", 1, 8, 64)
    yield lies(
        "half of the zip64 sizes",
        "zip64 sizes are missing",
        None,
        central={"size": 2**32 - 1, "packed": 2**32 - 1, "extra": extra},
    )
    fields = "extra fields don't have the length"
    padding = b"FB\2\0ZZ"
    for what, extra in {
        "half of an extra field": padding[:3],
        "an extra field that ends later": padding[:-1],
        "more than its extra field": padding + bytes(1),
        "zeros for extra fields": bytes(8),
        "an extra field behind the padding": padding + b"\1\0\0\0",
    }.items():
        yield lies(what, fields, local={"extra": extra})
    for what, lie in {"called a folder": {"dos": 0x10}, "a folder by name": {}}.items():
        name = "a/data/7/" if what.endswith("name") else "a/data/7"
        entry = Entry(name, WEIGHT, central=lie)
        yield one_file(what, zipped(*torch_members(), entry), Refused("called a folder", name, ANY))
    yield lies("elsewhere", "lies outside the file", central={"at": 0x7FFFFFFF})
    yield lies(
        "no local header where it should be", "not where the directory says", central={"at": 5}
    )
    yield one_file(
        "a method that nobody knows",
        torch_zip(data_0={"lies": {"method": 99}}),
        Refused("compression method 99", error="UnsupportedError"),
    )
    yield one_file(
        "another checksum of data.pkl",
        torch_zip(data_pkl={"lies": {"crc": 1}}),
        Refused("CRC", "a/data.pkl"),
    )
    yield one_file(
        "a changed byte in data.pkl",
        torch_zip(
            CLEAN.replace(b"weight", b"height"), data_pkl={"lies": {"crc": zlib.crc32(CLEAN)}}
        ),
        Refused("CRC", "a/data.pkl"),
    )


def _names() -> Iterator[Case]:
    for name in ("../x", "a/../../x", "/etc/x", "a\\x", "a/\0x", "C:/x", "", "a//x", "a/./x"):
        data = zipped(*torch_members(), Entry(name, b"x"))
        yield one_file(f"an entry {name!r}", data, Refused("leaves the archive", None, ANY))
    for name in ("a/data.pkl", "A/DATA.PKL", "a/Data.pkl"):
        data = zipped(*torch_members(), Entry(name, EVIL))
        yield one_file(f"also {name}", data, Refused("two entries of one name", name, ANY))
    yield one_file(
        "a storage twice",
        zipped(*torch_members(), Entry("a/data/0", WEIGHT)),
        Refused("two entries of one name", "a/data/0", ANY),
    )


def _layout() -> Iterator[Case]:
    """Where the entries lie in the file."""
    inside = torch_members()
    yield one_file(
        "bytes before the first entry",
        zipped(*inside, before=b"J" * 64),
        Refused("not a checkpoint"),
    )
    yield one_file("bytes after the end", zipped(*inside, after=bytes(99)), Odd("after the end"))
    hidden = Entry("a/hidden.pkl", EVIL, listed=False)
    yield one_file(
        "an entry that is not listed", zipped(*inside, hidden), Odd("belong to no entry")
    )
    link = Entry("a/link", b"/etc/hostname", central={"mode": 0o120777})
    yield one_file("a symbolic link", zipped(*inside, link), Odd("symbolic link"))
    # the second entry lies in the first one's bytes, so that they are counted twice
    outer = zipped(Entry("a/x", BIAS))[: -22 - 46 - 3]
    first = Entry("a/outer", outer + bytes(9))
    yield one_file(
        "an entry inside another",
        zipped(first, Entry("a/x", BIAS, central={"at": 37}), *inside),
        Refused("overlaps", "a/x", 37),
    )
    yield one_file(
        "two entries over the same bytes",
        zipped(*inside, Entry("a/data/0", WEIGHT, central={"name": b"a/data/7", "at": 0})),
        Refused("another name", "a/data/7", 0),
    )


def _directory() -> Iterator[Case]:
    def lies(what: str, why: str, at: int | None = ANY, **end: int) -> Case:
        return one_file(what, zipped(*torch_members(), end=end), Refused(why, None, at))

    yield lies("several disks", "several disks", disk=1)
    yield lies("fewer entries on this disk", "several disks", here=1)
    yield lies("more entries than there are", "the directory is cut off", count=6, here=6)
    yield lies("fewer entries than there are", "after the last directory entry", count=4, here=4)
    yield lies("a directory that begins elsewhere", "a gap between", start=10)
    yield lies("a directory outside the file", "outside the file", start=2**31)
    yield lies("a directory that is too long", "outside the file", length=2**31)
    yield lies(
        "60,000 entries in a few bytes", "can't hold 60,000 entries", count=60_000, here=60_000
    )
    nowhere = struct.pack("<4sIQI", b"PK\6\7", 0, 2**60, 1)
    yield one_file(
        "a zip64 locator that points nowhere",
        zipped(*torch_members(), wide=nowhere),
        Refused("points nowhere", None, ANY),
    )
    here = struct.pack("<4sIQI", b"PK\6\7", 0, 0, 1)
    yield one_file(
        "a zip64 locator that points at no record",
        zipped(*torch_members(), wide=here),
        Refused("points nowhere", None, ANY),
    )
    yield one_file(
        "bytes between the directory and the end",
        zipped(*torch_members(), wide=b"gap"),
        Refused("a gap between", None, ANY),
    )


def _members() -> Iterator[Case]:
    """What ``torch.save`` puts into a zip is not all there, or there twice."""
    evil = Entry("b/data.pkl", EVIL)
    yield one_file(
        "two roots, each with a data.pkl",
        zipped(*torch_members(), evil),
        Refused("not one folder with one data.pkl", "b/data.pkl"),
    )
    yield one_file(
        "a second root",
        zipped(*torch_members(), Entry("b/x", b"x")),
        Refused("not one folder", "a/data.pkl"),
    )
    yield one_file(
        "a data.pkl deeper down",
        zipped(*torch_members(root="a/b")),
        Refused("not one folder", "a/b/data.pkl"),
    )
    yield one_file(
        "a data.pkl at the top",
        zipped(Entry("data.pkl", CLEAN)),
        Refused("not one folder", "data.pkl"),
    )
    yield one_file("no data.pkl", torch_zip(data_pkl=None), Refused("without data.pkl"))
    yield one_file("no entries", zipped(), Refused("not a checkpoint"))
    yield one_file("a plain zip", zipped(Entry("notes.txt", b"hello")), Refused("without data.pkl"))
    yield one_file(
        "a storage that is missing", torch_zip(data_1=None), Refused("is missing", "a/data/1")
    )
    yield one_file(
        "a storage that is too short",
        torch_zip(data_1={"data": BIAS[:8]}),
        Refused("16 bytes are declared", "a/data/1", ANY),
    )
    yield one_file(
        "a storage that is too long", torch_zip(data_1={"data": BIAS * 2}), Odd("16 bytes too long")
    )
    yield one_file(
        "a byte order that nobody knows",
        torch_zip(byteorder={"data": b"middle"}),
        Refused("byte order", "a/byteorder"),
    )
    for version in (b"11", b"4294967299"):
        yield one_file(
            f"version {version.decode()}",
            torch_zip(version={"data": version}),
            Refused("version", error="UnsupportedError"),
        )
    for text in (b"0", b"-3", b"", b"#\n", b"3.0", "³".encode()):
        yield one_file(
            f"version {text!r}", torch_zip(version={"data": text}), Refused("version", "a/version")
        )
    yield one_file(
        "a torch.package",
        zipped(*torch_members(), Entry("a/.data/extern_modules", b"")),
        Refused("torch.package", error="UnsupportedError"),
    )
    yield one_file("a second pickle after STOP", torch_zip(CLEAN + EVIL), Odd("after the pickle"))
