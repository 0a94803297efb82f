"""Folders as people have them: a model with its config, a training, a pipeline, a run."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest

import modelctl as mc
from modelctl.errors import LossError, ModelctlError, SeveralError, UnreadableError

torch = pytest.importorskip("torch")
safetensors = pytest.importorskip("safetensors.torch")


def net() -> Any:
    torch.manual_seed(0)
    return torch.nn.Sequential(torch.nn.Linear(4, 3), torch.nn.Linear(3, 2))


def training(folder: Path, step: int = 500, *, wrapped: bool = False) -> Path:
    """As transformers' Trainer writes it."""
    folder.mkdir(parents=True)
    model = net()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda n: 1 / (1 + n))
    for _ in range(2):
        model(torch.ones(1, 4)).sum().backward()
        optimizer.step()
        scheduler.step()
    prefix = "module." if wrapped else ""
    weights = {prefix + name: value for name, value in model.state_dict().items()}
    safetensors.save_file(weights, folder / "model.safetensors", {"format": "pt"})
    torch.save(optimizer.state_dict(), folder / "optimizer.pt")
    torch.save(scheduler.state_dict(), folder / "scheduler.pt")
    state = {"epoch": 1.0, "global_step": step, "log_history": [{"loss": 0.5, "step": step}]}
    (folder / "trainer_state.json").write_text(json.dumps(state))
    torch.save({"python": (1, 2)}, folder / "rng_state.pth")
    (folder / "config.json").write_text('{"model_type": "net"}')
    (folder / "tokenizer.json").write_text("{}")
    return folder


def names(folder: Path) -> set[str]:
    return {one.name for one in folder.iterdir()}


# ------------------------------------------------------------------ a training


def test_a_trainers_folder_is_one_checkpoint(tmp_path):
    with mc.open(training(tmp_path / "checkpoint-500")) as ckpt:
        assert ckpt.sections.kind == "training checkpoint"
        assert set(ckpt.state_dict()) == {"0.weight", "0.bias", "1.weight", "1.bias"}
        assert ckpt["trainer_state.global_step"] == 500
        assert len(ckpt.sections.optimizers) == len(ckpt.sections.schedulers) == 1
        assert ckpt.folder is not None
        assert set(ckpt.folder.beside) == {"rng_state.pth", "config.json", "tokenizer.json"}


def test_an_edit_goes_through_its_files_and_takes_along_what_stands_beside(tmp_path):
    source = training(tmp_path / "checkpoint-500", wrapped=True)
    out = tmp_path / "out"
    report = mc.edit(source, "strip-prefix", output=out)
    assert names(out) == names(source)
    assert report.files_written == len(names(source))
    for name in ("config.json", "tokenizer.json", "rng_state.pth"):
        assert (out / name).read_bytes() == (source / name).read_bytes()
    assert set(safetensors.load_file(out / "model.safetensors")) == set(net().state_dict())
    assert any("went along" in note.text for note in report.notes)
    before = torch.load(source / "optimizer.pt", weights_only=True)
    after = torch.load(out / "optimizer.pt", weights_only=True)
    assert before["param_groups"] == after["param_groups"]
    with mc.open(out) as ckpt:
        assert ckpt["trainer_state.global_step"] == 500


def test_a_removal_takes_the_moments_along(tmp_path):
    source = training(tmp_path / "checkpoint-500")
    mc.edit(source, {"do": "drop", "pattern": "1"}, output=tmp_path / "out")
    after = torch.load(tmp_path / "out" / "optimizer.pt", weights_only=True)
    shapes = [tuple(one["exp_avg"].shape) for one in after["state"].values()]
    assert sorted(shapes) == [(3,), (3, 4)]
    assert len(after["param_groups"][0]["params"]) == 2


def test_in_place_only_what_changed_is_written(tmp_path):
    source = training(tmp_path / "checkpoint-500")
    before = {one.name: (one.stat().st_ino, one.read_bytes()) for one in source.iterdir()}
    report = mc.edit(source, {"do": "rename", "map": ["0=first"]}, in_place=True)
    changed = {
        one.name
        for one in source.iterdir()
        if before[one.name] != (one.stat().st_ino, one.read_bytes())
    }
    assert changed == {"model.safetensors"}  # an optimizer by numbers has no names
    assert report.files_written == 1
    mc.edit(source, {"do": "drop", "pattern": "1"}, in_place=True)
    assert len(torch.load(source / "optimizer.pt", weights_only=True)["state"]) == 2
    assert names(source) == set(before)


