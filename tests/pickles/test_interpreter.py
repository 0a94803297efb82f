# ruff: noqa: E501 - tables of pickles
"""The pickle interpreter against the real pickle module: same values, and nothing is run."""

from __future__ import annotations

import collections
import contextlib
import math
import pickle
import pickletools
import struct
import time
from typing import Any

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from modelctl.core.checkpoint import Finding
from modelctl.core.nodes import Global, Obj
from modelctl.errors import UnreadableError
from modelctl.pickles import interpreter
from modelctl.pickles.interpreter import MAX_DEPTH, unpickle
from modelctl.pickles.machine import MAX_MARKS, MAX_MEMO_ANYHOW, CutOffError

_MADE = {"set": set, "frozenset": frozenset, "bytearray": bytearray, "bytes": bytes}


def plain(node: Any) -> Any:
    """An inert tree as the values that it stands for."""
    if isinstance(node, Obj):
        name = str(node.func)
        if name == "collections.OrderedDict":
            return collections.OrderedDict((plain(k), plain(v)) for k, v in node.entries.items())
        assert name.startswith("builtins."), name
        return _MADE[name.partition(".")[2]](*(plain(arg) for arg in node.args))
    if isinstance(node, dict):
        return {plain(key): plain(value) for key, value in node.items()}
    if isinstance(node, list | tuple):
        return type(node)(plain(value) for value in node)
    return node


def same(a: Any, b: Any) -> bool:
    """Equality that tells 1 from True from 1.0, knows nan, and minds the order of dicts."""
    if type(a) is not type(b):
        return False
    if isinstance(a, float):
        return struct.pack("d", a) == struct.pack("d", b) or (math.isnan(a) and math.isnan(b))
    if isinstance(a, dict):
        return len(a) == len(b) and all(
            same(k, j) and same(v, w) for (k, v), (j, w) in zip(a.items(), b.items(), strict=True)
        )
    if isinstance(a, list | tuple):
        return len(a) == len(b) and all(map(same, a, b))
    if isinstance(a, set | frozenset):
        return {(type(x), x) for x in a} == {(type(x), x) for x in b}
    return a == b


INTEGERS = st.one_of(
    st.integers(),
    st.integers(-(2**31) - 2, 2**32 + 2),
    st.sampled_from([2**n + d for n in (7, 8, 15, 16, 31, 32, 63, 64, 2000) for d in (-1, 0, 1)]),
)
KEYS = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-(2**63), 2**63 - 1),
    st.floats(allow_nan=False),
    st.text(max_size=8),
    st.binary(max_size=4),
    st.tuples(st.integers(0, 9), st.text(max_size=2)),
)
SCALARS = st.one_of(
    st.none(),
    st.booleans(),
    INTEGERS,
    st.floats(),
    st.text(),
    st.text(min_size=250, max_size=260),
    st.binary(max_size=300),
    st.binary(max_size=9).map(bytearray),
    st.sets(st.integers(0, 999)),
    st.frozensets(st.text(max_size=3)),
)
VALUES = st.recursive(
    SCALARS,
    lambda inner: st.one_of(
        st.lists(inner, max_size=6),
        st.lists(inner, max_size=5).map(tuple),
        st.dictionaries(KEYS, inner, max_size=6),
        st.dictionaries(st.text(max_size=4), inner, max_size=4).map(collections.OrderedDict),
        inner.map(lambda x: [x, x, (x, x)]),
    ),
    max_leaves=12,
)


@pytest.mark.parametrize("protocol", range(6))
@settings(max_examples=60, deadline=None)
@given(value=VALUES)
@example(value={"a": [list(range(1001)), {i: i for i in range(1001)}]})
@example(value="\ud800\x85\u2028\r\n'\"\\")
@example(value=("'", '"', "\\", "a\nb", b"a'b\"\\\n\x00\xff"))
def test_same_as_pickle(value: Any, protocol: int) -> None:
    data = pickle.dumps(value, protocol)
    read = unpickle(data)
    assert same(plain(read.value), value)
    assert read.end == len(data)
    assert read.findings == []


