"""Host memory on the way to a device: a ring of chunks, which threads fill and send on each by
itself. A chunk is filled again as soon as what it held has arrived; nobody waits for all."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from queue import SimpleQueue
from threading import Lock, local
from typing import Any, NamedTuple

import torch
from torch import Tensor

ALIGN = 64
# More tensors than this in one chunk are one copy over the bus, and are told apart on the device.
_FEW = 4

Wait = Callable[[], object]


def _usable_cpus() -> int:
    affinity = getattr(os, "sched_getaffinity", None)  # Linux
    return len(affinity(0)) if affinity else os.cpu_count() or 1


def thread_count() -> int:
    """How many threads read: by the CPUs that this process may use. They wait more than they
    compute."""
    return min(16, max(4, _usable_cpus()))


class Part(NamedTuple):
    """Where the elements of a tensor stand in a chunk, in bytes, and the flat tensor, of any
    dtype, that gets them."""

    start: int
    stop: int
    dtype: torch.dtype
    target: Tensor

    def window(self, chunk: Tensor) -> Tensor:
        return chunk[self.start : self.stop].view(self.dtype)


class Bus:
    """How chunks get to a device. Here: each is copied before ``send`` is left, on as many threads
    as there are, which suits the CPU (other dtypes).

    Attributes:
        chunks: how many of them are worth having, each of ``size`` bytes.
    """

    chunks, size = 4, 4 << 20

    def __init__(self, device: torch.device) -> None:
        self.device = device

    def memory(self) -> Tensor:
        """For one more chunk."""
        return torch.empty(self.size, dtype=torch.uint8)

    def mark(self) -> Any:
        """What the device has been asked to do by now, for :meth:`send` to come after."""
        return None

    def send(self, chunk: Tensor, parts: Sequence[Part], after: Any) -> Wait:
        """Start to copy what stands in a chunk; gives what waits until it has arrived."""
        for part in parts:
            part.target.copy_(part.window(chunk))
        return _nothing


class OneLane(Bus):
    """To a device of which it is not known that several threads may use it at once."""

    def __init__(self, device: torch.device) -> None:
        super().__init__(device)
        self._lock = Lock()

    def send(self, chunk: Tensor, parts: Sequence[Part], after: Any) -> Wait:
        with self._lock:
            return super().send(chunk, parts, after)


class CudaBus(Bus):
    """From page-locked memory, on a stream of each thread's own, with an event a chunk."""

    def __init__(self, device: torch.device) -> None:
        super().__init__(device)
        # one is filled while another is on its way; more would only leave the cache sooner
        self.chunks = min(16, max(8, 2 * thread_count()))
        self._own = local()

    def memory(self) -> Tensor:
        with torch.cuda.device(self.device):  # else of a thread it is the first one
            return torch.empty(self.size, dtype=torch.uint8, pin_memory=True)

    def mark(self) -> Any:
        # the memory of a target may be in use until then, by what had it before
        return torch.cuda.current_stream(self.device).record_event()

    def send(self, chunk: Tensor, parts: Sequence[Part], after: Any) -> Wait:
        stream = self._stream()
        cuda: Any = torch.cuda
        event = cuda.Event(blocking=True)
        try:
            with cuda.stream(stream):
                stream.wait_event(after)
                self._copy(chunk, parts)
                event.record(stream)
        except BaseException:
            stream.synchronize()  # the chunk is free when this is left
            raise
        wait: Wait = event.synchronize
        return wait

    def _copy(self, chunk: Tensor, parts: Sequence[Part]) -> None:
        if len(parts) <= _FEW and all(part.dtype == part.target.dtype for part in parts):
            for part in parts:
                part.target.copy_(part.window(chunk), non_blocking=True)
            return
        # the device converts faster than the host, and copies small tensors by the hundred
        there = chunk[: max(part.stop for part in parts)].to(self.device, non_blocking=True)
        torch._foreach_copy_(
            [part.target for part in parts], [part.window(there) for part in parts]
        )

    def _stream(self) -> Any:
        if not hasattr(self._own, "stream"):
            cuda: Any = torch.cuda
            self._own.stream = cuda.Stream(self.device)
        return self._own.stream


def bus_to(device: torch.device) -> Bus:
    kinds: dict[str, type[Bus]] = {"cpu": Bus, "cuda": CudaBus}
    return kinds.get(device.type, OneLane)(device)


class Ring:
    """Chunks for one device. Memory is taken as they are first needed."""

    def __init__(self, bus: Bus) -> None:
        self.bus, self.size = bus, bus.size
        self._free: SimpleQueue[tuple[Tensor | None, Wait]] = SimpleQueue()
        for _ in range(bus.chunks):
            self._free.put((None, _nothing))

    def pass_on(
        self, fill: Callable[[Tensor], object], parts: Sequence[Part], after: Any = None
    ) -> None:
        """Have a chunk filled, and start to send it on; called by any thread. It waits for the
        chunk that was sent first, where none is free."""
        chunk, arrived = self._free.get()
        try:
            arrived()
            if chunk is None:
                chunk = self.bus.memory()
            fill(chunk)
            arrived = self.bus.send(chunk, parts, after)
        finally:
            self._free.put((chunk, arrived))

    def finish(self) -> None:
        """Wait until everything has arrived. No thread may be in :meth:`pass_on`."""
        for _ in range(self._free.qsize()):
            chunk, arrived = self._free.get()
            self._free.put((chunk, _nothing))
            arrived()


def _nothing() -> None:
    """What waits for what is there already."""
