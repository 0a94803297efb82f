"""Tensors in chunks, against numpy: any cut of any shape, any range of bytes."""

from __future__ import annotations

import zlib
from itertools import product
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from modelctl.core.dtypes import BY_NAME
from modelctl.core.storages import MemoryStorage, RunStorage, Source
from modelctl.core.tensors import TensorRef
from modelctl.errors import DamagedError, UnreadableError
from modelctl.storage.chunked import Chunk, ChunkedStorage, boxes, placed

INT16 = BY_NAME["int16"]


class Bytes(Source):
    def __init__(self, data: bytes) -> None:
        super().__init__("bytes", len(data))
        self.data = data

    def _fetch(self, offset: int, size: int) -> bytes:
        return self.data[offset : offset + size]


def chunk(values: Any, offsets: tuple[int, ...], *, turned: bool = False, crc: int = 0) -> Chunk:
    """A box of an array as it might lie somewhere: in row-major order, or in another."""
    shape = values.shape
    stride = None
    if turned:  # the last dimension is the slowest
        data = np.moveaxis(values, -1, 0).tobytes() if values.ndim else values.tobytes()
        inner = tuple(int(np.prod(shape[i + 1 : -1])) for i in range(len(shape) - 1))
        stride = (*inner, int(np.prod(shape[:-1]))) if values.ndim else ()
    else:
        data = values.tobytes()
    source = Bytes(data)
    known = (zlib.crc32(data) ^ crc) if data else None
    storage = RunStorage(source, 0, len(data), crc32=known)
    ref = TensorRef(INT16, shape, storage, 0, stride)
    return Chunk(offsets, shape, lambda: ref, "there")


@st.composite
def cut_arrays(draw: st.DrawFn) -> tuple[Any, list[Chunk]]:
    shape = tuple(draw(st.lists(st.integers(0, 5), max_size=4)))
    values = np.arange(int(np.prod(shape)), dtype="<i2").reshape(shape)
    cuts = [sorted({0, size, *draw(st.lists(st.integers(0, size), max_size=2))}) for size in shape]
    turned = draw(st.booleans())
    found = []
    for corner in product(*(range(max(len(c) - 1, 1)) for c in cuts)):
        low = tuple(c[i] for c, i in zip(cuts, corner, strict=True))
        high = tuple(c[min(i + 1, len(c) - 1)] for c, i in zip(cuts, corner, strict=True))
        part = values[tuple(map(slice, low, high))]
        found.append(chunk(part.copy(), low, turned=turned))
    return values, draw(st.permutations(found))


@given(cut_arrays(), st.data())
def test_any_range_of_any_cut_is_the_arrays(made: tuple[Any, list[Chunk]], data: st.DataObject):
    values, chunks = made
    storage = ChunkedStorage(INT16, values.shape, placed(values.shape, chunks))
    raw = values.tobytes()
    assert storage.nbytes == len(raw)
    start = data.draw(st.integers(0, len(raw)))
    stop = data.draw(st.integers(start, len(raw)))
    assert storage.read(start, stop - start) == raw[start:stop]
    assert b"".join(storage.checked()) == raw
    assert storage.compared
    runs = storage.runs(start, stop)
    if runs is not None:
        assert b"".join(run.source.read(run.offset, run.nbytes) for run in runs) == raw[start:stop]
    ref = TensorRef(INT16, values.shape, storage)
    assert ref.tobytes() == raw


@given(
    st.lists(st.integers(1, 4), max_size=4).flatmap(
        lambda shape: st.tuples(st.just(shape), *[st.integers(0, int(np.prod(shape)))] * 2)
    )
)
def test_a_range_of_elements_is_boxes_in_a_row(made: tuple[list[int], int, int]):
    shape, a, b = made
    values = np.arange(int(np.prod(shape))).reshape(shape)
    start, stop = sorted((a, b))
    parts = [
        values[tuple(slice(*side) for side in box)].reshape(-1) for box in boxes(shape, start, stop)
    ]
    assert [int(n) for part in parts for n in part] == [*range(start, stop)]
    assert len(parts) <= 2 * len(shape) + 1