def test_every_opcode_is_known() -> None:
    known = {op.code for op in pickletools.opcodes}
    ours = {chr(code) for code in range(256) if interpreter._TABLE[code] is not None}
    assert ours == known


# Opcodes that today's pickler never writes, as older ones did.
@pytest.mark.parametrize(
    "data",
    [
        b"I01\n.",
        b"I00\n.",
        b"I-5\n.",
        b"L12345678901234567890L\n.",
        b"F1.5\n.",
        b"S'a\\x00\\n\\'b'\n.",
        b'S"it\'s"\n.',
        b"T\x03\x00\x00\x00abc.",
        b"U\x03abc.",
        b"Va\\u00e9\\U0001f600\\u000a\n.",
        b"(I1\nI2\nl.",
        b"(I1\nI2\nd.",
        b"N(I1\nI2\n1.",
        b"I1\n2\x86.",
        b"(I1\nI2\nI3\ntp5\n0g5\n.",
        b"]r\xff\xff\x00\x00K\x01aj\xff\xff\x00\x00\x86.",
        b"\x80\x04\x95\x03\x00\x00\x00\x00\x00\x00\x00K\x01\x94.",
        b"\x8d\x02\x00\x00\x00\x00\x00\x00\x00ab.",
        b"\x8e\x02\x00\x00\x00\x00\x00\x00\x00ab.",
        b"\x8b\x03\x00\x00\x00\x01\x02\xff.",
        b"\x8a\x00.",
        b"K\x01\x94K\x02\x94\x86h\x00h\x01\x87.",
        b"]\x94(h\x00e.",
    ],
    ids=repr,
)
def test_old_opcodes(data: bytes) -> None:
    expected = pickle.loads(data)
    value = unpickle(data).value
    if value and isinstance(value, list) and value[0] is value:
        assert expected[0] is expected
    else:
        assert same(plain(value), expected)


def test_python_2_strings() -> None:
    # text where it is ASCII, as torch reads it; bytes where it is not
    assert unpickle(b"U\x03abc.").value == "abc"
    assert unpickle(b"U\x02\xc3\xa9.").value == b"\xc3\xa9"


def test_shared_values_stay_one() -> None:
    shared: list[Any] = [1]
    read = unpickle(pickle.dumps({"a": shared, "b": (shared,)}, 2)).value
    assert read["a"] is read["b"][0]


def test_a_cycle_is_read() -> None:
    loop: dict[str, Any] = {}
    loop["self"] = loop
    for protocol in range(6):
        read = unpickle(pickle.dumps(loop, protocol)).value
        assert read["self"] is read


def test_python_2_names_are_translated() -> None:
    assert unpickle(b"\x80\x02c__builtin__\nset\n.").value == Global("builtins", "set")
    assert unpickle(b"\x80\x02ccopy_reg\n_reconstructor\n.").value.module == "copyreg"


# ------------------------------------------------------------------ broken pickles


@pytest.mark.parametrize("protocol", range(6))
def test_every_prefix_is_cut_off(protocol: int) -> None:
    value = {"key": [1, 300, 70_000, 2**40, 1.5, "text", b"raw", None, True, (1, 2, 3, 4)]}
    data = pickle.dumps([value, value, {1, 2}], protocol)
    for end in range(len(data)):
        with pytest.raises(CutOffError):
            unpickle(data[:end])


@settings(max_examples=300, deadline=None)
@given(data=st.binary(max_size=60))
def test_noise_is_unreadable_or_read(data: bytes) -> None:
    with contextlib.suppress(UnreadableError):
        assert unpickle(data).end <= len(data)


@settings(max_examples=200, deadline=None)
@given(
    value=VALUES, where=st.integers(0, 10_000), byte=st.integers(0, 255), protocol=st.integers(0, 5)
)
def test_one_wrong_byte(value: Any, where: int, byte: int, protocol: int) -> None:
    data = bytearray(pickle.dumps(value, protocol))
    data[where % len(data)] = byte
    with contextlib.suppress(UnreadableError):
        unpickle(bytes(data))


