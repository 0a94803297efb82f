"""Tensors as lazy references: a spec, and a strided view of a storage whose bytes lie elsewhere."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from importlib import import_module
from itertools import product
from typing import Any, Literal, NamedTuple

from ..errors import DamagedError, UnreadableError, UnsupportedError
from .dtypes import DType, array
from .storages import CHUNK, GAP, RunStorage, Source, Storage

# An expanded view (stride 0) of more bytes than this, and of so many times those that are stored,
# is a bomb: four bytes can say four terabytes.
_EXPANDED, _TIMES = 1 << 30, 1000
# A view is read in strips: none of so much, and none of less than is worth a read by itself.
STRIP, _WORTH = 8 << 20, 256

# Floating dtypes without a sign of each element in its top bit.
_UNSIGNED = ("float8_e8m0fnu", "float4_e2m1fn_x2")

Role = Literal["parameter", "buffer"]
Dims = Sequence[tuple[int, int]]  # size and stride of each, in elements


class StorageRef(NamedTuple):
    """A storage as a pickle names it: all or (old view storages) a part, typed or untyped."""

    storage: Storage
    dtype: DType | None
    offset: int = 0  # bytes


class Rebuild(NamedTuple):
    """What a pickle says of a tensor beyond its view, kept to be written back as it was.

    ``bits`` are the lazy conj and neg flags, ``hooks`` its backward hooks, ``state`` the
    attributes of a parameter or a subclass, ``subclass`` the class that wraps it. ``array`` is the
    recipe of what is no tensor of torch's but a numpy array or scalar.
    """

    bits: dict[str, bool] | None = None
    hooks: Any = None
    state: Any = None
    subclass: Any = None
    array: Any = None


class TensorSpec(NamedTuple):
    """What is known of a tensor before any of its bytes is read."""

    dtype: DType
    shape: tuple[int, ...]

    @property
    def numel(self) -> int:
        return math.prod(self.shape)

    @property
    def nbytes(self) -> int:
        """Logical bytes: what the tensor takes when it is contiguous."""
        return self.dtype.nbytes(self.numel)


def contiguous_stride(shape: tuple[int, ...]) -> tuple[int, ...]:
    """Row-major strides, in elements, as torch gives them to a new tensor."""
    stride, step = [], 1
    for size in reversed(shape):
        stride.append(step)
        step *= max(size, 1)
    return tuple(reversed(stride))


class TensorRef:
    """A tensor in a file: its spec, the storage it views, and what is known of it.

    ``start`` is where its first element lies in the storage, in bytes; ``stride`` is in elements.
    ``requires_grad`` and ``role`` are None where the file does not say. Treat it as immutable;
    :meth:`replace` gives a changed copy.
    """

    # There can be a million of them: what few have is in one slot.
    __slots__ = ("_known", "_stride", "dtype", "shape", "start", "storage")

    def __init__(
        self,
        dtype: DType,
        shape: tuple[int, ...],
        storage: Storage,
        offset: int = 0,
        stride: tuple[int, ...] | None = None,
        *,
        base: int = 0,
        requires_grad: bool | None = None,
        role: Role | None = None,
        rebuild: Rebuild | None = None,
    ) -> None:
        """``offset`` counts elements, from ``base`` bytes on: where a view storage starts."""
        self.dtype = dtype
        self.shape = shape
        self.storage = storage
        self.start = base + offset * dtype.itemsize
        self._stride = stride  # None: contiguous
        self._known = (
            None
            if requires_grad is None and role is None and rebuild is None
            else (requires_grad, role, rebuild)
        )

    def replace(self, **changes: Any) -> TensorRef:
        """A copy with the given attributes changed, as :func:`dataclasses.replace`."""
        names = ("dtype", "shape", "storage", "offset", "base", "requires_grad", "role", "rebuild")
        fields = {name: getattr(self, name) for name in names} | {"stride": self._stride} | changes
        return TensorRef(fields.pop("dtype"), fields.pop("shape"), fields.pop("storage"), **fields)

    def settle(self, requires_grad: bool, rebuild: Rebuild | None) -> None:
        """What a pickle says of a tensor after it made it: for who reads it, before anybody else
        has it."""
        self._known = (requires_grad, self.role, rebuild)

    @property
    def requires_grad(self) -> bool | None:
        """Whether it trains, where the file says."""
        return None if self._known is None else self._known[0]

    @property
    def role(self) -> Role | None:
        """What it is to its module, where the file says."""
        return None if self._known is None else self._known[1]

    @property
    def rebuild(self) -> Rebuild | None:
        """What a pickle says of it beyond its view."""
        return None if self._known is None else self._known[2]

    @property
    def offset(self) -> int:
        """Where the first element lies, in elements from :attr:`base`."""
        return self.start // self.dtype.itemsize

    @property
    def base(self) -> int:
        """Bytes before a whole number of elements: 0, but where a storage was cut in between."""
        return self.start % self.dtype.itemsize

    @property
    def stride(self) -> tuple[int, ...]:
        """Elements from one index to the next, in each dimension."""
        return contiguous_stride(self.shape) if self._stride is None else self._stride

    @property
    def spec(self) -> TensorSpec:
        return TensorSpec(self.dtype, self.shape)

    @property
    def numel(self) -> int:
        return math.prod(self.shape)

    @property
    def nbytes(self) -> int:
        """Logical bytes: what the tensor takes when it is contiguous."""
        return self.dtype.nbytes(self.numel)

    @property
    def span(self) -> int:
        """Bytes of the storage from the first element to the end of the last one."""
        if 0 in self.shape:
            return 0
        last = sum((n - 1) * step for n, step in zip(self.shape, self.stride, strict=True))
        return self.dtype.nbytes(last + 1)

    @property
    def is_contiguous(self) -> bool:
        """True where the bytes in the storage already are in row-major order (torch's rule)."""
        if self._stride is None:
            return True
        expected = 1
        for size, step in zip(reversed(self.shape), reversed(self.stride), strict=True):
            if size == 0:
                return True
            if size != 1:
                if step != expected:
                    return False
                expected *= size
        return True

    @property
    def identity(self) -> tuple[int, int, tuple[int, ...], tuple[int, ...], str]:
        """Equal for references that are the same view of the same storage: tied tensors."""
        kind = "/".join((self.dtype.name, *sorted(self.bits)))
        return (id(self.storage), self.start, self.shape, self.stride, kind)

    @property
    def bits(self) -> dict[str, bool]:
        """The lazy bits that are set, ``conj`` and ``neg``: what is stored is not its values."""
        return (self.rebuild.bits if self.rebuild is not None else None) or {}

    @property
    def is_whole(self) -> bool:
        """Whether it takes all of its storage."""
        return self.start == 0 and self.span == self.storage.nbytes

    def check(self) -> None:
        """Compare what :meth:`chunks` won't with its checksum: the whole storage of which this is
        a part.

        Raises:
            DamagedError: the storage is not what was saved.
        """
        if not self.is_whole:
            self.storage.check()

    def chunks(self) -> Iterator[bytes]:
        """The tensor's bytes, row-major and little-endian, in pieces of at most 1 MiB. A lazy conj
        or neg bit is resolved: these are its values. What takes all of its storage is compared
        with the checksum of that.

        Raises:
            DamagedError: it is not what was saved; after the last piece at the latest.
            UnsupportedError: a lazy bit of a dtype that is not known to have one.
            UnreadableError: for a view that is out of all proportion to what is stored.
        """
        if self.nbytes > _EXPANDED and self.nbytes > _TIMES * self.storage.nbytes:
            raise UnreadableError(
                f"a view of {self.nbytes:,} bytes over {self.storage.nbytes:,} stored ones"
            )
        stored = self._stored()
        yield from _resolved(stored, self.dtype, self.bits) if self.bits else stored

    def _stored(self) -> Iterator[bytes]:
        """What is stored of the view, row-major."""
        is_whole = self.is_whole
        if self.is_contiguous:
            pieces = self.storage.checked if is_whole else self.storage.chunks
            yield from map(bytes, pieces(self.start, self.start + self.nbytes))
        elif self.nbytes:
            if is_whole:
                self.storage.check()
            yield from self._gather()

    def spans(self) -> Iterator[tuple[int, int]]:
        """From where to where in the storage it is read, in order."""
        for start, dims in self._strips() if self.numel else ():
            yield start, start + self._span(dims)

    def _strips(self) -> Iterator[tuple[int, Dims]]:
        """Where it lies: views one after the other, row-major, with more in between than is worth
        reading, or one."""
        item = self.dtype.itemsize
        # numpy knows fewer dimensions than torch: those of one element don't matter
        dims = [(n, step) for n, step in zip(self.shape, self.stride, strict=True) if n != 1]
        outer = _outer(dims, item) if self.storage.seekable else None
        if outer is None:
            yield self.start, dims
            return
        (n, step), *rest = dims[outer:] or [(1, 1)]
        rows = max(1, STRIP // (step * item))
        for index in product(*(range(size) for size, _ in dims[:outer])):
            steps = zip(index, dims[:outer], strict=True)
            start = self.start + item * sum(i * each for i, (_, each) in steps)
            for at in range(0, n, rows):
                yield start + at * step * item, [(min(rows, n - at), step), *rest]

    def _span(self, dims: Dims) -> int:
        return self.dtype.nbytes(1 + sum((n - 1) * step for n, step in dims))

    def _gather(self) -> Iterator[bytes]:
        for start, dims in self._strips():
            yield from self._row_major(start, dims)

    def _row_major(self, start: int, dims: Dims) -> Iterator[bytes]:
        """The bytes of a view of the storage, which is read in one piece."""
        import numpy as np

        item = self.dtype.itemsize
        view: Any = np.ndarray(
            [n for n, _ in dims],
            dtype=f"V{item}",
            buffer=self.storage.buffer(start, self._span(dims)),
            strides=[step * item for _, step in dims],
        )
        todo = [view]
        while todo:
            part = todo.pop()
            if part.nbytes <= CHUNK:
                yield part.tobytes()
                continue
            if len(part) == 1:
                todo.append(part[0])
                continue
            rows = max(1, CHUNK // (part.nbytes // len(part)))
            todo.append(part[rows:]) if rows < len(part) else None
            todo.append(part[:rows] if rows > 1 else part[0])

    def tobytes(self) -> bytes:
        """All bytes, row-major and little-endian."""
        return b"".join(self.chunks())

    def numpy(self) -> Any:
        """The values as a numpy array of its own, with the tensor's shape.

        What numpy has no dtype for is given in the next one that holds it exactly: bfloat16 as
        float32.

        Raises:
            UnsupportedError: a dtype that has no numbers here (fp8, packed, quantized), or the
                lazy conj or neg bit.
            UnreadableError: the file's data.
        """
        found = array(self.tobytes(), self.dtype)
        if found is None:
            raise UnsupportedError(
                f"numpy has no numbers of the dtype {self.dtype.name}",
                hint="tobytes() gives them as they are, torch() a tensor",
            )
        return found.reshape(self.shape)

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> Any:
        if copy is False:
            raise ValueError("the values are in a file: they are read into an array of their own")
        found = self.numpy()
        return found if dtype is None else found.astype(dtype)

    def torch(self, device: Any = "cpu") -> Any:
        """The values as a ``torch.Tensor`` on a device. Needs torch.

        Raises:
            UnsupportedError: a dtype that this torch lacks.
            UnreadableError: the file's data.
        """
        # this half never imports torch: who asks for a tensor has it
        loading = import_module("modelctl.nn.loading.tensors")
        return loading.to_tensors({"": self}, device)[""]

    def __repr__(self) -> str:
        return f"TensorRef({self.dtype.short}, {list(self.shape)})"


def _outer(dims: Dims, item: int) -> int | None:
    """How many of the first dimensions of a view lead from one strip to the
    next, with more in between than is worth reading; None where the rest lies in between itself."""
    span = 1
    for i in reversed(range(len(dims))):
        n, step = dims[i]
        if step < span:
            return None
        if (step - span) * item > GAP:
            return i + 1 if span * item >= _WORTH else None
        span += (n - 1) * step
    return 0


def _resolved(stored: Iterable[bytes], dtype: DType, bits: dict[str, bool]) -> Iterator[bytes]:
    """The values behind lazy bits: a conj turns the sign of imaginary parts, a neg all signs, as
    torch's ``resolve_conj().resolve_neg()`` does."""
    import numpy as np

    size = dtype.itemsize
    if dtype.kind not in ("complex", "float") or "fnuz" in dtype.name or dtype.name in _UNSIGNED:
        raise UnsupportedError(
            f"a {dtype.name} tensor with the lazy {'/'.join(sorted(bits))} bit can't be read",
            hint="save it with .resolve_conj().resolve_neg()",
        )
    signs = bytearray(size)
    part = size // 2 if dtype.kind == "complex" else size
    for top in range(part - 1, size, part) if "neg" in bits else ():
        signs[top] ^= 0x80
    if "conj" in bits and dtype.kind == "complex":
        signs[size - 1] ^= 0x80
    left = b""
    for piece in stored:
        left += piece
        whole = len(left) - len(left) % size
        items = np.frombuffer(left[:whole], "u1").reshape(-1, size)
        yield (items ^ np.frombuffer(signs, "u1")).tobytes()
        left = left[whole:]


def announce(ranges: Iterable[tuple[Storage, int, int]]) -> None:
    """Say to sources where reads are costly which ranges (storage, start, stop) will be read, in
    their order."""
    wanted: dict[Source, list[tuple[int, int]]] = {}
    for storage, start, stop in ranges:
        if isinstance(storage, RunStorage) and not storage.source.costly:
            continue  # most: there may be a million
        for run in storage.runs(start, stop) or ():
            if run.source.costly:
                wanted.setdefault(run.source, []).append((run.offset, run.nbytes))
    for source, spans in wanted.items():
        source.will_read(spans)


def announce_all(refs: Iterable[TensorRef]) -> None:
    """Say to sources where reads are costly that the bytes of tensors will be read, in their
    order."""
    storages = {id(ref.storage): ref.storage for ref in refs}.values()
    announce((storage, 0, storage.nbytes) for storage in storages)


class SwappedStorage(Storage):
    """A storage of a big-endian file, read as little-endian items of ``itemsize`` bytes."""

    __slots__ = ("inner", "itemsize")

    def __init__(self, inner: Storage, itemsize: int) -> None:
        super().__init__(inner.nbytes, inner.location)
        self.inner, self.itemsize = inner, itemsize
        self.compared = inner.compared

    def check(self) -> None:
        try:
            self.inner.check()
        except DamagedError as e:
            raise DamagedError(self, e.path, e.offset) from None
        self.compared = True

    def checked(self, start: int = 0, stop: int | None = None) -> Iterator[bytes | memoryview]:
        self.check()  # the checksum is that of the bytes as they lie there
        yield from self.chunks(start, stop)

    def read(self, start: int, size: int) -> bytes:
        n = self.itemsize
        first, last = start - start % n, start + size + -(start + size) % n
        raw = self.inner.read(first, min(last, self.nbytes) - first)
        out = bytearray(raw)
        for i in range(n):
            out[i::n] = raw[n - 1 - i :: n]
        return bytes(out[start - first : start - first + size])
