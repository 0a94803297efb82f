"""Where pickles lie in a file: as itself, in zips, tars and what is compressed, one in another.

What several readers would read differently is read as each of them would: a file is looked at as
everything that it begins like, or ends like, or has in its middle.
"""

from __future__ import annotations

import base64
import binascii
import bz2
import gzip
import io
import json
import lzma
import os
import re
import tarfile
import tempfile
import zipfile
import zlib
from collections.abc import Callable, Sequence
from contextlib import suppress
from typing import IO, Any, Literal, NamedTuple

from ..core.checkpoint import Finding
from ..core.notes import Note
from ..core.storages import Source
from ..errors import ModelctlError, UnreadableError, UnsupportedError
from ..formats.distributed.writing import DATA
from ..pickles.interpreter import most_bytes
from ..storage.containers.zipdir import STORED, Member, ZipDirectory
from ..storage.places import Place
from ..storage.source import OpenFile
from .pickles import read_pickles

_MOST_DEPTH = 5
_MOST_MEMBERS = 1_000_000
# What is unpacked from one that is compressed: as much as its structure may take, and so many times
# what it is.
_LEAST, _RATIO = 256 << 20, 100
_PIECE = 1 << 20
_HEAD = 512
# Where others keep pickles under names that say so.
_PICKLE_NAME = re.compile(r"(.*/)?(\.metadata|[^/]*\.(pkl|pickle|p|joblib|dill|pth?|bin|ckpt))$")
# Of protocols 0 and 1, which begin with anything: a name, and the end.
_NAMES_SOMETHING = re.compile(rb"[ci][A-Za-z_][\w.]*\n[A-Za-z_][\w.]*\n")
_MOST_TEXT = 4 << 20
# In torch's tars, where pickles and storages take turns: what reads those finds all of them.
_IN_OLD_TARS = re.compile(r"(^|!)(storages|tensors)$")
_STORAGES = re.compile(r"([^/]+/)?(\.?data(/(weights|constants))?|xl)/[^/]+$")


class Sighting(NamedTuple):
    """A finding, and the member of the file that it is in; "" where it is the file itself."""

    member: str
    finding: Finding


class Problem(NamedTuple):
    """What could not be looked at, and why: it contradicts itself, or is of no known kind."""

    kind: Literal["malformed", "unscanned"]
    member: str
    text: str
    offset: int | None = None