OPCODES = [op.code.encode("latin-1") for op in pickletools.opcodes]
PIECES = st.one_of(
    st.sampled_from(OPCODES),
    st.sampled_from(
        [
            b"K\x00", b"X\x01\x00\x00\x00a", b"q\x00", b"h\x00", b"\x8c\x01a", b"C\x01a", b"U\x01a",
            b"ctorch._utils\n_rebuild_tensor_v2\n", b"ccollections\nOrderedDict\n", b")R", b"(t",
            b"c_codecs\nencode\n", b"ctorch._utils\n_rebuild_parameter\n", b"ctorch._tensor\n_rebuild_from_type_v2\n",
            b"ctorch\nSize\n", b"ccopyreg\n_reconstructor\n", b"cos\nsystem\n", b"I1\n", b"p1\n", b"g1\n",
        ]
    ),
)  # fmt: skip


@settings(max_examples=1500, deadline=None)
@given(pieces=st.lists(PIECES, max_size=25))
def test_any_opcodes_are_unreadable_or_read(pieces: list[bytes]) -> None:
    with contextlib.suppress(UnreadableError):
        unpickle(b"".join(pieces) + b".")


@pytest.mark.parametrize(
    "data",
    [
        b"\xff.",
        b"\x80\x06N.",
        b".",
        b"(N.",
        b"t.",
        b"0.",
        b"h\x00.",
        b"g7\n.",
        b"Np0\ng-1\n.",
        b"j\x01\x00\x00\x00.",
        b"Np-1\n.",
        b"Ix\n.",
        b"Fx\n.",
        b"Sx\n.",
        b"S'x\n.",
        b"X\x01\x00\x00\x00\xff.",
        b"T\xff\xff\xff\xff.",
        b"\x8b\xff\xff\xff\xff.",
        b"]Na}}s.",
        b"}](Ns.",
        b"}(Nu.",
        b"(NNNd.",
        b"NNa.",
        b"NN}s.",
        b"NNR.",
        b"(o.",
        b"](N\x90.",
        b"\x97.",
        b"\x98.",
        b"NQ.",
        b"Px\n.",
        b"K\x05K\x01b.",
        b"C\x01aC\x01b\x93.",
        b"c\xff\nx\n.",
        b"ccollections\nOrderedDict\n(](K\x01et\x85R.",
        b"}(](Nu.",
        b"ctorch._utils\n_rebuild_tensor_v2\n)R.",
        b"ctorch._utils\n_rebuild_parameter\nN\x85R.",
        b"c_codecs\nencode\nX\x03\x00\x00\x00\xe2\x82\xacX\x06\x00\x00\x00latin1\x86R.",
    ],
    ids=repr,
)
def test_broken(data: bytes) -> None:
    with pytest.raises(UnreadableError) as caught:
        unpickle(data)
    assert caught.value.offset is not None
    assert 0 <= caught.value.offset <= len(data)


# ------------------------------------------------------------------ limits


def laughs(levels: int = 60) -> bytes:
    """A list that holds ten times one that holds ten times one …: small, and endless to print."""
    data = b"](" + b"K\x01" * 10 + b"eq\x00"
    for level in range(1, levels):
        data += b"0](" + b"h" + bytes([level - 1])
        data += (b"h" + bytes([level - 1])) * 9 + b"eq" + bytes([level])
    return data


def over(monkeypatch: pytest.MonkeyPatch, name: str, value: int, data: bytes) -> None:
    unpickle(data)
    monkeypatch.setattr(interpreter, name, value)
    with pytest.raises(UnreadableError, match="more than"):
        unpickle(data)


def test_limit_of_opcodes(monkeypatch: pytest.MonkeyPatch) -> None:
    assert interpreter.MAX_OPCODES == 20_000_000
    over(monkeypatch, "MAX_OPCODES", 99, b"N" + b"0N" * 99 + b".")


def test_limit_of_opcodes_that_are_deflated(monkeypatch: pytest.MonkeyPatch) -> None:
    """What few bytes of a file inflate to makes no more than they and some."""
    assert interpreter.OPCODES == 2_000_000
    monkeypatch.setattr(interpreter, "OPCODES", 100)
    data = b"N" + b"0N" * 99 + b"."
    assert unpickle(data, on_disk=110).value is None
    with pytest.raises(UnreadableError, match="more than 150 opcodes"):
        unpickle(data, on_disk=50)


