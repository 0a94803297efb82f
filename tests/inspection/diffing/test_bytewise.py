"""Storages against storages: each compared once, to the checksum, however it is laid out."""

from __future__ import annotations

import tracemalloc
import zipfile
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

import modelctl as mc
from modelctl.core.dtypes import BY_NAME
from modelctl.core.storages import MemoryStorage, Source, Storage
from modelctl.core.tensors import TensorRef
from modelctl.errors import DamagedError
from modelctl.inspection.diffing import bytewise
from modelctl.inspection.diffing.bytewise import compare

F32 = BY_NAME["float32"]


def opened(path: Path, state: Any) -> mc.Checkpoint:
    torch.save(state, path)
    return mc.open(path)


@pytest.fixture
def read(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The bytes that were read of storages, in pieces."""
    sizes: list[int] = []
    into, whole = Source.read_into, Source.read
    from modelctl.storage.source import OpenFile

    file_into = OpenFile.read_into

    def counted(self: Any, offset: int, out: memoryview) -> None:
        sizes.append(len(out))
        file_into(self, offset, out)

    def counted_read(self: Any, offset: int, size: int) -> bytes:
        sizes.append(size)
        return whole(self, offset, size)

    assert into is not None
    monkeypatch.setattr(OpenFile, "read_into", counted)
    monkeypatch.setattr(Source, "read", counted_read)
    return sizes


def test_what_is_equal_is_read_once_and_never_decoded(
    tmp_path: Path, read: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    tensor = torch.randn(3, 400_000)
    state = {"a": tensor, "tied": tensor, "row": tensor[1], "turned": tensor.T}
    monkeypatch.setattr(bytewise, "measure", None)
    with opened(tmp_path / "a.pt", state) as a, opened(tmp_path / "b.pt", state) as b:
        read.clear()
        found = mc.diff(a, b)
    assert (found.differs, found.same) == (False, 4)
    assert sum(read) == 2 * tensor.nbytes


def test_views_that_differ_are_found_among_those_that_do_not(tmp_path: Path) -> None:
    tensor = torch.zeros(4, 300_000)
    state = {"all": tensor, **{f"row{i}": tensor[i] for i in range(4)}, "turned": tensor[:2].T}
    with opened(tmp_path / "a.pt", state) as a:
        tensor[2, 7] = 1
        with opened(tmp_path / "b.pt", state) as b:
            found = mc.diff(a, b)
    assert [(change.name, change.elements) for change in found.changed] == [("all", 1), ("row2", 1)]
    assert found.same == 4


def test_however_they_lie(tmp_path: Path) -> None:
    """Tied in one file and apart in the other, turned, inside of a larger storage, sparse."""
    base = torch.randn(100, 50)
    a = {"x": base, "y": base, "z": base.T, "w": base[3:7, 2:9]}
    b = {
        "x": base.clone(),
        "y": base.T.contiguous().T,
        "z": base.T.contiguous(),
        "w": base[3:7, 2:9].clone(),
    }
    indices = torch.tensor([[0, 2], [1, 0]])
    a["s"], b["s"] = (torch.sparse_coo_tensor(indices, torch.ones(2), (3, 3)) for _ in range(2))
    with opened(tmp_path / "a.pt", a) as left, opened(tmp_path / "b.pt", b) as right:
        found = mc.diff(left, right)
        assert not found.differs
    b["y"][5, 5] += 1
    b["w"][0, 0] += 1
    with opened(tmp_path / "a.pt", a) as left, opened(tmp_path / "c.pt", b) as right:
        found = mc.diff(left, right)
    assert [(change.name, change.elements) for change in found.changed] == [("y", 1), ("w", 1)]


@pytest.mark.parametrize("threads", [1, 3])
def test_the_same_by_any_number_of_threads(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, threads: int
) -> None:
    monkeypatch.setattr(bytewise, "_threads", lambda groups: threads)
    monkeypatch.setattr(bytewise, "_BATCH", 1)
    monkeypatch.setattr(bytewise, "_ROOM", 1000)
    generator = torch.Generator().manual_seed(1)
    a = {f"t{i}": torch.randn(i * 37, generator=generator) for i in range(40)}
    b = {name: tensor + (name in ("t7", "t31")) for name, tensor in a.items()}
    told: list[int] = []
    with opened(tmp_path / "a.pt", a) as left, opened(tmp_path / "b.pt", b) as right:
        pairs = [(left.tensors()[name], right.tensors()[name]) for name in a]
        found = compare(pairs, 0, 0, told.append)
        assert [i for i, one in enumerate(found) if not one.same] == [7, 31]
        assert sum(told) == sum(ref.nbytes for ref, _ in pairs)


def test_the_last_byte_counts(tmp_path: Path) -> None:
    for size in (1, 511, 512 << 10, (512 << 10) + 1, (1 << 20) + 3):
        a = torch.zeros(size, dtype=torch.uint8)
        b = a.clone()
        b[-1] = 1
        with opened(tmp_path / "a.pt", {"x": a}) as one, opened(tmp_path / "b.pt", {"x": b}) as two:
            (change,) = mc.diff(one, two).changed
            assert (change.elements, change.numel) == (1, size)


# ---------------------------------------------------------------------- damage


def flipped(path: Path, count: int = 1) -> None:
    """A bit of the first storage, in a file whose directory still has its checksum."""
    with zipfile.ZipFile(path) as archive:
        (member,) = [one for one in archive.namelist() if one.endswith("data/0")]
        with archive.open(member) as inside:
            start = inside._orig_compress_start  # type: ignore[attr-defined]
    data = bytearray(path.read_bytes())
    data[start + 5] ^= 1
    path.write_bytes(data)


@pytest.mark.parametrize("which", ["a", "b", "both"])
@pytest.mark.parametrize("size", [10, 400_000])
def test_damage_is_seen_on_either_side(tmp_path: Path, which: str, size: int) -> None:
    for name in "ab":
        torch.save({"x": torch.ones(size)}, tmp_path / f"{name}.pt")
        if which in (name, "both"):
            flipped(tmp_path / f"{name}.pt")
    with pytest.raises(DamagedError):
        mc.diff(tmp_path / "a.pt", tmp_path / "b.pt")


def test_damage_of_a_storage_that_only_one_side_has_sums_of(tmp_path: Path) -> None:
    torch.save({"x": torch.ones(1000)}, tmp_path / "a.pt")
    flipped(tmp_path / "a.pt")
    wrong = torch.ones(1000).view(torch.uint8)
    wrong[5] ^= 1  # the same bytes, where nothing says that they are wrong
    save_file({"x": wrong.view(torch.float32)}, tmp_path / "b.safetensors")
    with mc.open(tmp_path / "a.pt") as a, mc.open(tmp_path / "b.safetensors") as b:
        for left, right in ((a, b), (b, a)):
            with pytest.raises(DamagedError):
                mc.diff(left, right)


def test_an_error_of_a_thread_is_the_commands(monkeypatch: pytest.MonkeyPatch) -> None:
    class Broken(MemoryStorage):
        def chunks(self, start: int = 0, stop: int | None = None) -> Any:
            raise DamagedError(self, None, None)

    monkeypatch.setattr(bytewise, "_BATCH", 1)
    monkeypatch.setattr(bytewise, "_threads", lambda groups: 3)
    storages: list[Storage] = [MemoryStorage(bytes(40)) for _ in range(20)]
    pairs = [
        (TensorRef(F32, (10,), one), TensorRef(F32, (10,), MemoryStorage(bytes(40))))
        for one in storages
    ]
    assert all(one.same for one in compare(pairs, 0, 0, None))
    pairs[11] = (TensorRef(F32, (10,), Broken(bytes(40))), pairs[11][1])
    with pytest.raises(DamagedError):
        compare(pairs, 0, 0, None)


# ---------------------------------------------------------------------- formats, memory


def test_the_same_figures_in_every_format(tmp_path: Path) -> None:
    generator = torch.Generator().manual_seed(2)
    a = {f"layer.{i}.w": torch.randn(50, 30, generator=generator) for i in range(6)}
    b = {
        name: tensor + 0.01 * torch.randn(50, 30, generator=generator) for name, tensor in a.items()
    }
    for name, state in (("a", a), ("b", b)):
        torch.save(state, tmp_path / f"{name}.pt")
        torch.save(state, tmp_path / f"{name}.pth", _use_new_zipfile_serialization=False)
        save_file(state, tmp_path / f"{name}.safetensors")
        with mc.open(tmp_path / f"{name}.pt") as ckpt:
            mc.save(ckpt, f"{tmp_path}/{name}-shards/", to="safetensors", max_shard_size="12KB")
            mc.save(ckpt, f"{tmp_path}/{name}-dcp/", to="dcp")
        with (
            zipfile.ZipFile(tmp_path / f"{name}.pt") as stored,
            zipfile.ZipFile(
                tmp_path / f"{name}-deflated.pt", "w", zipfile.ZIP_DEFLATED
            ) as deflated,
        ):
            for member in stored.namelist():
                deflated.writestr(member, stored.read(member))
    forms = (".pt", ".pth", ".safetensors", "-shards", "-dcp", "-deflated.pt")
    plain = mc.diff(tmp_path / "a.pt", tmp_path / "b.pt")
    assert len(plain.changed) == 6
    wanted = {change.name: change.as_dict() for change in plain.changed}
    for one in forms:
        assert not mc.diff(tmp_path / "a.pt", tmp_path / f"a{one}").changed
        for other in forms:
            found = mc.diff(tmp_path / f"a{one}", tmp_path / f"b{other}")
            assert {change.name: change.as_dict() for change in found.changed} == wanted


def test_in_bounded_memory(tmp_path: Path) -> None:
    a = torch.zeros(8_000_000)
    b = a + 1
    with opened(tmp_path / "a.pt", {"x": a}) as one, opened(tmp_path / "b.pt", {"x": b}) as two:
        mc.diff(one, two)  # what is imported
        tracemalloc.start()
        (change,) = mc.diff(one, two).changed
        assert change.measure is not None
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
    assert change.measure.mean_abs == 1
    assert peak < 12 << 20
