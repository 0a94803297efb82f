"""Pickle bytes to an inert tree, by our own opcode loop: nothing is imported, nothing is called.

Opcodes as in the standard library's ``pickletools``; rules and limits as in
docs/safety.md#pickles.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

from ..core.checkpoint import Finding
from ..core.tree import is_deeper
from ..errors import UnreadableError
from . import opcodes as op
from .arrays import names_arrays, with_arrays
from .machine import Machine

MAX_SIZE = 256 << 20
# An opcode makes up to 60 bytes of memory, whatever the few are that it was deflated to.
MAX_OPCODES, OPCODES = 20_000_000, 2_000_000
MAX_DEPTH = 500


class Unpickled(NamedTuple):
    """What a pickle holds, where it ended, and what running it would have done."""

    value: Any
    end: int
    findings: list[Finding]


def unpickle(
    data: bytes,
    start: int = 0,
    persistent_load: Callable[[Any], Any] | None = None,
    findings: list[Finding] | None = None,
    on_disk: int = 0,
    behind: Callable[[Machine, Any], None] | None = None,
) -> Unpickled:
    """Read one pickle from ``data``, beginning at ``start``.

    ``persistent_load`` turns a persistent id (an inert value) into what stands in the tree for
    it; without one, persistent ids are an error. ``findings`` is the list to which they are
    added, so that those made before an error are kept. ``on_disk`` is how many bytes of a file hold
    it: limits of what it may take grow with them. ``behind`` is called with the machine and an
    object that got its state; it may move on over what the object's class reads from the stream.

    Raises:
        UnreadableError: not a pickle, cut off, or over a limit. ``offset`` says where.
    """
    machine = Machine(data, start, persistent_load, findings, on_disk)
    machine.behind = behind
    try:
        return _run(machine, min(max(MAX_OPCODES, on_disk), OPCODES + (on_disk or len(data))))
    finally:
        machine.finish()


def most_bytes(file: int) -> int:
    """How long a pickle in a file of so many bytes may be."""
    return max(MAX_SIZE, file)


def _run(machine: Machine, most: int) -> Unpickled:
    data, table = machine.data, _TABLE
    budget = most
    try:
        while True:
            machine.at = at = machine.pos
            machine.pos = at + 1
            run = table[data[at]]
            if run is None:
                raise machine.error(f"unknown opcode 0x{data[at]:02x}: not a pickle")
            run(machine)
            budget -= 1
            if budget < machine.spent:
                raise machine.error(f"more than {most:,} opcodes")
    except op.Stop:
        pass
    except IndexError:
        if machine.pos >= len(data):
            raise machine.cut_off() from None
        raise machine.error("an opcode finds nothing on the stack") from None
    value = machine.stack[-1]
    if is_deeper(value, MAX_DEPTH):  # the next reader's stack would not hold it
        raise UnreadableError(f"nested deeper than {MAX_DEPTH} levels")
    if names_arrays(machine.globals):
        value = with_arrays(value)
    return Unpickled(value, machine.pos, machine.findings)


_OPCODES: dict[bytes, Callable[[Machine], None]] = {
    b"\x80": op.op_proto,
    b"\x95": op.op_frame,
    b".": op.op_stop,
    b"(": op.op_mark,
    b"0": op.op_pop,
    b"1": op.op_pop_mark,
    b"2": op.op_dup,
    b"N": op.op_none,
    b"\x88": op.op_true,
    b"\x89": op.op_false,
    b"I": op.op_int,
    b"J": op.op_binint,
    b"K": op.op_binint1,
    b"M": op.op_binint2,
    b"L": op.op_long,
    b"\x8a": op.op_long1,
    b"\x8b": op.op_long4,
    b"F": op.op_float,
    b"G": op.op_binfloat,
    b"S": op.op_string,
    b"T": op.op_binstring,
    b"U": op.op_short_binstring,
    b"V": op.op_unicode,
    b"X": op.op_binunicode,
    b"\x8c": op.op_short_binunicode,
    b"\x8d": op.op_binunicode8,
    b"B": op.op_binbytes,
    b"C": op.op_short_binbytes,
    b"\x8e": op.op_binbytes8,
    b"\x96": op.op_bytearray8,
    b"\x97": op.op_next_buffer,
    b"\x98": op.op_next_buffer,
    b"]": op.op_empty_list,
    b"}": op.op_empty_dict,
    b")": op.op_empty_tuple,
    b"\x8f": op.op_empty_set,
    b"\x90": op.op_additems,
    b"\x91": op.op_frozenset,
    b"l": op.op_list,
    b"d": op.op_dict,
    b"t": op.op_tuple,
    b"\x85": op.op_tuple1,
    b"\x86": op.op_tuple2,
    b"\x87": op.op_tuple3,
    b"a": op.op_append,
    b"e": op.op_appends,
    b"s": op.op_setitem,
    b"u": op.op_setitems,
    b"g": op.op_get,
    b"h": op.op_binget,
    b"j": op.op_long_binget,
    b"p": op.op_put,
    b"q": op.op_binput,
    b"r": op.op_long_binput,
    b"\x94": op.op_memoize,
    b"c": op.op_global,
    b"\x93": op.op_stack_global,
    b"\x82": op.op_ext,
    b"\x83": op.op_ext,
    b"\x84": op.op_ext,
    b"R": op.op_reduce,
    b"i": op.op_inst,
    b"o": op.op_obj,
    b"\x81": op.op_newobj,
    b"\x92": op.op_newobj_ex,
    b"b": op.op_build,
    b"P": op.op_persid,
    b"Q": op.op_binpersid,
}
_TABLE: list[Callable[[Machine], None] | None] = [_OPCODES.get(bytes([i])) for i in range(256)]
