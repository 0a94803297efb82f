"""Sources and storages: ranges, many at once, from several threads; runs over several files."""

from __future__ import annotations

import io
import tarfile
from concurrent.futures import ThreadPoolExecutor
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from modelctl.core.dtypes import BY_NAME
from modelctl.core.storages import MemoryStorage, Run, RunStorage, Source, SpreadStorage
from modelctl.core.tensors import TensorRef
from modelctl.errors import ModelctlError, UnreadableError
from modelctl.storage.values import ValuesStorage

DATA = bytes(range(256)) * 256


class Memory(Source):
    """A source of a third kind: neither a file nor a window; gives at most ``most`` at once."""

    def __init__(self, data: bytes = DATA, most: int = 1 << 30) -> None:
        super().__init__("memory", len(data))
        self.data, self.most = data, most
        self.asked: list[tuple[int, int]] = []

    def _fetch(self, offset: int, size: int) -> bytes:
        self.asked.append((offset, size))
        return self.data[offset : offset + min(size, self.most)]


ranges = st.lists(st.tuples(st.integers(0, len(DATA)), st.integers(0, 5000)), max_size=30).map(
    lambda found: [(at, min(size, len(DATA) - at)) for at, size in found]
)


@given(ranges)
def test_many_ranges_at_once_are_what_each_is(wanted: list[tuple[int, int]]) -> None:
    source = Memory()
    assert source.read_many(wanted) == [DATA[at : at + size] for at, size in wanted]
    if len(source.asked) > 1:  # what lies together was asked for once
        ends = sorted((at, at + size) for at, size in source.asked)
        assert all(begin > end + 4096 for (_, end), (begin, _) in pairwise(ends))


def test_close_ranges_cost_one_read() -> None:
    source = Memory()
    source.read_many([(i * 100, 10) for i in range(100)])
    assert len(source.asked) == 1
    source = Memory()
    source.read_many([(0, 10), (30_000, 10)])
    assert len(source.asked) == 2


def test_one_read_of_many_ranges_stays_small() -> None:
    source = Memory(bytes(32 << 20))
    found = source.read_many([(at << 20, 1 << 20) for at in range(32)])
    assert list(map(len, found)) == [1 << 20] * 32
    assert [size for _, size in source.asked] == [8 << 20] * 4


def test_a_range_that_ends_outside() -> None:
    source = Memory()
    for read in (
        lambda: source.read(len(DATA) - 1, 2),
        lambda: source.read_many([(len(DATA) - 5, 5), (len(DATA) - 1, 2)]),
        lambda: source.read_into(len(DATA) - 1, memoryview(bytearray(2))),
        lambda: source.map(len(DATA) - 1, 2),
    ):
        with pytest.raises(UnreadableError, match="cut off: 2 bytes are expected") as caught:
            read()
        assert caught.value.offset == len(DATA) - 1
    source.close()
    with pytest.raises(ModelctlError, match="closed"):
        source.read(0, 1)


def test_short_reads_go_on_and_are_counted() -> None:
    source = Memory(most=1000)
    out = bytearray(5000)
    source.read_into(7, memoryview(out))
    assert bytes(out) == DATA[7:5007]
    assert source.read(0, 5000) == DATA[:5000]
    assert source.bytes_read == 10_000
    with pytest.raises(AttributeError):
        source.bytes_read = 0  # type: ignore[misc]


def test_several_threads_count_together() -> None:
    source = Memory(most=100)
    with ThreadPoolExecutor(8) as pool:
        found = list(pool.map(lambda i: source.read(i, 1000), range(300)))
    assert found == [DATA[i : i + 1000] for i in range(300)]
    assert source.bytes_read == 300_000


def test_a_library_reads_it_as_a_file() -> None:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as tar:
        member = tarfile.TarInfo("a")
        member.size = len(DATA)
        tar.addfile(member, io.BytesIO(DATA))
    with Memory(buffer.getvalue()).stream() as file, tarfile.open(fileobj=file) as tar:
        inside = tar.extractfile("a")
        assert inside is not None
        assert inside.read() == DATA


# ------------------------------------------------------------------ storages

pieces = st.lists(st.tuples(st.integers(0, 60_000), st.integers(0, 3000)), min_size=1, max_size=8)


@given(pieces, st.data())
def test_a_storage_in_pieces_is_those_joined(
    found: list[tuple[int, int]], data: st.DataObject
) -> None:
    sources = [Memory(), Memory(DATA[::-1])]
    runs = [Run(sources[i % 2], at, size) for i, (at, size) in enumerate(found)]
    whole = b"".join(run.source.read(run.offset, run.nbytes) for run in runs)
    storage = SpreadStorage(runs)
    start = data.draw(st.integers(0, len(whole)))
    stop = data.draw(st.integers(start, len(whole)))
    assert storage.nbytes == len(whole)
    assert storage.read(start, stop - start) == whole[start:stop]
    assert b"".join(storage.chunks(start, stop)) == whole[start:stop]
    parts = storage.runs(start, stop)
    assert sum(run.nbytes for run in parts) == stop - start
    assert all(run.nbytes for run in parts)
    assert b"".join(r.source.read(r.offset, r.nbytes) for r in parts) == whole[start:stop]
    assert bytes(storage.buffer(start, stop - start)) == whole[start:stop]


def test_what_is_made_has_no_runs() -> None:
    base = MemoryStorage(DATA)
    turned = TensorRef(BY_NAME["uint8"], (256, 256), base, stride=(1, 256))
    values = ValuesStorage(turned)
    assert base.runs() is None
    assert values.runs() is None
    assert values.read(0, values.nbytes) == turned.tobytes() != DATA
    assert values.read(1000, 70) == turned.tobytes()[1000:1070]
    assert RunStorage(Memory(), 5, 10).runs(2, 4)[0][1:] == (7, 2)
