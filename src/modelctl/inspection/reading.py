"""All bytes of tensors, on all cores, each piece in a place that is used again and again."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator
from threading import Lock, Thread
from typing import TypeVar

from ..core.dtypes import BY_NAME
from ..core.nodes import Composite
from ..core.storages import RunStorage, fastest_crc32
from ..core.tensors import StorageRef, TensorRef

T = TypeVar("T")


def pieces(ref: TensorRef) -> Iterator[bytes | memoryview]:
    """The bytes of a tensor as :meth:`TensorRef.chunks` gives them, each gone with the next; the
    storages that they are of are compared with their checksums, whole.

    Raises:
        DamagedError: one is not what was saved; after the last piece at the latest.
        UnreadableError, UnsupportedError: as :meth:`TensorRef.chunks`.
    """
    if ref.bits or not ref.is_contiguous or not ref.storage.seekable:
        ref.check()
        yield from ref.chunks()
        return
    crc32 = fastest_crc32()
    for part in ref.storage.slices(ref.start, ref.start + ref.nbytes):
        one = part.storage
        is_whole = (part.start, part.stop) == (0, one.nbytes)
        if not is_whole:
            one.check()
        if not isinstance(one, RunStorage):
            yield from one.checked() if is_whole else one.chunks(part.start, part.stop)
            continue
        crc, compared = 0, one.compared
        for data in one.passing(part.start, part.stop):
            if not compared:
                crc = crc32(data, crc)
            yield data
        if is_whole and not compared:
            one.compare(crc)


def is_far(refs: Iterable[TensorRef]) -> bool:
    """Whether reading some of them is a round trip: such are read in their order, by one."""
    storages = {id(ref.storage): ref.storage for ref in refs}.values()
    # the first byte of each tells, and may be all of it that has to be looked for
    begins = (one.runs(0, min(1, one.nbytes)) or () for one in storages)
    return any(run.source.costly for runs in begins for run in runs)


def spread(jobs: Iterable[T], work: Callable[[T], object], *, alone: bool = False) -> None:
    """Do each of the jobs, on as many threads as this process may use cores; on this one ``alone``
    in their order, where they are to be done so. The first error ends all, and is raised."""
    rest, lock = iter(jobs), Lock()
    failed: list[BaseException] = []

    def run() -> None:
        while not failed:
            with lock:
                job = next(rest, lock)
            if job is lock:
                return
            try:
                work(job)  # type: ignore[arg-type]
            except BaseException as e:
                failed.append(e)

    others = [Thread(target=run, daemon=True) for _ in range(0 if alone else cores() - 1)]
    for thread in others:
        thread.start()
    run()
    for thread in others:
        thread.join()
    if failed:
        raise failed[0]


def cores() -> int:
    """How many this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def as_tensor(node: object) -> TensorRef | None:
    """A tensor; what a quantized one, or a storage by itself, has its bytes in, as one in a row;
    None of what has none of its own."""
    if isinstance(node, TensorRef):
        return node
    if isinstance(node, Composite):
        node = next((one for one in node.args if isinstance(one, StorageRef)), None)
    if not isinstance(node, StorageRef):
        return None
    dtype = node.dtype or BY_NAME["uint8"]
    size = (node.storage.nbytes - node.offset) // dtype.itemsize
    return TensorRef(dtype, (size,), node.storage, base=node.offset)
