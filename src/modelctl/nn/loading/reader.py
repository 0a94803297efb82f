"""Bytes of a file into the memory of tensors, on any device, through memory of a fixed size."""

from __future__ import annotations

import ctypes
import os
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial
from threading import Lock
from types import TracebackType
from typing import Any

import torch
from torch import Tensor

from ...core.storages import Run, Storage, fastest_crc32
from ...core.tensors import TensorRef
from ...errors import UnsupportedError
from ...storage.checksums import crc32_of_pieces

# What goes to a device, or becomes another dtype, passes through buffers of this size: two for
# CUDA, one elsewhere.
STAGE = 16 << 20
# Reads of more than this are shared out among threads.
PIECE = 2 << 20
_THREADS = min(8, max(4, os.cpu_count() or 1))  # they wait more than they compute
# A tensor that does not fit into the rest of a buffer starts there if that much is left.
_WORTH = 1 << 20
_ALIGN = 64
_ReadInto = Callable[[int, memoryview], None]


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
    between. What goes to another device or dtype passes through a staging buffer; for CUDA two
    page-locked ones take turns, so that the disk and the bus work at the same time. Only what
    is not dense in memory or in the file, or deflated there, goes through a temporary tensor: of
    as many rows as a buffer holds, where these lie one after the other.
    """

    def __init__(self, advance: Callable[[int], object] | None = None) -> None:
        """``advance`` is called with the number of bytes that were read since the last call."""
        self._pool: ThreadPoolExecutor | None = None
        self._jobs: list[tuple[Future[None], int]] = []  # each with its bytes
        self._advance = advance or (lambda _: None)
        self._stages: dict[torch.device, _Stage] = {}

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
                for stage in self._stages.values():
                    stage.finish()
        finally:
            if self._pool is not None:
                self._pool.shutdown(cancel_futures=True)

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
        if straight and dest.device.type == "cpu" and dest.dtype == dtype:
            out = memory(dest)
            self._fill(ref, out, _Comparison(ref.storage) if compare else None)
        elif straight and ref.is_contiguous and ref.storage.runs(0, 0) is not None:
            self._staged(ref, dest.view(-1), dtype, compare)
        elif not bits and (rows := _rows(ref, dest)):
            for at in range(0, len(dest), rows):
                part = dest[at : at + rows]
                start = ref.offset + at * ref.stride[0]
                strip = ref.replace(shape=tuple(part.shape), stride=ref.stride, offset=start)
                self.read(strip, part, compare=compare)
        else:
            where = dest.device if ref.is_contiguous else "cpu"
            values = torch.empty(ref.shape, dtype=dtype, device=where)
            self.read(ref, values, compare=compare)
            self.finish()
            if bits.get("conj"):
                values = values.conj().resolve_conj()
            if bits.get("neg"):
                values = values.neg()
            dest.copy_(values.reshape(dest.shape))

    def finish(self) -> None:
        """Wait for the reads that were started."""
        jobs, self._jobs = self._jobs, []
        for job, nbytes in jobs:
            job.result()
            self._advance(nbytes)

    def _staged(self, ref: TensorRef, flat: Tensor, dtype: torch.dtype, compare: bool) -> None:
        crc, crc32 = 0, fastest_crc32()

        def fill(at: int, out: memoryview) -> None:
            nonlocal crc
            n = len(out) // ref.dtype.itemsize
            self._fill(ref.replace(shape=(n,), stride=(1,), offset=ref.offset + at), out)
            self.finish()
            if compare:
                crc = crc32(out, crc)

        if flat.device not in self._stages:
            self.finish()  # so that waiting for a window is waiting for that alone
            self._stages[flat.device] = _Stage(flat.device)
        self._stages[flat.device].pass_on(fill, flat, dtype)
        if compare:
            ref.storage.compare(crc)

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
            read = run.source.read_into
            if comparison is not None:
                read = partial(comparison.read, read, at - run.offset)
            self._fill_run(run, out[at : at + run.nbytes], read)
            at += run.nbytes

    def _fill_run(self, run: Run, out: memoryview, read: _ReadInto) -> None:
        if len(out) <= PIECE or _THREADS == 1:
            read(run.offset, out)
            self._advance(len(out))
            return
        if self._pool is None:
            self._pool = ThreadPoolExecutor(_THREADS, "modelctl")
        for at in range(0, len(out), PIECE):
            part = out[at : at + PIECE]
            self._jobs.append((self._pool.submit(read, run.offset + at, part), len(part)))


class _Comparison:
    """A storage whose checksum is compared once all of it is in memory: made piece by piece, while
    each is in the cache of who read it."""

    def __init__(self, storage: Storage) -> None:
        self.storage, self.left = storage, storage.nbytes
        self.found: dict[int, tuple[int, int]] = {}  # by where the piece begins
        self.lock = Lock()

    def read(self, read_into: _ReadInto, shift: int, offset: int, out: memoryview) -> None:
        """A piece that lies at an offset of its file, into its place in the storage."""
        read_into(offset, out)
        crc = fastest_crc32()(out, 0)
        with self.lock:
            self.found[offset + shift] = crc, len(out)
            self.left -= len(out)
            is_last = not self.left
        if is_last:
            pieces = (self.found[at] for at in sorted(self.found))
            self.storage.compare(crc32_of_pieces(pieces))


class _Stage:
    """Host memory on the way to a device: filled, sent on, filled again."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        # only CUDA orders copies with what follows them; elsewhere each is waited for
        self.cuda = device.type == "cuda"
        self.buffers = [
            torch.empty(STAGE, dtype=torch.uint8, pin_memory=self.cuda)
            for _ in range(2 if self.cuda else 1)
        ]
        event: Any = torch.cuda.Event
        self.sent = [event() for _ in self.buffers] if self.cuda else []
        self.turn = self.used = 0

    def pass_on(
        self, fill: Callable[[int, memoryview], None], flat: Tensor, dtype: torch.dtype
    ) -> None:
        """Copy all elements of ``flat``, ``fill(first, memory)`` giving so many as fit."""
        total, item, at = flat.numel(), dtype.itemsize, 0
        while at < total:
            if STAGE - self.used < min((total - at) * item, _WORTH):
                self._next()
            n = min(total - at, (STAGE - self.used) // item)
            window = self.buffers[self.turn][self.used : self.used + n * item]
            fill(at, memory(window))
            self._send(window.view(dtype), flat[at : at + n])
            self.used += n * item + -(n * item) % _ALIGN
            at += n

    def _send(self, window: Tensor, target: Tensor) -> None:
        if self.cuda and window.dtype != target.dtype:  # the device converts faster
            window = window.to(self.device, non_blocking=True)
        target.copy_(window, non_blocking=self.cuda)

    def _next(self) -> None:
        """Take the other buffer, as soon as what it held has arrived."""
        if self.cuda:
            self.sent[self.turn].record(torch.cuda.current_stream(self.device))
        self.turn = (self.turn + 1) % len(self.buffers)
        self.used = 0
        if self.cuda:
            self.sent[self.turn].synchronize()

    def finish(self) -> None:
        """Wait until everything has arrived: the buffers are free memory afterwards."""
        if self.cuda:
            torch.cuda.current_stream(self.device).synchronize()


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
    rows = max(1, STAGE * len(dest) // ref.nbytes)
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
