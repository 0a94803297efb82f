"""Folders of torchtitan and Megatron: read as trainings, edited in step, and theirs again."""

from __future__ import annotations

import io
import json
import pickle
from pathlib import Path
from typing import Any

import pytest

import modelctl as mc
from modelctl.inspection.edits import EditReport

torch = pytest.importorskip("torch")
dcp = pytest.importorskip("torch.distributed.checkpoint")
from torch.distributed.checkpoint.state_dict import (  # noqa: E402
    StateDictOptions,
    get_optimizer_state_dict,
    set_optimizer_state_dict,
)

FLAT = StateDictOptions(flatten_optimizer_state_dict=True)
pytestmark = pytest.mark.filterwarnings("ignore::UserWarning", "ignore::FutureWarning")


def rename(*maps: str) -> dict[str, Any]:
    return {"do": "rename", "map": list(maps)}


def edit(folder: Path, out: Path | None, *edits: dict[str, Any]) -> list[str]:
    """Into a new folder, or in place."""
    where: dict[str, Any] = {"in_place": True} if out is None else {"output": f"{out}/"}
    report = mc.edit(folder, list(edits), **where)
    assert isinstance(report, EditReport)
    return [note.text for note in report.notes]


def a_model(last: str = "head") -> Any:
    torch.manual_seed(0)
    model = torch.nn.Sequential()
    model.add_module("trunk", torch.nn.Linear(4, 4))
    model.add_module(last, torch.nn.Linear(4, 2))
    return model


def an_optimizer(model: Any) -> Any:
    first, *others = model.parameters()
    optimizer = torch.optim.AdamW([{"params": [first], "lr": 0.1}, {"params": others}], lr=0.01)
    model(torch.ones(3, 4)).sum().backward()
    optimizer.step()
    return optimizer


@pytest.fixture
def titan(tmp_path: Path) -> Path:
    """As torchtitan's CheckpointManager saves: the model at the top, a flat optimizer."""
    model = a_model()
    saved = {
        **model.state_dict(),
        "optimizer": get_optimizer_state_dict(model, an_optimizer(model), options=FLAT),
        "lr_scheduler": {"last_epoch": 7},
        "train_state": {"step": torch.tensor(7, dtype=torch.int32)},
    }
    dcp.save(saved, checkpoint_id=str(tmp_path / "titan"))
    return tmp_path / "titan"


def test_torchtitan_is_a_training(titan: Path) -> None:
    with mc.open(titan) as ckpt:
        sections = ckpt.sections
        assert list(sections.model().tensors()) == list(a_model().state_dict())
        assert sections.lrs() == [0.1, 0.01]
        assert sections.step == (("train_state", "step"), 7)
        assert sections.kind == "training checkpoint"
        assert [path for path, _ in sections.schedulers] == [("lr_scheduler",)]


@pytest.mark.parametrize("in_place", [True, False])
def test_an_edited_torchtitan_is_what_torch_loads(titan: Path, in_place: bool) -> None:
    out = titan if in_place else titan.parent / "new"
    data = titan / "__0_0.distcp"
    before = data.read_bytes()
    edit(titan, None if in_place else out, rename("head=classifier"))
    if in_place:
        assert data.read_bytes() == before

    model = a_model("classifier")
    expected = an_optimizer(model)
    fresh = a_model("classifier")
    torch.nn.init.zeros_(fresh.trunk.weight)
    optimizer = an_optimizer(fresh)
    state = {**fresh.state_dict()}
    state["optimizer"] = get_optimizer_state_dict(fresh, optimizer, options=FLAT)
    state["train_state"] = {"step": torch.tensor(0, dtype=torch.int32)}
    dcp.load(state, checkpoint_id=str(out))
    set_optimizer_state_dict(fresh, optimizer, state["optimizer"], options=FLAT)
    assert int(state["train_state"]["step"]) == 7
    assert [group["lr"] for group in optimizer.param_groups] == [0.1, 0.01]
    for a, b in zip(expected.state.values(), optimizer.state.values(), strict=True):
        assert all(torch.equal(a[key], b[key]) for key in a)


