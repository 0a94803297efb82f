"""Tensors over the pages of a file itself, in place of copies of them."""

from __future__ import annotations

import mmap
from collections import Counter

import torch
from torch import Tensor

from ...core.storages import Source
from ...core.tensors import TensorRef, contiguous_stride
from ...errors import UnreadableError
from .reader import torch_dtype


class Mapper:
    """Maps tensors of files that are here, copy-on-write: what is written to one stays in this
    process's own pages. A mapping lives as long as a tensor over it.

    Two tensors are never over the same pages, as those that are tied in the file and not in the
    model would be: of each further one of a storage the file is mapped again.
    """

    def __init__(self) -> None:
        self._maps: dict[tuple[int, int], mmap.mmap] = {}
        self._uses: Counter[int] = Counter()

    def tensor(self, ref: TensorRef) -> Tensor | None:
        """The tensor of a file in its own dtype; None where its bytes don't lie there as memory
        has them: deflated, in several pieces or with gaps, far, not aligned, of no elements, or
        with a lazy conjugation.

        Raises:
            UnreadableError: the file can't be mapped, or has become shorter.
            UnsupportedError: a dtype that this torch lacks.
        """
        if not ref.numel or ref.bits or not _is_dense(ref):
            return None
        runs = ref.storage.runs(ref.start, ref.start + ref.nbytes) or ()
        dtype = torch_dtype(ref)
        if dtype.itemsize * ref.numel != ref.nbytes:
            return None
        if len(runs) != 1 or runs[0].offset % dtype.itemsize:
            return None
        source, offset = runs[0].source, runs[0].offset
        if source.fileno() is None:
            return None
        source.check(offset, ref.nbytes)
        again = self._uses[id(ref.storage)]
        self._uses[id(ref.storage)] += 1
        pages = self._pages(source, again)
        flat = torch.frombuffer(pages, dtype=dtype, count=ref.numel, offset=offset)
        return flat.as_strided(ref.shape, ref.stride)

    def _pages(self, source: Source, again: int) -> mmap.mmap:
        key = id(source), again
        if key not in self._maps:
            number = source.fileno()
            assert number is not None
            try:
                self._maps[key] = mmap.mmap(number, source.size, access=mmap.ACCESS_COPY)
            except (OSError, ValueError) as e:
                raise UnreadableError(
                    f"{source.name}: can't be mapped: {e}", hint="load without assign=True"
                ) from e
        return self._maps[key]


def _is_dense(ref: TensorRef) -> bool:
    """Whether it has no gaps: row-major, or with its dimensions in another order."""
    order = sorted(
        (i for i, n in enumerate(ref.shape) if n > 1), key=lambda i: ref.stride[i], reverse=True
    )
    dense = contiguous_stride(tuple(ref.shape[i] for i in order))
    return tuple(ref.stride[i] for i in order) == dense
