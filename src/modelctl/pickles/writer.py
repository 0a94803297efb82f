"""An inert tree to a pickle of protocol 2, as torch.save writes it (docs/formats.md#torch-zip).

The opcodes, their order and the memo are those of the standard library's pickler, so that a
tree that was read and not changed gives the bytes it came from.
"""

from __future__ import annotations

import _compat_pickle
import struct
from collections.abc import Callable, Generator, Iterable, Iterator
from itertools import islice
from typing import Any

from ..core.dtypes import STORAGE_CLASS, DType
from ..core.nodes import ABSENT, ORDERED_DICT, Global, Obj
from ..core.storages import CHUNK, Storage
from ..core.tensors import StorageRef, TensorRef
from ..errors import RefusedError, UnsupportedError
from .array_dtypes import DTYPE, judge_dtype
from .policy import MAY_CALL_WITH, judge, judge_global, judge_state

_BATCH = 1000
_PIECE = 16 << 20
_MOST_TEXT = 0xFFFFFFFF
_ENCODE, _LATIN_1 = Global("_codecs", "encode"), "latin1"
_UNTYPED = Global("torch.storage", "UntypedStorage")
_Saving = Generator[Any, None, None]


def pickle(
    root: Any, storage_key: Callable[[Storage], str], device: str | None = None
) -> list[bytes]:
    """The tree as a pickle, in pieces. ``storage_key`` names a storage in the container; ``device``
    is what all are said to have been on, where that is not for each of them to say.

    Raises:
        RefusedError: the tree holds a call that unpickling it would run.
        UnsupportedError: the tree refers to itself where a pickle can't.
    """
    return _Writer(storage_key, device).run(root)


