"""The opcodes of pickle, one function each, on a :class:`~modelctl.pickles.machine.Machine`."""

from __future__ import annotations

import codecs
import re
import struct
from math import isinf
from typing import Any

from ..core.nodes import ABSENT, ORDERED_DICT, Global, Obj
from ..core.tensors import TensorRef
from .array_dtypes import DTYPE
from .machine import KINDS, MAX_MARKS, Machine
from .policy import judge_state
from .rebuild import set_old_state

# Read where they lie: there may be millions.
_int32, _float64 = struct.Struct("<i").unpack_from, struct.Struct(">d").unpack_from
_MAX_DIGITS = 1 << 10  # bytes of a LONG4, digits of a decimal INT
# As Python writes them: of other spellings (010, 1_0, 1e400) its readers make different values.
_INTEGER = re.compile(r"0|-?[1-9][0-9]*")
_REAL = re.compile(r"-?(?:[0-9]+(?:\.[0-9]*)?(?:e[+-]?[0-9]+)?|inf|nan)")


class Stop(Exception):
    """The pickle's end."""


def op_proto(m: Machine) -> None:
    version = m.take(1)[0]
    if version > 5:
        raise m.error(f"pickle protocol {version}")


def op_frame(m: Machine) -> None:
    size = int.from_bytes(m.take(8), "little")
    if size > len(m.data) - m.pos:
        raise m.cut_off(size)


def op_stop(m: Machine) -> None:
    if len(m.stack) < 1 or m.below:
        raise m.error("STOP without a value")
    raise Stop


def op_mark(m: Machine) -> None:
    m.below.append(m.stack)
    m.stack = []
    if len(m.below) > MAX_MARKS:
        raise m.error(f"more than {MAX_MARKS:,} open marks")


def op_pop(m: Machine) -> None:
    if m.stack:
        m.stack.pop()
    else:
        m.pop_mark()


def op_pop_mark(m: Machine) -> None:
    m.pop_mark()


def op_dup(m: Machine) -> None:
    m.stack.append(m.stack[-1])
    m.owe(m.stack[-1])


def op_none(m: Machine) -> None:
    m.stack.append(None)


def op_true(m: Machine) -> None:
    m.stack.append(True)


def op_false(m: Machine) -> None:
    m.stack.append(False)


def op_binint(m: Machine) -> None:
    at = m.pos
    m.pos = at + 4
    if m.pos > len(m.data):
        raise m.cut_off(4)
    m.stack.append(_int32(m.data, at)[0])


def op_binint1(m: Machine) -> None:
    m.stack.append(m.data[m.pos])
    m.pos += 1


def op_binint2(m: Machine) -> None:
    raw = m.take(2)
    m.stack.append(raw[0] | raw[1] << 8)


def op_int(m: Machine) -> None:
    line = m.line()
    if line in ("00", "01"):
        m.stack.append(line == "01")
    else:
        m.stack.append(decimal(m, line))


def op_long(m: Machine) -> None:
    m.stack.append(decimal(m, m.line().removesuffix("L")))


def decimal(m: Machine, digits: str) -> int:
    if len(digits) > _MAX_DIGITS:
        raise m.error(f"an integer of {len(digits):,} digits")
    if _INTEGER.fullmatch(digits) is None:
        raise m.error("not an integer")
    return int(digits)


def op_long1(m: Machine) -> None:
    m.stack.append(int.from_bytes(m.take(m.take(1)[0]), "little", signed=True))


def op_long4(m: Machine) -> None:
    size = int.from_bytes(m.take(4), "little", signed=True)
    if not 0 <= size <= _MAX_DIGITS:
        raise m.error(f"an integer of {size:,} bytes")
    m.stack.append(int.from_bytes(m.take(size), "little", signed=True))


def op_float(m: Machine) -> None:
    line = m.line()
    value = float(line) if _REAL.fullmatch(line) else None
    if value is None or (isinf(value) and "n" not in line):
        raise m.error("not a number")
    m.stack.append(value)


def op_binfloat(m: Machine) -> None:
    at = m.pos
    m.pos = at + 8
    if m.pos > len(m.data):
        raise m.cut_off(8)
    m.stack.append(_float64(m.data, at)[0])


