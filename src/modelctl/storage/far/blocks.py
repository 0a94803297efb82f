"""A far object as a source: small reads from a cache of blocks, announced ones many at once.

A request costs a round trip, whatever it asks for. So what is read first of a file comes with its
neighbourhood, what is read one after the other comes ahead, and what somebody says that they will
read (:meth:`FarSource.will_read`) comes in large parts, several at a time, before it is asked for.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from bisect import bisect_right
from collections import OrderedDict
from collections.abc import Callable, Iterable, Sequence
from threading import Event, Lock, RLock, Thread
from typing import NamedTuple

from ...core.storages import CHUNK, Source
from ...errors import UnreadableError

BLOCK = 16 << 10
# The beginning and the end of a file: headers, directories and pickles lie there.
HEAD, _TAIL = 256 << 10, 128 << 10
_MOST_BLOCKS = (32 << 20) // BLOCK
_MOST_AHEAD = (1 << 20) // BLOCK
# Ranges that are no farther apart come in one request: it costs as much as so many bytes.
_GAP = 64 << 10
PART, _AT_ONCE = 4 << 20, 8
_STRETCH = 64 << 20


class FarObject(ABC):
    """Something far away whose ranges can be asked for, by several threads at once.

    Attributes:
        name: what errors call it, without secrets.
        size: in bytes.
        head: what came with the first answer, from the start.
    """

    name: str
    size: int
    head: bytes

    @abstractmethod
    def fetch(self, start: int, stop: int) -> bytes:
        """Exactly the bytes from ``start`` to ``stop``, of the object as it was at first.

        Raises:
            UnreadableError: it has changed since.
            ModelctlError: they can't be had, after several tries.
        """

    def close(self) -> None:  # noqa: B027
        """Let go of what is open."""


class _Guard(NamedTuple):
    """Bytes from ``start`` on that must be as ``check`` wants before those up to ``stop`` are
    given to anybody."""

    payload: int
    start: int
    stop: int
    check: Callable[[bytes], object]


class FarSource(Source):
    """An object far away, read in ranges.

    Args:
        far: what opens it.
        size: how long it is, where a listing says so: it is opened when it is first read then.
    """

    costly = True

    def __init__(self, name: str, far: Callable[[], FarObject], size: int | None = None) -> None:
        self._object = far() if size is None else None
        self._open = far
        super().__init__(name, self._object.size if self._object is not None else size or 0)
        self._blocks: OrderedDict[int, bytes] = OrderedDict()
        self._caching = RLock()
        self._next, self._ahead = -1, 0
        self._plans: list[_Plan] = []
        self._guards: list[_Guard] = []
        self._starts: list[int] = []
        if self._object is not None:
            self._begin(self._object)

    # ------------------------------------------------------------------ what readers call

    def read(self, offset: int, size: int) -> bytes:
        if size <= 0:
            return b""
        self.check(offset, size)
        guards = self._in_the_way(offset, offset + size)
        begin = min([offset, *(guard.start for guard in guards)])
        data = self._bytes(begin, offset + size)
        for guard in guards:
            guard.check(data[guard.start - begin : guard.payload - begin])
        self._passed(guards)
        return data[offset - begin :] if begin < offset else data

    def read_into(self, offset: int, out: memoryview) -> None:
        self.check(offset, len(out))
        if len(out) > 2 * PART and not self._plans:
            self.will_read([(offset, len(out))])
        for at in range(0, len(out), PART):
            size = min(PART, len(out) - at)
            out[at : at + size] = self.read(offset + at, size)

    def read_many(self, ranges: Iterable[tuple[int, int]]) -> list[bytes]:
        wanted = list(ranges)
        for offset, size in wanted:
            self.check(offset, size)
        if not self._plans and len(wanted) > 1:
            self.will_read(wanted)
        return [self.read(offset, size) for offset, size in wanted]

    def will_read(self, ranges: Sequence[tuple[int, int]]) -> None:
        """Say what will be read, and in which order: it comes in large parts, some ahead."""
        spans = []
        for offset, size in ranges:
            if size > 0:
                self.check(offset, size)
                guards = self._in_the_way(offset, offset + size)
                begin = min([offset, *(guard.start for guard in guards)])
                if not self._has(begin, offset + size):
                    spans.append((begin, offset + size))
        self._plans = _plans(spans, self._fetched)

    def guard(self, start: int, payload: int, stop: int, check: Callable[[bytes], object]) -> None:
        # read with the payload: what is presumed costs no request until somebody relies on it
        with self._caching:
            at = bisect_right(self._starts, payload)
            self._starts.insert(at, payload)
            self._guards.insert(at, _Guard(payload, start, stop, check))

    def has(self, offset: int, size: int) -> bool:
        return offset + size <= self.size and self._has(offset, offset + size)

    def close(self) -> None:
        super().close()
        self._plans = []
        self._blocks.clear()
        if self._object is not None:
            self._object.close()

    def _fetch(self, offset: int, size: int) -> bytes:
        return self._bytes(offset, offset + size)

    @property
    def opened(self) -> FarObject | None:
        """What is far away, where it was asked for by now."""
        return self._object

    # ------------------------------------------------------------------ where bytes come from

    def _bytes(self, start: int, stop: int) -> bytes:
        self._far()
        plans = self._plans
        for n, plan in enumerate(plans):
            data = plan.read(start, stop)
            if data is not None:
                if n > 1:  # those before are behind
                    self._plans = plans[n - 1 :]
                return data
        if stop - start <= CHUNK or self._has(start, stop):
            return self._by_blocks(start, stop)
        spans = [(at, min(at + PART, stop)) for at in range(start, stop, PART)]
        if len(spans) == 1:
            return self._fetched(start, stop)
        whole = _Plan([(start, stop)], self._fetched).read(start, stop)
        assert whole is not None
        return whole

    def _begin(self, far: FarObject) -> None:
        self._store(0, far.head)
        self._count(len(far.head))

    def _far(self) -> FarObject:
        """What is far away, open."""
        with self._caching:
            if self._object is None:
                far = self._open()
                if far.size != self.size:
                    raise UnreadableError(
                        f"it changed: it has {far.size:,} bytes, the listing of its folder says "
                        f"{self.size:,}",
                        path=self.name,
                        hint="do it again",
                    )
                self._object = far
                self._begin(far)
            return self._object

    def _fetched(self, start: int, stop: int) -> bytes:
        data = self._far().fetch(start, stop)
        self._count(len(data))
        return data

    def _has(self, start: int, stop: int) -> bool:
        with self._caching:
            return all(b in self._blocks for b in range(start // BLOCK, -(-stop // BLOCK)))

    def _store(self, start: int, data: bytes) -> None:
        """Keep the whole blocks in what came; the last one of a file may be short."""
        for at in range(0, len(data), BLOCK):
            block = data[at : at + BLOCK]
            if len(block) == BLOCK or start + at + len(block) == self.size:
                self._blocks[(start + at) // BLOCK] = block
        while len(self._blocks) > _MOST_BLOCKS:
            self._blocks.popitem(last=False)

    def _by_blocks(self, start: int, stop: int) -> bytes:
        first, last = start // BLOCK, (stop - 1) // BLOCK
        with self._caching:
            wanted = range(first, last + 1)
            for b in wanted:  # what is there must not make room for the rest
                if b in self._blocks:
                    self._blocks.move_to_end(b)
            missing = [b for b in wanted if b not in self._blocks]
            if missing:
                self._load(missing[0], missing[-1] + 1)
            parts = []
            for b in wanted:
                self._blocks.move_to_end(b)
                parts.append(self._blocks[b])
        data = parts[0] if len(parts) == 1 else b"".join(parts)
        return data[start - first * BLOCK : stop - first * BLOCK]

    def _load(self, first: int, stop: int) -> None:
        """Fetch blocks: at the end of the file with what lies around, else with twice as much
        ahead as the last time, where somebody reads on."""
        whole = -(-self.size // BLOCK)
        if first * BLOCK >= self.size - _TAIL:
            first, end = max(0, self.size - _TAIL) // BLOCK, whole
        else:
            self._ahead = min(max(2 * self._ahead, 4), _MOST_AHEAD) if first == self._next else 0
            end = min(stop + self._ahead, whole)
            self._next = end
        start = first * BLOCK
        self._store(start, self._fetched(start, min(end * BLOCK, self.size)))

    # ------------------------------------------------------------------ what is only presumed

    def _in_the_way(self, start: int, stop: int) -> list[_Guard]:
        """The guards of payloads in a range that nobody looked at yet."""
        if not self._guards:
            return []
        with self._caching:
            at = max(bisect_right(self._starts, start) - 1, 0)
            found = []
            while at < len(self._guards) and self._guards[at].payload < stop:
                if self._guards[at].stop > start:
                    found.append(self._guards[at])
                at += 1
            return found

    def _passed(self, guards: Sequence[_Guard]) -> None:
        if not guards:
            return
        with self._caching:
            for guard in guards:
                at = bisect_right(self._starts, guard.payload) - 1
                if at >= 0 and self._guards[at] is guard:
                    del self._starts[at], self._guards[at]


class _Part:
    """A range that comes in one request; ``left`` counts the bytes that are still to be read."""

    def __init__(self, start: int, stop: int) -> None:
        self.start, self.stop, self.left = start, stop, 0
        self.begun, self.done = False, Event()
        self.data: bytes | None = None
        self.error: BaseException | None = None


class _Plan:
    """Ranges that will be read about the same time, in parts that come some ahead of who reads
    them, each kept until it was read.

    Its threads are daemons: an interrupted program does not wait for a server.
    """

    def __init__(
        self, spans: Sequence[tuple[int, int]], fetch: Callable[[int, int], bytes]
    ) -> None:
        self._fetch, self._lock = fetch, Lock()
        self._parts = _parts(spans)
        self._starts = [part.start for part in self._parts]
        rank: dict[int, int] = {}  # parts come in the order in which they are asked for
        for start, stop in spans:
            at = bisect_right(self._starts, start) - 1
            while at < len(self._parts) and self._parts[at].start < stop:
                part = self._parts[at]
                part.left += min(stop, part.stop) - max(start, part.start)
                rank.setdefault(at, len(rank))
                at += 1
        self._order = [self._parts[at] for at in rank]
        self._rank = {id(part): n for n, part in enumerate(self._order)}

    def read(self, start: int, stop: int) -> bytes | None:
        """The bytes of a range, or None where it is not a part of the plan (any more)."""
        pieces: list[bytes] = []
        at = start
        while at < stop:
            index = bisect_right(self._starts, at) - 1
            part = self._parts[index] if index >= 0 else None
            if part is None or at >= part.stop or not self._begin(part):
                return None
            part.done.wait()
            if part.error is not None:
                raise part.error
            data = part.data
            if data is None:
                return None
            piece = data[at - part.start : stop - part.start]
            pieces.append(piece)
            at += len(piece)
            with self._lock:
                part.left -= len(piece)
                if part.left <= 0:
                    part.data = None
        return pieces[0] if len(pieces) == 1 else b"".join(pieces)

    def _begin(self, part: _Part) -> bool:
        """Have a part and the next ones fetched; whether it is there, or on its way."""
        with self._lock:
            if part.begun and part.done.is_set() and part.data is None and part.error is None:
                return False  # it was read, all of it
            at = self._rank[id(part)]
            for one in self._order[at : at + _AT_ONCE]:
                if not one.begun:
                    one.begun = True
                    Thread(target=self._get, args=(one,), daemon=True).start()
        return True

    def _get(self, part: _Part) -> None:
        try:
            part.data = self._fetch(part.start, part.stop)
        except BaseException as e:
            part.error = e
        finally:
            part.done.set()


def _plans(spans: Sequence[tuple[int, int]], fetch: Callable[[int, int], bytes]) -> list[_Plan]:
    """Spans in the order in which they will be read, as plans of a bounded size: what lies together
    but is read at other times is fetched twice, not held all the while."""
    plans: list[_Plan] = []
    group: list[tuple[int, int]] = []
    size = 0
    for span in spans:
        group.append(span)
        size += span[1] - span[0]
        if size >= _STRETCH:
            plans.append(_Plan(group, fetch))
            group, size = [], 0
    return [*plans, _Plan(group, fetch)] if group else plans


def _parts(spans: Sequence[tuple[int, int]]) -> list[_Part]:
    """Spans as parts: those close together are one, what is large is several."""
    joined: list[list[int]] = []
    for start, stop in sorted(spans):
        if joined and start <= joined[-1][1] + _GAP:
            joined[-1][1] = max(joined[-1][1], stop)
        else:
            joined.append([start, stop])
    return [
        _Part(at, min(at + PART, stop)) for start, stop in joined for at in range(start, stop, PART)
    ]