@pytest.mark.parametrize(
    "line",
    [
        *("I010", "I0x10", "I1_0", "I 10", "I+5", "I10 ", "I08", "I-0", "I-01", "I000", "I\u0663"),
        *("L010L", "L1_0L", "L5LL", "F1_0", "F 1", "F1.5 ", "F1e400", "F0x10", "F+1", "FInfinity"),
    ],
)
def test_numbers_that_readers_take_for_others(line: str) -> None:
    """``010`` is 8 for C's unpickler, an error for Python's, and would be 10."""
    with pytest.raises(UnreadableError, match="not a"):
        unpickle(f"{line}\n.".encode())


@pytest.mark.parametrize("value", [0, 7, -10, 2**70, -(2**70), 1e16, -1.5e-07, 3.0, 1e300, True])
def test_numbers_as_they_are_written(value: float) -> None:
    found = unpickle(pickle.dumps(value, 0)).value
    assert (type(found), found) == (type(value), value)


def test_limit_of_names() -> None:
    names = [b"ca\nb%d\n0" % i for i in range(50_001)]
    with pytest.raises(UnreadableError, match="more than 50,000 different names"):
        unpickle(b"".join(names) + b"N.")
    assert unpickle(b"".join(names[:40_000] * 2) + b"N.").value is None


def test_limit_of_memo() -> None:
    assert MAX_MEMO_ANYHOW == 4_000_000
    last = struct.pack("<I", MAX_MEMO_ANYHOW - 1)
    assert unpickle(b"Nr" + last + b"j" + last + b"\x86.").value == (None, None)
    for data in (
        b"r" + struct.pack("<I", MAX_MEMO_ANYHOW),
        b"p%d\n" % MAX_MEMO_ANYHOW,
        b"r\xff\xff\xff\x7f",
    ):
        with pytest.raises(UnreadableError, match="memo slot"):
            unpickle(b"N" + data + b".")


def test_limit_of_depth() -> None:
    deep = MAX_DEPTH - 1
    assert unpickle(b"]" * deep + b"a" * (deep - 1) + b".").value
    for data in (
        b"]" * 2000 + b"a" * 1999 + b".",
        b"N" + b"\x85" * 2000 + b".",
        b"K\x00" + b"}K\x00" * 2000 + b"}" + b"s" * 2000 + b".",
        b"ccollections\nOrderedDict\n)R" + b"\x85" * 2000 + b".",
        b"ca\nb\n)\x81" * 1 + b"ca\nb\n)\x81" * 2000 + b"b" * 2000 + b".",
    ):
        with pytest.raises(UnreadableError, match=r"nested|SETITEM"):
            unpickle(data)


@pytest.mark.parametrize("key", [b"N" + b"\x85" * 100_000, b"(" + b"N" * 100 + b"t"])
def test_keys_are_checked_before_they_are_hashed(key: bytes) -> None:
    with pytest.raises(UnreadableError, match="key"):
        unpickle(b"}" + key + b"Ns.")


def test_limit_of_marks() -> None:
    with pytest.raises(UnreadableError, match="marks"):
        unpickle(b"(" * (MAX_MARKS + 1) + b".")


@pytest.mark.parametrize(
    "data",
    [b"I" + b"9" * 5000 + b"\n.", b"L" + b"9" * 5000 + b"L\n.", b"\x8b\x00\x20\x00\x00" + bytes(8192) + b"."],
    ids=["INT", "LONG", "LONG4"],
)  # fmt: skip
def test_limit_of_digits(data: bytes) -> None:
    with pytest.raises(UnreadableError, match="integer of"):
        unpickle(data)


@pytest.mark.parametrize("opcode", [b"X", b"B", b"T", b"\x8b"])
@pytest.mark.parametrize("size", [10, 2**31 - 1])
def test_a_declared_length_is_checked_first(opcode: bytes, size: int) -> None:
    with pytest.raises(UnreadableError):
        unpickle(opcode + struct.pack("<I", size) + b"x.")


