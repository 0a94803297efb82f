"""Pickles that describe tensors which can't be, or storages that are none."""

from __future__ import annotations

import struct
from collections.abc import Iterator
from typing import Any

from ..build.containers import BIAS, STORAGES, legacy, legacy_tensor, tar, tar_members, torch_zip
from ..build.pickles import (
    FALSE,
    NONE,
    ORDERED,
    TRUE,
    call,
    group,
    mapping,
    name,
    number,
    ordered,
    program,
    sequence,
    storage_id,
    tensor,
    text,
)
from ..case import Case, Odd, Refused, one_file

PICKLE = "a/data.pkl"


def saved(what: str, value: bytes, why: str, member: str = PICKLE, at: int | None = -1) -> Case:
    return one_file(what, torch_zip(program(ordered({"w": value}))), Refused(why, member, at))


def cases() -> Iterator[Case]:
    yield from _views()
    yield from _storages()
    yield from _arguments()
    yield from _legacy()
    yield from _old_tars()


def _views() -> Iterator[Case]:
    outside, strange = "outside its storage", "of such strides"
    yield saved("a negative size", tensor("1", (-4,), (1,), numel=4), strange)
    yield saved("a negative stride", tensor("1", (4,), (-1,)), strange)
    yield saved("a negative offset", tensor("1", (4,), offset=-1), "the offset -1")
    yield saved("an offset past the end", tensor("1", (4,), offset=1), outside)
    yield saved("strides past the end", tensor("1", (4,), (2,)), outside)
    yield saved("strides fewer than sizes", tensor("1", (2, 2), (1,), numel=4), "don't go together")
    yield saved("a view of nothing", tensor("1", (1,), numel=0), outside)


def _storages() -> Iterator[Case]:
    def of(what: str, pid: bytes, why: str, member: str = PICKLE, at: int | None = -1) -> Case:
        return saved(what, tensor("1", (4,), storage=pid), why, member, at)

    double = name("torch", "DoubleStorage")
    yield of(
        "doubles over the bytes of floats",
        storage_id("1", 4, double),
        "32 bytes are declared",
        "a/data/1",
    )
    yield of(
        "a class that is no storage",
        storage_id("1", 4, name("torch", "Tensor")),
        "a storage of the class",
    )
    yield of(
        "a class of somebody else",
        storage_id("1", 4, name("acme", "FloatStorage")),
        "a storage of the class",
    )
    yield of(
        "a class that is text", storage_id("1", 4, text("FloatStorage")), "a storage of the class"
    )
    yield of("a negative length", storage_id("1", -4), "elements")
    yield of(
        "a length that is text",
        group(text("storage"), name("torch", "FloatStorage"), text("1"), text("cpu"), text("4")),
        "elements",
    )
    yield of(
        "a key that is none",
        group(text("storage"), name("torch", "FloatStorage"), NONE, text("cpu"), number(4)),
        "is not text",
    )
    yield of(
        "a place that is none",
        group(text("storage"), name("torch", "FloatStorage"), text("1"), NONE, number(4)),
        "is not text",
    )
    yield of(
        "a key that leaves the archive",
        storage_id("../../../../etc/hostname", 4),
        "is missing",
        "a/data/../../../../etc/hostname",
        None,
    )
    yield of("a key that is not there", storage_id("9", 4), "is missing", "a/data/9", None)
    yield of(
        "three parts",
        group(text("storage"), name("torch", "FloatStorage"), text("1")),
        "no storage",
    )
    yield of("text", text("1"), "no storage")
    yield of("another kind", storage_id("1", 4).replace(b"storage", b"modules", 1), "no storage")
    view = storage_id("1", 4, None, "cpu", group(text("v"), number(2), number(4)))
    yield of("a view past the end", view, "outside its storage")
    view = storage_id("1", 4, None, "cpu", group(text("v"), number(-1), number(2)))
    yield of("a view that begins before it", view, "negative offset")
    view = storage_id("1", 4, None, "cpu", text("v"))
    yield of("a view that is text", view, "(key, offset, size)")


