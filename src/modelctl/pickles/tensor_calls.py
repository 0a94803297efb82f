"""Tensors as torch's pickler writes them, some thirty opcodes in a fixed order, in one step each.

A checkpoint of many tensors is this sequence over and over with other numbers in it, so that one
regular expression does what would be thirty turns of the loop. What comes of it is what the
opcodes would make, by the same functions; bytes that differ in the least (a slot out of order, an
integer too long) are left to the opcodes, one by one. What these would leave in the memo and
torch never takes out again, an id and its arguments, is made when it is asked for.
"""

from __future__ import annotations

import re
import struct
from array import array
from bisect import bisect_right
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Any

from ..core.nodes import ORDERED_DICT, Global, Obj
from ..core.tensors import StorageRef
from ..errors import UnreadableError
from .rebuild import TENSOR_V2, Reach, place, reach

if TYPE_CHECKING:
    from .machine import Machine

# What stands in the memo for what was not made yet.
UNMADE = object()
# For how many opcodes a tensor counts: it takes the time of about ten, and keeps less than they do.
_COST = 4
# As many tensors are read before the loop looks at its limits again.
_AT_ONCE = 1000
# What bytes mean is remembered where they come again, and forgotten beyond so many of them.
_MOST_KNOWN = 1 << 12

_GET = rb"(?:h.|j....)"
_PUT = rb"r(....)"
_INT = rb"(?:K.|M..|J....)"
_INTS = rb"|".join(
    (_INT + rb"\x85", _INT + rb"{2}\x86", _INT + rb"{3}\x87", rb"\(" + _INT + rb"{0,64}t")
)
_CALL = re.compile(
    # ("storage", class, key, location, numel), long ago with a view, None: a persistent id
    rb"\(\((?P<head>" + _GET + rb"{2})"
    rb"(?:X(....)(?P<key>\d{1,20})" + _PUT + rb"|(?P<known>" + _GET + rb"))"
    rb"(?P<where>" + _GET + rb")(?P<numel>" + _INT + rb")(?P<view>N)?t" + _PUT + rb"Q"
    # offset, size, stride, requires_grad, hooks (an empty OrderedDict), and v3's dtype
    rb"(?P<offset>" + _INT + rb")"
    rb"(?:(?P<size>" + _INTS + rb")" + _PUT + rb"(?P<stride>" + _INTS + rb")" + _PUT + rb"|\)\))"
    rb"(?P<hooks>[\x88\x89]" + _GET + rb")\)R" + _PUT
    + rb"(?P<dtype>" + _GET + rb")?t" + _PUT + rb"R" + _PUT,
    re.DOTALL,
)  # fmt: skip
_BEFORE_BINPERSID, _BEFORE_REDUCE = 9, 18  # groups
_NEWTRUE, _BINUNICODE, _LONG_BINPUT = b"\x88", b"X", b"r"
_EACH_GET = re.compile(_GET, re.DOTALL)
_EACH_INT = re.compile(_INT, re.DOTALL)
_uint = struct.Struct("<I").unpack_from
_LENGTHS = [struct.pack("<I", n) for n in range(21)]
# n slots in a row from f on, as PUTs spell them, are the integer f * ones + ramp of n * 4 bytes.
_ROWS = [
    (sum(1 << 32 * i for i in range(n)), sum(i << 32 * i for i in range(n)), 4 * n)
    for n in range(8)
]
_UNMADE = [[UNMADE] * n for n in range(8)]
_NO_HOOKS = Obj(ORDERED_DICT)