@pytest.mark.parametrize("opcode", [b"\x8d", b"\x8e", b"\x96", b"\x95"])
def test_a_declared_long_length_is_checked_first(opcode: bytes) -> None:
    with pytest.raises(CutOffError):
        unpickle(opcode + struct.pack("<Q", 2**63 - 1) + b"x.")


def test_integer_keys_of_equal_hash() -> None:
    keys = b"".join(pickle.dumps(k * (2**61 - 1), 2)[2:-1] + b"N" for k in range(1, 5000))
    with pytest.raises(UnreadableError, match="key"):
        unpickle(b"}(" + keys + b"u.")


def equal_tuples(count: int) -> list[tuple[int, int]]:
    """Pairs of integers whose tuples have one hash: CPython's xxHash, solved for the second."""
    p1, p2, p5 = 11400714785074694791, 14029467366897019727, 2870177450012600261
    mask, found, want, first = 2**64 - 1, [], None, 0
    inverse = pow(p2, -1, 2**64)
    while len(found) < count:
        first += 1
        acc = (p5 + first * p2) & mask
        acc = ((acc << 31 | acc >> 33) & mask) * p1 & mask
        if want is None:
            want = (acc + 1 * p2) & mask
        second = (want - acc) * inverse & mask
        if second < 2**61 - 1:
            found.append((first, second))
    assert len({hash(pair) for pair in found}) == 1
    return found


@pytest.mark.skipif(struct.calcsize("P") != 8, reason="hashes of 64 bits")
@pytest.mark.parametrize("opcode", ["u", "d", "OrderedDict"])
def test_tuple_keys_of_equal_hash(opcode: str) -> None:
    pairs = equal_tuples(2000)
    body = b"".join(pickle.dumps(pair, 2)[2:-1] + b"N" for pair in pairs)
    data = {"u": b"}(" + body + b"u.", "d": b"(" + body + b"d."}.get(opcode)
    if data is None:
        listed = pickle.dumps([(pair, None) for pair in pairs], 2)[2:-1]
        data = b"ccollections\nOrderedDict\n" + listed + b"\x85R."
    with pytest.raises(UnreadableError, match="same hash"):
        unpickle(data)


def test_many_tuple_keys_are_read() -> None:
    value = {(i, j): 0 for i in range(100) for j in range(100)}
    assert unpickle(pickle.dumps([value] * 2, 2)).value[0] == value


def test_messages_of_what_has_no_end() -> None:
    """What is wrong is named, but never printed whole."""
    bomb = laughs()
    rebuilt = b"ctorch._utils\n_rebuild_tensor_v2\n"
    storage = b"(X\x07\x00\x00\x00storagectorch\nFloatStorage\nX\x01\x00\x00\x000X\x03\x00\x00\x00cpuK\x04tQ"

    from modelctl.core.dtypes import BY_NAME
    from modelctl.core.storages import MemoryStorage
    from modelctl.core.tensors import StorageRef
    from modelctl.formats.pytorch.storage_ids import storage_table

    def tensor(offset: bytes = b"K\x00", size: bytes = b"K\x01", stride: bytes = b"K\x01") -> bytes:
        hooks = b"\x89ccollections\nOrderedDict\n)R"
        return (
            rebuilt + b"(" + storage + offset + size + b"\x85" + stride + b"\x85" + hooks + b"tR."
        )

    load = storage_table(lambda *_: MemoryStorage(bytes(16)))
    assert unpickle(tensor(), persistent_load=load).value.shape == (1,)
    started = time.process_time()
    for data in (
        bomb + b"Q.",
        bomb + b"\x85Q.",
        b"X\x07\x00\x00\x00storage" + bomb + b"NNN(tQ.",
        b"(X\x07\x00\x00\x00storage" + bomb + b"NNNtQ.",
        b"(X\x07\x00\x00\x00storagectorch\nFloatStorage\nNN" + bomb + b"tQ.",
        b"(X\x07\x00\x00\x00storagectorch\nFloatStorage\nX\x01\x00\x00\x000X\x00\x00\x00\x00" + bomb + b"tQ.",
        bomb + bomb + b"\x93.",
        tensor(offset=bomb),
        tensor(size=bomb),
        tensor(stride=bomb),
        bomb + b")R" + bomb + b"\x93.",
    ):  # fmt: skip
        with pytest.raises(UnreadableError) as caught:
            unpickle(data, persistent_load=load)
        assert len(str(caught.value)) < 500
    assert time.process_time() - started < 30  # not a measure: what fails here never ends
    assert StorageRef(MemoryStorage(b""), BY_NAME["float32"])