def test_it_becomes_one_file_and_says_what_stays(tmp_path):
    source = training(tmp_path / "checkpoint-500")
    report = mc.edit(source, "convert", output=tmp_path / "one.pt")
    loaded = torch.load(tmp_path / "one.pt", weights_only=True)
    assert set(loaded) == {"model", "optimizer", "scheduler", "trainer_state"}
    assert any("config.json" in note.text and "stay" in note.text for note in report.notes)
    with pytest.raises(LossError, match="this is a training checkpoint"):
        mc.edit(source, "convert", output=tmp_path / "one.safetensors")


def test_the_weights_alone_keep_the_config(tmp_path):
    source = training(tmp_path / "checkpoint-500")
    mc.edit(source, {"do": "convert", "weights-only": True}, output=tmp_path / "out")
    assert names(tmp_path / "out") == {
        *("model.safetensors", "config.json", "tokenizer.json", "rng_state.pth")
    }


def test_several_go_into_a_folder_each_under_its_name(tmp_path):
    sources = [training(tmp_path / "run" / f"checkpoint-{n}", n) for n in (500, 1000)]
    mc.edit(sources, {"do": "rename", "map": ["0=a"]}, output=f"{tmp_path}/out/")
    assert names(tmp_path / "out") == {"checkpoint-500", "checkpoint-1000"}
    assert names(tmp_path / "out" / "checkpoint-500") == names(sources[0])


def test_it_does_not_write_over_another(tmp_path):
    source, other = (training(tmp_path / name) for name in ("a", "b"))
    with pytest.raises(ModelctlError, match="exists already"):
        mc.edit(source, {"do": "rename", "map": ["0=a"]}, output=other)


def test_accelerates_names(tmp_path):
    source = training(tmp_path / "a")
    for name in ("optimizer", "scheduler"):
        (source / f"{name}.pt").rename(source / f"{name}.bin")
    (source / "trainer_state.json").unlink()
    mc.edit(source, {"do": "drop", "pattern": "1"}, output=tmp_path / "out")
    assert {"optimizer.bin", "scheduler.bin"} < names(tmp_path / "out")
    assert len(torch.load(tmp_path / "out" / "optimizer.bin", weights_only=True)["state"]) == 2


def test_shards_stay_shards(tmp_path):
    source = training(tmp_path / "a")
    mc.edit(source / "model.safetensors", "convert", output=f"{tmp_path}/s/", max_shard_size="50B")
    (source / "model.safetensors").unlink()
    for one in (tmp_path / "s").iterdir():
        one.rename(source / one.name)
    before = names(source)
    assert "model.safetensors.index.json" in before
    mc.edit(source, {"do": "rename", "map": ["0=first"]}, output=tmp_path / "out")
    assert names(tmp_path / "out") == before
    mc.edit(source, {"do": "rename", "map": ["0=first"]}, in_place=True)
    with mc.open(source) as ckpt:
        assert set(ckpt.state_dict()) == {"first.weight", "first.bias", "1.weight", "1.bias"}
        assert ckpt["trainer_state.global_step"] == 500
    assert len(names(source)) == len(before)


# ------------------------------------------------------------------ a model and its config


def model_folder(folder: Path) -> Path:
    folder.mkdir()
    safetensors.save_file(net().state_dict(), folder / "model.safetensors")
    (folder / "config.json").write_text("{}")
    return folder


def test_a_model_takes_its_config_along(tmp_path):
    mc.edit(model_folder(tmp_path / "m"), {"do": "drop", "pattern": "1"}, output=tmp_path / "out")
    assert names(tmp_path / "out") == {"model.safetensors", "config.json"}


def test_what_does_not_go_along_is_named(tmp_path):
    source = model_folder(tmp_path / "m")
    (source / "onnx").mkdir()
    (source / "pytorch_model.bin").write_bytes(b"the same once more")
    (tmp_path / "secret").write_text("x")
    (source / "link.txt").symlink_to(tmp_path / "secret")
    report = mc.edit(source, {"do": "drop", "pattern": "1"}, output=tmp_path / "out")
    assert names(tmp_path / "out") == {"model.safetensors", "config.json"}
    (said,) = [note.text for note in report.notes if note.level == "warning"]
    assert said == "left behind: link.txt, onnx, pytorch_model.bin"


# ------------------------------------------------------------------ several