def op_string(m: Machine) -> None:
    line = m.raw_line()
    if len(line) < 2 or line[0] != line[-1] or line[:1] not in (b"'", b'"'):
        raise m.error("a string without quotes")
    try:
        raw = codecs.escape_decode(line[1:-1])[0]
    except ValueError:
        raise m.error("a string with a broken escape") from None
    m.stack.append(native(raw))


def native(raw: bytes) -> str | bytes:
    """A Python 2 string: text where it is ASCII (as torch reads it), else bytes."""
    try:
        return raw.decode("ascii")
    except UnicodeDecodeError:
        return raw


def op_short_binstring(m: Machine) -> None:
    m.stack.append(native(m.take(m.take(1)[0])))


def op_binstring(m: Machine) -> None:
    size = int.from_bytes(m.take(4), "little", signed=True)
    if size < 0:
        raise m.error("a string of negative length")
    m.stack.append(native(m.take(size)))


def op_unicode(m: Machine) -> None:
    try:
        m.stack.append(m.raw_line().decode("raw_unicode_escape"))
    except UnicodeDecodeError:
        raise m.error("text with a broken escape") from None


def op_binunicode(m: Machine) -> None:
    at = m.pos
    data = m.data
    end = at + 4 + int.from_bytes(data[at : at + 4], "little")
    if end > len(data):
        raise m.cut_off(end - at - 4)
    m.pos = end
    try:
        m.stack.append(data[at + 4 : end].decode("utf-8", "surrogatepass"))
    except UnicodeDecodeError:
        raise m.error("text that is not UTF-8") from None


def op_short_binunicode(m: Machine) -> None:
    m.stack.append(m.text(m.take(m.take(1)[0])))


def op_binunicode8(m: Machine) -> None:
    m.stack.append(m.text(m.take(int.from_bytes(m.take(8), "little"))))


def op_short_binbytes(m: Machine) -> None:
    m.stack.append(m.take(m.take(1)[0]))


def op_binbytes(m: Machine) -> None:
    m.stack.append(m.take(int.from_bytes(m.take(4), "little")))


def op_binbytes8(m: Machine) -> None:
    m.stack.append(m.take(int.from_bytes(m.take(8), "little")))


def op_bytearray8(m: Machine) -> None:
    raw = m.take(int.from_bytes(m.take(8), "little"))
    m.stack.append(Obj(Global("builtins", "bytearray"), (raw,)))


def op_empty_list(m: Machine) -> None:
    m.count()
    m.stack.append([])


def op_empty_dict(m: Machine) -> None:
    m.count()
    m.stack.append({})


def op_empty_tuple(m: Machine) -> None:
    m.stack.append(())


def op_empty_set(m: Machine) -> None:
    m.count()
    m.stack.append(Obj(Global("builtins", "set"), ([],)))


def op_additems(m: Machine) -> None:
    items = m.pop_mark()
    target = m.stack[-1]
    if not (isinstance(target, Obj) and target.args and isinstance(target.args[0], list)):
        raise m.error("ADDITEMS on what is no set")
    target.args[0].extend(items)


def op_frozenset(m: Machine) -> None:
    m.count()
    items = m.pop_mark()
    m.stack.append(Obj(Global("builtins", "frozenset"), (items,)))


def op_list(m: Machine) -> None:
    m.count()
    items = m.pop_mark()
    m.stack.append(items)


def op_dict(m: Machine) -> None:
    m.count()
    items = m.pop_mark()
    made: dict[Any, Any] = {}
    m.set_items(made, items)
    m.stack.append(made)


def op_tuple(m: Machine) -> None:
    m.add_tuple(m.pop_mark())


def op_tuple1(m: Machine) -> None:
    m.add_tuple([m.stack.pop()])


def op_tuple2(m: Machine) -> None:
    second, first = m.stack.pop(), m.stack.pop()
    m.add_tuple([first, second])


def op_tuple3(m: Machine) -> None:
    third, second, first = m.stack.pop(), m.stack.pop(), m.stack.pop()
    m.add_tuple([first, second, third])


def op_append(m: Machine) -> None:
    value = m.stack.pop()
    m.extend(m.stack[-1], [value])


def op_appends(m: Machine) -> None:
    values = m.pop_mark()
    m.extend(m.stack[-1], values)