# ------------------------------------------------------------------ findings


def findings(data: bytes) -> list[Finding]:
    kept: list[Finding] = []
    with contextlib.suppress(UnreadableError):
        unpickle(data, findings=kept)
    return kept


ARGS = b"X\x04\x00\x00\x00true\x85"


@pytest.mark.parametrize(
    ("data", "id", "opcode", "name", "offset"),
    [
        (b"cos\nsystem\n" + ARGS + b"R.", "call", "REDUCE", "os.system", 21),
        (b"(S'true'\nios\nsystem\n.", "call", "INST", "os.system", 9),
        (b"(cos\nsystem\nX\x04\x00\x00\x00trueo.", "call", "OBJ", "os.system", 21),
        (b"cos\nPopen\n)\x81.", "call", "NEWOBJ", "os.Popen", 11),
        (b"cos\nPopen\n)}\x92.", "call", "NEWOBJ_EX", "os.Popen", 12),
        (b"cacme\nrun\n)R.", "call", "REDUCE", "acme.run", 11),
        (b"cacme\nRun\n)\x81.", "custom-class", "NEWOBJ", "acme.Run", 11),
        (b"ctorch.nn.modules.linear\nLinear\n)\x81.", "custom-class", "NEWOBJ", None, 33),
        (b"ctorch.storage\n_load_from_bytes\n)R.", "call", "REDUCE", None, 33),
        (b"ctorch.fx.graph_module\nreduce_graph_module\n)R.", "call", "REDUCE", None, None),
        (b"ctorch.hub\nload\n)R.", "call", "REDUCE", "torch.hub.load", 17),
        (b"\x8c\x07logging\x8c\tos.system\x93.", "dotted-name", "STACK_GLOBAL", "logging.os.system", 20),
        (b"\x82\x07.", "extension", "EXT", "7", 0),
        (b"\x83\x07\x00.", "extension", "EXT", "7", 0),
        (b"\x84\x07\x00\x00\x00.", "extension", "EXT", "7", 0),
        (b"K\x01K\x02\x93.", "computed-name", "STACK_GLOBAL", None, 4),
        (b"ccollections\nOrderedDict\n)R)R.", "computed-call", "REDUCE", "?", 28),
        (b"K\x01)R.", "computed-call", "REDUCE", "?", 3),
        (b"csys\nmodules\nK\x01K\x02s.", "setitem-on-global", "SETITEM", "sys.modules", 17),
        (b"csys\nmodules\n}b.", "build-on-global", "BUILD", "sys.modules", 14),
        (b"ca\nB\n)\x81}X\x09\x00\x00\x00__class__Nsb.", "dunder-state", "BUILD", "__class__", None),
        (b"ca\nB\n)\x81N}X\x09\x00\x00\x00__class__Ns\x86b.", "dunder-state", "BUILD", "__class__", None),
        # harmless callables that call what they are given
        (b"ctorch._tensor\n_rebuild_from_type_v2\n(cos\nsystem\ncbuiltins\ndict\n" + ARGS + b"}tR.", "call", "REDUCE", "os.system", None),
        (b"ctorch._tensor\n_rebuild_from_type_v2\n(ctorch._tensor\n_rebuild_from_type_v2\ncbuiltins\ndict\n(cos\nsystem\ncbuiltins\ndict\n" + ARGS + b"}t}tR.", "call", "REDUCE", "os.system", None),
        (b"ctorch._tensor\n_rebuild_from_type_v2\n(ccopyreg\n_reconstructor\nN(ca\nB\ncsubprocess\nPopen\nNt}tR.", "call", "NEWOBJ", "subprocess.Popen", None),
        (b"cnumpy.random._pickle\n__generator_ctor\nX\x04\x00\x00\x00truecos\nsystem\n\x86R.", "call", "REDUCE", "os.system", None),
        (b"cnumpy.random._pickle\n__randomstate_ctor\nX\x04\x00\x00\x00truecos\nsystem\n\x86R.", "call", "REDUCE", "os.system", None),
        (b"cnumpy.random._pickle\n__bit_generator_ctor\ncsubprocess\nPopen\n\x85R.", "call", "NEWOBJ", "subprocess.Popen", None),
        (b"ccopyreg\n_reconstructor\ncsubprocess\nPopen\ncbuiltins\nobject\nN\x87R.", "call", "NEWOBJ", "subprocess.Popen", None),
        (b"ccopyreg\n_reconstructor\ncbuiltins\nlist\ncsubprocess\nPopen\nN\x87R.", "call", "NEWOBJ", "subprocess.Popen", None),
        (b"ccopyreg\n_reconstructor\ncbuiltins\nlist\ncsubprocess\nPopen\nN\x87\x81.", "call", "NEWOBJ", "subprocess.Popen", None),
        (b"ccollections\ndefaultdict\ncos\ngetcwd\n\x85R.", "call", "NEWOBJ", "os.getcwd", None),
    ],
    ids=lambda value: repr(value)[:60] if isinstance(value, bytes) else "",
)  # fmt: skip
def test_finding(data: bytes, id: str, opcode: str, name: str | None, offset: int | None) -> None:
    found = findings(data)
    assert id in [one.id for one in found]
    one = next(one for one in found if one.id == id)
    assert one.opcode == opcode
    assert name is None or one.name == name
    assert offset is None or one.offset == offset
    assert one.level == ("suspicious" if id == "custom-class" else "dangerous")


