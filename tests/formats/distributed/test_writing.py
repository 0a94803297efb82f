"""DCP that modelctl writes, and edits in place: read by torch, under any number of ranks."""

from __future__ import annotations

import os
import pickle
import shutil
from pathlib import Path
from typing import Any

import pytest

import modelctl as mc
from modelctl.errors import LossError, UsageError, WriteError

torch = pytest.importorskip("torch")
from torch.distributed.checkpoint.format_utils import dcp_to_torch_save  # noqa: E402

from .conftest import run_ranks  # noqa: E402
from .test_torch import flat  # noqa: E402


def by_torch(folder: Path) -> dict[str, Any]:
    """What torch makes of a folder, flat."""
    out = folder.with_suffix(".by-torch.pt")
    dcp_to_torch_save(str(folder), out)
    return flat(torch.load(out, weights_only=False))


def same(found: dict[str, Any], expected: dict[str, Any]) -> None:
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        if isinstance(value, torch.Tensor):
            assert torch.equal(found[name], value), name
            assert found[name].dtype == value.dtype
        else:
            assert found[name] == value


def a_training() -> dict[str, Any]:
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(5, 7), torch.nn.BatchNorm1d(7))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    model(torch.randn(4, 5)).sum().backward()
    optimizer.step()
    whole = torch.arange(24.0).reshape(4, 6)
    return {
        "model": model.state_dict(),
        "optimizer": optimizer.state_dict(),
        "odd": {
            "turned": whole.t(),
            "part": whole[1:3, ::2],
            "number": torch.tensor(2.5),
            "nothing": torch.zeros(0, 3),
            "half": whole.bfloat16(),
            "flags": whole > 3,
        },
        "epoch": 3,
        "names": ["a", "b"],
        "list": [torch.ones(2), {"x": torch.zeros(3, dtype=torch.int64)}],
    }


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    torch.save(a_training(), tmp_path / "a.pt")
    return tmp_path / "a.pt"


def text_keys(value: Any) -> Any:
    """As torch has it after DCP: keys are text."""
    if isinstance(value, dict):
        return {str(key): text_keys(one) for key, one in value.items()}
    if isinstance(value, list):
        return [text_keys(one) for one in value]
    return value


def test_torch_reads_what_is_written(saved, tmp_path):
    with mc.open(saved) as ckpt:
        mc.save(ckpt, tmp_path / "out", to="dcp")
    assert sorted(os.listdir(tmp_path / "out")) == [".metadata", "__0_0.distcp"]
    same(by_torch(tmp_path / "out"), flat(text_keys(a_training())))


@pytest.mark.parametrize("world", [1, 3])
def test_ranks_of_torch_read_their_parts(saved, tmp_path, world):
    if not torch.distributed.is_gloo_available():
        pytest.skip("this torch has no gloo")
    with mc.open(saved) as ckpt:
        mc.save(ckpt, tmp_path / "out", to="dcp")
    dcp_to_torch_save(str(tmp_path / "out"), tmp_path / "expected.pt")
    run_ranks(tmp_path, world, tmp_path / "out", tmp_path / "expected.pt")


def test_it_comes_back_as_it_was(saved, tmp_path):
    with mc.open(saved) as ckpt:
        mc.save(ckpt, tmp_path / "out", to="dcp")
        with mc.open(tmp_path / "out") as again:
            for name, ref in ckpt.tensors().items():
                assert again.tensors()[name].spec == ref.spec
                assert again.tensors()[name].tobytes() == ref.tobytes(), name
            assert again["epoch"] == 3
            assert again["names"] == ["a", "b"]


def test_tied_tensors_are_written_once_and_stay_tied(tmp_path):
    weight = torch.randn(1000, 100)
    torch.save({"a": weight, "b": weight}, tmp_path / "a.pt")
    with mc.open(tmp_path / "a.pt") as ckpt:
        saved = mc.save(ckpt, tmp_path / "out", to="dcp")
    assert saved.bytes_written < 420_000
    with mc.open(tmp_path / "out") as ckpt:
        assert ckpt["a"].identity == ckpt["b"].identity
    same(by_torch(tmp_path / "out"), {"/a": weight, "/b": weight})


