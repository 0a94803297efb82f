"""Checksums put together from those of pieces, and storages that are read once for theirs."""

from __future__ import annotations

import io
import os
import sys
import zipfile
import zlib
from collections.abc import Sequence
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from modelctl.core.dtypes import BY_NAME
from modelctl.core.storages import RunStorage, Slice, Storage
from modelctl.core.tensors import TensorRef
from modelctl.errors import DamagedError
from modelctl.formats.pytorch.records import Records
from modelctl.storage import checksums
from modelctl.storage.checksums import Passed, combined, crc32_of_pieces
from modelctl.storage.chunked import Chunk, ChunkedStorage
from modelctl.storage.layout import Layout
from modelctl.storage.staging import staged_file
from tests.core.test_storages import Memory

UINT8 = BY_NAME["uint8"]
LARGE = 300 << 10  # by itself, not with its neighbours


@given(st.binary(max_size=300), st.binary(max_size=300))
def test_two_pieces(first: bytes, second: bytes) -> None:
    found = combined(zlib.crc32(first), zlib.crc32(second), len(second))
    assert found == zlib.crc32(first + second)


@pytest.mark.parametrize("nbytes", [1 << 20, (1 << 24) + 7])
def test_large_pieces(nbytes: int) -> None:
    data = os.urandom(100) * (nbytes // 100 + 1)
    first, second = data[: nbytes // 3], data[nbytes // 3 :]
    pieces = [(zlib.crc32(one), len(one)) for one in (first, b"", second)]
    assert combined(pieces[0][0], pieces[2][0], len(second)) == zlib.crc32(data)
    assert crc32_of_pieces(pieces) == zlib.crc32(data)


def test_without_isal(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "isal", None)
    checksums._fastest_combine.cache_clear()
    try:
        assert crc32_of_pieces([(zlib.crc32(b"ab"), 2), (zlib.crc32(b"c"), 1)]) == zlib.crc32(
            b"abc"
        )
        assert checksums._fastest_combine() is combined
    finally:
        checksums._fastest_combine.cache_clear()


# ---------------------------------------------------------------------- what passes


def storage_of(data: bytes, *, flip: int | None = None) -> tuple[Memory, RunStorage]:
    """A storage with the checksum of ``data``, where a bit may have flipped since."""
    kept = bytearray(data)
    if flip is not None:
        kept[flip] ^= 4
    source = Memory(bytes(kept))
    return source, RunStorage(source, 0, len(data), crc32=zlib.crc32(data))


slices = st.lists(st.tuples(st.integers(0, 40), st.integers(0, 40)).map(sorted), max_size=8)


@given(slices, st.one_of(st.none(), st.integers(0, 39)))
def test_slices_that_passed_in_any_order(found: Sequence[Sequence[int]], flip: int | None) -> None:
    """All of it is compared, whatever passed, and whether or not slices overlap."""
    source, storage = storage_of(bytes(range(40)), flip=flip)
    passed, of = Passed(), RunStorage(source, 0, 1)

    def run() -> None:
        for start, stop in found:
            if start < stop:
                crc = zlib.crc32(storage.read(start, stop - start))
                passed.add(Slice(storage, start, stop), crc, of)
        passed.finish()

    some = any(start < stop for start, stop in found)
    if flip is None or not some:
        run()
    else:
        with pytest.raises(DamagedError) as e:
            run()
        assert e.value.storage is of
    assert storage.compared == (some and flip is None)


@pytest.mark.parametrize("size", [1000, LARGE])
@pytest.mark.parametrize("unused", [0, 10])
@pytest.mark.parametrize("flip", [None, "used", "unused"])
def test_a_flat_storage_that_is_cut_into_records(
    tmp_path: Path, size: int, unused: int, flip: str | None
) -> None:
    """Each of its bytes is read once, and all are compared, those that no record has, too."""
    if flip == "unused" and not unused:
        pytest.skip("there is none")
    data = os.urandom(2 * size + unused)
    at = {None: None, "used": size + 5, "unused": len(data) - 1}[flip]
    source, flat = storage_of(data, flip=at)
    parts: list[Storage] = []
    for start in (size, 0):
        view = TensorRef(UINT8, (size,), flat, start)
        parts.append(ChunkedStorage(UINT8, (size,), [Chunk.of((0,), view, "there")]))
    records = Records("x")
    for i, part in enumerate(parts):
        assert part.recorded_crc32() is None
        records.add(f"data/{i}", part)
    records.finish(".data/serialization_id")

    def write() -> None:
        with staged_file(tmp_path / "x") as group:
            group.carry_out(Layout([records.out.file("x")]))

    if flip is not None:
        with pytest.raises(DamagedError) as e:
            write()
        assert e.value.storage in parts  # whoever knows its tensor can name it
        assert os.listdir(tmp_path) == []
        return
    write()
    assert source.bytes_read == len(data)
    with zipfile.ZipFile(tmp_path / "x") as zipped:
        assert zipped.testzip() is None
        assert zipped.read("x/data/0") == data[size : 2 * size]
        assert zipped.read("x/data/1") == data[:size]


@pytest.mark.parametrize("size", [1000, LARGE])
@pytest.mark.parametrize("flip", [None, 3])
def test_parts_that_are_whole_keep_their_checksums(
    tmp_path: Path, size: int, flip: int | None
) -> None:
    """Nothing is read for them, and damage goes on to be seen in the output."""
    data = [os.urandom(size), os.urandom(2 * size)]
    path = tmp_path / "in"
    storages = [storage_of(data[0], flip=flip)[1], storage_of(data[1])[1]]
    path.write_bytes(b"".join(one.read(0, one.nbytes) for one in storages))
    chunks = [
        Chunk.of((at,), TensorRef(UINT8, (one.nbytes,), one), "there")
        for at, one in zip((0, size), storages, strict=True)
    ]
    joined = ChunkedStorage(UINT8, (3 * size,), chunks)
    assert joined.recorded_crc32() == zlib.crc32(b"".join(data))
    records = Records("x")
    records.add("data/0", joined)
    records.finish(".data/serialization_id")
    file = records.out.file("x")
    assert not joined.compared
    with staged_file(tmp_path / "x") as group:
        group.carry_out(Layout([file]))
    with zipfile.ZipFile(io.BytesIO((tmp_path / "x").read_bytes())) as zipped:
        assert (zipped.testzip() is None) == (flip is None)


def test_columns_and_parts_without_checksums_have_none() -> None:
    _, whole = storage_of(bytes(6))
    unsummed = RunStorage(whole.source, 0, 6)
    halves = [Chunk.of((0, i), TensorRef(UINT8, (6, 1), whole), "there") for i in (0, 1)]
    assert ChunkedStorage(UINT8, (6, 2), halves).recorded_crc32() is None
    one = Chunk.of((0,), TensorRef(UINT8, (6,), unsummed), "there")
    assert ChunkedStorage(UINT8, (6,), [one]).recorded_crc32() is None
