"""The directory of a zip file, read strictly: what two readers could understand differently is
refused (docs/safety.md#zips). Layout: PKWARE APPNOTE 6.3.10, sections 4.3-4.5."""

from __future__ import annotations

import re
import struct
import zlib
from collections.abc import Callable
from typing import NamedTuple

from ...core.notes import Note, warning
from ...core.storages import Source
from ...errors import UnreadableError, UnsupportedError
from .deflate import inflate
from .localheader import DEFLATED as DEFLATED
from .localheader import EXTRA, LOCAL, STREAMED, agreeing, are_fields
from .localheader import STORED as STORED

_END = struct.Struct("<4s4H2IH")
_LOCATOR = struct.Struct("<4sIQI")
_END64 = struct.Struct("<4sQ2H2I4Q")
_CENTRAL = struct.Struct("<4s6H3I5H2I")
# What is looked at first of either, without what doesn't matter.
_CENTRAL_PARTS = struct.Struct("<I4x2H4x3I3H4x2I").unpack_from
_CENTRAL_SIGNATURE = 0x02014B50
_MAX16, _MAX32 = 0xFFFF, 0xFFFFFFFF
_ENCRYPTED = 0x0001 | 0x0040 | 0x2000
_DESCRIPTOR = 24  # bytes that may follow a streamed entry
_DESCRIPTORS = (0, 12, 16, 20, 24)
# torch pads what stands before a storage to so many bytes, with one extra field.
_ALIGNED = 64
_LINK = 0o12  # the kind of file that the upper bits of Unix attributes say
_FOLDER = 0x10  # DOS: torch reads nothing of such an entry, and gives what lay in memory
_MOST_DIRECTORY = 1 << 30
# Structure that is compressed shrinks to a fifth, a twentieth of what is much alike: what would be
# much longer than it is was made to be so.
MOST_RATIO, LITTLE = 64, 256 << 10
# Where entries are this small on average, their local headers are read this much at once.
_SMALL, _WINDOW = 4096, 1 << 16
_PLAIN_NAME = re.compile(rb"\.?[\w\-][\w.\-]*(?:/\.?[\w\-][\w.\-]*)*")


class Member(NamedTuple):
    """An entry: where its bytes lie (``offset``) and how long they are there and inflated."""

    name: str
    method: int
    crc32: int
    compressed: int
    size: int
    header: int
    offset: int