@pytest.mark.parametrize("world", [1, 2, 4])
def test_an_edit_in_place_writes_the_metadata_and_objects_alone(written, tmp_path, world):
    folder = tmp_path / "dcp"
    shutil.copytree(written(world) / "dcp", folder)
    before = by_torch(folder)
    files = {one.name: one.read_bytes() for one in folder.iterdir()}
    report = mc.edit(
        folder,
        [
            {"do": "drop", "pattern": "head"},
            {"do": "rename", "map": ["first=stem"]},
            {"do": "freeze", "pattern": "stem"},
        ],
        in_place=True,
    )
    assert report.bytes_written < 60_000
    assert any("stay in the files" in note.text for note in report.notes)
    for name, data in files.items():
        if name.endswith(".distcp"):
            assert (folder / name).read_bytes() == data
    expected = {
        name.replace("/first.", "/stem."): value
        for name, value in before.items()
        if "/head." not in name
    }
    expected["/optim/param_groups/0/params"] = [
        name.replace("first.", "stem.")
        for name in before["/optim/param_groups/0/params"]
        if "head." not in name
    ]
    same(by_torch(folder), expected)
    with mc.open(folder) as ckpt:  # and what was recorded is read again
        from modelctl.core.records import read_freeze

        record = read_freeze(ckpt)
        assert record is not None
        assert sorted(record.frozen) == ["stem.bias", "stem.weight"]


def test_objects_of_an_earlier_edit_go(written, tmp_path):
    folder = tmp_path / "dcp"
    shutil.copytree(written(2) / "dcp", folder)
    names = []
    for i in range(3):
        mc.edit(
            folder, {"do": "rename", "map": [f"*norm{i or ''}.*=*norm{i + 1}.*"]}, in_place=True
        )
        names.append(sorted(one.name for one in folder.glob("__0_*.distcp")))
    assert len({len(one) for one in names}) == 1


def test_a_folder_that_holds_one_is_not_written_over(saved, tmp_path):
    with mc.open(saved) as ckpt:
        mc.save(ckpt, tmp_path / "out", to="dcp")
        with pytest.raises(WriteError, match="exists already"):
            mc.save(ckpt, tmp_path / "out", to="dcp")
        mc.save(mc.drop(ckpt, "1"), tmp_path / "out", to="dcp", overwrite=True)
    assert sorted(os.listdir(tmp_path / "out")) == [".metadata", "__0_1.distcp"]
    assert not any("/model/1." in name for name in by_torch(tmp_path / "out"))


@pytest.mark.parametrize(
    ("value", "said"),
    [
        ({1: torch.ones(1), "1": torch.ones(1)}, "two entries would be called '1'"),
        ({"a": torch.eye(3).to_sparse()}, "sparse_coo"),
        (torch.ones(3), "holds a dict by names"),
        ({"a": torch.nn.Linear(2, 2)}, "a whole module"),
    ],
)
def test_what_has_no_place_there_is_refused(tmp_path, value, said):
    torch.save(value, tmp_path / "a.pt")
    with (
        mc.open(tmp_path / "a.pt") as ckpt,
        pytest.raises(LossError, match=said),
    ):
        mc.save(ckpt, tmp_path / "out", to="dcp")


def test_the_metadata_are_as_torch_pickles_them(saved, tmp_path):
    """Unpickled by the classes themselves, with every field that they have."""
    from torch.distributed.checkpoint.metadata import Metadata

    with mc.open(saved) as ckpt:
        mc.save(ckpt, tmp_path / "out", to="dcp")
    found = pickle.loads((tmp_path / "out" / ".metadata").read_bytes())
    assert isinstance(found, Metadata)
    assert found.state_dict_metadata["model.0.weight"].properties.dtype is torch.float32
    assert found.planner_data["list.1.x"] == ("list", 1, "x")


@pytest.mark.parametrize("what", ["ranks", "parts"])
def test_a_folder_that_is_read_only_is_not_edited_in_place(written, tmp_path, what):
    """Nothing is written beside files that would be read again instead of it."""
    source = written(2) / what
    if not source.exists():
        pytest.skip("this torch has no writer of them")
    folder = tmp_path / what
    shutil.copytree(source, folder)
    before = sorted(os.listdir(folder))
    with pytest.raises(UsageError, match="read only, not edited in place") as e:
        mc.edit(folder, {"do": "add-prefix", "prefix": "m"}, in_place=True)
    assert "-o FILE.pt" in (e.value.hint or "")
    assert sorted(os.listdir(folder)) == before
