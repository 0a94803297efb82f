"""Pickle bytes to an inert tree, by our own opcode loop: nothing is imported, nothing is called.

Opcodes as in the standard library's ``pickletools``; rules and limits as in SAFETY ("Symbolic
unpickler"). What a pickle would call becomes an :class:`~modelctl.core.tree.Obj`, unless it is
one of torch's tensor rebuild functions or a plain container.
"""

from __future__ import annotations

import _compat_pickle
import struct
from collections.abc import Callable
from typing import Any, NamedTuple

from ..core.checkpoint import Finding
from ..core.tree import ABSENT, ORDERED_DICT, Global, Obj, containers
from ..errors import UnreadableError
from .policy import MAY_CALL, judge_call
from .rebuild import REBUILDS

MAX_SIZE = 256 << 20
MAX_OPCODES = 20_000_000
MAX_MEMO = 4_000_000
MAX_DEPTH = 500
_MAX_MARKS = 10_000
_MAX_LINE = 1 << 16
_MAX_DIGITS = 1 << 10  # bytes of a LONG4, digits of a decimal INT
_MAX_FINDINGS = 1_000

_DATA = {list: "a list", dict: "a dict", tuple: "a tuple", str: "a string", Global: "a global"}


class Unpickled(NamedTuple):
    """What a pickle holds, where it ended, and what running it would have done."""

    value: Any
    end: int
    findings: list[Finding]


def unpickle(
    data: bytes,
    start: int = 0,
    persistent_load: Callable[[Any], Any] | None = None,
) -> Unpickled:
    """Read one pickle from ``data``, beginning at ``start``.

    ``persistent_load`` turns a persistent id (an inert value) into what stands in the tree for
    it; without one, persistent ids are an error.

    Raises:
        UnreadableError: not a pickle, cut off, or over a limit. ``offset`` says where.
    """
    return _Machine(data, start, persistent_load).run()


class CutOffError(UnreadableError):
    """A pickle that goes on beyond the bytes given."""


class _Stop(Exception):
    pass