def test_the_worst_argument_counts() -> None:
    data = b"ccopyreg\n_reconstructor\nca\nB\ncsubprocess\nPopen\nN\x87R."
    assert [one.name for one in findings(data)] == ["subprocess.Popen", "a.B"]


def test_findings_before_an_error_are_kept() -> None:
    found = findings(b"cos\nsystem\n" + ARGS + b"R\xff")
    assert [one.name for one in found] == ["os.system"]


def test_a_persistent_id_that_is_no_storage() -> None:
    from modelctl.formats.pytorch.storage_ids import storage_table

    kept: list[Finding] = []
    with pytest.raises(UnreadableError, match=r"os\.system"):
        unpickle(
            b"(X\x07\x00\x00\x00storagecos\nsystem\nX\x01\x00\x00\x000X\x03\x00\x00\x00cpuK\x04tQ.",
            persistent_load=storage_table(lambda *_: pytest.fail("made")),
            findings=kept,
        )
    assert [one.id for one in kept] == ["persistent-id"]


def test_plain_containers_are_no_finding() -> None:
    import argparse
    import datetime
    import pathlib
    import random
    import uuid

    import numpy as np

    value = [
        {1, 2},
        frozenset("ab"),
        collections.defaultdict(list, a=[1]),
        collections.deque([1]),
        collections.Counter("abc"),
        argparse.Namespace(lr=0.1),
        pathlib.PurePosixPath("/a/b"),
        datetime.datetime(2020, 1, 1, tzinfo=datetime.timezone.utc),
        uuid.UUID(int=5),
        complex(1, 2),
        range(3),
        slice(1, 2),
        random.getstate(),
        np.float64(1.5),
        np.arange(4),
        np.random.get_state(),
        np.random.default_rng(0),
        np.random.RandomState(0),
    ]
    for one in value:
        for protocol in range(2, 5):
            assert findings(pickle.dumps(one, protocol)) == [], one


@pytest.mark.parametrize("depth", [40, 400])
def test_what_is_no_name_is_not_spelt_out(depth: int) -> None:
    """A tensor of a class that is a tuple: of tuples, each twice in the next one."""
    twice = b"N" + b"2\x86" * depth if depth < 100 else b"N" + b"\x85" * depth
    head = b"\x80\x02ctorch._utils\n_rebuild_wrapper_subclass\n("
    tail = b"ctorch\nfloat32\nK\x02\x85NK\x00Nctorch\nstrided\n\x89tR."
    found = unpickle(head + twice + tail)
    assert isinstance(found.value, Obj)
