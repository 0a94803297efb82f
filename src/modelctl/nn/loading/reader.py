"""Bytes of a file into the memory of tensors, on any device, through memory of a fixed size."""

from __future__ import annotations

import ctypes
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from functools import partial
from threading import Lock
from types import TracebackType
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ...core.storages import Run, Source, Storage, fastest_crc32
from ...core.tensors import TensorRef
from ...errors import UnsupportedError
from ...storage.checksums import crc32_of_pieces
from .ring import ALIGN, Part, Ring, bus_to, thread_count

# What a thread reads at once, of one large tensor or of several small ones.
PIECE = 2 << 20
# A temporary tensor of rows of a view.
STRIP = 16 << 20
# A tensor that does not fit into the rest of a chunk starts there if that much is left.
_WORTH = 1 << 20
# What is read into a chunk before it is compared: it is in the cache then.
_STEP = 512 << 10
# Tensors in a file that are no farther apart are read at once into a chunk.
_GAP = 512


def torch_dtype(ref: TensorRef) -> torch.dtype:
    """The torch dtype of a reference. Raises UnsupportedError where this torch lacks it."""
    found = getattr(torch, ref.dtype.name, None)
    if not isinstance(found, torch.dtype):
        raise UnsupportedError(
            f"this torch ({torch.__version__}) has no dtype {ref.dtype.name}",
            hint="upgrade torch",
        )
    return found


