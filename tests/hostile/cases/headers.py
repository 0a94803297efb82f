"""safetensors files whose header is not what it should be."""

from __future__ import annotations

import struct
from collections.abc import Iterator
from typing import Any

from ..build.containers import BIAS, described, safetensors
from ..case import Case, Fine, Odd, Refused, one_file

TWO = {"a": described(), "b": described(begin=16, end=32)}
WHOLE = safetensors(TWO, BIAS * 2)


def cases() -> Iterator[Case]:
    yield from _offsets()
    yield from _fields()
    yield from _json()
    yield from _names()


def file(what: str, header: Any, why: str, data: bytes = BIAS, at: int | None = None) -> Case:
    return one_file(what, safetensors(header, data), Refused(why, "header", at))


def _offsets() -> Iterator[Case]:
    def two(begin: int, end: int) -> Any:
        return {"a": described(), "b": described(begin=begin, end=end)}

    def spans(what: str, header: Any, why: str, data: bytes, at: int | None) -> Case:
        return one_file(what, safetensors(header, data), Refused(why, None, at))

    yield spans("tensors that overlap", two(8, 24), "overlaps another", BIAS * 2, -1)
    yield spans("tensors over the same bytes", two(0, 16), "overlaps another", BIAS, -1)
    yield spans("a hole", two(24, 40), "leaves a hole", BIAS * 3, -1)
    yield spans(
        "a hole before the first", {"a": described(begin=8, end=24)}, "leaves a hole", BIAS * 2, -1
    )
    yield spans("bytes after the last", TWO, "the file at", BIAS * 3, None)
    yield spans("only bytes", {}, "the file at", BIAS, None)
    yield file("an end past the file", TWO, "the file at")
    yield file("a begin after its end", {"a": described(begin=16, end=0)}, "described by")
    yield file("a negative begin", {"a": described(begin=-16, end=0)}, "described by")
    yield file("an offset that is a float", {"a": described(begin=0.0)}, "described by")
    yield file("an offset that is true", {"a": described(begin=False)}, "described by")
    yield file("three offsets", {"a": {**described(), "data_offsets": [0, 8, 16]}}, "described by")


def _fields() -> Iterator[Case]:
    unsupported = "UnsupportedError"
    yield one_file(
        "a dtype that nobody knows",
        safetensors({"a": described("F33")}),
        Refused("the dtype F33", error=unsupported),
    )
    yield file("a dtype that is no name", {"a": described("F3\x1b[2J")}, "described by")
    yield file("a dtype that is no text", {"a": described(7)}, "described by")  # type: ignore[arg-type]
    yield file("a size that differs", {"a": described(shape=(5,))}, "bytes by its shape")
    yield file("a negative size", {"a": described(shape=(-2, -2))}, "described by")
    yield file("a size that is a float", {"a": described(shape=[4.0])}, "described by")
    yield file("a size that is true", {"a": described("U8", [True], 0, 1)}, "described by", b"x")
    yield file("a shape that is text", {"a": described(shape="4")}, "described by")
    yield file(
        "sizes whose product overflows",
        {"a": described(shape=(2**32, 2**32), end=0)},
        "described by",
        b"",
    )
    yield one_file(
        "an odd number of 4-bit values",
        safetensors({"a": described("F4", (3,), 0, 2)}, b"ab"),
        Refused("bytes by its shape", "header"),
    )
    yield one_file(
        "rows of an odd number of 4-bit values",
        safetensors({"a": described("F4", (2, 3), 0, 3)}, b"abc"),
        Refused("F4 of the shape [2, 3]", error=unsupported),
    )
    for field in ("dtype", "shape", "data_offsets"):
        header = {"a": {key: value for key, value in described().items() if key != field}}
        yield file(f"no {field}", header, "described by")
    yield file("a tensor that is a list", {"a": []}, "described by")
    yield file(
        "metadata that are no text",
        {"__metadata__": {"epoch": 3}, "a": described()},
        "other than strings",
    )
    yield file(
        "metadata that are a list", {"__metadata__": [], "a": described()}, "other than strings"
    )
    for what, record in {
        "that is no JSON": "{",
        "of 5,000 digits": "9" * 5000,
        "of 100,000 levels": "[" * 100_000 + "]" * 100_000,
        "of 400 levels": "[" * 400 + "]" * 400,
    }.items():
        yield one_file(
            f"a record of ours {what}",
            safetensors({"__metadata__": {"modelctl.freeze": record}, "a": described()}),
            Odd("the record modelctl.freeze"),
        )


def _json() -> Iterator[Case]:
    tensor = b'{"dtype":"F32","shape":[4],"data_offsets":[0,16]}'
    yield file("a key twice", b'{"a":%s,"a":%s}' % (tensor, tensor), "the key 'a' twice", at=8)
    yield file(
        "a field twice",
        b'{"a":{"dtype":"F64","dtype":"F32","shape":[4],"data_offsets":[0,16]}}',
        "the key 'dtype' twice",
        at=8,
    )
    yield file("text that is not UTF-8", b'{"\xff\xfe":%s}' % tensor, "not UTF-8", at=-1)
    yield file(
        "a number that is none",
        b'{"a":{"dtype":"F32","shape":[NaN],"data_offsets":[0,16]}}',
        "NaN is no JSON",
        at=8,
    )
    yield file("no end", b'{"a":' + tensor, "no JSON", at=8)
    yield one_file("spaces before it", safetensors(b"   {}", b""), Fine())
    yield one_file(
        "more than spaces before it", safetensors(b"  \0{}", b""), Refused("not a checkpoint")
    )
    yield file("a list", b"[]", "does not begin with", b"", at=8)
    yield one_file("a length and no header", struct.pack("<Q", 8), Refused("not a checkpoint"))
    yield one_file("cut off in the length", safetensors({})[:7], Refused("not a checkpoint"))
    yield one_file("cut off in the header", WHOLE[:40], Refused("a header of", "header", 0))
    yield one_file("cut off by a byte", WHOLE[:-1], Refused("the file at", "header"))
    wrong = bytes((WHOLE[0], WHOLE[1] ^ 2, *WHOLE[2:]))
    yield one_file("a wrong bit in the length", wrong, Refused("a header of", "header", 0))


def _names() -> Iterator[Case]:
    """Names are text: what they would do elsewhere is no matter here."""
    for what, name in {
        "control characters": "a\x1b[2J\x1b]0;title\x07\n",
        "a path": "../../../tmp/x",
        "text that runs backwards": "\u202eexe.thgiew",
        "nothing": "",
        "a million letters": "a" * 10**6,
    }.items():
        yield one_file(f"a name of {what}", safetensors({name: described()}), Fine())
