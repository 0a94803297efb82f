"""Bytes of removed tensors do not go along in a storage that others share with them."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

import modelctl as mc
from modelctl.errors import DamagedError
from modelctl.files import Saved
from tests.formats.pytorch.test_damaged_storages import flip

FLAT = torch.arange(1, 1001.0)


def saved(path: Path) -> Path:
    """Ten tensors of one storage, and one by itself."""
    state = {f"t{i}": FLAT[i * 100 : i * 100 + 100].view(10, 10) for i in range(10)}
    torch.save({**state, "tied": state["t4"], "own": torch.ones(5)}, path)
    return path


def edited(path: Path, *patterns: str) -> tuple[dict[str, torch.Tensor], Saved]:
    out = path.with_name("out.pt")
    with mc.open(path) as ckpt:
        done = mc.save(mc.keep(ckpt, list(patterns)), out, overwrite=True)
    return torch.load(out), done


def holds(path: Path, name: int) -> bool:
    return FLAT[name * 100 : name * 100 + 100].numpy().tobytes() in path.read_bytes()


def test_one_of_ten(tmp_path: Path) -> None:
    found, done = edited(saved(tmp_path / "in.pt"), "t3")
    assert torch.equal(found["t3"], FLAT[300:400].view(10, 10))
    assert found["t3"].untyped_storage().nbytes() == 400
    assert not any(holds(tmp_path / "out.pt", i) for i in range(10) if i != 3)
    assert not done.notes


def test_neighbours_still_share(tmp_path: Path) -> None:
    """Where they lie to each other, and ties, are as they were."""
    found, done = edited(saved(tmp_path / "in.pt"), "t4", "t5", "tied", "own")
    storage = found["t4"].untyped_storage()
    assert storage.nbytes() == 800
    assert found["t5"].untyped_storage().data_ptr() == storage.data_ptr()
    assert [found[name].storage_offset() for name in ("t4", "tied", "t5")] == [0, 0, 100]
    assert torch.equal(found["t5"], FLAT[500:600].view(10, 10))
    assert not done.notes


def test_what_lies_between_is_told(tmp_path: Path) -> None:
    found, done = edited(saved(tmp_path / "in.pt"), "t2", "t5", "t6")
    assert found["t2"].untyped_storage().nbytes() == 2000
    (note,) = done.notes
    assert note.text.startswith("800 bytes of removed tensors stay")
    report = mc.edit(
        tmp_path / "in.pt", {"do": "keep", "pattern": ["t2", "t5"]}, output=tmp_path / "b.pt"
    )
    assert any("800 bytes of removed" in note.text for note in report.notes)
    mc.edit(
        tmp_path / "in.pt",
        {"do": "keep", "pattern": ["t2", "t5"]},
        output=tmp_path / "b.safetensors",
    )
    assert not holds(tmp_path / "b.safetensors", 3)


def test_a_file_as_it_was_keeps_its_storages(tmp_path: Path) -> None:
    """Only a part of this one is viewed, and nothing was removed."""
    torch.save({"a": FLAT[:10], "b": FLAT[20:30], "c": torch.ones(2)}, tmp_path / "in.pt")
    for edit in ("convert", {"do": "add-prefix", "prefix": "x."}, {"do": "drop", "pattern": "c"}):
        mc.edit(tmp_path / "in.pt", edit, output=tmp_path / "out.pt", overwrite=True)
        for tensor in torch.load(tmp_path / "out.pt").values():
            assert tensor.untyped_storage().nbytes() in (4000, 8)


def test_views_of_two_dtypes(tmp_path: Path) -> None:
    """What is left begins and ends at an item of each."""
    raw = torch.arange(240, dtype=torch.uint8).repeat(4)
    state = {
        "gone": raw[:64].view(torch.uint16),
        "a": raw[67:71].view(torch.float8_e5m2),
        "b": raw[80:240].view(torch.uint16),
        "gone2": raw[600:].view(torch.uint16),
    }
    torch.save(state, tmp_path / "in.pt")
    found, _ = edited(tmp_path / "in.pt", "a", "b")
    assert found["a"].untyped_storage().nbytes() == 174
    for name in ("a", "b"):
        assert torch.equal(found[name].view(torch.uint8), state[name].view(torch.uint8))
    assert found["a"].untyped_storage().data_ptr() == found["b"].untyped_storage().data_ptr()


def test_strided_ones(tmp_path: Path) -> None:
    table = FLAT.view(100, 10)
    torch.save({"column": table[50:, 3], "rest": table[:50]}, tmp_path / "in.pt")
    found, done = edited(tmp_path / "in.pt", "column")
    assert torch.equal(found["column"], table[50:, 3])
    assert found["column"].stride() == (10,)
    assert found["column"].untyped_storage().nbytes() == 4 * 491
    assert not done.notes  # its gaps are no removed tensor's


def test_every_section(tmp_path: Path) -> None:
    """Views in an optimizer's state of the storage of the model's."""
    state = {"a": FLAT[:100], "b": FLAT[100:200]}
    torch.save({"model": state, "epoch": 3, "other": {"flat": FLAT[50:150]}}, tmp_path / "in.pt")
    with mc.open(tmp_path / "in.pt") as ckpt:
        mc.save(mc.drop(ckpt, "b"), tmp_path / "out.pt")
    found = torch.load(tmp_path / "out.pt")
    assert torch.equal(found["other"]["flat"], FLAT[50:150])
    assert found["model"]["a"].untyped_storage().nbytes() == 600


def test_split(tmp_path: Path) -> None:
    torch.save({"model": {"a": FLAT[:100]}, "ema": {"a": FLAT[100:200]}}, tmp_path / "in.pt")
    mc.split_file(tmp_path / "in.pt", output=tmp_path / "parts")
    assert not holds(tmp_path / "parts" / "model.pt", 1)
    assert not holds(tmp_path / "parts" / "ema.pt", 0)


def test_a_part_of_what_is_damaged(tmp_path: Path) -> None:
    """A new checksum of a part must not hide that the old one was wrong."""
    path = saved(tmp_path / "in.pt")
    flip(path, "t0")
    with pytest.raises(DamagedError, match="is damaged"):
        edited(path, "t9")
    assert not (tmp_path / "out.pt").exists()