class ZipDirectory:
    """The entries of a zip file by name, in the order of its central directory.

    ``warnings`` says what is odd but can't be misread: bytes after the end record, entries that
    the directory doesn't list, links.

    Raises:
        UnreadableError: broken, or readable in more than one way.
    """

    def __init__(self, source: Source) -> None:
        self.source = source
        self.warnings: list[Note] = []
        start, size, count = self._find()
        self.window, self.window_at = b"", 0  # what was read last of local headers
        self.window_size = _WINDOW if count * _SMALL > start else 0
        self.folder = b""  # of the last entry with a plain name
        self.members = self._entries(start, size, count)
        self.window = b""
        # torch saves without checksums where it is told to: all are 0 then
        self.has_checksums = any(member.crc32 for member in self.members.values())
        self._check_spans(start)

    def _error(
        self, message: str, offset: int | None = None, member: str | None = None
    ) -> Exception:
        return UnreadableError(
            message,
            path=self.source.name,
            member=member,
            offset=offset,
            hint="the file is damaged or was made to mislead: get it again from its source",
        )

    def _find(self) -> tuple[int, int, int]:
        size = self.source.size
        for most in (_END.size, _END.size + _MAX16):  # a comment is rare
            tail_at = max(0, size - most)
            tail = self.source.read(tail_at, size - tail_at)
            at = tail.rfind(b"PK\5\6", 0, max(0, len(tail) - _END.size + 4))
            if at >= 0:
                break
        if at < 0:
            raise UnreadableError(
                "the zip's end record is missing: the file is cut off",
                path=self.source.name,
                offset=size,
                hint="download or save it again",
            )
        end_at = tail_at + at
        _, disk, first_disk, here, count, length, start, comment = _END.unpack_from(tail, at)
        trailing = size - end_at - _END.size - comment
        if trailing < 0:
            raise self._error("the zip's end record is cut off", end_at)
        if trailing:
            self.warnings.append(warning(f"{trailing:,} bytes after the end of the zip"))
        if disk or first_disk or here != count:
            raise self._error("a zip that spans several disks", end_at)
        directory_end = end_at
        if end_at >= _LOCATOR.size:
            locator = self.source.read(end_at - _LOCATOR.size, _LOCATOR.size)
            signature, _, end64_at, _ = _LOCATOR.unpack(locator)
            if signature == b"PK\6\7":
                if end64_at + _END64.size > end_at - _LOCATOR.size:
                    raise self._error("the zip64 locator points nowhere", end_at - _LOCATOR.size)
                fields = _END64.unpack(self.source.read(end64_at, _END64.size))
                if fields[0] != b"PK\6\6":
                    raise self._error("the zip64 locator points nowhere", end_at - _LOCATOR.size)
                if end64_at + 12 + fields[1] != end_at - _LOCATOR.size:
                    raise self._error("bytes between its two end records", end64_at)
                narrow = (count, length, start)
                count, length, start = fields[7], fields[8], fields[9]
                for wide, seen, most in zip(
                    (count, length, start), narrow, (_MAX16, _MAX32, _MAX32), strict=True
                ):
                    if seen not in (most, wide):
                        raise self._error("the two end records disagree", end_at)
                directory_end = end64_at
        if start + length > directory_end or length > _MOST_DIRECTORY:
            raise self._error("the directory lies outside the file", end_at)
        if start + length != directory_end:
            raise self._error("a gap between the directory and the end record", start + length)
        if count * _CENTRAL.size > length:
            raise self._error(f"the directory can't hold {count:,} entries", start)
        return start, length, count

    def _entries(self, start: int, length: int, count: int) -> dict[str, Member]:
        data = self.source.read(start, length)
        members: dict[str, Member] = {}
        folded: set[str] = set()  # names without case, where that makes another name of them

        def is_taken(name: str) -> bool:
            fold = name.casefold()
            return fold in members or fold in folded

        at = 0
        for _ in range(count):
            member, ahead = self._usual(data, at, start) or self._entry(data, at, start, is_taken)
            name = member.name
            fold = name.casefold()
            if fold in members or fold in folded:
                raise self._error("two entries of one name", start + at, name)
            if fold != name:
                folded.add(fold)
            members[name] = member
            at = ahead
        if at != length:
            raise self._error("bytes after the last directory entry", start + at)
        return members

    def _usual(self, data: bytes, at: int, start: int) -> tuple[Member, int] | None:
        """The entry at ``at``, and where the next one lies, if it is as torch writes them: stored,
        of 32-bit sizes, under a plain name, with a local header that agrees or is streamed. None
        leaves it to :meth:`_entry`, which knows what else there is, and what is wrong.
        """
        named = at + _CENTRAL.size
        if named > len(data):
            return None
        (
            signature,
            flags,
            method,
            crc,
            packed,
            size,
            n_name,
            n_extra,
            n_comment,
            external,
            header,
        ) = _CENTRAL_PARTS(data, at)
        raw = data[named : named + n_name]
        ahead = named + n_name + n_extra
        offset = header + LOCAL.size + n_name
        if (
            signature != _CENTRAL_SIGNATURE
            or method != STORED
            or flags & _ENCRYPTED
            or packed != size
            or size == _MAX32
            or header == _MAX32
            or ahead > len(data)
            or offset + size > start
            or external >> 28 == _LINK
            or external & _FOLDER
            or not self._is_plain(raw)
        ):
            return None
        ahead += n_comment
        if self.source.costly and not self.source.has(header, LOCAL.size + n_name):
            after = _CENTRAL_PARTS(data, ahead)[-1] if ahead + _CENTRAL.size <= len(data) else start
            aligned = offset + EXTRA.size + -(offset + EXTRA.size) % _ALIGNED
            if after - aligned - size not in _DESCRIPTORS:
                return None
            member = Member(raw.decode("ascii"), method, crc, size, size, header, aligned)
            self._presume(member, raw, flags)
            return member, ahead
        near = header - self.window_at
        if near < 0 or near + LOCAL.size + n_name + EXTRA.size > len(self.window):
            near = self._near(header, LOCAL.size + n_name + EXTRA.size)
        extra = agreeing(self.window, near, raw, flags, crc, size)
        if extra is None or offset + extra + size > start:
            return None
        return Member(raw.decode("ascii"), method, crc, size, size, header, offset + extra), ahead

    def _presume(self, member: Member, raw: bytes, flags: int) -> None:
        """Take it that a file far away has the padding that torch writes, which the next entry
        agrees with; the local header is looked at with the bytes that it is for."""

        def check(local: bytes) -> None:
            extra = agreeing(local, 0, raw, flags, member.crc32, member.size)
            if extra is None or extra != len(local) - LOCAL.size - len(raw):
                raise self._error(
                    "its local header and the directory disagree", member.header, member.name
                )

        source, at = self.source.outermost(0)
        payload = at + member.offset
        source.guard(at + member.header, payload, payload + member.size, check)

    def _is_plain(self, raw: bytes) -> bool:
        """A name of ASCII letters and the like; most are numbers in the folder of the last one."""
        folder = self.folder
        if raw.startswith(folder) and raw[len(folder) :].isdigit():
            return True
        if _PLAIN_NAME.fullmatch(raw) is None or raw.find(b"..") >= 0:
            return False
        self.folder = raw[: raw.rfind(b"/") + 1]
        return True

    def _entry(
        self, data: bytes, at: int, start: int, is_taken: Callable[[str], bool]
    ) -> tuple[Member, int]:
        """The entry at ``at`` of the directory, and where the next one lies."""
        if at + _CENTRAL.size > len(data):
            raise self._error("the directory is cut off", start + at)
        fields = _CENTRAL.unpack_from(data, at)
        signature, _, _, flags, method, _, _, crc = fields[:8]
        packed, size, n_name, n_extra, n_comment = fields[8:13]
        attributes, header = fields[15], fields[16]
        if signature != b"PK\1\2":
            raise self._error("not a directory entry", start + at)
        raw = data[at + 46 : at + 46 + n_name]
        extra = data[at + 46 + n_name : at + 46 + n_name + n_extra]
        if len(raw) != n_name or len(extra) != n_extra:
            raise self._error("the directory is cut off", start + at)
        name = self._name(raw, start + at)
        if is_taken(name):
            raise self._error("two entries of one name", start + at, name)
        size, packed, header = self._wide(extra, size, packed, header, name)
        if flags & _ENCRYPTED:
            raise self._error("encrypted", start + at, name)
        if method not in (STORED, DEFLATED):
            raise UnsupportedError(f"{self.source.name}, {name}: zip compression method {method}")
        if method == STORED and packed != size:
            raise self._error("stored, but of two sizes", start + at, name)
        if header + LOCAL.size + n_name + packed > start:
            raise self._error("lies outside the file", header, name)
        if size and (attributes & _FOLDER or name.endswith("/")):
            raise self._error(f"called a folder, of {size:,} bytes", start + at, name)
        if attributes >> 28 == _LINK:
            self.warnings.append(warning(f"{name} is a symbolic link: its text is not followed"))
        offset = self._payload(raw, name, header, flags, method, crc, packed, size)
        if offset + packed > start:
            raise self._error("lies outside the file", header, name)
        member = Member(name, method, crc, packed, size, header, offset)
        return member, at + 46 + n_name + n_extra + n_comment

    def _name(self, raw: bytes, at: int) -> str:
        if _PLAIN_NAME.fullmatch(raw) and b".." not in raw:
            return raw.decode("ascii")
        try:
            name = raw.decode("utf-8")
        except UnicodeDecodeError:
            name = raw.decode("cp437")
        parts = name.rstrip("/").split("/")
        if (
            not name
            or name.startswith("/")
            or "\\" in name
            or "\0" in name
            or name[1:2] == ":"
            or any(part in ("", ".", "..") for part in parts)
        ):
            raise self._error(f"an entry's name leaves the archive: {name!r}", at)
        return name

    def _wide(
        self, extra: bytes, size: int, packed: int, header: int, name: str
    ) -> tuple[int, int, int]:
        """The 64-bit values of those fields that are all ones (APPNOTE 4.5.3)."""
        wanted = [size == _MAX32, packed == _MAX32, header == _MAX32]
        if not any(wanted):
            return size, packed, header
        at = 0
        while at + 4 <= len(extra):
            kind, length = struct.unpack_from("<HH", extra, at)
            if kind == 1:
                values = list(
                    struct.unpack_from(f"<{min(length, len(extra) - at - 4) // 8}Q", extra, at + 4)
                )
                fields = [size, packed, header]
                for i, is_wide in enumerate(wanted):
                    if is_wide:
                        if not values:
                            break
                        fields[i] = values.pop(0)
                else:
                    return fields[0], fields[1], fields[2]
                break
            at += 4 + length
        raise self._error("its zip64 sizes are missing", member=name)

    def _payload(
        self,
        raw: bytes,
        name: str,
        header: int,
        flags: int,
        method: int,
        crc: int,
        packed: int,
        size: int,
    ) -> int:
        near = self._near(header, LOCAL.size + len(raw))
        local = self.window[near : near + LOCAL.size + len(raw)]
        signature, _, l_flags, l_method, _, _, l_crc, l_packed, l_size, n_name, n_extra = (
            LOCAL.unpack_from(local)
        )
        if signature != b"PK\3\4":
            raise self._error("its local header is not where the directory says", header, name)
        if local[LOCAL.size :] != raw or n_name != len(raw):
            raise self._error("has another name in its local header", header, name)
        if l_method != method or (l_flags ^ flags) & ~STREAMED:
            raise self._error("its local header and the directory disagree", header, name)
        # A streamed entry has zeros here, its sizes follow it; torch's zip64 ones have ones.
        for here, there in ((l_crc, crc), (l_packed, packed), (l_size, size)):
            known = here != _MAX32 and (here or not l_flags & STREAMED)
            if known and here != there:
                raise self._error("its local header and the directory disagree", header, name)
        payload = header + LOCAL.size + int(n_name) + int(n_extra)
        near = self._near(header, min(payload, self.source.size) - header)
        if not are_fields(self.window[near + len(local) :][:n_extra]):
            raise self._error("its extra fields don't have the length that they say", header, name)
        return payload

    def _near(self, offset: int, size: int) -> int:
        """Where the bytes at ``offset`` are in the window, which is moved there if they are not:
        one read for the headers of many entries, where those are small."""
        at = offset - self.window_at
        if at < 0 or at + size > len(self.window):
            length = max(size, min(self.window_size, self.source.size - offset))
            self.window, self.window_at, at = self.source.read(offset, length), offset, 0
        return at

    def _check_spans(self, directory: int) -> None:
        if self._is_seamless(directory):
            return
        spans = [(m.header, m.offset + m.compressed, m.name) for m in self.members.values()]
        spans.sort()
        reached = 0
        for begin, end, name in [*spans, (directory, directory, "")]:
            if begin < reached:
                raise self._error("overlaps the entry before it", begin, name)
            if begin - reached > _DESCRIPTOR:
                lost = f"{begin - reached:,} bytes at {reached:,} belong to no entry of the zip"
                self.warnings.append(warning(lost))
            reached = end

    def _is_seamless(self, directory: int) -> bool:
        """Whether the entries lie in the order of the directory, one after the other."""
        reached = 0
        for member in self.members.values():
            if not reached <= member.header <= reached + _DESCRIPTOR:
                return False
            reached = member.offset + member.compressed
        return reached <= directory <= reached + _DESCRIPTOR

    def crc32(self, member: Member) -> int | None:
        """The checksum of an entry; None where none was recorded, as by ``skip_data`` of torch,
        which leaves storages to be filled in later."""
        return member.crc32 or None

    def read(self, name: str, most: int) -> bytes:
        """An entry's bytes, inflated, with its CRC checked where it has one.

        Raises:
            UnreadableError: longer than ``most``, broken, or its CRC is wrong.
        """
        member = self.members[name]
        if member.size > most:
            raise self._error(
                f"{member.size:,} bytes, more than the limit of {most:,}", member.header, name
            )
        if member.method == STORED:
            data = self.source.read(member.offset, member.size)
        else:
            if member.size > LITTLE and member.size > MOST_RATIO * member.compressed:
                raise self._error(
                    f"{member.compressed:,} bytes would inflate to {member.size:,}: "
                    "a decompression bomb?",
                    member.header,
                    name,
                )
            try:
                data = b"".join(inflate(self.source, member.offset, member.compressed, member.size))
            except UnreadableError as e:
                raise e.located(self.source.name, name) from None
        if self.has_checksums and zlib.crc32(data) != member.crc32:
            raise self._error("its bytes don't have the CRC that the zip records", None, name)
        return data