@pytest.fixture
def pipeline(tmp_path: Path) -> Path:
    folder = tmp_path / "pipe"
    for name, file in (("unet", "diffusion_pytorch_model"), ("text_encoder", "model")):
        (folder / name).mkdir(parents=True)
        safetensors.save_file(
            {f"{name}.weight": torch.ones(2)}, folder / name / f"{file}.safetensors"
        )
        (folder / name / "config.json").write_text("{}")
    (folder / "scheduler").mkdir()
    (folder / "model_index.json").write_text('{"_class_name": "APipeline"}')
    return folder


def test_a_pipeline_shows_its_models_and_key_picks_one(pipeline):
    with mc.open(pipeline) as ckpt:
        assert set(ckpt.tensors()) == {"unet.unet.weight", "text_encoder.text_encoder.weight"}
        assert ckpt.origin is not None
        assert ckpt.origin.label == "APipeline of 2 models"
    with mc.open(pipeline, key="unet") as ckpt:
        assert set(ckpt.state_dict()) == {"unet.weight"}
    mc.edit(pipeline / "unet", {"do": "rename", "map": ["unet=x"]}, in_place=True)
    with mc.open(pipeline, key="unet") as ckpt:
        assert set(ckpt.state_dict()) == {"x.weight"}


def test_a_pipeline_is_not_written_as_a_whole(pipeline, tmp_path):
    with pytest.raises(LossError, match="the folders of its models"):
        mc.edit(pipeline, "convert", output=tmp_path / "out.pt")


@pytest.mark.parametrize("index", ["[]", "{}", '{"_class_name": "\\u001b[2J"}'])
def test_a_pipeline_without_a_name(pipeline, index):
    (pipeline / "model_index.json").write_text(index)
    with mc.open(pipeline) as ckpt:
        assert ckpt.origin is not None
        assert ckpt.origin.label == "pipeline of 2 models"


def test_an_index_of_a_pipeline_that_is_none(pipeline):
    (pipeline / "model_index.json").write_text("{")
    with pytest.raises(UnreadableError, match="no JSON"):
        mc.open(pipeline)


def test_a_run_lists_its_checkpoints_the_newest_last(tmp_path):
    for n in (500, 1500, 1000):
        training(tmp_path / "run" / f"checkpoint-{n}", n)
    (tmp_path / "run" / "logs").mkdir()
    with pytest.raises(SeveralError, match="checkpoint-500, checkpoint-1000, checkpoint-1500") as e:
        mc.open(tmp_path / "run")
    assert [Path(one).name for one in e.value.found][-1] == "checkpoint-1500"
    assert f"the newest: {tmp_path}/run/checkpoint-1500" in (e.value.hint or "")


def test_latest_says_which_is_the_newest(tmp_path):
    for n in (1, 2):
        torch.save({"w": torch.ones(n)}, tmp_path / f"ep-{n}.pt")
    (tmp_path / "latest").write_text("ep-1.pt\n")
    with pytest.raises(SeveralError) as e:
        mc.open(tmp_path)
    assert [os.path.basename(one) for one in e.value.found] == ["ep-2.pt", "ep-1.pt"]


def test_a_folder_of_one_run_is_told(tmp_path):
    training(tmp_path / "run" / "checkpoint-500")
    with pytest.raises(SeveralError, match="checkpoint-500") as e:
        mc.open(tmp_path / "run")
    assert "checkpoint-500" in (e.value.hint or "")


def test_a_link_latest_says_which_is_the_newest_and_is_none_itself(tmp_path):
    for n in (1, 2):
        training(tmp_path / f"checkpoint-{n}", n)
    (tmp_path / "latest").symlink_to("checkpoint-1")
    with pytest.raises(SeveralError) as e:
        mc.open(tmp_path)
    assert [os.path.basename(one) for one in e.value.found] == ["checkpoint-2", "checkpoint-1"]
    (tmp_path / "latest").unlink()
    (tmp_path / "latest").symlink_to("gone")
    with pytest.raises(SeveralError):
        mc.open(tmp_path)


@pytest.mark.parametrize("name", ["model.safetensors", "optimizer.pt"])
def test_an_empty_file_in_it_is_called_empty(tmp_path, name):
    folder = training(tmp_path / "run")
    (folder / name).write_bytes(b"")
    with pytest.raises(UnreadableError, match=rf"{name}: an empty file") as e:
        mc.open(folder)
    assert "do it again" in (e.value.hint or "")
