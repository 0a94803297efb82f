"""The machine of the pickle interpreter: its stack, memo and findings, and what it may make.

Rules and limits as in docs/safety.md#pickles. What a pickle would call becomes an
:class:`~modelctl.core.tree.Obj`, unless it is one of torch's tensor rebuild functions or a plain
container.
"""

from __future__ import annotations

import _compat_pickle
from collections.abc import Callable, Iterable
from contextlib import suppress
from typing import Any

from ..core.checkpoint import Finding
from ..core.nodes import ORDERED_DICT, Global, Obj
from ..core.tensors import Rebuild, TensorRef
from ..core.tree import brief
from ..errors import UnreadableError
from .array_dtypes import judge_dtype
from .composite import composite
from .policy import MAY_CALL_WITH, judge, judge_global, judge_state, judge_subclass
from .rebuild import REBUILDS, TENSOR_V2, TENSOR_V3
from .tensor_calls import UNMADE, TensorCalls

# What any pickle may make; one that takes more of its file may make more, so that time and memory
# are in proportion to what somebody had to store.
# Slots are filled in order: a million tensors take nine million. Those in any other order are kept
# in a dict, which takes ten times as much for each.
MAX_MEMO, BYTES_A_SLOT = 16_000_000, 4
MAX_MEMO_ANYHOW = 4_000_000
MAX_MARKS = 10_000
# What takes far more memory than the opcodes that make it, and tuples, which take a little more: at
# most so many, and so many a byte of the pickle (one that holds something takes more).
MAX_CONTAINERS, CONTAINERS, BYTES_A_CONTAINER = 2_000_000, 50_000, 12
MAX_TUPLES, TUPLES, BYTES_A_TUPLE = 8_000_000, 200_000, 5
# Names that differ, each of which is judged: a checkpoint has some hundreds.
_MAX_NAMES = 50_000
_MAX_LINE = 1 << 16
_MAX_FINDINGS = 1_000  # of each level
_MAX_EQUAL = 64

KINDS = {list: "a list", dict: "a dict", tuple: "a tuple", str: "a string", Global: "a global"}


class CutOffError(UnreadableError):
    """A pickle that goes on beyond the bytes given."""


