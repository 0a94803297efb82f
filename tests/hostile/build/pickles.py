"""A pickle, opcode by opcode (``pickletools`` of the standard library says what each does).

Every function gives the bytes that leave one value on the stack, unless it says otherwise, so that
they nest: ``program(call(name("os", "system"), text("true")))``.
"""

from __future__ import annotations

import math
import struct
from collections.abc import Mapping, Sequence

NONE, TRUE, FALSE = b"N", b"\x88", b"\x89"
EMPTY_DICT, EMPTY_LIST, EMPTY_TUPLE = b"}", b"]", b")"
MARK, POP, STOP = b"(", b"0", b"."


def program(*body: bytes, protocol: int = 2) -> bytes:
    """A whole pickle: what stands in it one after the other, and STOP."""
    return b"\x80" + bytes((protocol,)) + b"".join(body) + STOP


def text(value: str) -> bytes:
    raw = value.encode("utf-8", "surrogatepass")
    return b"X" + struct.pack("<I", len(raw)) + raw


def short_text(value: str) -> bytes:
    """SHORT_BINUNICODE, of protocol 4."""
    raw = value.encode()
    return b"\x8c" + bytes((len(raw),)) + raw


def raw_bytes(value: bytes) -> bytes:
    """BINBYTES, of protocol 3."""
    return b"B" + struct.pack("<I", len(value)) + value


def number(value: int) -> bytes:
    if -(2**31) <= value < 2**31:
        return b"J" + struct.pack("<i", value)
    raw = value.to_bytes(value.bit_length() // 8 + 1, "little", signed=True)
    return b"\x8a" + bytes((len(raw),)) + raw


def real(value: float) -> bytes:
    return b"G" + struct.pack(">d", value)


def name(module: str, attribute: str) -> bytes:
    """GLOBAL: what a module holds under a name."""
    return f"c{module}\n{attribute}\n".encode()


def stack_name(module: str, attribute: str) -> bytes:
    """STACK_GLOBAL, of protocol 4: the name may hold dots."""
    return short_text(module) + short_text(attribute) + b"\x93"


def put(slot: int) -> bytes:
    """Remember the value on the stack; leaves it there."""
    return b"q" + bytes((slot,)) if slot < 256 else b"r" + struct.pack("<I", slot)


def get(slot: int) -> bytes:
    return b"h" + bytes((slot,)) if slot < 256 else b"j" + struct.pack("<I", slot)


def group(*parts: bytes) -> bytes:
    """A tuple."""
    return MARK + b"".join(parts) + b"t"


def sequence(*parts: bytes) -> bytes:
    """A list."""
    return EMPTY_LIST + MARK + b"".join(parts) + b"e"


def entries(items: Mapping[str, bytes]) -> bytes:
    """SETITEMS on the value below: leaves nothing of its own."""
    return MARK + b"".join(text(key) + value for key, value in items.items()) + b"u"


def mapping(**items: bytes) -> bytes:
    """A dict."""
    return EMPTY_DICT + entries(items)


def call(function: bytes, *arguments: bytes) -> bytes:
    return function + group(*arguments) + b"R"


def make(cls: bytes, *arguments: bytes) -> bytes:
    """NEWOBJ: ``cls.__new__(cls, …)``."""
    return cls + group(*arguments) + b"\x81"


def with_state(made: bytes, state: bytes) -> bytes:
    """BUILD: what ``__setstate__`` or the attributes get."""
    return made + state + b"b"


ORDERED = call(name("collections", "OrderedDict"))


def ordered(items: Mapping[str, bytes]) -> bytes:
    """An OrderedDict, which is what a state_dict is."""
    return ORDERED + entries(items)


def storage_id(
    key: str, numel: int, cls: bytes | None = None, location: str = "cpu", *view: bytes
) -> bytes:
    """The persistent id of a storage, not yet loaded. Legacy files have a sixth part, the view."""
    cls = name("torch", "FloatStorage") if cls is None else cls
    return group(text("storage"), cls, text(key), text(location), number(numel), *view)


def tensor(
    key: str,
    shape: Sequence[int],
    stride: Sequence[int] | None = None,
    offset: int = 0,
    numel: int | None = None,
    *,
    storage: bytes | None = None,
    function: str = "_rebuild_tensor_v2",
) -> bytes:
    """A tensor over the storage ``key``: contiguous, and as large as it, where nothing is said."""
    stride = [math.prod(shape[i + 1 :]) for i in range(len(shape))] if stride is None else stride
    numel = math.prod(shape) if numel is None else numel
    return call(
        name("torch._utils", function),
        (storage_id(key, numel) if storage is None else storage) + b"Q",
        number(offset),
        group(*map(number, shape)),
        group(*map(number, stride)),
        FALSE,
        ORDERED,
    )