def _arguments() -> Iterator[Case]:
    def called(what: str, function: str, *args: bytes) -> Case:
        made = call(name("torch._utils", function), *args)
        return saved(what, made, "with arguments that it does not take")

    size, stride, storage = group(number(4)), group(number(1)), storage_id("1", 4) + b"Q"
    yield called("no arguments", "_rebuild_tensor_v2")
    yield called("too few arguments", "_rebuild_tensor_v2", storage, number(0), size, stride)
    yield called(
        "a storage that is text",
        "_rebuild_tensor_v2",
        text("1"),
        number(0),
        size,
        stride,
        FALSE,
        ORDERED,
    )
    dtype = name("torch", "float33")
    yield called(
        "a dtype that nobody knows",
        "_rebuild_tensor_v3",
        storage,
        number(0),
        size,
        stride,
        FALSE,
        ORDERED,
        dtype,
    )
    bits = mapping(conj=TRUE, other=TRUE)
    made = call(
        name("torch._utils", "_rebuild_tensor_v2"),
        storage,
        number(0),
        size,
        stride,
        FALSE,
        ORDERED,
        bits,
    )
    yield saved("bits that nobody knows", made, "bits other than conj and neg")


def _legacy() -> Iterator[Case]:
    def lies(
        what: str, why: str, at: int | None = -1, member: str | None = None, **parts: Any
    ) -> Case:
        return one_file(f"legacy: {what}", legacy(**parts), Refused(why, member, at))

    zero, one = text("0"), text("1")
    yield lies(
        "a key that no tensor has", "belongs to no tensor", keys=program(sequence(zero, text("7")))
    )
    yield lies("a key twice", "broken list of storage keys", keys=program(sequence(zero, zero)))
    yield lies(
        "a key too few",
        "storages are missing",
        keys=program(sequence(zero)),
    )
    yield lies(
        "keys that are no list", "broken list of storage keys", keys=program(group(zero, one))
    )
    yield lies("a length that differs", "elements here", numel={"1": 5})
    yield lies("a negative length", "elements here", numel={"1": -4})
    yield lies("a length of 2^62", "elements here", numel={"0": 2**62})
    yield lies("another version", "magic number and version", None, version=program(number(1002)))
    big = program(b"}" + text("little_endian") + FALSE + b"s")
    yield one_file(
        "legacy: big-endian", legacy(system=big), Refused("big-endian", error="UnsupportedError")
    )
    huge = ordered({"weight": legacy_tensor("0", 4, 4), "bias": legacy_tensor("1", 2**40)})
    yield lies("a storage past the end", "cut off", data=program(huge))
    yield lies(
        "storages that end early",
        "cut off",
        storages={"0": STORAGES["0"], "1": BIAS[:8]},
        numel={"1": 4},
    )
    yield one_file(
        "legacy: bytes after the last storage", legacy() + b"more", Odd("after the last storage")
    )
    source = group(text("module"), name("os", "system")) + b"Q"
    yield lies("a class without its source", "no storage", data=program(source), member="object")


def _old_tars() -> Iterator[Case]:
    def lies(what: str, why: str, member: str | None, at: int | None, **parts: Any) -> Case:
        return one_file(f"tar: {what}", tar(tar_members(**parts)), Refused(why, member, at))

    for missing in ("storages", "tensors", "pickle"):
        left = {member: data for member, data in tar_members().items() if member != missing}
        yield one_file(f"tar: no {missing}", tar(left), Refused(f"without {missing}"))
    past = struct.pack("<3q", 5, 1, 0)
    yield lies("a tensor past its storage", "outside its storage", "tensors", None, sizes=past)
    negative = struct.pack("<3q", 4, -1, 0)
    yield lies("a negative stride", "of such strides", "tensors", None, sizes=negative)
    yield lies("two storages announced", "broken record", "storages", None, count=2)
    yield lies(
        "a record that is none",
        "broken record",
        "storages",
        None,
        storage=program(number(1)) + program(number(1)),
    )
    yield lies(
        "a persistent id that names nothing",
        "names nothing",
        "pickle",
        -1,
        tree=program(number(99) + b"Q"),
    )
    yield one_file("tar: cut off", tar(tar_members())[:1600], Refused(""))
    yield one_file(
        "tar: other members", tar({"notes.txt": b"hello"}), Refused("tar without a checkpoint")
    )