def op_setitem(m: Machine) -> None:
    value = m.stack.pop()
    key = m.stack.pop()
    m.set_items(m.stack[-1], [key, value])


def op_setitems(m: Machine) -> None:
    values = m.pop_mark()
    m.set_items(m.stack[-1], values)


def op_get(m: Machine) -> None:
    m.fetch(decimal(m, m.line()))


def op_binget(m: Machine) -> None:
    at = m.pos
    m.pos = at + 1
    m.get(m.data[at])


def op_long_binget(m: Machine) -> None:
    m.get(int.from_bytes(m.take(4), "little"))


def op_put(m: Machine) -> None:
    index = decimal(m, m.line())
    if index < 0:
        raise m.error("a negative memo slot")
    m.put(index)


def op_binput(m: Machine) -> None:
    at = m.pos
    m.pos = at + 1
    m.put(m.data[at])


def op_long_binput(m: Machine) -> None:
    at = m.pos
    data = m.data
    m.pos = at + 4
    m.put(data[at] | data[at + 1] << 8 | data[at + 2] << 16 | data[at + 3] << 24)


def op_memoize(m: Machine) -> None:
    m.put(len(m.memo) + len(m.sparse))


def op_global(m: Machine) -> None:
    module = m.line()
    m.name(module, m.line())


def op_stack_global(m: Machine) -> None:
    name = m.stack.pop()
    module = m.stack.pop()
    if type(name) is not str or type(module) is not str:
        m.danger("computed-name", "names a computed value", name, "STACK_GLOBAL")
        raise m.error("STACK_GLOBAL on what are no strings")
    m.name(module, name)


def op_ext(m: Machine) -> None:
    size = {0x82: 1, 0x83: 2, 0x84: 4}[m.data[m.at]]
    code = int.from_bytes(m.take(size), "little")
    m.danger("extension", f"names extension {code} of the reader's registry", code, "EXT")
    m.stack.append(Global("copyreg.extension", str(code)))


def _holds_pairs(args: Any) -> bool:
    return type(args) is tuple and len(args) == 1 and isinstance(args[0], list | tuple)


def op_reduce(m: Machine) -> None:
    args = m.stack.pop()
    func = m.stack.pop()
    if func is ORDERED_DICT and (args == () or _holds_pairs(args)):
        m.count()
        made = Obj(func)
        if args:  # Python 2 gives the pairs as an argument
            for pair in args[0]:
                if not isinstance(pair, list | tuple) or len(pair) != 2:
                    raise m.error("an OrderedDict of what are no pairs")
                m.enter(made.entries, pair[0], pair[1])
        m.stack.append(made)
        return
    m.call(func, args, "REDUCE")


def op_inst(m: Machine) -> None:
    module, name = m.line(), m.line()
    args = tuple(m.pop_mark())
    m.name(module, name)
    m.call(m.stack.pop(), args, "INST")


def op_obj(m: Machine) -> None:
    args = m.pop_mark()
    if not args:
        raise m.error("OBJ without a class")
    m.call(args[0], tuple(args[1:]), "OBJ")


def op_newobj(m: Machine) -> None:
    args = m.stack.pop()
    m.construct(m.stack.pop(), args, ABSENT, "NEWOBJ")


def op_newobj_ex(m: Machine) -> None:
    kwargs = m.stack.pop()
    args = m.stack.pop()
    m.construct(m.stack.pop(), args, kwargs, "NEWOBJ_EX")


def op_build(m: Machine) -> None:
    state = m.stack.pop()
    target = m.stack[-1]
    if isinstance(target, Obj):
        target.state = state
        m.find(judge_state(target.func, state, "BUILD", m.at))
        if target.func == DTYPE:
            m.dtypes.append((target, m.at))
        if m.behind is not None:
            m.behind(m, target)
    elif isinstance(target, TensorRef) and set_old_state(target, state):
        pass
    elif isinstance(target, Global):
        m.danger("build-on-global", f"changes {target}", target, "BUILD")
    elif state:
        raise m.error(f"BUILD on {KINDS.get(type(target), 'a value')}")


def op_persid(m: Machine) -> None:
    m.persistent(m.line())


def op_binpersid(m: Machine) -> None:
    m.persistent(m.stack.pop())


def op_next_buffer(m: Machine) -> None:
    raise m.error("an out-of-band buffer")