class Machine:
    """What the opcodes work on. ``at`` is where the current opcode lies, ``pos`` what follows."""

    def __init__(
        self,
        data: bytes,
        start: int,
        persistent_load: Callable[[Any], Any] | None,
        findings: list[Finding] | None = None,
        on_disk: int = 0,
    ) -> None:
        self.data, self.pos = data, start
        self.persistent_load = persistent_load
        self.stack: list[Any] = []
        self.below: list[list[Any]] = []
        self.memo: list[Any] = []
        self.sparse: dict[int, Any] = {}
        self.made = self.tuples = 0
        size = len(data) - start
        most = max(MAX_CONTAINERS, on_disk // BYTES_A_CONTAINER)
        self.most_made = min(most, CONTAINERS + size // BYTES_A_CONTAINER)
        most = max(MAX_TUPLES, on_disk // BYTES_A_TUPLE)
        self.most_tuples = min(most, TUPLES + size // BYTES_A_TUPLE)
        self.most_slots = max(MAX_MEMO, on_disk // BYTES_A_SLOT)
        # these few are compared by identity
        self.globals = {(one.module, one.name): one for one in (ORDERED_DICT, TENSOR_V2, TENSOR_V3)}
        self.tensors = TensorCalls(self.memo)
        self.spent = 0  # opcodes, beyond those that were run one by one
        self.equal_hashes: dict[tuple[int, int], int] = {}
        self.findings: list[Finding] = [] if findings is None else findings
        self.kinds: dict[tuple[str, str, str], int] = {}  # of findings: where in the list
        self.levels: dict[str, int] = {}
        self.named: dict[Global, Finding] = {}  # what is found of names, called or not
        # Of what may be called with some arguments: how often it was on the stack, and not called.
        self.owed: dict[Global, int] = {}
        # called when an object got its state: what lies behind it in the stream is its own
        self.behind: Callable[[Machine, Any], None] | None = None
        self.dtypes: list[tuple[Obj, int]] = []  # numpy's, and where their states were set
        self.at = start

    def error(self, message: str) -> UnreadableError:
        return UnreadableError(message, offset=self.at)

    def cut_off(self, wanted: int = 1) -> CutOffError:
        left = max(len(self.data) - self.at - 1, 0)
        return CutOffError(
            f"the pickle is cut off: {wanted:,} more bytes are declared, {left:,} are left",
            offset=self.at,
        )

    # ------------------------------------------------------------------ pieces

    def take(self, size: int) -> bytes:
        at = self.pos
        end = at + size
        if end > len(self.data):
            raise self.cut_off(size)
        self.pos = end
        return self.data[at:end]

    def raw_line(self) -> bytes:
        at = self.pos
        end = self.data.find(b"\n", at, at + _MAX_LINE)
        if end < 0:
            if len(self.data) - at < _MAX_LINE:
                raise self.cut_off()
            raise self.error("a line without an end")
        self.pos = end + 1
        return self.data[at:end]

    def line(self) -> str:
        try:
            return self.raw_line().decode("utf-8")
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

    def count(self) -> None:
        """One more list, dict or object, each of which takes far more memory than its opcode."""
        self.made += 1
        if self.made > self.most_made:
            raise self.error(f"more than {self.most_made:,} containers in a pickle of its size")

    def add_tuple(self, parts: Iterable[Any]) -> None:
        self.tuples += 1
        if self.tuples > self.most_tuples:
            raise self.error(f"more than {self.most_tuples:,} tuples in a pickle of its size")
        self.stack.append(tuple(parts))

    def put(self, index: int) -> None:
        memo = self.memo
        most = self.most_slots if index == len(memo) else MAX_MEMO_ANYHOW
        if index < len(memo):
            self.tensors.settle(self)
            memo[index] = self.stack[-1]
        elif index >= most:
            raise self.error(f"memo slot {index:,}, of at most {most:,}")
        elif index == len(memo) and index not in self.sparse:
            memo.append(self.stack[-1])
        else:
            self.sparse[index] = self.stack[-1]

    def fetch(self, index: int) -> None:
        if 0 <= index < len(self.memo):
            value = self.memo[index]
            self.stack.append(self.tensors.make(self, index) if value is UNMADE else value)
            if self.owed:
                self.owe(value)
        elif index in self.sparse:
            self.stack.append(self.sparse[index])
            self.owe(self.sparse[index])
        else:
            raise self.error(f"memo slot {index} was never filled")

    def owe(self, value: Any) -> None:
        """What is on the stack once more."""
        if type(value) is Global and value in self.owed:
            self.owed[value] += 1

    def get(self, index: int) -> None:
        """A BINGET or LONG_BINGET: what torch calls for a tensor comes out of the memo by these."""
        self.fetch(index)
        value = self.stack[-1]
        if (
            (value is TENSOR_V2 or value is TENSOR_V3)
            and self.persistent_load is not None
            and not self.sparse
            and len(self.below) + 2 <= MAX_MARKS
        ):
            self.tensors.read(self, value, self.persistent_load, self.most_slots)

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

    def enter(self, entries: dict[Any, Any], key: Any, value: Any) -> None:
        """``entries[key] = value``, where that is done without harm."""
        if type(key) is not str:
            self.key(key)
            if isinstance(key, tuple) and key not in entries:
                # Hashes of tuples of integers are no secret: a dict of equal ones takes hours.
                slot = (id(entries), hash(key))
                self.equal_hashes[slot] = count = self.equal_hashes.get(slot, 0) + 1
                if count > _MAX_EQUAL:
                    raise self.error("keys that were made to have the same hash")
        entries[key] = value

    def find(self, finding: Finding | None) -> None:
        """Note a finding; of what was found before, that it was found once more."""
        if finding is None:
            return
        kind = (finding.level, finding.id, finding.name)
        index = self.kinds.get(kind)
        if index is not None:
            before = self.findings[index]
            self.findings[index] = before._replace(times=before.times + 1)
            return
        found = self.levels[finding.level] = self.levels.get(finding.level, 0) + 1
        if found <= _MAX_FINDINGS:
            self.kinds[kind] = len(self.findings)
            self.findings.append(finding)

    def finish(self) -> None:
        """Note what was named, and not called, and the dtypes: they are whole now."""
        for dtype, at in self.dtypes:
            self.find(judge_dtype(dtype, at))
        called = {finding.name for finding in self.findings}
        for name, finding in self.named.items():
            if self.owed.get(name, 1) and finding.name not in called:
                self.find(finding)

    def danger(self, id: str, what: str, name: Any, opcode: str) -> None:
        text = (
            name
            if isinstance(name, str)
            else str(name)
            if isinstance(name, Global)
            else brief(name)
        )
        self.find(Finding("dangerous", id, what[:300], text[:200], opcode, self.at))

    # ------------------------------------------------------------------ what makes objects

    def name(self, module: Any, name: Any) -> None:
        # Python 2's names, as pickle itself translates them
        module, name = _compat_pickle.NAME_MAPPING.get(
            (module, name), (_compat_pickle.IMPORT_MAPPING.get(module, module), name)
        )
        found = self.globals.get((module, name))
        if found is None:
            if len(self.globals) >= _MAX_NAMES:
                raise self.error(f"more than {_MAX_NAMES:,} different names")
            found = self.globals[(module, name)] = Global(module, name)
            if "." in name:
                self.danger("dotted-name", f"names {found}", found, "STACK_GLOBAL")
            finding = judge_global(found, self.at)
            if finding is not None:
                self.named[found] = finding
                if found in MAY_CALL_WITH:
                    self.owed[found] = 0
        if found in self.owed:
            self.owed[found] += 1
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
                    if isinstance(made, TensorRef) and made.rebuild is not None:
                        self.judge_tensor(made.rebuild)
                    self.stack.append(made)
                    return
        self.count()
        finding = judge(func, args, opcode, self.at)
        self.find(finding)
        if finding is None and isinstance(func, Global) and func in self.owed:
            self.owed[func] -= 1
        made = None
        if isinstance(func, Global):
            with suppress(TypeError, ValueError, IndexError, AttributeError, KeyError):
                made = composite(func, args)
        self.stack.append(Obj(func, args) if made is None else made)

    def persistent(self, pid: Any) -> None:
        """BINPERSID: what stands in the tree for it, by who reads the container."""
        if self.persistent_load is None:
            raise self.error("a persistent id where none is expected")
        try:
            self.stack.append(self.persistent_load(pid))
        except UnreadableError as e:
            raise self.refused(pid, e) from None

    def refused(self, pid: Any, e: UnreadableError) -> UnreadableError:
        """A persistent id that is no storage, or none that is there."""
        cls = pid[1] if type(pid) is tuple and len(pid) > 1 and pid[0] == "storage" else None
        if not isinstance(cls, Global) or cls.module.partition(".")[0] != "torch":
            self.danger("persistent-id", "hands a reader what is no storage", cls, "BINPERSID")
        return self.error(e.reason) if e.offset is None and e.member is None else e

    def judge_tensor(self, rebuild: Rebuild) -> None:
        if rebuild.subclass is not None:
            self.find(judge_subclass(rebuild.subclass, self.at))
        self.find(judge_state(None, rebuild.state, "REDUCE", self.at))

    def construct(self, cls: Any, args: Any, kwargs: Any, opcode: str) -> None:
        if not isinstance(args, tuple):
            raise self.error("a construction whose arguments are not a tuple")
        self.count()
        self.find(judge(cls, args, opcode, self.at))
        how = "newobj" if opcode == "NEWOBJ" else "newobj_ex"
        self.stack.append(Obj(cls, args, how, kwargs=kwargs))

    def extend(self, target: Any, values: list[Any]) -> None:
        if isinstance(target, list):
            target.extend(values)
        elif isinstance(target, Obj):
            target.items.extend(values)
        else:
            raise self.error(f"APPEND on {KINDS.get(type(target), 'a value')}")

    def set_items(self, target: Any, values: list[Any]) -> None:
        if isinstance(target, Obj):
            entries = target.entries
        elif isinstance(target, dict):
            entries = target
        elif isinstance(target, Global):
            self.danger("setitem-on-global", f"changes {target}", target, "SETITEM")
            return
        else:
            raise self.error(f"SETITEM on {KINDS.get(type(target), 'a value')}")
        if len(values) % 2:
            raise self.error("SETITEMS with a key but no value")
        keys = values[::2]
        if set(map(type, keys)) == {str}:
            entries.update(zip(keys, values[1::2], strict=True))
            return
        for key, value in zip(keys, values[1::2], strict=True):
            self.enter(entries, key, value)