def test_torchtitan_becomes_a_file_that_resumes(titan: Path) -> None:
    from modelctl import nn as mnn

    mc.edit(titan, "convert", output=titan.parent / "whole.pt")
    for source in (titan, titan.parent / "whole.pt"):
        model, expected = a_model(), an_optimizer(a_model())
        optimizer = an_optimizer(model)
        found = mnn.resume(source, model=model, optimizer=optimizer)
        assert found.step == 7
        for a, b in zip(expected.state.values(), optimizer.state.values(), strict=True):
            assert all(torch.equal(a[key], b[key]) for key in a)


# ---------------------------------------------------------------------- Megatron's

LAYERS = ("embedding.word_embeddings", "decoder.layers.mlp.linear_fc1", "output_layer")


def saved_by_transformer_engine() -> io.BytesIO:
    state = io.BytesIO()
    torch.save({"scale": torch.ones(3)}, state)
    state.seek(0)
    return state


@pytest.fixture
def megatron_folder(tmp_path: Path) -> Path:
    """As Megatron saves with ``torch_dist``: nothing taken apart, all tensors at the top."""
    torch.manual_seed(0)
    model = {f"{layer}.weight": torch.randn(2, 4, 3) for layer in LAYERS}
    saved = {
        **model,
        **{
            f"{LAYERS[1]}._extra_state/shard_{i}_{12}": saved_by_transformer_engine()
            for i in range(12)
        },
        "rng_state/shard_0.0_1.1": [{"tracker": {"x": torch.ones(4)}, "np": (1, 2)}],
        **{
            f"optimizer.state.{kind}.{name}": torch.randn(2, 4, 3)
            for kind in ("fp32_param", "exp_avg", "exp_avg_sq")
            for name in model
        },
    }
    folder = tmp_path / "iter_0000012"
    save_whole(saved, folder)
    torch.save({"iteration": 12, "checkpoint_version": 3.0}, folder / "common.pt")
    (folder / "metadata.json").write_text(json.dumps({"sharded_backend": "torch_dist"}))
    return folder


def save_whole(saved: dict[str, Any], folder: Path) -> None:
    planner = dcp.DefaultSavePlanner(flatten_state_dict=False)
    dcp.save(saved, checkpoint_id=str(folder), planner=planner)


def by_torch(folder: Path) -> dict[str, Any]:
    """All entries of a folder as they lie, read by torch alone."""
    described = dcp.FileSystemReader(str(folder)).read_metadata().state_dict_metadata
    found = {
        name: torch.empty(one.size, dtype=one.properties.dtype) if hasattr(one, "size") else None
        for name, one in described.items()
    }
    planner = dcp.DefaultLoadPlanner(flatten_state_dict=False)
    dcp.load(found, checkpoint_id=str(folder), planner=planner)
    return found


def alike(a: Any, b: Any) -> bool:
    if isinstance(a, torch.Tensor):
        return torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(alike(a[key], b[key]) for key in a)
    if isinstance(a, list | tuple):
        return len(a) == len(b) and all(map(alike, a, b))
    return a.getvalue() == b.getvalue() if isinstance(a, io.BytesIO) else a == b


def test_megatron_is_a_training(megatron_folder: Path) -> None:
    with mc.open(megatron_folder) as ckpt:
        assert list(ckpt.sections.model().tensors()) == [f"{layer}.weight" for layer in LAYERS]
        (_, optimizer), *others = ckpt.sections.optimizers
        assert not others
        assert list(optimizer["state"]) == [f"{layer}.weight" for layer in LAYERS]
        assert ckpt.sections.step == (("common", "iteration"), 12)
        assert ckpt.sections.rng is not None
        assert not ckpt.findings
        assert not ckpt.warnings


