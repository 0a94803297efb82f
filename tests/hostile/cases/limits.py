"""Few bytes that ask for much: memory, time, or depth."""

from __future__ import annotations

import gzip
import struct
import tarfile
from collections.abc import Iterator
from typing import Any

from ..build.containers import (
    BIAS,
    CLEAN,
    Entry,
    described,
    safetensors,
    tar,
    tar_members,
    torch_members,
    torch_zip,
    zipped,
)
from ..build.pickles import (
    EMPTY_DICT,
    EMPTY_LIST,
    MARK,
    NONE,
    POP,
    get,
    group,
    mapping,
    name,
    number,
    ordered,
    program,
    put,
    sequence,
    tensor,
    text,
)
from ..case import Case, Fine, Odd, Refused, one_file


def cases() -> Iterator[Case]:
    yield from _pickles()
    yield from _tensors()
    yield from _containers()


def _pickles() -> Iterator[Case]:
    def refused(what: str, why: str, *body: bytes, at: int | None = -1) -> Case:
        return one_file(what, torch_zip(program(*body)), Refused(why, "a/data.pkl", at))

    yield refused("a memo slot far out", "memo slot", NONE, b"r" + struct.pack("<I", 0x7FFFFFF0))
    yield refused("a memo slot that was never filled", "never filled", b"j\xff\xff\xff\x7f")
    for opcode in (b"X", b"B", b"T"):
        length = struct.pack("<I", 0x7FFFFFFF)
        yield refused(f"2 GB of text by {opcode.decode()}", "cut off", opcode + length + b"x", at=2)
    for opcode in (b"\x8d", b"\x8e", b"\x96", b"\x95"):
        length = struct.pack("<Q", 2**62)
        yield refused(f"4 EB by opcode {opcode.hex()}", "cut off", opcode + length + b"x", at=2)
    yield refused("a long integer of 2 GB", "integer of", b"\x8b\xff\xff\xff\x7f" + b"1")
    yield refused("an integer of a million digits", "without an end", b"I" + b"9" * 10**6 + b"\n")
    yield refused("an integer of 60,000 digits", "digits", b"I" + b"9" * 60_000 + b"\n", at=2)
    yield refused("a name without an end", "without an end", b"c" + b"a" * 10**6, at=2)
    yield refused("a million marks", "open marks", MARK * 10**6)
    yield refused(
        "more containers than a checkpoint has", "containers", MARK + EMPTY_LIST * 2_000_001
    )
    yield refused(
        "40,000 lists in each other",
        "nested deeper",
        EMPTY_LIST * 40_000 + b"a" * 39_999,
        at=None,
    )
    yield refused(
        "2 MB of empty lists", "in a pickle of its size", MARK + EMPTY_LIST * 1_999_000 + b"l"
    )
    yield refused("2 MB of tuples", "in a pickle of its size", NONE + b"\x85" * 1_999_000)
    yield refused("100,000 tuples in each other", "nested deeper", NONE + b"\x85" * 10**5, at=None)
    yield refused(
        "objects in each other",
        "nested deeper",
        (name("a", "B") + b")\x81") * 2000 + b"b" * 1999,
        at=None,
    )
    yield refused(
        "a deep tuple as a key", "as a key", EMPTY_DICT + NONE + b"\x85" * 10**5 + NONE + b"s"
    )
    yield refused("a list as a key", "as a key", EMPTY_DICT + EMPTY_LIST + NONE + b"s")
    same = b"".join(number(k * (2**61 - 1)) + NONE for k in range(1, 20_000))
    yield refused("integer keys of one hash", "as a key", EMPTY_DICT + MARK + same + b"u")
    yield one_file(
        "tensors that are on 10^40 paths",
        torch_zip(
            program(
                mapping(model=ordered({"w": tensor("1", (4,), numel=4)}), x=_laughs(tensors=True))
            )
        ),
        Refused("a bomb", late=True),
    )
    yield one_file("lists that spell out 10^40 paths", torch_zip(program(_laughs())), Fine())
    yield one_file(
        "a memo that is used out of order",
        torch_zip(program(NONE, put(3_999_999), POP, NONE)),
        Fine(),
    )


def _laughs(tensors: bool = False) -> bytes:
    """Ten times the same list of ten times the same list of …: few bytes, countless paths."""
    body = sequence(*[tensor("1", (4,), numel=4) if tensors else text("ha")] * 10) + put(0)
    for level in range(1, 40):
        body += POP + sequence(*[get(level - 1)] * 10) + put(level)
    return body


