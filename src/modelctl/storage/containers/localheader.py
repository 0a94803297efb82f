"""The header before each entry of a zip, and its extra fields (PKWARE APPNOTE 4.3.7, 4.5)."""

from __future__ import annotations

import struct

LOCAL = struct.Struct("<4s5H3I2H")
# What is looked at first, without what doesn't matter.
_LOCAL_PARTS = struct.Struct("<I2x2H4x3I2H").unpack_from
_LOCAL_SIGNATURE = 0x04034B50
STREAMED = 0x0008
STORED, DEFLATED = 0, 8
EXTRA, _PADDING = struct.Struct("<2H"), b"FB"


def _is_padding(begin: bytes, length: int) -> bool:
    """Whether extra fields of so many bytes are none, or the one that torch pads with."""
    return not length or (
        begin[:2] == _PADDING and int.from_bytes(begin[2:4], "little") == length - EXTRA.size
    )


def are_fields(extra: bytes) -> bool:
    """Whether these are extra fields, whole ones, the padding as the last one: if not, the length
    of all of them is wrong, and whatever is read behind them."""
    at = 0
    while at + EXTRA.size <= len(extra):
        kind, length = EXTRA.unpack_from(extra, at)
        at += EXTRA.size + length
        is_padding = extra.startswith(_PADDING, at - EXTRA.size - length)
        if not kind or (is_padding and at != len(extra)):
            return False
    return at == len(extra)


def agreeing(window: bytes, at: int, raw: bytes, flags: int, crc: int, size: int) -> int | None:
    """The bytes of extra fields of the local header at ``at``, where it is that of a stored entry
    and says what the directory says, or that it is streamed; else None."""
    signature, l_flags, l_method, l_crc, l_packed, l_size, l_name, l_extra = _LOCAL_PARTS(
        window, at
    )
    if (
        signature != _LOCAL_SIGNATURE
        or l_method != STORED
        or l_name != len(raw)
        or not window.startswith(raw, at + LOCAL.size)
        or not _is_padding(window[at + LOCAL.size + l_name :][:4], l_extra)
        or (l_flags ^ flags) & ~STREAMED
        or not (
            l_crc == l_packed == l_size == 0
            if l_flags & STREAMED
            else l_crc == crc and l_packed == l_size == size
        )
    ):
        return None
    return int(l_extra)
