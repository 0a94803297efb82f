"""Safetensors files with parts of tensors that don't go together, and items that are compressed."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest

import modelctl as mc
from modelctl.errors import ModelctlError, UnreadableError, UnsupportedError
from modelctl.formats.distributed.metadata import Item
from modelctl.formats.distributed.streams import as_saved
from modelctl.storage.places import Place

torch = pytest.importorskip("torch")
safetensors = pytest.importorskip("safetensors.torch")


def part(folder: Path, number: int, tensors: dict[str, Any], starts: Any) -> Path:
    """A file of a rank, with where its parts begin."""
    folder.mkdir(exist_ok=True)
    path = folder / f"shard-{number:05}-model-00001-of-00001.safetensors"
    info = starts if isinstance(starts, str) else json.dumps(starts)
    safetensors.save_file(tensors, path, {"DCP_SHARDING_INFO": info, "DCP_VERSION": "1.0"})
    return path


def begins(*at: int) -> dict[str, Any]:
    return {"w": {"saved_offsets": list(at)}}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Three ranks, each with two rows."""
    for i in range(3):
        part(tmp_path / "run", i + 1, {"w": torch.full((2, 4), float(i))}, begins(2 * i, 0))
    return tmp_path / "run"


def refused(folder: Path, match: str) -> None:
    with pytest.raises(ModelctlError, match=match) as e:
        mc.open(folder)
    assert folder.name in str(e.value)


def test_they_are_joined(folder):
    with mc.open(folder) as ckpt:
        assert ckpt["w"].shape == (6, 4)
        assert ckpt["w"].torch()[:, 0].tolist() == [0, 0, 1, 1, 2, 2]
        assert ckpt.metadata == {}


@pytest.mark.parametrize("number", [1, 2])
def test_a_rank_is_missing(folder, number):
    next(folder.glob(f"shard-{number:05}*")).unlink()
    refused(folder, "'w': 8 of its 24 elements are in no part of it")


def test_the_last_rank_can_not_be_missed_and_that_is_said(folder):
    with mc.open(folder) as ckpt:
        (note,) = ckpt.warnings
        assert note.text.startswith("the files of 3 ranks are here, and none says how many saved")
    next(folder.glob("shard-00003*")).unlink()
    with mc.open(folder) as ckpt:
        assert ckpt["w"].shape == (4, 4)
        (note,) = ckpt.warnings
        assert "of 2 ranks" in note.text


def test_a_rank_that_held_other_tensors_is_missing(folder):
    part(folder, 5, {"v": torch.zeros(2)}, {"v": {"saved_offsets": [0]}})
    with mc.open(folder) as ckpt:
        said, _ = ckpt.warnings
        assert said.level == "warning"
        assert said.text.startswith("no file shard-00004-…")


def test_files_of_some_tensors_are_missing_of_every_rank(folder):
    for path in folder.iterdir():
        path.rename(path.with_name(path.name.replace("of-00001", "of-00002")))
    refused(folder, "model-00002-of-00002 is missing, of every rank")
    path.with_name(path.name.replace("of-00001", "of-00002")).rename(path)
    refused(folder, "files of several saves: shard-00001-model-00001-of-0000")


@pytest.mark.parametrize(
    ("tensors", "starts", "match"),
    [
        ({"w": torch.zeros(2, 4)}, begins(1, 0), "'w': two parts of it overlap"),
        ({"w": torch.zeros(2, 4)}, begins(2), "the parts of 'w' do not go together"),
        ({"w": torch.zeros(2, 4, 1)}, begins(2, 0, 0), "the parts of 'w' do not go together"),
        ({"w": torch.zeros(2, 4).half()}, begins(2, 0), "the parts of 'w' do not go together"),
        ({"w": torch.zeros(2, 4)}, begins(10**18, 10**18), "are in no part of it"),
    ],
)
def test_a_part_that_does_not_fit(folder, tensors, starts, match):
    part(folder, 2, tensors, starts)
    refused(folder, match)


@pytest.mark.parametrize(
    "starts",
    [
        *("", "{", "null", "[]", "3", '"x"', '{"w": 3}', '{"w": {}}', "[" * 100_000),
        *('{"w": {"saved_offsets": "ab"}}', '{"w": {"saved_offsets": [-2, 0]}}'),
        *('{"w": {"saved_offsets": [true, 0]}}', '{"w": {"saved_offsets": [2.0, 0]}}'),
        '{"w": {"saved_offsets": [' + "9" * 4000 + ", " + "9" * 4000 + "]}}",
        '{"w": {"saved_offsets": [' + "9" * 5000 + ", 0]}}",
    ],
)
def test_places_that_are_none(folder, starts):
    part(folder, 2, {"w": torch.zeros(2, 4)}, starts)
    refused(folder, r"does not say where its parts begin|overlap")


def test_a_file_that_is_cut_off(folder):
    path = next(folder.glob("shard-00002*"))
    path.write_bytes(path.read_bytes()[:-8])
    refused(folder, "shard-00002")


@pytest.fixture
def packed(tmp_path: Path) -> tuple[Place, Item]:
    (tmp_path / "item").write_bytes(b"\x28\xb5\x2f\xfd" + b"\xff" * 40)
    return Place(tmp_path / "item"), Item("item", 0, 44, ("stream.zstd/1",))


def test_without_the_library_the_extra_is_named(packed, monkeypatch):
    monkeypatch.setitem(sys.modules, "zstandard", None)
    with pytest.raises(UnsupportedError, match="zstandard") as e:
        as_saved(*packed)
    assert "pip install zstandard" in (e.value.hint or "")


def test_compressed_bytes_that_are_damaged(packed):
    pytest.importorskip("zstandard")
    with pytest.raises(UnreadableError, match="item: damaged"):
        as_saved(*packed)