class Reader:
    """Reads tensors of files into tensors; done when the ``with`` block is left.

    A CPU tensor of the same dtype gets the file's bytes in its own memory, with nothing in
    between. What goes to another device or dtype passes through a ring of chunks (see
    :class:`Ring`), of which each thread reads one and sends it on. Only what is not dense in
    memory or in the file, or deflated there, goes through a temporary tensor: of a strip of rows,
    where these lie one after the other.
    """

    def __init__(self, advance: Callable[[int], object] | None = None) -> None:
        """``advance`` is called with the number of bytes that were read since the last call."""
        self._pool: ThreadPoolExecutor | None = None
        self._jobs: list[tuple[Future[None], int]] = []  # each with its bytes
        self._advance = advance or (lambda _: None)
        self._rings: dict[torch.device, Ring] = {}
        self._load: _Load | None = None  # for the next chunk
        self._small: list[Callable[[], None]] = []
        self._small_bytes = 0
        self._inference = torch.is_inference_mode_enabled()  # threads have a mode of their own

    def __enter__(self) -> Reader:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        value: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        try:
            if kind is None:
                self.finish()
        finally:
            if self._pool is not None:
                self._pool.shutdown(cancel_futures=True)
            # nothing may still be on its way into memory that is freed now
            for ring in self._rings.values():
                with suppress(RuntimeError):  # of the device: what came first is what is told
                    ring.finish()

    def read(self, ref: TensorRef, dest: Tensor, *, compare: bool = True) -> None:
        """Start to copy a tensor of a file into one with as many elements, of any dtype.

        Without ``compare`` only its own bytes are read: the checksum of what it is a part of is
        not looked at.

        Raises:
            DamagedError: its bytes are not what was saved.
            UnreadableError: the file ends inside the tensor, or the disk failed. Either may come
                up as late as the end of the ``with`` block.
            UnsupportedError: a dtype that this torch lacks.
        """
        dtype = torch_dtype(ref)
        if dest.is_meta or not dest.numel():
            return
        if compare:
            ref.check()
            if not ref.storage.compared and ref.storage.recorded_crc32() is None:
                ref.storage.check()  # of parts of other storages
        compare = compare and not ref.storage.compared  # while it is read
        bits = ref.bits
        ref, dest = _row_major(ref.replace(rebuild=None) if bits else ref, dest)
        straight = dest.is_contiguous() and not bits
        comparison = _Comparison(ref.storage) if compare else None
        if straight and dest.device.type == "cpu" and dest.dtype == dtype:
            self._fill(ref, memory(dest), comparison)
            return
        lies = ref.is_contiguous and bool(ref.storage.runs(ref.start, ref.start + ref.nbytes))
        if straight and lies:
            self._stage(ref, dest.view(-1), dtype, comparison)
        elif not bits and (rows := _rows(ref, dest)):
            for at in range(0, len(dest), rows):
                part = dest[at : at + rows]
                start = ref.offset + at * ref.stride[0]
                strip = ref.replace(shape=tuple(part.shape), stride=ref.stride, offset=start)
                self.read(strip, part, compare=compare)
        else:
            where = dest.device if lies else "cpu"
            values = torch.empty(ref.shape, dtype=dtype, device=where)
            self.read(ref, values, compare=compare)
            self.finish()
            if bits.get("conj"):
                values = values.conj().resolve_conj()
            if bits.get("neg"):
                values = values.neg()
            dest.copy_(values.reshape(dest.shape))

    def finish(self) -> None:
        """Wait for the reads that were started, and until all has arrived."""
        self._send_load()
        self._start_small()
        jobs, self._jobs = self._jobs, []
        for job, nbytes in jobs:
            job.result()
            self._advance(nbytes)
        for ring in self._rings.values():
            ring.finish()

    def _start(self, job: Callable[[], None], nbytes: int) -> None:
        if self._pool is None:
            self._pool = ThreadPoolExecutor(thread_count(), "modelctl")
        self._jobs.append((self._pool.submit(job), nbytes))

    # ------------------------------------------------------------------ through a ring

    def _stage(
        self, ref: TensorRef, flat: Tensor, dtype: torch.dtype, comparison: _Comparison | None
    ) -> None:
        ring = self._rings.get(flat.device)
        if ring is None:
            ring = self._rings[flat.device] = Ring(bus_to(flat.device))
        total, item, at = flat.numel(), dtype.itemsize, 0
        while at < total:
            left = (total - at) * item
            load = self._load
            if load is None or load.ring is not ring or load.room < min(left, max(item, _WORTH)):
                self._send_load()
                self._load = load = _Load(ring)
            n = min(total - at, load.room // item)
            load.add(ref, at * item, flat[at : at + n], dtype, comparison)
            at += n

    def _send_load(self) -> None:
        load, self._load = self._load, None
        if load is not None and load.parts:
            after = load.ring.bus.mark()  # once all that it goes to is there
            self._start(partial(self._pass_on, load, after), load.nbytes)

    def _pass_on(self, load: _Load, after: Any) -> None:
        with torch.inference_mode() if self._inference else torch.no_grad():
            load.ring.pass_on(load.fill, load.parts, after)

    # ------------------------------------------------------------------ in place

    def _fill(self, ref: TensorRef, out: memoryview, comparison: _Comparison | None = None) -> None:
        """Start to read exactly the bytes of a tensor, row-major, into ``out``."""
        start = ref.start
        runs = ref.storage.runs(start, start + len(out)) if ref.is_contiguous else None
        at = 0
        if runs is None:
            for piece in ref.chunks():
                out[at : at + len(piece)] = piece
                at += len(piece)
                self._advance(len(piece))
            return
        for run in runs:
            for skip in range(0, run.nbytes, PIECE):
                part = out[at + skip : at + min(run.nbytes, skip + PIECE)]
                read = partial(_read, run.source, run.offset + skip, part, comparison, at + skip)
                if len(part) == PIECE:
                    self._start(read, PIECE)
                    continue
                self._small.append(read)
                self._small_bytes += len(part)
                if self._small_bytes >= PIECE:
                    self._start_small()
            at += run.nbytes

    def _start_small(self) -> None:
        reads, nbytes = self._small, self._small_bytes
        self._small, self._small_bytes = [], 0
        if self._pool is None and nbytes < PIECE:  # all there is: no thread is worth it
            _all(reads)
            self._advance(nbytes)
        elif reads:
            self._start(partial(_all, reads), nbytes)


class _Read(NamedTuple):
    """Bytes at an offset of a file, and from where to where in a chunk they go."""

    source: Source
    offset: int
    start: int
    stop: int


class _Load:
    """What goes through one chunk: reads that fill it, and the parts of tensors in it."""

    def __init__(self, ring: Ring) -> None:
        self.ring, self.nbytes = ring, 0
        self.parts: list[Part] = []
        self._reads: list[_Read] = []
        # pieces from where to where in the chunk, and where they lie in the storage
        self._comparisons: list[tuple[_Comparison, int, int, int]] = []

    @property
    def room(self) -> int:
        """Bytes that a tensor may still take."""
        used = self.parts[-1].stop if self.parts else 0
        return self.ring.size - used - -used % ALIGN

    def add(
        self,
        ref: TensorRef,
        at: int,
        target: Tensor,
        dtype: torch.dtype,
        comparison: _Comparison | None,
    ) -> None:
        """The bytes of a tensor from ``at`` on, as many as the flat ``target`` takes."""
        nbytes = target.numel() * dtype.itemsize
        first = ref.start + at
        runs = ref.storage.runs(first, first + nbytes) or []
        begin = self._begin(runs[0].source, runs[0].offset, nbytes, dtype.itemsize)
        stop = begin
        for run in runs:
            if not self._goes_on(run, stop):
                self._reads.append(_Read(run.source, run.offset, stop, stop + run.nbytes))
            stop += run.nbytes
        self.parts.append(Part(begin, stop, dtype, target))
        self.nbytes += nbytes
        if comparison is not None:
            for start in range(begin, stop, _STEP):
                piece = comparison, start, min(start + _STEP, stop), at + start - begin
                self._comparisons.append(piece)

    def _begin(self, source: Source, offset: int, nbytes: int, item: int) -> int:
        """Where a tensor stands: as far from the one before as in the file, where that is close
        and fits, so that one read brings both."""
        used = self.parts[-1].stop if self.parts else 0
        if self._reads and self._reads[-1].source is source:
            last = self._reads[-1]
            begin = last.start + offset - last.offset
            near = 0 <= begin - last.stop <= _GAP
            if near and begin % item == 0 and begin + nbytes <= self.ring.size:
                return begin
        return used + -used % ALIGN

    def _goes_on(self, run: Run, at: int) -> bool:
        """Whether the last read brings it, too: then that is made longer."""
        last = self._reads[-1] if self._reads else None
        if last is None or last.source is not run.source or at - last.stop > _GAP:
            return False
        if at - last.start != run.offset - last.offset:
            return False
        self._reads[-1] = last._replace(stop=at + run.nbytes)
        return True

    def fill(self, chunk: Tensor) -> None:
        """Read it all, and compare what is complete with its checksum."""
        out = memory(chunk)
        waiting = deque(self._comparisons)
        for read in self._reads:
            for start in range(read.start, read.stop, _STEP):
                stop = min(start + _STEP, read.stop)
                read.source.read_into(read.offset + start - read.start, out[start:stop])
                while waiting and waiting[0][2] <= stop:
                    comparison, first, last, at = waiting.popleft()
                    comparison.add(out[first:last], at)


class _Comparison:
    """A storage whose checksum is compared once all of it is in memory: made piece by piece, while
    each is in the cache of who read it."""

    def __init__(self, storage: Storage) -> None:
        self.storage, self.left = storage, storage.nbytes
        self.found: dict[int, tuple[int, int]] = {}  # by where the piece begins
        self.lock = Lock()

    def add(self, piece: memoryview, at: int) -> None:
        """A piece that was read, and where in the storage it lies.

        Raises:
            DamagedError: it was the last, and they are not what was saved.
        """
        crc = fastest_crc32()(piece, 0)
        with self.lock:
            self.found[at] = crc, len(piece)
            self.left -= len(piece)
            is_last = not self.left
        if is_last:
            pieces = (self.found[at] for at in sorted(self.found))
            self.storage.compare(crc32_of_pieces(pieces))


def _read(
    source: Source, offset: int, out: memoryview, comparison: _Comparison | None, at: int
) -> None:
    source.read_into(offset, out)
    if comparison is not None:
        comparison.add(out, at)


def _all(reads: list[Callable[[], None]]) -> None:
    for read in reads:
        read()


def memory(tensor: Tensor) -> memoryview:
    """The bytes of a contiguous CPU tensor, writable; they keep it alive."""
    # by its address: what numpy has seen can't be resized any more, which FSDP does
    array: Any = (ctypes.c_char * (tensor.numel() * tensor.element_size())).from_address(
        tensor.data_ptr()
    )
    array.owner = tensor
    return memoryview(array).cast("B")


def _rows(ref: TensorRef, dest: Tensor) -> int:
    """How many rows of a view fit into a buffer, where it can be read so, and has more; else 0."""
    if ref.is_contiguous or not ref.storage.seekable or tuple(dest.shape) != ref.shape:
        return 0
    rows = max(1, STRIP * len(dest) // ref.nbytes)
    return rows if rows < len(dest) else 0


def _row_major(ref: TensorRef, dest: Tensor) -> tuple[TensorRef, Tensor]:
    """The same two with their dimensions in the order in which the file has them, where that
    makes the file's side contiguous (channels_last)."""
    if ref.is_contiguous or dest.ndim != len(ref.shape):
        return ref, dest
    order = sorted(range(dest.ndim), key=lambda i: -ref.stride[i])
    turned = ref.replace(
        shape=tuple(ref.shape[i] for i in order), stride=tuple(ref.stride[i] for i in order)
    )
    return (turned, dest.permute(order)) if turned.is_contiguous else (ref, dest)