def _tensors() -> Iterator[Case]:
    def refused(what: str, why: str, *args: Any, **fields: Any) -> Case:
        data = program(ordered({"w": tensor("1", *args, **fields)}))
        return one_file(what, torch_zip(data), Refused(why, "a/data.pkl", -1))

    outside = "outside its storage"
    yield refused("a tensor of 10^12 elements over four", outside, (10**6, 10**6), numel=4)
    yield refused("a storage of 2^62 elements", "elements", (4,), numel=2**62)
    more = "more elements than there can be"
    yield refused("sizes whose product overflows", more, (2**32, 2**32, 2**32), numel=4)
    endless = (1 << 1900,) * 10
    yield refused("sizes of 572 digits, expanded", more, endless, (0,) * 10, numel=4)
    yield refused("65 dimensions", "65 dimensions", (1,) * 65)
    expanded = ordered({"w": tensor("1", (10**12,), (0,), numel=4)})
    yield one_file(
        "4 TB by an expanded view", torch_zip(program(expanded)), Refused("a view of", late=True)
    )


def _containers() -> Iterator[Case]:
    bomb = {"deflated": True, "data": bytes(8 << 20)}
    lies = {"deflated": True, "data": bytes(8 << 20), "lies": {"size": 16}}
    yield one_file(
        "a storage that inflates to more than it declares",
        torch_zip(data_1=lies),
        Refused("inflates to more", None, -1, late=True),
    )
    yield one_file(
        "a storage that inflates to more than the pickle says",
        torch_zip(data_1=bomb),
        Refused("inflates to", "a/data/1", -1),
    )
    yield one_file(
        "a data.pkl that inflates to more than it declares",
        torch_zip(data_pkl={**lies, "data": CLEAN + bytes(8 << 20)}),
        Refused("inflates to more", "a/data.pkl", -1),
    )
    yield one_file(
        "a data.pkl of which 8 kB inflate to 8 MB",
        torch_zip(data_pkl={"deflated": True, "data": CLEAN[:-1] + NONE * (8 << 20) + b"."}),
        Refused("would inflate to", "a/data.pkl", -1),
    )
    yield one_file(
        "a data.pkl of over 256 MB",
        torch_zip(data_pkl={"lies": {"size": 300 << 20, "method": 8}}),
        Refused("more than the limit", "a/data.pkl", -1),
    )
    many = [Entry(f"a/x{i}") for i in range(5000)]
    found = Odd("5,000 entries beside what torch.save writes: a/x0, a/x1, a/x2 and 4997 more")
    yield one_file("5,000 empty entries", zipped(*torch_members(), *many), found)
    honest = {"a": described()}
    for length in (99_000_000, 200_000_000):
        expect = Refused("a header of", "header", 0)
        yield one_file(
            f"safetensors: a header of {length:,} bytes", safetensors(honest, length=length), expect
        )
    for length in (2**63, 2**64 - 1):
        expect = Refused("not a checkpoint")
        yield one_file(
            f"safetensors: a header of {length:,} bytes", safetensors(honest, length=length), expect
        )
    for what, header in {
        "100,000 levels": b'{"a":' + b"[" * 100_000 + b"]" * 100_000 + b"}",
        "an offset of 5,000 digits": b'{"a":{"dtype":"F32","shape":[4],"data_offsets":[0,%s]}}'
        % (b"9" * 5000),
    }.items():
        yield one_file(f"safetensors: {what}", safetensors(header), Refused("no JSON", "header", 8))
    yield one_file(
        "safetensors: 65 dimensions",
        safetensors({"a": described(shape=[1] * 65, end=4)}, BIAS[:4]),
        Refused("described by", "header"),
    )
    for count in (10**9, -1):
        yield one_file(
            f"tar: {count:,} storages",
            tar(tar_members(count=count)),
            Refused("records", "storages"),
        )
    for numel in (2**60, -1):
        yield one_file(
            f"tar: a storage of {numel:,} elements",
            tar(tar_members(numel=numel)),
            Refused("ends outside its member", "storages", -1),
        )
    for dims in (2**31 - 1, -1):
        yield one_file(
            f"tar: {dims:,} dimensions",
            tar(tar_members(dims=dims)),
            Refused("dimensions", "tensors", -1),
        )
    for what, key in (("laughs", _laughs()), ("deep", NONE + b"\x85" * 400)):
        listed = program(number(1)) + program(group(key, number(7), name("torch", "FloatTensor")))
        yield one_file(
            f"tar: a tensor called {what}",
            tar(tar_members(tensors=listed + struct.pack("<i4x3q", 1, 4, 1, 0))),
            Refused("is no id", "tensors"),
        )
    yield one_file(
        "tar: a view of two numbers",
        tar(tar_members(storage=program(number(0)) + program(sequence(group(number(1), NONE))))),
        Refused("a broken view", "storages"),
    )
    yield one_file(
        "a gzipped tar with a header of 4 MB", _long_header(4 << 20), Refused("a header of 4,194,3")
    )
    yield one_file(
        "a gzipped tar that inflates a thousandfold",
        tar({"weights.th": bytes(65 << 20)}, "w:gz"),
        Refused("inflates to far more"),
    )


def _long_header(size: int) -> bytes:
    """A tar whose extended header says of itself that it is so long."""
    made = tarfile.TarInfo("h")
    made.type, made.size = tarfile.XGLTYPE, size
    head = made.tobuf(tarfile.GNU_FORMAT)
    return gzip.compress(head + bytes(size) + bytes(1024))