class Walk:
    """What was found in a file, and what could not be looked at."""

    def __init__(self) -> None:
        self.sightings: list[Sighting] = []
        self.problems: list[Problem] = []
        self.pickles = self.arrays = 0
        self.containers = 0

    def file(self, place: Place, member: str = "", depth: int = 0, *, surely: bool = True) -> None:
        """All that a file, or a part of one, can be taken for. Where it is not ``surely`` a pickle,
        one that does not come to its end is none."""
        if depth > _MOST_DEPTH:
            self.problem("unscanned", member, f"archives in archives, over {_MOST_DEPTH} deep")
            return
        source, head = place.source, place.head
        if not source.size:
            return
        if head[:4] == b"PK\3\4":
            self._zip(place, member, depth)
        elif _ends_as_zip(source):  # there may be anything before it: a tar whose last member it is
            self._lenient_zip(place, member, depth)
        if head[257:262] == b"ustar":
            self._tar(place, member, depth)
        for begins, opened in _COMPRESSED:
            if head.startswith(begins):
                self._packed(place, member, depth, opened)
        if head[:6] == b"\x93NUMPY":
            self._array(place, member)
        elif _may_be_pickle(place, member):
            self._pickles(place, member, surely=surely and head[:1] == b"\x80")

    def warned(self, notes: Sequence[Note]) -> None:
        """Note what reading it warned of."""
        known = {one.finding.what for one in self.sightings}
        member = ""
        for note in notes:
            if note.level == "warning" and note.text not in known:
                self.odd(member, "odd-file", note.text)

    def problem(
        self, kind: Literal["malformed", "unscanned"], member: str, text: str, at: int | None = None
    ) -> None:
        """Note what could not be looked at, once."""
        if not any(one.text == text for one in self.problems):
            self.problems.append(Problem(kind, member, text, at))

    def odd(self, member: str, id: str, what: str, offset: int = 0) -> None:
        """Note what no writer of checkpoints writes."""
        finding = Finding("suspicious", id, what, "", "", offset)
        self.sightings.append(Sighting(member, finding))

    # ------------------------------------------------------------------ pickles

    def _pickles(self, place: Place, member: str, *, surely: bool) -> None:
        found = read_pickles(place.source)
        if not (found.read or surely or found.findings):
            return  # it only began like one
        self.pickles += found.read
        self.arrays += found.arrays
        self.sightings += [Sighting(member, one) for one in found.findings]
        left = place.size - found.end
        if found.error is not None and (found.read == 0 or found.legacy):
            self.problem("malformed", member, found.error.reason, found.error.offset)
        elif left and not found.legacy and not _IN_OLD_TARS.search(member):
            self.odd(member, "trailing-bytes", f"{left:,} bytes after the pickle", found.end)

    def _array(self, place: Place, member: str) -> None:
        """A ``.npy``: with objects in it, it is a pickle behind a header."""
        head = place.head
        wide = head[6:7] != b"\1"
        start = (12 if wide else 10) + int.from_bytes(head[8 : 12 if wide else 10], "little")
        if b"O" in head[10:start] and start < place.size:
            self._pickles(place.window(start, place.size - start, member), member, surely=True)

    def _serialized(self, data: bytes, place: Place, member: str) -> None:
        """The JSON of stable-baselines3, with pickles in base64 (``:serialized:``)."""
        try:
            todo = [json.loads(data)]
        except (ValueError, RecursionError):
            self.problem("malformed", member, "no JSON, which is expected here")
            return
        while todo:
            one = todo.pop()
            if isinstance(one, dict):
                todo += one.values()
                text = one.get(":serialized:")
                if isinstance(text, str):
                    with suppress(binascii.Error, ValueError):
                        self.file(place.holding(Bytes(base64.b64decode(text), member)), member, 1)
            elif isinstance(one, list):
                todo += one

    # ------------------------------------------------------------------ containers

    def _zip(self, place: Place, member: str, depth: int) -> None:
        self.containers += 1
        try:
            directory = ZipDirectory(place.source)
        except ModelctlError as e:
            several = self._zips(place, member, depth)
            if not (several and DATA.fullmatch(place.filename)):  # a rank's file is read by parts
                self.refused(e, member)
            self._lenient_zip(place, member, depth)
            return
        for note in directory.warnings:
            self.odd(member, "odd-zip", note.text)
        for one in directory.members.values():
            name = inside(member, one.name)
            try:
                inner = self._zipped(place, directory, one)
                if inner is not None:
                    self._member(inner, one.name, name, depth)
            except ModelctlError as e:
                self.refused(e, name)

    def _zips(self, place: Place, member: str, depth: int) -> bool:
        """Whether it is several zips, one after the other, as torch.distributed.checkpoint has them
        in the file of a rank; which of them somebody reads, other files say."""
        ends = _ends_of_zips(place.source)
        starts = [0, *ends[:-1]]
        if len(ends) < 2:
            return False
        self.odd(member, "odd-zip", f"{len(ends):,} zips, one after the other")
        for start, end in zip(starts, ends, strict=True):
            name = inside(member, f"at {start:,}")
            self.file(place.window(start, end - start, name), name, depth + 1)
        if ends[-1] != place.size:
            self.odd(member, "odd-zip", f"{place.size - ends[-1]:,} bytes after the last zip")
        return True

    def _zipped(self, place: Place, directory: ZipDirectory, member: Member) -> Place | None:
        """A member as a place of its own; None for one that is compressed and a storage."""
        if member.method == STORED:
            return place.window(member.offset, member.size, member.name)
        if _STORAGES.fullmatch(member.name):
            return None
        data = directory.read(member.name, most_bytes(place.size))
        return place.holding(Bytes(data, f"{place.name}, {member.name}"))

    def _lenient_zip(self, place: Place, member: str, depth: int) -> None:
        """One that is refused, as Python's own reader understands it."""
        with suppress(Exception), place.source.stream() as raw, zipfile.ZipFile(raw) as archive:
            left = max(_LEAST, _RATIO * place.size)
            for info in archive.infolist()[:_MOST_MEMBERS]:
                with suppress(Exception), archive.open(info) as file:
                    head = file.read(_HEAD)
                    if _STORAGES.fullmatch(info.filename) and not _begins_like_any(head):
                        continue
                    data = head + file.read(min(left, most_bytes(place.size)))
                    left -= len(data)
                    inner = place.holding(Bytes(data, f"{place.name}, {info.filename}"))
                    self._member(inner, info.filename, inside(member, info.filename), depth)

    def _member(self, inner: Place, own: str, name: str, depth: int) -> None:
        if own == "data" and inner.head[:1] == b"{":
            self._serialized(inner.source.read(0, inner.size), inner, name)
        is_storage = bool(_STORAGES.fullmatch(own)) and not own.endswith(".pkl")
        surely = not is_storage and bool(_PICKLE_NAME.fullmatch(own))
        self.file(inner, name, depth + 1, surely=surely)

    def _tar(self, place: Place, member: str, depth: int) -> None:
        from ..storage.containers.tarheaders import BoundedTarInfo

        self.containers += 1
        try:
            with (
                place.source.stream() as file,
                tarfile.open(fileobj=file, mode="r:", tarinfo=BoundedTarInfo) as tar,
            ):
                for count, one in enumerate(tar):
                    if count > _MOST_MEMBERS:
                        raise UnreadableError("too many members")
                    if one.isreg() and not one.issparse():
                        inner = place.window(one.offset_data, one.size, one.name)
                        self._member(inner, one.name, inside(member, one.name), depth)
        except ModelctlError as e:
            self.refused(e, member)
        except (tarfile.TarError, ValueError, EOFError, OverflowError) as e:
            self.problem("malformed", member, f"not a tar that can be read: {e}"[:200])

    def _packed(
        self, place: Place, member: str, depth: int, opened: Callable[[IO[bytes]], Any]
    ) -> None:
        """A file that is compressed, as joblib has them; or a tar that is."""
        self.containers += 1
        most = max(_LEAST, _RATIO * place.size)
        with tempfile.TemporaryFile() as temporary:
            try:
                with place.source.stream() as raw, opened(raw) as plain:
                    size = 0
                    while piece := plain.read(_PIECE):
                        size += len(piece)
                        if size > most:
                            raise UnsupportedError("inflates to far more than it is")
                        temporary.write(piece)
            except ModelctlError as e:
                self.refused(e, member)
                return
            except (OSError, EOFError, zlib.error, lzma.LZMAError, ValueError) as e:
                self.problem("malformed", member, f"what is compressed is damaged: {e}"[:200])
            temporary.flush()
            inner = OpenFile(os.dup(temporary.fileno()), f"{place.name}, unpacked")
        place.sources.append(inner)
        self.file(place.holding(inner), inside(member, "unpacked"), depth + 1)

    def refused(self, e: ModelctlError, member: str) -> None:
        """Note an error as what it is: of what contradicts itself, or can't be read here."""
        kind: Literal["malformed", "unscanned"]
        kind = "malformed" if isinstance(e, UnreadableError) else "unscanned"
        text = e.reason if isinstance(e, UnreadableError) else str(e)
        within = e.member if isinstance(e, UnreadableError) else None
        offset = e.offset if isinstance(e, UnreadableError) else None
        self.problem(kind, inside(member, within) if within else member, text, offset)