def test_rows_lie_in_the_files_one_after_the_other():
    values = np.arange(12, dtype="<i2").reshape(4, 3)
    chunks = [chunk(values[2:], (2, 0)), chunk(values[:2], (0, 0))]
    storage = ChunkedStorage(INT16, (4, 3), placed((4, 3), chunks))
    runs = storage.runs(3, 20)
    assert runs is not None
    assert [(run.offset, run.nbytes) for run in runs] == [(3, 9), (0, 8)]
    columns = [chunk(values[:, :1].copy(), (0, 0)), chunk(values[:, 1:].copy(), (0, 1))]
    assert ChunkedStorage(INT16, (4, 3), placed((4, 3), columns)).runs() is None


@pytest.mark.parametrize(
    ("where", "said"),
    [
        ([((0, 0), (2, 3)), ((1, 0), (3, 3))], "overlap"),
        ([((0, 0), (4, 2)), ((0, 1), (4, 2))], "overlap"),
        ([((0, 0), (2, 3)), ((3, 0), (1, 3))], "3 of its 12 elements"),
        ([((0, 0), (4, 2))], "4 of its 12 elements"),
        ([((0, 0), (5, 3))], "outside"),
        ([((0,), (4,))], "outside"),
        ([], "12 of its 12 elements"),
    ],
)
def test_what_does_not_cover_a_tensor_once_is_refused(where, said):
    chunks = [chunk(np.zeros(sizes, "<i2"), offsets) for offsets, sizes in where]
    with pytest.raises(UnreadableError, match=said):
        placed((4, 3), chunks)


def test_copies_of_a_part_count_once():
    values = np.arange(6, dtype="<i2").reshape(2, 3)
    chunks = [chunk(values[:1], (0, 0)), chunk(values[1:], (1, 0)), chunk(values[:1], (0, 0))]
    assert len(placed((2, 3), chunks)) == 2


def test_a_thousand_parts_are_placed_in_a_moment_and_shared_out_in_two_dimensions():
    chunks = [chunk(np.zeros((1, 1), "<i2"), (i, j)) for i in range(40) for j in range(40)]
    assert len(placed((40, 40), chunks)) == 1600


@pytest.mark.parametrize("columns", [False, True])
def test_damage_of_a_part_is_seen(columns):
    values = np.arange(12, dtype="<i2").reshape(4, 3)
    halves = (
        [(values[:, :1].copy(), (0, 0)), (values[:, 1:].copy(), (0, 1))]
        if columns
        else [(values[:2], (0, 0)), (values[2:], (2, 0))]
    )
    parts = [chunk(part, at, crc=i) for i, (part, at) in enumerate(halves)]
    storage = ChunkedStorage(INT16, (4, 3), placed((4, 3), parts))
    with pytest.raises(DamagedError) as e:
        b"".join(storage.checked())
    assert e.value.storage is storage  # whoever knows its tensor can name it
    with pytest.raises(DamagedError):
        storage.check()


@pytest.mark.parametrize("width", [3, 1 << 10, 1 << 20])
def test_columns_are_read_once_and_compared(width):
    values = np.arange(8 * width, dtype="<i2").reshape(8, width)
    cut = width // 3
    for crc in (0, 1):
        parts = [
            chunk(values[:, :cut].copy(), (0, 0)),
            chunk(values[:, cut:].copy(), (0, cut), crc=crc),
        ]
        storage = ChunkedStorage(INT16, values.shape, placed(values.shape, parts))
        sources = [part.find().storage.source for part in parts]
        if crc:
            with pytest.raises(DamagedError) as e:
                b"".join(storage.checked())
            assert e.value.storage is storage
        else:
            assert b"".join(storage.checked()) == values.tobytes()
            assert storage.compared
        assert sum(source.bytes_read for source in sources) == values.nbytes


def test_a_part_that_is_not_what_was_said_is_refused():
    other = TensorRef(BY_NAME["int32"], (2,), MemoryStorage(bytes(8)))
    storage = ChunkedStorage(INT16, (2,), [Chunk((0,), (2,), lambda: other, "__0_0.distcp")])
    with pytest.raises(UnreadableError, match=r"__0_0.distcp: int32 of \[2\] lies there"):
        storage.read(0, 4)
