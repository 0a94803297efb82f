"""Tensors read in one step each: what comes of it is what the opcodes make, one by one."""

from __future__ import annotations

import contextlib
import pickletools
import random
import re
import struct
import sys
import tracemalloc
from collections.abc import Callable, Iterator
from types import FrameType
from typing import Any

import pytest

from modelctl.core.dtypes import BY_NAME
from modelctl.core.nodes import Obj, ordered_dict
from modelctl.core.storages import MemoryStorage, Storage
from modelctl.core.tensors import StorageRef, TensorRef
from modelctl.core.tree import walk
from modelctl.errors import UnreadableError
from modelctl.formats.pytorch.storage_ids import storage_table
from modelctl.pickles import machine
from modelctl.pickles.interpreter import unpickle
from modelctl.pickles.tensor_calls import TensorCalls
from modelctl.pickles.writer import pickle

# Past 256 slots of the memo torch's pickler writes the long form, which is read in one step.
BEFORE = [f"before {i}" for i in range(260)]
MISSING = "999999"
SHAPES: list[tuple[int, ...]] = [(), (3,), (0,), (2, 300), (2, 3, 4), (2, 1, 3, 2), (70_000,)]


class Named(Storage):
    """Bytes that are never read, of a storage with this key."""

    __slots__ = ("key",)

    def __init__(self, key: str, nbytes: int, location: str) -> None:
        super().__init__(nbytes, location)
        self.key = key

    def read(self, start: int, size: int) -> bytes:
        raise AssertionError


def load() -> Callable[[Any], StorageRef]:
    def make(key: str, location: str, nbytes: int, dtype: Any) -> Storage:
        if key == MISSING:
            raise UnreadableError(f"the storage '{key}' is missing")
        return Named(key, nbytes, location)

    return storage_table(make)


def tensors(rng: random.Random, count: int) -> dict[str, TensorRef]:
    """Tensors of many kinds: tied, views of one storage, parameters, without a storage class."""
    made: dict[str, TensorRef] = {}
    for i in range(count):
        dtype = BY_NAME[rng.choice(["float32", "float32", "bool", "int64", "uint16", "complex64"])]
        shape = rng.choice(SHAPES)
        ref = TensorRef(dtype, shape, MemoryStorage(bytes(0)))
        storage = Named("", ref.nbytes + 64, rng.choice(["cpu", "cpu", "cuda:0"]))
        offset = rng.choice([0, 0, 0, 2])
        role: Any = rng.choice([None, None, None, "parameter"]) if dtype.is_floating else None
        ref = TensorRef(dtype, shape, storage, offset, role=role, requires_grad=role and True)
        if made and rng.random() < 0.3:
            other = rng.choice(list(made.values()))
            ref = other if rng.random() < 0.5 else other.replace(shape=other.shape)
        if len(ref.shape) == 2 and rng.random() < 0.5:
            ref = ref.replace(shape=ref.shape[::-1], stride=ref.stride[::-1])
        made[f"layer.{i}.é" if i % 7 == 3 else f"layer.{i}.weight"] = ref
    return made


def pickled(root: Any) -> bytes:
    keys: dict[int, str] = {}
    pieces = pickle(root, lambda storage: keys.setdefault(id(storage), str(len(keys))))
    return b"".join(pieces)


def checkpoint(seed: int, count: int = 12) -> bytes:
    rng = random.Random(seed)
    made = tensors(rng, count)
    optimizer = {i: {"step": 3, "exp_avg": ref} for i, ref in enumerate(tensors(rng, 3).values())}
    return pickled([BEFORE, made, optimizer, ordered_dict(tensors(rng, 2))])


def last_slot(data: bytes) -> int:
    return max(at for op, at, _ in pickletools.genops(data) if op.name == "LONG_BINPUT")