class _Writer:
    def __init__(self, storage_key: Callable[[Storage], str], device: str | None) -> None:
        self.storage_key, self.device = storage_key, device
        self.out = bytearray(b"\x80\x02")
        self.pieces: list[bytes] = []  # what was written before it
        self.memo: dict[Any, int] = {}  # id of an object, or a Global itself: its slot
        self.slots = 0
        self.open: set[int] = set()
        self.alive: list[Any] = []  # what is made here must outlive the memo of ids

    def run(self, root: Any) -> list[bytes]:
        stack: list[_Saving] = []
        if not self.leaf(root):
            stack.append(self.node(root))
        while stack:
            child = next(stack[-1], stack)
            if child is stack:
                stack.pop()
            else:
                stack.append(self.node(child))
        self.out += b"."
        return [*self.pieces, bytes(self.out)]

    def flush(self) -> None:
        """Now and then, so that it never is a second copy of all of it."""
        if len(self.out) >= _PIECE:
            self.pieces.append(bytes(self.out))
            self.out.clear()

    # ------------------------------------------------------------------ the memo

    def put(self, key: Any = None) -> None:
        slot = self.slots
        self.slots = slot + 1
        if key is not None:
            self.memo[key] = slot
        self.out += b"q" + bytes((slot,)) if slot < 256 else b"r" + struct.pack("<I", slot)

    def got(self, key: Any) -> bool:
        slot = self.memo.get(key)
        if slot is None:
            return False
        self.out += b"h" + bytes((slot,)) if slot < 256 else b"j" + struct.pack("<I", slot)
        return True

    # ------------------------------------------------------------------ leaves

    def leaf(self, value: Any) -> bool:
        """Write what holds nothing else, or was written before; False for the rest."""
        kind = type(value)
        if kind is str:
            self.text(value)
        elif kind is int:
            self.integer(value)
        elif value is None:
            self.out += b"N"
        elif kind is bool:
            self.out += b"\x88" if value else b"\x89"
        elif kind is float:
            self.out += b"G" + struct.pack(">d", value)
        elif kind is Global:
            self.name(value)
        elif kind is TensorRef and value.rebuild is None:
            if not self.got(id(value)):
                self.tensor(value)
        elif kind is tuple and not value:
            self.out += b")"
        else:
            return self.got(id(value))
        return True

    def text(self, value: str) -> None:
        if self.got(id(value)):
            return
        raw = value.encode("utf-8", "surrogatepass")
        self.raw_text(len(raw), (raw,))
        self.put(id(value))

    def raw_text(self, size: int, pieces: Iterable[bytes]) -> None:
        if size > _MOST_TEXT:
            raise UnsupportedError(f"{size:,} bytes in one text or bytes are too many for a pickle")
        self.out += b"X"
        self.out += struct.pack("<I", size)
        for piece in pieces:
            if len(piece) < _PIECE:
                self.out += piece
                self.flush()
            else:
                self.pieces += (bytes(self.out), piece)
                self.out.clear()

    def integer(self, value: int) -> None:
        if 0 <= value <= 0xFF:
            self.out += b"K" + bytes((value,))
        elif 0 <= value <= 0xFFFF:
            self.out += b"M" + struct.pack("<H", value)
        elif -0x80000000 <= value <= 0x7FFFFFFF:
            self.out += b"J" + struct.pack("<i", value)
        else:
            size = (value.bit_length() >> 3) + 1
            raw = value.to_bytes(size, "little", signed=True)
            if value < 0 and size > 1 and raw[-1] == 0xFF and raw[-2] & 0x80:
                raw = raw[:-1]
            head = b"\x8a" + bytes((len(raw),)) if len(raw) < 256 else b"\x8b"
            self.out += head if len(raw) < 256 else head + struct.pack("<i", len(raw))
            self.out += raw

    def name(self, value: Global, *, called: bool = False) -> None:
        """A name: to be called with what was judged, or as a value, which anybody may call."""
        finding = None if called or value in self.memo else judge_global(value, 0)
        if finding is not None and finding.level == "dangerous":
            raise _refused(finding.what)
        if value in MAY_CALL_WITH and not called:
            raise _refused(f"names {value}")
        if self.got(value):
            return
        module, name = value.module, value.name
        module, name = _compat_pickle.REVERSE_NAME_MAPPING.get(
            (module, name), (_compat_pickle.REVERSE_IMPORT_MAPPING.get(module, module), name)
        )
        if "\n" in module or "\n" in name or "." in name:
            raise _refused(f"names {value}")
        self.out += b"c" + module.encode() + b"\n" + name.encode() + b"\n"
        self.put(value)

    def small_tuple(self, values: Iterable[int]) -> None:
        values = tuple(values)
        if not values:
            self.out += b")"
            return
        if len(values) > 3:
            self.out += b"("
        for value in values:
            self.integer(value)
        self.out += (b"\x85", b"\x86", b"\x87", b"t")[min(len(values), 4) - 1]
        self.put()

    # ------------------------------------------------------------------ tensors

    def storage(self, storage: Storage, dtype: DType | None) -> None:
        typed = None if dtype is None else STORAGE_CLASS.get(dtype.name)
        itemsize = dtype.itemsize if typed and dtype is not None else 1
        self.out += b"("
        self.text("storage")
        self.name(Global("torch", typed) if typed else _UNTYPED)
        self.text(self.storage_key(storage))
        self.text(self.device or storage.location or "cpu")
        self.integer(storage.nbytes // itemsize)
        self.out += b"t"
        self.put()
        self.out += b"Q"

    def hooks(self) -> None:
        self.name(ORDERED_DICT)
        self.out += b")R"
        self.put()

    def tensor(self, ref: TensorRef) -> None:
        """``_rebuild_tensor_v2`` (v3 for dtypes without a storage class), as a parameter too."""
        typed = ref.dtype.name in STORAGE_CLASS
        parameter = ref.role == "parameter"
        if parameter:
            self.name(Global("torch._utils", "_rebuild_parameter"))
        version = "_rebuild_tensor_v2" if typed else "_rebuild_tensor_v3"
        self.name(Global("torch._utils", version))
        self.tensor_args(ref, bool(ref.requires_grad) and not parameter)
        self.out += b"R"
        self.put(None if parameter else id(ref))
        if parameter:
            self.out += b"\x88" if ref.requires_grad else b"\x89"
            self.hooks()
            self.out += b"\x87"
            self.put()
            self.out += b"R"
            self.put(id(ref))

    def tensor_args(self, ref: TensorRef, requires_grad: bool) -> None:
        bits = ref.rebuild.bits if ref.rebuild else None
        self.out += b"("
        self.storage(ref.storage, ref.dtype)
        self.integer(ref.start // ref.dtype.itemsize)
        self.small_tuple(ref.shape)
        self.small_tuple(ref.stride)
        self.out += b"\x88" if requires_grad else b"\x89"
        self.hooks()
        if ref.dtype.name not in STORAGE_CLASS:
            self.name(Global("torch", ref.dtype.name))
        if bits:
            self.out += b"}"
            self.put()
            if len(bits) > 1:
                self.out += b"("
            for bit in bits:
                self.text(bit)
                self.out += b"\x88"
            self.out += b"u" if len(bits) > 1 else b"s"
        self.out += b"t"
        self.put()

    def special_tensor(self, ref: TensorRef) -> _Saving:
        """A tensor with more to it than its view: a subclass, a state, hooks, lazy bits; or that
        was a numpy array."""
        rebuild = ref.rebuild
        assert rebuild is not None
        if rebuild.array is not None:
            yield from self.save_object(rebuild.array, ref)
            return
        self.check_state(None, rebuild.state)
        version = "_rebuild_tensor_v2" if ref.dtype.name in STORAGE_CLASS else "_rebuild_tensor_v3"
        inner = Global("torch._utils", version)
        if rebuild.subclass is not None:
            self.name(Global("torch._tensor", "_rebuild_from_type_v2"))
            self.out += b"("
            if ref.role == "parameter":
                raise UnsupportedError(f"a {rebuild.subclass} parameter can't be written yet")
            self.name(inner)
            self.name(rebuild.subclass)
            self.tensor_args(ref, bool(ref.requires_grad))
            if not self.leaf(rebuild.state):
                yield rebuild.state
            self.out += b"t"
            self.put()
            self.out += b"R"
            self.put(id(ref))
            return
        if ref.role != "parameter":
            self.name(inner)
            self.tensor_args(ref, bool(ref.requires_grad))
            self.out += b"R"
            self.put(id(ref))
            return
        stateful = rebuild.state is not None
        which = "_rebuild_parameter_with_state" if stateful else "_rebuild_parameter"
        self.name(Global("torch._utils", which))
        if stateful:
            self.out += b"("
        self.name(inner)
        self.tensor_args(ref, False)
        self.out += b"R"
        self.put()
        self.out += b"\x88" if ref.requires_grad else b"\x89"
        if rebuild.hooks is None:
            self.hooks()
        elif not self.leaf(rebuild.hooks):
            yield rebuild.hooks
        if stateful:
            if not self.leaf(rebuild.state):
                yield rebuild.state
            self.out += b"t"
        else:
            self.out += b"\x87"
        self.put()
        self.out += b"R"
        self.put(id(ref))

    # ------------------------------------------------------------------ containers

    def node(self, value: Any) -> _Saving:
        kind = type(value)
        if kind is dict:
            self.out += b"}"
            self.put(id(value))
            yield from self.entries(value)
        elif kind is list:
            self.out += b"]"
            self.put(id(value))
            yield from self.appends(value)
        elif kind is tuple:
            yield from self.save_tuple(value)
        elif kind is bytes:
            yield from self.save_bytes(value)
        elif isinstance(value, Obj):
            yield from self.save_object(value)
        elif kind is TensorRef:
            yield from self.special_tensor(value)
        elif kind is StorageRef:
            self.storage(value.storage, value.dtype)
        else:
            raise UnsupportedError(f"a {kind.__name__} can't be written to a pickle")

    def save_tuple(self, value: tuple[Any, ...]) -> _Saving:
        self.enter(value)
        if len(value) > 3:
            self.out += b"("
        for part in value:
            if not self.leaf(part):
                yield part
        self.out += (b"\x85", b"\x86", b"\x87", b"t")[min(len(value), 4) - 1]
        self.put(id(value))
        self.open.discard(id(value))

    def save_bytes(self, value: bytes) -> _Saving:
        """As protocol 2 has them: ``_codecs.encode(text, "latin1")``."""
        if not value:
            yield from self.save_object(Obj(Global("builtins", "bytes")), value)
            return
        self.name(_ENCODE)
        self.raw_text(sum(map(len, _as_text(value))), _as_text(value))
        self.put()
        self.text(_LATIN_1)
        self.out += b"\x86"
        self.put()
        self.out += b"R"
        self.put(id(value))

    def save_object(self, value: Obj, stands_for: Any = None) -> _Saving:
        opcode = {"reduce": "REDUCE", "newobj": "NEWOBJ", "newobj_ex": "NEWOBJ_EX"}[value.how]
        finding = judge(value.func, value.args, opcode, 0)
        if finding is not None and finding.level == "dangerous":
            raise _refused(finding.what)
        self.alive.append(value)
        self.enter(value)
        parts = (value.func, value.args)
        for part in parts if value.how != "newobj_ex" else (*parts, value.kwargs):
            if part is value.func and isinstance(part, Global):
                self.name(part, called=True)
            elif not self.leaf(part):
                yield part
        self.out += {"reduce": b"R", "newobj": b"\x81", "newobj_ex": b"\x92"}[value.how]
        self.put(id(value if stands_for is None else stands_for))
        self.open.discard(id(value))
        yield from self.appends(value.items)
        yield from self.entries(value.entries)
        if value.state is not ABSENT:
            self.check_state(value.func, value.state)
            broken = judge_dtype(value, 0) if value.func == DTYPE else None
            if broken is not None:
                raise _refused(broken.what)
            if not self.leaf(value.state):
                yield value.state
            self.out += b"b"

    def check_state(self, func: Any, state: Any) -> None:
        finding = judge_state(func, state, "BUILD", 0)
        if finding is not None and finding.level == "dangerous":
            raise _refused(finding.what)

    def enter(self, value: Any) -> None:
        if id(value) in self.open:
            raise UnsupportedError("an object that is one of its own arguments can't be written")
        self.open.add(id(value))

    def appends(self, items: list[Any]) -> _Saving:
        rest = iter(items)
        while batch := list(islice(rest, _BATCH)):
            self.flush()
            if len(batch) > 1:
                self.out += b"("
            for item in batch:
                if not self.leaf(item):
                    yield item
            self.out += b"e" if len(batch) > 1 else b"a"

    def entries(self, entries: dict[Any, Any]) -> _Saving:
        rest = iter(entries.items())
        while batch := list(islice(rest, _BATCH)):
            self.flush()
            if len(batch) > 1:
                self.out += b"("
            for key, item in batch:
                if not self.leaf(key):
                    yield key
                if not self.leaf(item):
                    yield item
            self.out += b"u" if len(batch) > 1 else b"s"


def _as_text(value: bytes) -> Iterator[bytes]:
    """Bytes as UTF-8 of the text that has a character for each, a part at a time."""
    for at in range(0, len(value), CHUNK):
        yield value[at : at + CHUNK].decode("latin-1").encode()


def _refused(what: str) -> RefusedError:
    return RefusedError(
        f"unpickling this file {what}: that is not written out again",
        hint="'modelctl convert --weights-only' keeps the model's tensors, and leaves the rest",
    )