class TensorCalls:
    """Reads tensors in one step each, and knows which slots of the memo they fill, from where."""

    def __init__(self, memo: list[Any]) -> None:
        self.memo = memo
        # what bytes mean: GETs, integers, a size with its stride, requires_grad with its hooks
        self.gets: dict[bytes, tuple[Any, ...]] = {}
        self.numbers: dict[bytes, int] = {}
        self.reaches: dict[tuple[bytes, bytes], Reach] = {}
        self.flags: dict[bytes, bool] = {}
        self.slots = array("Q")  # the first one of each tensor, ascending
        self.places = array("Q")  # where its bytes begin

    def read(self, m: Machine, func: Global, load: Callable[[Any], Any], room: int) -> None:
        """Read the call of ``func``, which a GET has just put on the stack, if what follows are
        its arguments as torch writes them; and the next ones, as long as they have a name each.

        ``load`` makes storages of persistent ids, ``room`` is how many slots there may be.

        Raises:
            UnreadableError: as the opcodes would, at their offsets.
        """
        data, memo, stack = m.data, self.memo, m.stack
        gets, numbers, reaches, flags = self.gets, self.numbers, self.reaches, self.flags
        get = data[m.at : m.pos]
        for _ in range(_AT_ONCE):
            match = _CALL.match(data, m.pos)
            if match is None:
                return
            # fmt: off
            (head, length, key, key_put, known, where, numel, view, pid_put, offset, size, size_put,
             stride, stride_put, hooks, hooks_put, dtype, args_put, put) = match.groups(b"")
            # fmt: on
            first = len(memo)
            puts = b"".join((key_put, pid_put, size_put, stride_put, hooks_put, args_put, put))
            ones, ramp, width = _ROWS[len(puts) >> 2]
            if puts != (first * ones + ramp).to_bytes(width, "little") or first + 8 > room:
                return
            try:
                storage, cls = gets[head]
                name = key.decode() if key else gets[known][0]
                pid: tuple[Any, ...] = (storage, cls, name, gets[where][0], numbers[numel])
                at, reach, needs_grad = numbers[offset], reaches[size, stride], flags[hooks]
                more = gets[dtype] if dtype else ()
            except KeyError:
                if self._learn((head, known, where, dtype), (numel, offset), size, stride, hooks):
                    continue
                return
            if at < 0 or (key and length != _LENGTHS[len(key)]):
                return
            if view:
                pid = (*pid, None)
            try:
                ref = load(pid)
            except UnreadableError as e:
                m.at = match.end(_BEFORE_BINPERSID)
                raise m.refused(pid, e) from None
            if func is TENSOR_V2 and not more and type(ref) is StorageRef and ref.dtype is not None:
                try:
                    stack[-1] = made = place(ref, ref.dtype, at, reach, needs_grad)
                except UnreadableError as e:
                    m.at = match.end(_BEFORE_REDUCE)
                    raise m.error(e.reason) from None
            else:
                stack.pop()
                m.at = match.end(_BEFORE_REDUCE)
                m.call(func, (ref, at, *reach[:2], needs_grad, _NO_HOOKS, *more), "REDUCE")
                made = stack[-1]
            memo += _UNMADE[width >> 2]
            memo[-1] = made
            if key:
                memo[first] = name
            self.slots.append(first)
            self.places.append(match.start())
            m.pos = at = match.end()
            m.spent += _COST
            # In a state_dict a name follows, and the same call again.
            if not data.startswith(_BINUNICODE, at) or at + 10 > len(data):
                return
            end = at + 5 + _uint(data, at + 1)[0]
            if (
                not data.startswith(get, end + 5)
                or not data.startswith(_LONG_BINPUT, end)
                or _uint(data, end + 1)[0] != len(memo)
            ):
                return
            try:
                text = data[at + 5 : end].decode("utf-8", "surrogatepass")
            except UnicodeDecodeError:
                return
            memo.append(text)
            stack += (text, func)
            m.pos = end + 5 + len(get)
            m.spent += 3

    def make(self, m: Machine, slot: int) -> Any:
        """What the opcodes would have left in a slot, and in those beside it."""
        tensor = bisect_right(self.slots, slot) - 1
        first = self.slots[tensor]
        match = _CALL.match(m.data, self.places[tensor])
        assert match is not None
        assert m.persistent_load is not None
        found = match.groupdict(b"")
        name = self.memo[first] if found["key"] else self._got(found["known"])[0]
        storage, cls = self._got(found["head"])
        pid = (storage, cls, name, *self._got(found["where"]), _int(found["numel"]))
        if found["view"]:
            pid = (*pid, None)
        size, stride, hooks = _ints(found["size"]), _ints(found["stride"]), Obj(ORDERED_DICT)
        args = (
            *(m.persistent_load(pid), _int(found["offset"]), size, stride),
            *(found["hooks"][:1] == _NEWTRUE, hooks, *self._got(found["dtype"])),
        )
        row = [name] if found["key"] else []
        row += [pid, size, stride, hooks, args] if found["size"] else [pid, hooks, args]
        self.memo[first : first + len(row)] = row
        return self.memo[slot]

    def settle(self, m: Machine) -> None:
        """Make all that was not made: what it is made of is about to change."""
        for slot in self.slots:
            for beside in (slot, slot + 1):
                if self.memo[beside] is UNMADE:
                    self.make(m, beside)
        del self.slots[:], self.places[:]
        self.gets.clear()
        self.flags.clear()

    def _learn(
        self,
        gets: Iterable[bytes],
        numbers: Iterable[bytes],
        size: bytes,
        stride: bytes,
        hooks: bytes,
    ) -> bool:
        """Find out what these bytes mean; False where only the opcodes can tell."""
        for known in (self.gets, self.numbers, self.reaches, self.flags):
            if len(known) >= _MOST_KNOWN:
                known.clear()
        try:
            self.gets.update((raw, self._got(raw)) for raw in gets)
            self.reaches[size, stride] = _reach(size, stride)
            if self._got(hooks[1:])[0] is not ORDERED_DICT:
                return False
        except (LookupError, UnreadableError):
            return False
        self.numbers.update((raw, _int(raw)) for raw in numbers)
        self.flags[hooks] = hooks[:1] == _NEWTRUE
        return True

    def _got(self, raw: bytes) -> tuple[Any, ...]:
        """What GETs find in the memo. Raises LookupError where that is nothing yet."""
        found = tuple(
            self.memo[int.from_bytes(get[1:], "little")] for get in _EACH_GET.findall(raw)
        )
        if any(value is UNMADE for value in found):
            raise LookupError
        return found


def _int(raw: bytes) -> int:
    """The integer of a BININT1, BININT2 or BININT."""
    return int.from_bytes(raw[1:], "little", signed=len(raw) == 5)


def _ints(raw: bytes) -> tuple[int, ...]:
    """The integers of a size or stride, as the opcodes ``raw`` put them together."""
    return tuple(map(_int, _EACH_INT.findall(raw, raw[:1] == b"(")))


def _reach(size: bytes, stride: bytes) -> Reach:
    dims, steps = _ints(size), _ints(stride)
    if len(dims) != len(steps):
        raise UnreadableError("a tensor whose size and stride don't go together")
    return reach(dims, steps)