def outcome(data: bytes) -> tuple[Any, ...]:
    """What reading gives, with what is shared, or how it fails."""
    findings: list[Any] = []
    try:
        read = unpickle(data, persistent_load=load(), findings=findings)
    except UnreadableError as e:
        return type(e), str(e), e.offset, findings
    places: dict[int, int] = {}
    nodes = []
    for path, node in walk(read.value):
        shown = None if isinstance(node, dict | list | tuple | Obj) else node
        if isinstance(node, TensorRef):
            at = places.setdefault(id(node.storage), len(places))
            shown = (node.dtype, node.shape, node.stride, node.start, node.requires_grad)
            shown = (*shown, node.role, node.rebuild, at, node.storage.nbytes)
        elif isinstance(node, StorageRef):
            shown = (places.setdefault(id(node.storage), len(places)), node.dtype, node.offset)
        names = tuple(
            ("storage",) if isinstance(part, StorageRef) else (type(part), str(part))
            for label in path
            for part in (label if isinstance(label, tuple) else (label,))
        )
        same = places.setdefault(id(node), len(places)) if shown is None and node != () else None
        nodes.append((names, type(node), shown, same))
    return read.end, nodes, findings


@contextlib.contextmanager
def one_by_one() -> Iterator[None]:
    """The opcodes alone."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(TensorCalls, "read", lambda *_: None)
        yield


def check(data: bytes) -> tuple[Any, ...]:
    found = outcome(data)
    with one_by_one():
        assert found == outcome(data)
    return found


@pytest.fixture
def steps(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many tensors each call of read() took in."""
    taken: list[int] = []
    read = TensorCalls.read

    def counted(self: TensorCalls, *args: Any) -> None:
        before = len(self.slots)
        try:
            read(self, *args)
        finally:
            taken.append(len(self.slots) - before)

    monkeypatch.setattr(TensorCalls, "read", counted)
    return taken


@pytest.mark.parametrize("seed", range(12))
def test_the_same_tree(seed: int, steps: list[int]) -> None:
    data = checkpoint(seed)
    read = unpickle(data, persistent_load=load())
    # all but the first of each function, parameters' own call, and a tie that is a GET
    assert sum(steps) > 4
    assert pickled(read.value) == data
    check(data)