class _Machine:
    def __init__(
        self, data: bytes, start: int, persistent_load: Callable[[Any], Any] | None
    ) -> None:
        self.data, self.pos = data, start
        self.persistent_load = persistent_load
        self.stack: list[Any] = []
        self.below: list[list[Any]] = []
        self.memo: dict[int, Any] = {}
        self.globals: dict[tuple[str, str], Global] = {}
        self.findings: list[Finding] = []
        self.at = start

    # ------------------------------------------------------------------ the loop

    def run(self) -> Unpickled:
        data, table = self.data, _TABLE
        budget = MAX_OPCODES
        try:
            while True:
                self.at = at = self.pos
                self.pos = at + 1
                op = table[data[at]]
                if op is None:
                    raise self.error(f"unknown opcode 0x{data[at]:02x}: not a pickle")
                op(self)
                budget -= 1
                if budget < 0:
                    raise self.error(f"more than {MAX_OPCODES:,} opcodes")
        except _Stop:
            pass
        except IndexError:
            if self.pos >= len(data):
                raise self.cut_off() from None
            raise self.error("an opcode finds nothing on the stack") from None
        value = self.stack[-1]
        self.check_depth(value)
        return Unpickled(value, self.pos, self.findings)

    def error(self, message: str) -> UnreadableError:
        return UnreadableError(message, offset=self.at)

    def cut_off(self, wanted: int = 1) -> CutOffError:
        left = max(len(self.data) - self.at - 1, 0)
        return CutOffError(
            f"the pickle is cut off: {wanted:,} more bytes are declared, {left:,} are left",
            offset=self.at,
        )

    def check_depth(self, root: Any) -> None:
        """Refuse what is nested so deep that the next reader's stack would not hold it."""
        found = containers(root)
        if len(found) <= MAX_DEPTH:
            return
        seen: set[int] = set()
        level = [root]
        for _ in range(MAX_DEPTH):
            inner: list[Any] = []
            for node in level:
                key = id(node)
                if key in found and key not in seen:
                    seen.add(key)
                    inner.extend(c for c in found[key][1] if id(c) in found)
            if not inner:
                return
            level = inner
        raise UnreadableError(f"nested deeper than {MAX_DEPTH} levels")

    # ------------------------------------------------------------------ pieces

    def take(self, size: int) -> bytes:
        at = self.pos
        end = at + size
        if end > len(self.data):
            raise self.cut_off(size)
        self.pos = end
        return self.data[at:end]

    def line(self) -> str:
        at = self.pos
        end = self.data.find(b"\n", at, at + _MAX_LINE)
        if end < 0:
            if len(self.data) - at < _MAX_LINE:
                raise self.cut_off()
            raise self.error("a line without an end")
        self.pos = end + 1
        try:
            return self.data[at:end].decode("utf-8")
        except UnicodeDecodeError:
            raise self.error("text that is not UTF-8") from None

    def pop_mark(self) -> list[Any]:
        if not self.below:
            raise self.error("an opcode finds no mark on the stack")
        items = self.stack
        self.stack = self.below.pop()
        return items

    def text(self, raw: bytes) -> str:
        try:
            return raw.decode("utf-8", "surrogatepass")
        except UnicodeDecodeError:
            raise self.error("text that is not UTF-8") from None

    def put(self, index: int) -> None:
        memo = self.memo
        memo[index] = self.stack[-1]
        if len(memo) > MAX_MEMO:
            raise self.error(f"more than {MAX_MEMO:,} memo slots")

    def fetch(self, index: int) -> None:
        try:
            self.stack.append(self.memo[index])
        except KeyError:
            raise self.error(f"memo slot {index} was never filled") from None

    def key(self, key: Any, depth: int = 0) -> Any:
        """A dict key that can be hashed without harm."""
        if isinstance(key, int):
            # Beyond 64 bits equal hashes are made at will: a dict of them takes hours.
            if key.bit_length() > 64:
                raise self.error("an integer of over 64 bits as a key")
        elif isinstance(key, tuple):
            if depth > 8 or len(key) > 64:
                raise self.error("a tuple that deep or long as a key")
            for part in key:
                self.key(part, depth + 1)
        elif isinstance(key, list | dict):
            raise self.error("a list or dict as a key")
        return key

    def find(self, finding: Finding | None) -> None:
        if finding is not None and len(self.findings) < _MAX_FINDINGS:
            self.findings.append(finding)

    def danger(self, id: str, what: str, name: Any, opcode: str) -> None:
        self.find(Finding("dangerous", id, what, str(name)[:200], opcode, self.at))

    # ------------------------------------------------------------------ what makes objects

    def name(self, module: Any, name: Any) -> None:
        # Python 2's names, as pickle itself translates them
        module, name = _compat_pickle.NAME_MAPPING.get(
            (module, name), (_compat_pickle.IMPORT_MAPPING.get(module, module), name)
        )
        found = self.globals.get((module, name))
        if found is None:
            found = self.globals[(module, name)] = Global(module, name)
            if "." in name:
                self.danger("dotted-name", f"names {found}", found, "STACK_GLOBAL")
        self.stack.append(found)

    def call(self, func: Any, args: Any, opcode: str) -> None:
        """REDUCE: one of torch's rebuild functions, a container, or an inert recipe."""
        if not isinstance(args, tuple):
            raise self.error("a call whose arguments are not a tuple")
        if isinstance(func, Global):
            make = REBUILDS.get(func)
            if make is not None:
                try:
                    made = make(args)
                except UnreadableError as e:
                    raise self.error(e.reason) from None
                except (TypeError, ValueError, IndexError, AttributeError, KeyError):
                    raise self.error(f"{func} with arguments that it does not take") from None
                if made is not None:
                    self.stack.append(made)
                    return
        if func not in MAY_CALL if isinstance(func, Global) else True:
            self.find(judge_call(func, opcode, self.at))
        elif func.name == "_reconstructor" and args:
            self.find(judge_call(args[0], "NEWOBJ", self.at))
        self.stack.append(Obj(func, args))

    def construct(self, cls: Any, args: Any, kwargs: Any, opcode: str) -> None:
        if not isinstance(args, tuple):
            raise self.error("a construction whose arguments are not a tuple")
        self.find(judge_call(cls, opcode, self.at))
        how = "newobj" if opcode == "NEWOBJ" else "newobj_ex"
        self.stack.append(Obj(cls, args, how, kwargs=kwargs))

    def extend(self, target: Any, values: list[Any]) -> None:
        if isinstance(target, list):
            target.extend(values)
        elif isinstance(target, Obj):
            target.items.extend(values)
        else:
            raise self.error(f"APPEND on {_DATA.get(type(target), 'a value')}")

    def set_items(self, target: Any, values: list[Any]) -> None:
        if isinstance(target, Obj):
            entries = target.entries
        elif isinstance(target, dict):
            entries = target
        elif isinstance(target, Global):
            self.danger("setitem-on-global", f"changes {target}", target, "SETITEM")
            return
        else:
            raise self.error(f"SETITEM on {_DATA.get(type(target), 'a value')}")
        if len(values) % 2:
            raise self.error("SETITEMS with a key but no value")
        for i in range(0, len(values), 2):
            key = values[i]
            entries[key if type(key) is str else self.key(key)] = values[i + 1]

    # ------------------------------------------------------------------ opcodes

    def op_proto(self) -> None:
        version = self.take(1)[0]
        if version > 5:
            raise self.error(f"pickle protocol {version}")

    def op_frame(self) -> None:
        size = int.from_bytes(self.take(8), "little")
        if size > len(self.data) - self.pos:
            raise self.cut_off(size)

    def op_stop(self) -> None:
        if len(self.stack) < 1 or self.below:
            raise self.error("STOP without a value")
        raise _Stop

    def op_mark(self) -> None:
        self.below.append(self.stack)
        self.stack = []
        if len(self.below) > _MAX_MARKS:
            raise self.error(f"more than {_MAX_MARKS:,} open marks")

    def op_pop(self) -> None:
        if self.stack:
            self.stack.pop()
        else:
            self.pop_mark()

    def op_pop_mark(self) -> None:
        self.pop_mark()

    def op_dup(self) -> None:
        self.stack.append(self.stack[-1])

    def op_none(self) -> None:
        self.stack.append(None)

    def op_true(self) -> None:
        self.stack.append(True)

    def op_false(self) -> None:
        self.stack.append(False)

    def op_binint(self) -> None:
        self.stack.append(int.from_bytes(self.take(4), "little", signed=True))

    def op_binint1(self) -> None:
        self.stack.append(self.data[self.pos])
        self.pos += 1

    def op_binint2(self) -> None:
        at = self.pos
        self.stack.append(self.data[at] | self.data[at + 1] << 8)
        self.pos = at + 2

    def op_int(self) -> None:
        line = self.line()
        if line in ("00", "01"):
            self.stack.append(line == "01")
        else:
            self.stack.append(self.decimal(line))

    def op_long(self) -> None:
        self.stack.append(self.decimal(self.line().removesuffix("L")))

    def decimal(self, digits: str) -> int:
        if len(digits) > _MAX_DIGITS:
            raise self.error(f"an integer of {len(digits):,} digits")
        try:
            return int(digits)
        except ValueError:
            raise self.error("not an integer") from None

    def op_long1(self) -> None:
        self.stack.append(int.from_bytes(self.take(self.take(1)[0]), "little", signed=True))

    def op_long4(self) -> None:
        size = int.from_bytes(self.take(4), "little", signed=True)
        if not 0 <= size <= _MAX_DIGITS:
            raise self.error(f"an integer of {size:,} bytes")
        self.stack.append(int.from_bytes(self.take(size), "little", signed=True))

    def op_float(self) -> None:
        try:
            self.stack.append(float(self.line()))
        except ValueError:
            raise self.error("not a number") from None

    def op_binfloat(self) -> None:
        self.stack.append(struct.unpack(">d", self.take(8))[0])

    def op_string(self) -> None:
        line = self.line()
        if len(line) < 2 or line[0] != line[-1] or line[0] not in "'\"":
            raise self.error("a string without quotes")
        try:
            raw = line[1:-1].encode("latin-1").decode("unicode_escape").encode("latin-1")
        except (UnicodeDecodeError, UnicodeEncodeError):
            raise self.error("a string with a broken escape") from None
        self.stack.append(self.native(raw))

    def native(self, raw: bytes) -> str | bytes:
        """A Python 2 string: text where it is ASCII (as torch reads it), else bytes."""
        try:
            return raw.decode("ascii")
        except UnicodeDecodeError:
            return raw

    def op_short_binstring(self) -> None:
        self.stack.append(self.native(self.take(self.take(1)[0])))

    def op_binstring(self) -> None:
        size = int.from_bytes(self.take(4), "little", signed=True)
        if size < 0:
            raise self.error("a string of negative length")
        self.stack.append(self.native(self.take(size)))

    def op_unicode(self) -> None:
        try:
            self.stack.append(self.line().encode("latin-1").decode("raw_unicode_escape"))
        except (UnicodeDecodeError, UnicodeEncodeError):
            raise self.error("text with a broken escape") from None

    def op_binunicode(self) -> None:
        at = self.pos
        data = self.data
        end = at + 4 + (data[at] | data[at + 1] << 8 | data[at + 2] << 16 | data[at + 3] << 24)
        if end > len(data):
            raise self.cut_off(end - at - 4)
        self.pos = end
        try:
            self.stack.append(data[at + 4 : end].decode("utf-8", "surrogatepass"))
        except UnicodeDecodeError:
            raise self.error("text that is not UTF-8") from None

    def op_short_binunicode(self) -> None:
        self.stack.append(self.text(self.take(self.take(1)[0])))

    def op_binunicode8(self) -> None:
        self.stack.append(self.text(self.take(int.from_bytes(self.take(8), "little"))))

    def op_short_binbytes(self) -> None:
        self.stack.append(self.take(self.take(1)[0]))

    def op_binbytes(self) -> None:
        self.stack.append(self.take(int.from_bytes(self.take(4), "little")))

    def op_binbytes8(self) -> None:
        self.stack.append(self.take(int.from_bytes(self.take(8), "little")))

    def op_bytearray8(self) -> None:
        raw = self.take(int.from_bytes(self.take(8), "little"))
        self.stack.append(Obj(Global("builtins", "bytearray"), (raw,)))

    def op_empty_list(self) -> None:
        self.stack.append([])

    def op_empty_dict(self) -> None:
        self.stack.append({})

    def op_empty_tuple(self) -> None:
        self.stack.append(())

    def op_empty_set(self) -> None:
        self.stack.append(Obj(Global("builtins", "set"), ([],)))

    def op_additems(self) -> None:
        items = self.pop_mark()
        target = self.stack[-1]
        if not (isinstance(target, Obj) and target.args and isinstance(target.args[0], list)):
            raise self.error("ADDITEMS on what is no set")
        target.args[0].extend(items)

    def op_frozenset(self) -> None:
        items = self.pop_mark()
        self.stack.append(Obj(Global("builtins", "frozenset"), (items,)))

    def op_list(self) -> None:
        items = self.pop_mark()
        self.stack.append(items)

    def op_dict(self) -> None:
        items = self.pop_mark()
        made: dict[Any, Any] = {}
        self.set_items(made, items)
        self.stack.append(made)

    def op_tuple(self) -> None:
        items = self.pop_mark()
        self.stack.append(tuple(items))

    def op_tuple1(self) -> None:
        stack = self.stack
        stack[-1] = (stack[-1],)

    def op_tuple2(self) -> None:
        stack = self.stack
        stack[-2:] = [(stack[-2], stack[-1])]

    def op_tuple3(self) -> None:
        stack = self.stack
        stack[-3:] = [(stack[-3], stack[-2], stack[-1])]

    def op_append(self) -> None:
        value = self.stack.pop()
        self.extend(self.stack[-1], [value])

    def op_appends(self) -> None:
        values = self.pop_mark()
        self.extend(self.stack[-1], values)

    def op_setitem(self) -> None:
        value = self.stack.pop()
        key = self.stack.pop()
        self.set_items(self.stack[-1], [key, value])

    def op_setitems(self) -> None:
        values = self.pop_mark()
        self.set_items(self.stack[-1], values)

    def op_get(self) -> None:
        self.fetch(self.decimal(self.line()))

    def op_binget(self) -> None:
        at = self.pos
        self.pos = at + 1
        try:
            self.stack.append(self.memo[self.data[at]])
        except KeyError:
            raise self.error(f"memo slot {self.data[at]} was never filled") from None

    def op_long_binget(self) -> None:
        self.fetch(int.from_bytes(self.take(4), "little"))

    def op_put(self) -> None:
        index = self.decimal(self.line())
        if index < 0:
            raise self.error("a negative memo slot")
        self.put(index)

    def op_binput(self) -> None:
        at = self.pos
        self.pos = at + 1
        self.memo[self.data[at]] = self.stack[-1]

    def op_long_binput(self) -> None:
        self.put(int.from_bytes(self.take(4), "little"))

    def op_memoize(self) -> None:
        self.put(len(self.memo))

    def op_global(self) -> None:
        module = self.line()
        self.name(module, self.line())

    def op_stack_global(self) -> None:
        name = self.stack.pop()
        module = self.stack.pop()
        if type(name) is not str or type(module) is not str:
            self.danger("computed-name", "names a computed value", name, "STACK_GLOBAL")
            raise self.error("STACK_GLOBAL on what are no strings")
        self.name(module, name)

    def op_ext(self) -> None:
        size = {0x82: 1, 0x83: 2, 0x84: 4}[self.data[self.at]]
        code = int.from_bytes(self.take(size), "little")
        self.danger("extension", f"names extension {code} of the reader's registry", code, "EXT")
        self.stack.append(Global("copyreg.extension", str(code)))

    def op_reduce(self) -> None:
        args = self.stack.pop()
        func = self.stack.pop()
        if func == ORDERED_DICT and isinstance(args, tuple):
            made = Obj(func)
            if args and isinstance(args[0], list):  # Python 2 gives the pairs as an argument
                for pair in args[0]:
                    if not isinstance(pair, list | tuple) or len(pair) != 2:
                        raise self.error("an OrderedDict of what are no pairs")
                    made.entries[self.key(pair[0])] = pair[1]
            self.stack.append(made)
            return
        self.call(func, args, "REDUCE")

    def op_inst(self) -> None:
        module, name = self.line(), self.line()
        args = tuple(self.pop_mark())
        self.name(module, name)
        self.call(self.stack.pop(), args, "INST")

    def op_obj(self) -> None:
        args = self.pop_mark()
        if not args:
            raise self.error("OBJ without a class")
        self.call(args[0], tuple(args[1:]), "OBJ")

    def op_newobj(self) -> None:
        args = self.stack.pop()
        self.construct(self.stack.pop(), args, ABSENT, "NEWOBJ")

    def op_newobj_ex(self) -> None:
        kwargs = self.stack.pop()
        args = self.stack.pop()
        self.construct(self.stack.pop(), args, kwargs, "NEWOBJ_EX")

    def op_build(self) -> None:
        state = self.stack.pop()
        target = self.stack[-1]
        if isinstance(target, Obj):
            target.state = state
            if isinstance(state, dict):
                for name in state:
                    if type(name) is str and name.startswith("__") and name.endswith("__"):
                        self.danger("dunder-state", f"sets {name} of an object", name, "BUILD")
        elif isinstance(target, Global):
            self.danger("build-on-global", f"changes {target}", target, "BUILD")
        elif state:
            raise self.error(f"BUILD on {_DATA.get(type(target), 'a value')}")

    def op_persid(self) -> None:
        self.persistent(self.line())

    def op_binpersid(self) -> None:
        self.persistent(self.stack.pop())

    def persistent(self, pid: Any) -> None:
        if self.persistent_load is None:
            raise self.error("a persistent id where none is expected")
        try:
            self.stack.append(self.persistent_load(pid))
        except UnreadableError as e:
            if e.offset is None and e.member is None:
                raise self.error(e.reason) from None
            raise

    def op_next_buffer(self) -> None:
        raise self.error("an out-of-band buffer")