@pytest.mark.parametrize("in_place", [True, False])
def test_an_edited_megatron_is_one(megatron_folder: Path, in_place: bool) -> None:
    before = by_torch(megatron_folder)
    common = (megatron_folder / "common.pt").read_bytes()
    out = megatron_folder if in_place else megatron_folder.parent / "new"
    drop = {"do": "drop", "pattern": "output_layer.*"}
    notes = edit(
        megatron_folder, None if in_place else out, rename("decoder.layers=decoder.blocks"), drop
    )

    expected = {
        key.replace("decoder.layers", "decoder.blocks"): value
        for key, value in before.items()
        if "output_layer" not in key
    }
    found = by_torch(out)
    assert found.keys() == expected.keys()
    assert all(alike(found[key], value) for key, value in expected.items())
    metadata = dcp.FileSystemReader(str(out)).read_metadata()
    assert metadata.planner_data is None
    assert (out / "common.pt").read_bytes() == common
    assert (out / "metadata.json").exists()
    assert not [text for text in notes if "stays in the folder" in text]


def test_what_megatron_notes_of_a_tensor_goes_with_it(tmp_path: Path) -> None:
    """The shape that a flattened tensor had: mcore_data, by name."""
    folder = tmp_path / "megatron"
    save_whole({"a.weight": torch.ones(2, 3), "b.weight": torch.ones(4)}, folder)
    file = folder / ".metadata"
    metadata = pickle.loads(file.read_bytes())
    metadata.mcore_data = {"a.weight": {"nd_reformulated_orig_global_shape": (2, 3)}}
    file.write_bytes(pickle.dumps(metadata))

    edit(folder, tmp_path / "copied", rename("a=c"))
    edit(folder, None, rename("a=c"))
    for one in (folder, tmp_path / "copied"):
        found = dcp.FileSystemReader(str(one)).read_metadata()
        assert found.mcore_data == {"c.weight": {"nd_reformulated_orig_global_shape": (2, 3)}}


def test_common_pt_of_anybody_else_is_not_read(tmp_path: Path) -> None:
    folder = tmp_path / "dcp"
    dcp.save({"a.weight": torch.ones(2)}, checkpoint_id=str(folder))
    torch.save({"iteration": 12}, folder / "common.pt")
    with mc.open(folder) as ckpt:
        assert list(ckpt.root) == ["a.weight"]
        assert [note.text for note in ckpt.warnings] == ["common.pt beside it is not read here"]


def test_what_stands_beside_goes_along(tmp_path: Path) -> None:
    folder = tmp_path / "dcp"
    dcp.save({"a.weight": torch.ones(2)}, checkpoint_id=str(folder))
    (folder / "config.json").write_text("{}")
    (folder / "__7_0.distcp").write_bytes(b"of a save before")
    new = tmp_path / "new"
    edit(folder, new, rename("a=b"))
    assert sorted(one.name for one in new.iterdir()) == [".metadata", "__0_0.distcp", "config.json"]


def test_common_pt_is_written_where_it_changed(megatron_folder: Path) -> None:
    with mc.open(megatron_folder) as ckpt:
        common = {**ckpt.root["common"], "iteration": 13}
        mc.save(ckpt.replace(root={**ckpt.root, "common": common}), megatron_folder, overwrite=True)
    assert torch.load(megatron_folder / "common.pt")["iteration"] == 13
    with mc.open(megatron_folder) as ckpt:
        root = {key: node for key, node in ckpt.root.items() if key != "common"}
        mc.save(ckpt.replace(root=root), megatron_folder, overwrite=True)
    assert not (megatron_folder / "common.pt").exists()


def test_a_model_alone_stands_at_the_top(megatron_folder: Path) -> None:
    new = megatron_folder.parent / "weights"
    mc.edit(megatron_folder, {"do": "convert", "weights-only": True}, output=new, to="dcp")
    assert by_torch(new).keys() == {f"{layer}.weight" for layer in LAYERS}
