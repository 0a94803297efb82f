"""The values of tensors as storages of their own: row-major, and in other kinds of numbers."""

from __future__ import annotations

from collections.abc import Iterator

from ..core.storages import Storage, cut
from ..core.tensors import TensorRef


class ValuesStorage(Storage):
    """The values of a tensor, row-major, as a storage of their own: gathered while they are read,
    where they don't lie so."""

    __slots__ = ("ref",)
    seekable = False

    def __init__(self, ref: TensorRef) -> None:
        super().__init__(ref.nbytes, ref.storage.location)
        self.ref = ref
        self.compared = ref.storage.compared

    def check(self) -> None:
        self.ref.storage.check()
        self.compared = True

    def checked(self, start: int = 0, stop: int | None = None) -> Iterator[bytes | memoryview]:
        self.ref.check()
        yield from self.chunks(start, stop)

    def chunks(self, start: int = 0, stop: int | None = None) -> Iterator[bytes]:
        yield from cut(self._values(), start, self.nbytes if stop is None else stop)

    def _values(self) -> Iterator[bytes]:
        return self.ref.chunks()

    def read(self, start: int, size: int) -> bytes:
        return b"".join(self.chunks(start, start + size))


class Widened(ValuesStorage):
    """The values of a tensor of half precision in float32, which holds each of them exactly; made
    while they are read."""

    __slots__ = ()

    def __init__(self, ref: TensorRef) -> None:
        super().__init__(ref)
        self.nbytes = 4 * ref.numel

    def _values(self) -> Iterator[bytes]:
        return map(self._wide, self.ref.chunks())

    def _wide(self, piece: bytes) -> bytes:
        import numpy as np

        if self.ref.dtype.name == "float16":
            return np.frombuffer(piece, "<f2").astype("<f4").tobytes()
        return (np.frombuffer(piece, "<u2").astype("<u4") << 16).tobytes()