class Bytes(Source):
    """Bytes that are in memory."""

    def __init__(self, data: bytes, name: str) -> None:
        super().__init__(name, len(data))
        self._data = data

    def _fetch(self, offset: int, size: int) -> bytes:
        return self._data[offset : offset + size]

    def fileno(self) -> int | None:
        return None

    def close(self) -> None:
        self._closed = True


def inside(member: str, name: str) -> str:
    """What a member of a member is called."""
    return f"{member}!{name}" if member else name


def _ends_as_zip(source: Source) -> bool:
    """Whether a zip's end record is at its end: there may be anything before a zip."""
    size = min(source.size, 1 << 16)
    return source.size > 22 and b"PK\5\6" in source.read(source.size - size, size)


def _ends_of_zips(source: Source) -> list[int]:
    """Where zips end, after which another begins, or the last one's end."""
    found = []
    for at in range(0, source.size, _PIECE):
        room = source.read(at, min(_PIECE + 3, source.size - at))
        here = room.find(b"PK\5\6")
        while here >= 0:
            begin = at + here
            if begin + 22 <= source.size:
                comment = int.from_bytes(source.read(begin + 20, 2), "little")
                end = begin + 22 + comment
                after = source.read(end, min(4, source.size - end)) if end < source.size else b""
                if after == b"PK\3\4" or end == source.size:
                    found.append(end)
            here = room.find(b"PK\5\6", here + 1)
        if len(found) > _MOST_MEMBERS:
            break
    return found


def _may_be_pickle(place: Place, member: str) -> bool:
    head = place.head
    if head[:1] == b"\x80":
        return head[1:2] in (b"\0", b"\1", b"\2", b"\3", b"\4", b"\5")
    if head[:4] == b"PK\3\4" or head[257:262] == b"ustar" or head[:9].lstrip()[:1] in (b"{", b"<"):
        return False
    if place.size > _MOST_TEXT:
        return bool(_NAMES_SOMETHING.search(head))
    data = place.source.read(0, place.size)
    return bool(_NAMES_SOMETHING.search(data)) and b"." in data


def _begins_like_any(head: bytes) -> bool:
    known = (b"PK\3\4", b"\x93NUMPY", *(begins for begins, _ in _COMPRESSED))
    return head[:1] == b"\x80" or head.startswith(known) or head[257:262] == b"ustar"


class _Zlib(io.RawIOBase):
    """A stream of zlib, a piece at a time."""

    def __init__(self, raw: IO[bytes]) -> None:
        self._raw, self._inflate = raw, zlib.decompressobj()

    def readable(self) -> bool:
        return True

    def read(self, size: int = -1) -> bytes:
        while not self._inflate.eof:
            data = self._inflate.unconsumed_tail or self._raw.read(_PIECE)
            if not data:
                raise EOFError("it ends too early")
            found = self._inflate.decompress(data, size if size > 0 else _PIECE)
            if found:
                return found
        return b""


# What opens each, by how it begins.
_COMPRESSED: tuple[tuple[bytes, Any], ...] = (
    (b"\x1f\x8b\x08", gzip.open),
    (b"BZh", bz2.open),
    (b"\xfd7zXZ\0", lzma.open),
    (b"\x5d\0\0", lzma.open),
    *((bytes((0x78, level)), _Zlib) for level in (0x01, 0x5E, 0x9C, 0xDA)),
)