_OPCODES: dict[bytes, Callable[[_Machine], None]] = {
    b"\x80": _Machine.op_proto,
    b"\x95": _Machine.op_frame,
    b".": _Machine.op_stop,
    b"(": _Machine.op_mark,
    b"0": _Machine.op_pop,
    b"1": _Machine.op_pop_mark,
    b"2": _Machine.op_dup,
    b"N": _Machine.op_none,
    b"\x88": _Machine.op_true,
    b"\x89": _Machine.op_false,
    b"I": _Machine.op_int,
    b"J": _Machine.op_binint,
    b"K": _Machine.op_binint1,
    b"M": _Machine.op_binint2,
    b"L": _Machine.op_long,
    b"\x8a": _Machine.op_long1,
    b"\x8b": _Machine.op_long4,
    b"F": _Machine.op_float,
    b"G": _Machine.op_binfloat,
    b"S": _Machine.op_string,
    b"T": _Machine.op_binstring,
    b"U": _Machine.op_short_binstring,
    b"V": _Machine.op_unicode,
    b"X": _Machine.op_binunicode,
    b"\x8c": _Machine.op_short_binunicode,
    b"\x8d": _Machine.op_binunicode8,
    b"B": _Machine.op_binbytes,
    b"C": _Machine.op_short_binbytes,
    b"\x8e": _Machine.op_binbytes8,
    b"\x96": _Machine.op_bytearray8,
    b"\x97": _Machine.op_next_buffer,
    b"\x98": _Machine.op_next_buffer,
    b"]": _Machine.op_empty_list,
    b"}": _Machine.op_empty_dict,
    b")": _Machine.op_empty_tuple,
    b"\x8f": _Machine.op_empty_set,
    b"\x90": _Machine.op_additems,
    b"\x91": _Machine.op_frozenset,
    b"l": _Machine.op_list,
    b"d": _Machine.op_dict,
    b"t": _Machine.op_tuple,
    b"\x85": _Machine.op_tuple1,
    b"\x86": _Machine.op_tuple2,
    b"\x87": _Machine.op_tuple3,
    b"a": _Machine.op_append,
    b"e": _Machine.op_appends,
    b"s": _Machine.op_setitem,
    b"u": _Machine.op_setitems,
    b"g": _Machine.op_get,
    b"h": _Machine.op_binget,
    b"j": _Machine.op_long_binget,
    b"p": _Machine.op_put,
    b"q": _Machine.op_binput,
    b"r": _Machine.op_long_binput,
    b"\x94": _Machine.op_memoize,
    b"c": _Machine.op_global,
    b"\x93": _Machine.op_stack_global,
    b"\x82": _Machine.op_ext,
    b"\x83": _Machine.op_ext,
    b"\x84": _Machine.op_ext,
    b"R": _Machine.op_reduce,
    b"i": _Machine.op_inst,
    b"o": _Machine.op_obj,
    b"\x81": _Machine.op_newobj,
    b"\x92": _Machine.op_newobj_ex,
    b"b": _Machine.op_build,
    b"P": _Machine.op_persid,
    b"Q": _Machine.op_binpersid,
}
_TABLE: list[Callable[[_Machine], None] | None] = [_OPCODES.get(bytes([i])) for i in range(256)]
