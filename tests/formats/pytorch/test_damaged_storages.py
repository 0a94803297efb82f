"""A bit of a tensor that flipped since the file was saved, which the checksums of its zip show:
seen wherever the bytes are read, or go where no checksum would show it any more."""

from __future__ import annotations

import os
import sys
import zipfile
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

import modelctl as mc
from modelctl.core.checkpoint import Checkpoint
from modelctl.core.storages import fastest_crc32
from modelctl.errors import DamagedError, UnreadableError

LARGE = 300 << 10  # elements: copied by the kernel, read in several pieces


def flip(path: Path, name: str) -> None:
    """Flip a bit in the middle of the storage of a tensor."""
    with mc.open(path) as ckpt:
        storage = ckpt.tensors()[name].storage
        runs = getattr(storage, "inner", storage).runs()
        assert runs is not None
        at = runs[0].offset + runs[0].nbytes // 2
    data = bytearray(path.read_bytes())
    data[at] ^= 0x10
    path.write_bytes(data)


@pytest.fixture(params=["small", "large", "views", "transposed", "transposed views"])
def damaged(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    """A file in which the tensor ``bad`` has a bit that flipped, a sound one on either side."""
    path = tmp_path / "in.pt"
    many = torch.arange(float(2 * LARGE))
    tensors = {
        "small": [torch.arange(7.0)],
        "large": [many],
        "views": [many[:LARGE], many[LARGE:]],
        "transposed": [many.view(2, -1).t()],
        "transposed views": [many[:LARGE].view(2, -1).t(), many[LARGE:]],
    }[request.param]
    state = {"first": torch.ones(3), "bad": tensors[0], "last": torch.zeros(LARGE)}
    if len(tensors) > 1:
        state["other"] = tensors[1]
    torch.save(state, path)
    flip(path, "bad")
    torch.load(path)  # torch does not see it
    return path


@contextmanager
def refused(path: Path) -> Iterator[None]:
    """What is said, and that nothing is left."""
    before = sorted(os.listdir(path.parent))
    with pytest.raises(DamagedError) as caught:
        yield
    text = str(caught.value)
    assert text.startswith(f"{path}, at byte ")
    assert "'bad' is damaged" in text or "'other' is damaged" in text
    assert "drop" in (caught.value.hint or "")
    assert caught.value.kind == "damaged"
    assert sorted(os.listdir(path.parent)) == before


def to_safetensors(ckpt: Checkpoint, folder: Path) -> None:
    mc.save(ckpt, folder / "out.safetensors")


def to_shards(ckpt: Checkpoint, folder: Path) -> None:
    mc.save(ckpt, folder / "shards", to="safetensors", max_shard_size="1MB")


def stats(ckpt: Checkpoint, folder: Path) -> None:
    mc.summarize(ckpt, stats=True)


def difference(ckpt: Checkpoint, folder: Path) -> None:
    with mc.open(folder / "in.pt") as again:
        mc.diff(ckpt, again)


@pytest.mark.parametrize("use", [to_safetensors, to_shards, stats, difference])
def test_it_is_seen(use: Callable[[Checkpoint, Path], None], damaged: Path) -> None:
    with refused(damaged), mc.open(damaged) as ckpt:
        use(ckpt, damaged.parent)


def test_it_is_seen_without_the_kernel(damaged: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(os, "copy_file_range", raising=False)
    with refused(damaged), mc.open(damaged) as ckpt:
        to_safetensors(ckpt, damaged.parent)


def test_it_is_seen_by_zlib(damaged: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "isal", None)
    fastest_crc32.cache_clear()
    try:
        with refused(damaged), mc.open(damaged) as ckpt:
            to_safetensors(ckpt, damaged.parent)
    finally:
        fastest_crc32.cache_clear()


def test_an_output_that_stood_there_is_kept(damaged: Path) -> None:
    out = damaged.with_name("out.safetensors")
    out.write_bytes(b"what stood there")
    with refused(damaged), mc.open(damaged) as ckpt:
        mc.save(ckpt, out, overwrite=True)
    assert out.read_bytes() == b"what stood there"


def test_zip_to_zip_keeps_the_checksum(damaged: Path) -> None:
    out = damaged.with_name("out.pt")
    with mc.open(damaged) as ckpt:
        mc.save(mc.add_prefix(ckpt, "a."), out)
    with zipfile.ZipFile(out) as zipped:
        assert zipped.testzip() is not None
    with pytest.raises(DamagedError, match=r"'a\.(bad|other)' is damaged"), mc.open(out) as ckpt:
        mc.save(ckpt, damaged.with_name("out.safetensors"))


def test_without_it_the_rest_is_written(damaged: Path) -> None:
    out = damaged.with_name("out.safetensors")
    with mc.open(damaged) as ckpt:
        mc.save(mc.drop(ckpt, ["bad", "other"] if "other" in ckpt.tensors() else ["bad"]), out)
    assert list(load_file(out)) == ["first", "last"]


@pytest.mark.parametrize("kind", ["deflated", "big-endian"])
def test_other_storages(kind: str, tmp_path: Path) -> None:
    """Storages whose bytes are not the member's."""
    path = tmp_path / "in.pt"
    torch.save({"first": torch.ones(3), "bad": torch.arange(float(LARGE))}, path)
    with zipfile.ZipFile(path) as zipped:
        members = {name: zipped.read(name) for name in zipped.namelist()}
    if kind == "big-endian":
        members["in/byteorder"] = b"big"
    how = zipfile.ZIP_DEFLATED if kind == "deflated" else zipfile.ZIP_STORED
    with zipfile.ZipFile(path, "w", how) as zipped:
        for name, data in members.items():
            zipped.writestr(name, data)
    with mc.open(path) as ckpt:
        mc.save(ckpt, tmp_path / "sound.safetensors")
        mc.save(ckpt, tmp_path / "sound.pt")
    if kind == "big-endian":
        flip(path, "bad")
    else:  # a wrong checksum instead: wrong bytes would be no deflate stream
        crc = zlib.crc32(members["in/data/1"]).to_bytes(4, "little")
        data = path.read_bytes()
        assert data.count(crc) == 2
        path.write_bytes(data.replace(crc, b"\1\2\3\4"))
    for suffix in ("safetensors", "pt"):
        with refused(path), mc.open(path) as ckpt:
            mc.save(ckpt, tmp_path / f"out.{suffix}")
    with refused(path), mc.open(path) as ckpt:
        ckpt.tensors()["bad"].tobytes()


def test_a_part_of_a_storage_is_read_without_the_rest(tmp_path: Path) -> None:
    """``tobytes`` of a view reads that view alone; what uses it for good asks for more."""
    flat = torch.arange(float(LARGE))
    torch.save({"bad": flat[:4], "rest": flat[4:]}, tmp_path / "f.pt")
    flip(tmp_path / "f.pt", "bad")
    with mc.open(tmp_path / "f.pt") as ckpt:
        ref = ckpt.tensors()["bad"]
        before = ckpt.bytes_read
        assert ref.tobytes() == flat[:4].numpy().tobytes()
        assert ckpt.bytes_read - before == 16
        with pytest.raises(DamagedError):
            ref.check()


def test_a_storage_is_compared_once(tmp_path: Path) -> None:
    flat = torch.arange(float(LARGE))
    torch.save({f"{i}": flat[i * 1024 : i * 1024 + 1024] for i in range(100)}, tmp_path / "f.pt")
    with mc.open(tmp_path / "f.pt") as ckpt:
        mc.summarize(ckpt, stats=True)
        once = ckpt.bytes_read
        assert once < 2 * flat.nbytes
        mc.summarize(ckpt, stats=True)
        assert ckpt.bytes_read - once == 100 * 4096


# ---------------------------------------------------------------------- saved without checksums


@pytest.fixture
def unsummed(tmp_path: Path) -> Path:
    set_crc32: Any = getattr(torch.serialization, "set_crc32_options", None)
    if set_crc32 is None:
        pytest.skip("this torch always writes checksums")
    path = tmp_path / "unsummed.pt"
    set_crc32(False)
    try:
        torch.save({"a": torch.arange(5.0), "b": torch.arange(float(LARGE))}, path)
    finally:
        set_crc32(True)
    with zipfile.ZipFile(path) as zipped:
        assert not any(info.CRC for info in zipped.infolist())
    return path


@pytest.mark.parametrize("suffix", [".pt", ".safetensors"])
def test_saved_without_checksums(suffix: str, unsummed: Path) -> None:
    out = unsummed.with_name("out" + suffix)
    with mc.open(unsummed) as ckpt:
        assert not ckpt.warnings
        mc.summarize(ckpt, stats=True)
        mc.save(ckpt, out)
    found = load_file(out) if suffix == ".safetensors" else torch.load(out)
    assert torch.equal(found["a"], torch.arange(5.0))
    assert torch.equal(found["b"], torch.arange(float(LARGE)))
    if suffix == ".pt":  # a new zip has its checksums
        with zipfile.ZipFile(out) as zipped:
            assert zipped.testzip() is None


def test_storages_that_are_filled_in_later(tmp_path: Path) -> None:
    """As for GPUDirect: their checksums are 0, those of the rest are not."""
    path, tensor = tmp_path / "f.pt", torch.arange(float(LARGE))
    skip_data: Any = getattr(torch.serialization, "skip_data", None)
    if skip_data is None:
        pytest.skip("this torch writes storages at once")
    with skip_data():
        torch.save({"a": tensor}, path)
    with mc.open(path) as ckpt:
        (run,) = ckpt.tensors()["a"].storage.runs() or ()
    with open(path, "r+b") as file:
        file.seek(run.offset)
        file.write(tensor.numpy().tobytes())
    with mc.open(path) as ckpt:
        mc.save(ckpt, tmp_path / "out.safetensors")
    assert torch.equal(load_file(tmp_path / "out.safetensors")["a"], tensor)
    data = bytearray(path.read_bytes())
    data[data.index(b"_rebuild")] ^= 1
    path.write_bytes(data)
    with pytest.raises(UnreadableError, match="CRC"):
        mc.open(path)