def changed(rng: random.Random, data: bytes) -> bytes:
    """One thing in it is wrong: a byte, a piece, the slot of a GET or PUT."""
    out = bytearray(data)
    at = rng.randrange(len(data) // 2, len(data))
    kind = rng.randrange(6)
    if kind == 0:
        out[at] = rng.randrange(256)
    elif kind == 1:
        out[at : at + rng.randrange(1, 9)] = b""
    elif kind == 2:
        start = rng.randrange(len(data))
        out[at:at] = data[start : start + rng.randrange(1, 80)]
    elif kind == 3:
        del out[at:]
    elif kind == 4:
        number = struct.pack("<I", rng.randrange(250, 500))
        out[at:at] = rng.choice([b"j" + number, b"r" + number, b"h\x03", b"q\x03", b"(", b"0"])
    else:
        slots = list(re.finditer(rb"[jr]..\0\0", data, re.DOTALL))
        found = rng.choice(slots)
        slot = int.from_bytes(found[0][1:], "little") + rng.choice([-300, -9, -3, -2, -1, 1, 2])
        out[found.start() + 1 : found.end()] = struct.pack("<I", max(slot, 0))
    return bytes(out)


@pytest.mark.parametrize("seed", range(20))
def test_the_same_of_what_is_broken(seed: int, steps: list[int]) -> None:
    rng = random.Random(seed)
    data = checkpoint(seed)
    read = sum(len(check(changed(rng, data))) == 3 for _ in range(40))
    assert 0 < read < 40  # some can be read still, some can't
    assert sum(steps) > 40


def test_every_prefix() -> None:
    data = checkpoint(1, 4)
    for end in range(data.index(b"layer.0"), len(data)):
        assert check(data[:end])[0] is not data


def test_a_name_in_another_slot() -> None:
    data = checkpoint(2)
    for found in re.finditer(rb"weightr(....)", data, re.DOTALL):
        slot = struct.unpack("<I", found[1])[0]
        for other in (slot + 1, slot - 1, 3):
            put = struct.pack("<I", other)
            changed = data[: found.start(1)] + put + data[found.end(1) : -1]
            check(changed + b".")
            check(changed + b"j" + found[1] + b"\x86.")


# What a GET takes out of the memo that was not made: the slots of the last tensor but one.
@pytest.mark.parametrize("back", range(18))
def test_what_was_left_out_is_made_when_it_is_asked_for(back: int) -> None:
    data = checkpoint(3)
    last = last_slot(data)
    get = b"j" + struct.pack("<I", last - back)
    kind = check(data[:-1] + get + get + b"\x87.")
    assert kind[0] == len(data) + 11
    value = unpickle(data[:-1] + get + get + b"\x87.", persistent_load=load()).value
    assert value[1] is value[2]  # made once


def test_what_it_is_made_of_may_change() -> None:
    """Slots that tensors were read from are filled anew: what was not made yet is made before."""
    data = pickled([BEFORE, tensors(random.Random(5), 12)])
    slot = next(re.finditer(rb"storageq(.)|storager(....)", data, re.DOTALL))
    put = b"r" + ((slot[1] or b"") + (slot[2] or b"") + b"\0\0\0")[:4]
    last = last_slot(data)
    gets = b"".join(b"j" + struct.pack("<I", last - back) for back in range(60))
    changed = data[:-1] + b"X\3\0\0\0new" + put + b"0(" + gets + b"t\x86."
    found = check(changed)
    assert found[0] == len(changed)
    read = unpickle(changed, persistent_load=load()).value[1]
    assert any(isinstance(part, tuple) and part[:1] == ("storage",) for part in read)
    assert not any(isinstance(part, tuple) and part[:1] == ("new",) for part in read)


def test_a_tensor_outside_its_storage_is_found_at_its_call() -> None:
    data = pickled([BEFORE, {f"w{i}": TensorRef(BY_NAME["float32"], (3,), Named("", 12, "cpu"))
                             for i in range(4)}])  # fmt: skip
    at = data.rindex(b"K\x03\x85")
    short = data[:at] + b"K\x04" + data[at + 2 :]
    found = check(short)
    assert "outside its storage" in found[1]
    assert short[found[2] : found[2] + 1] == b"R"
    assert "missing" in check(data.replace(b"X\1\0\0\x003r", b"X\6\0\0\x00999999r"))[1]


# ------------------------------------------------------------------ work, and what is kept


def many(count: int) -> bytes:
    float32 = BY_NAME["float32"]
    return pickled({f"layer.{i}.weight": TensorRef(float32, (1 + i % 8,), Named("", 32, "cpu"))
                    for i in range(count)})  # fmt: skip


def calls(data: bytes) -> int:
    """How many functions of Python are called."""
    count = 0

    def hear(frame: FrameType, event: str, arg: Any) -> None:
        nonlocal count
        count += event == "call"

    ref = StorageRef(Named("0", 32, "cpu"), BY_NAME["float32"])
    before = sys.getprofile()
    sys.setprofile(hear)
    try:
        unpickle(data, persistent_load=lambda _: ref)
    finally:
        sys.setprofile(before)
    return count


def test_a_tensor_is_a_few_calls() -> None:
    fewer, more = calls(many(1000)), calls(many(3000))
    assert more - fewer < 2000 * 8
    with one_by_one():
        assert calls(many(3000)) - calls(many(1000)) > 2000 * 30


def test_what_a_tensor_takes_while_it_is_read() -> None:
    sizes = []
    for count in (1000, 5000):
        data = many(count)
        tracemalloc.start()
        unpickle(data, persistent_load=load())
        sizes.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
    assert (sizes[1] - sizes[0]) / 4000 < 700


def test_the_memo_is_long_in_order_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    data = many(300)
    slots = last_slot(data)
    monkeypatch.setattr(machine, "MAX_MEMO_ANYHOW", 10)
    monkeypatch.setattr(machine, "MAX_MEMO", slots + 1)
    assert check(data)[0] == len(data)
    monkeypatch.setattr(machine, "MAX_MEMO", slots - 4)
    assert "memo slot" in check(data)[1]
    with pytest.raises(UnreadableError, match="memo slot 10, of at most 10"):
        unpickle(b"Nq\x0a.")


@pytest.mark.parametrize(("limit", "one"), [("MAX_TUPLES", b"N\x85"), ("MAX_TUPLES", b"(t"),
                         ("MAX_CONTAINERS", b"ccollections\nOrderedDict\n)R")])  # fmt: skip
def test_what_is_made_is_counted(limit: str, one: bytes, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine, limit, 50)
    assert unpickle(one * 50 + b".").value is not None
    with pytest.raises(UnreadableError, match="more than 50"):
        unpickle(one * 51 + b".")
