"""Trainings of transformers' Trainer and of accelerate, edited halfway: each later step is as it
would have been."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

import modelctl as mc

transformers = pytest.importorskip("transformers")
accelerate = pytest.importorskip("accelerate")

# A prefix and back, and names that are others on the way: the folder is written three times.
THERE_AND_BACK: list[list[dict[str, Any]]] = [
    [{"do": "add-prefix", "prefix": "net."}],
    [{"do": "rename", "map": "net.model=net.trunk"}],
    [{"do": "rename", "map": "net.trunk=net.model"}, {"do": "strip-prefix", "prefix": "net."}],
]


def llama() -> Any:
    torch.manual_seed(0)
    return transformers.LlamaForCausalLM(
        transformers.LlamaConfig(
            hidden_size=8,
            intermediate_size=12,
            num_hidden_layers=3,
            num_attention_heads=2,
            vocab_size=16,
            max_position_embeddings=16,
        )
    )


BATCHES = [{"input_ids": torch.arange(6) + i, "labels": torch.arange(6) + i} for i in range(8)]


def edited(folder: Path, tmp_path: Path) -> Path:
    for i, edits in enumerate(THERE_AND_BACK):
        out = tmp_path / f"edited-{i}" / folder.name
        mc.edit(folder, edits, output=f"{out}/")
        folder = out
    return folder


def trainer(folder: Path) -> Any:
    arguments = transformers.TrainingArguments(
        output_dir=str(folder),
        max_steps=4,
        save_steps=2,
        logging_steps=1,
        per_device_train_batch_size=2,
        weight_decay=0.1,
        learning_rate=0.01,
        use_cpu=True,
        report_to=[],
        disable_tqdm=True,
    )
    return transformers.Trainer(llama(), arguments, train_dataset=BATCHES)


def losses(one: Any) -> list[float]:
    return [entry["loss"] for entry in one.state.log_history if "loss" in entry]


def test_the_trainer_goes_on_step_by_step(tmp_path: Path) -> None:
    whole = trainer(tmp_path / "whole")
    whole.train()
    half = edited(tmp_path / "whole" / "checkpoint-2", tmp_path)
    resumed = trainer(tmp_path / "resumed")
    resumed.train(resume_from_checkpoint=str(half))
    assert len(losses(whole)) == 4
    assert losses(resumed) == losses(whole)
    for (name, mine), (_, other) in zip(
        resumed.model.named_parameters(), whole.model.named_parameters(), strict=True
    ):
        assert torch.equal(mine, other), name


def test_moments_go_with_their_parameters(tmp_path: Path) -> None:
    """Against the order of the live model, which the sorted file does not have."""
    one = trainer(tmp_path / "run")
    one.train()
    saved = tmp_path / "run" / "checkpoint-4"
    mc.edit(saved, {"do": "drop", "pattern": "model.layers.1"}, output=f"{tmp_path}/out/")
    decay = set(one.get_decay_parameter_names(one.model))
    names = [name for name, _ in one.model.named_parameters()]
    order = [n for n in names if n in decay] + [n for n in names if n not in decay]
    kept = [name for name in order if not name.startswith("model.layers.1.")]
    before = torch.load(saved / "optimizer.pt", weights_only=True)["state"]
    after = torch.load(tmp_path / "out" / "optimizer.pt", weights_only=True)["state"]
    assert len(after) == len(kept) < len(before) == len(order)
    for i, name in enumerate(kept):
        for key, value in after[i].items():
            assert torch.equal(value, before[order.index(name)][key]), name


def test_its_summary(tmp_path: Path) -> None:
    one = trainer(tmp_path / "run")
    one.train()
    with mc.open(tmp_path / "run" / "checkpoint-2") as ckpt:
        training = mc.summarize(ckpt).training
    assert training is not None
    assert (training.epoch, training.step) == (0.5, 2)
    assert training.loss == losses(one)[1]
    assert training.text.startswith(f"epoch 0.5 · step 2 · loss {training.loss:g}")


def test_accelerate_goes_on(tmp_path: Path) -> None:
    def start() -> tuple[Any, Any, Any]:
        one = accelerate.Accelerator(cpu=True)
        model = llama()
        optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
        return one, *one.prepare(model, optimizer)

    def steps(model: Any, optimizer: Any, which: range) -> list[torch.Tensor]:
        found = []
        for i in which:
            optimizer.zero_grad()
            batch = BATCHES[i]["input_ids"][None]
            loss = model(input_ids=batch, labels=batch).loss
            loss.backward()
            optimizer.step()
            found.append(loss.detach())
        return found

    one, model, optimizer = start()
    steps(model, optimizer, range(2))
    one.save_state(str(tmp_path / "half"))
    expected = steps(model, optimizer, range(2, 4))
    half = edited(tmp_path / "half", tmp_path)
    mc.edit(half, {"do": "drop", "pattern": "lm_head"}, output=f"{tmp_path}/cut/")
    held = torch.load(half / "optimizer.bin", weights_only=True)["state"]
    cut = torch.load(tmp_path / "cut" / "optimizer.bin", weights_only=True)["state"]
    assert len(cut) == len(held) - 1
    assert all(torch.equal(cut[i]["exp_avg"], held[i]["exp_avg"]) for i in cut)  # it was the last
    shutil.rmtree(tmp_path / "cut")
    other, model, optimizer = start()
    other.load_state(str(half))
    assert steps(model, optimizer, range(2, 4)) == expected


def test_lightning_goes_on(tmp_path: Path) -> None:
    lightning = pytest.importorskip("lightning")

    class Module(lightning.LightningModule):  # type: ignore[name-defined, misc]
        def __init__(self) -> None:
            super().__init__()
            self.net = llama()
            self.losses: list[torch.Tensor] = []

        def training_step(self, batch: torch.Tensor, index: int) -> torch.Tensor:
            loss = self.net(input_ids=batch, labels=batch).loss
            self.losses.append(loss.detach())
            return loss

        def configure_optimizers(self) -> torch.optim.Optimizer:
            return torch.optim.AdamW(self.parameters(), lr=0.01)

    def fit(steps: int, start: Path | None = None) -> tuple[Any, Any]:
        module = Module()
        quiet = dict.fromkeys(
            ("logger", "enable_checkpointing", "enable_progress_bar", "enable_model_summary"), False
        )
        run = lightning.Trainer(
            max_epochs=steps, accelerator="cpu", default_root_dir=tmp_path, **quiet
        )
        batches = torch.stack([one["input_ids"] for one in BATCHES])
        run.fit(module, torch.utils.data.DataLoader(batches, 8), ckpt_path=start)
        return run, module

    _, whole = fit(4)
    run, _ = fit(2)
    run.save_checkpoint(tmp_path / "half.ckpt")
    edits: list[dict[str, Any]] = [
        {"do": "strip-prefix", "prefix": "net."},
        {"do": "add-prefix", "prefix": "net."},
    ]
    mc.edit(tmp_path / "half.ckpt", edits, output=tmp_path / "edited.ckpt")
    _, resumed = fit(4, tmp_path / "edited.ckpt")
    assert len(resumed.losses) == 2
    assert resumed.losses == whole.losses[2:]
