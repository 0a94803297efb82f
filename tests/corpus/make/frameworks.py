"""What frameworks save by themselves."""

from __future__ import annotations

import json
import os
import warnings
from pathlib import Path
from typing import Any

import torch
from torch import optim

from ..made import Tensors, makes, official
from ..nets import ResNet, images, train


@makes("training checkpoint", needs="lightning", plain=False)
def lightning_trainer(folder: Path) -> Path:
    import lightning

    class Lit(lightning.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.save_hyperparameters({"width": 4})
            self.net = ResNet()

        def training_step(self, batch: Any, _: int) -> torch.Tensor:
            return self.net(batch[0]).square().mean()

        def configure_optimizers(self) -> Any:
            optimizer = optim.AdamW(self.parameters(), lr=0.1)
            return [optimizer], [optim.lr_scheduler.StepLR(optimizer, 1)]

    data = torch.utils.data.TensorDataset(images())
    quiet = ("logger", "enable_checkpointing", "enable_progress_bar", "enable_model_summary")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        trainer = lightning.Trainer(max_steps=1, accelerator="cpu", **dict.fromkeys(quiet, False))
        trainer.fit(Lit(), torch.utils.data.DataLoader(data, batch_size=2))
        trainer.save_checkpoint(folder / "run.ckpt")
    return folder / "run.ckpt"


@makes("training checkpoint", needs="timm", plain=False)
def timm_saver(folder: Path) -> Path:
    import argparse

    from timm.utils import CheckpointSaver, ModelEmaV2

    net = ResNet()
    optimizer = optim.SGD(net.parameters(), lr=0.1, momentum=0.9)
    train(net, optimizer, images())
    saver = CheckpointSaver(
        net,
        optimizer,
        args=argparse.Namespace(model="resnet"),
        model_ema=ModelEmaV2(net),
        checkpoint_dir=str(folder),
        recovery_dir=str(folder),
    )
    saver.save_checkpoint(3, metric=0.5)
    return folder / "last.pth.tar"


def accelerated(folder: Path) -> Path:
    from accelerate import Accelerator

    net = ResNet()
    optimizer = optim.Adam(net.parameters())
    scheduler = optim.lr_scheduler.StepLR(optimizer, 1)
    accelerator = Accelerator(cpu=True)
    net, optimizer, scheduler = accelerator.prepare(net, optimizer, scheduler)
    train(net, optimizer, images())
    accelerator.save_state(str(folder))
    return folder


@makes("state_dict", needs="accelerate", plain=False)
def accelerate_model(folder: Path) -> Path:
    return accelerated(folder) / "model.safetensors"


@makes("optimizer", needs="accelerate")
def accelerate_optimizer(folder: Path) -> Path:
    return accelerated(folder) / "optimizer.bin"


def parts(index: Path) -> Tensors:
    """The tensors of all shards, in the order of the index."""
    names = json.loads(index.read_text())["weight_map"]
    found = {shard: dict(official(index.parent / shard)) for shard in set(names.values())}
    return [(name, found[shard][name]) for name, shard in names.items()]


@makes("state_dict", needs="huggingface_hub", plain=False, reads=parts)
def hub_shards(folder: Path) -> Path:
    from huggingface_hub import save_torch_state_dict

    save_torch_state_dict(ResNet().state_dict(), folder, max_shard_size=2000)
    return folder / "model.safetensors.index.json"


@makes("state_dict", needs="huggingface_hub", plain=False, reads=parts)
def hub_shards_of_pickles(folder: Path) -> Path:
    from huggingface_hub import save_torch_state_dict

    save_torch_state_dict(
        ResNet().state_dict(), folder, max_shard_size=2000, safe_serialization=False
    )
    return folder / "pytorch_model.bin.index.json"


@makes("state_dict", needs="transformers", plain=False)
def transformers_pretrained(folder: Path) -> Path:
    transformers(folder).save_pretrained(folder)
    return folder / "model.safetensors"


def transformers(folder: Path) -> Any:
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    from transformers import BertConfig, BertForSequenceClassification

    config = BertConfig(
        vocab_size=20,
        hidden_size=8,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=16,
        max_position_embeddings=12,
    )
    return BertForSequenceClassification(config)


def trained(folder: Path) -> Path:
    """A step of the Trainer, and its folder ``checkpoint-1``."""
    from transformers import Trainer, TrainingArguments

    batch = [{"input_ids": torch.arange(6), "labels": torch.tensor(i)} for i in (0, 1)]
    arguments = TrainingArguments(
        output_dir=str(folder),
        max_steps=1,
        save_steps=1,
        per_device_train_batch_size=2,
        use_cpu=True,
        report_to=[],
        disable_tqdm=True,
    )
    Trainer(transformers(folder), arguments, train_dataset=batch).train()
    return folder / "checkpoint-1"


@makes("optimizer", needs="transformers")
def trainer_optimizer(folder: Path) -> Path:
    return trained(folder) / "optimizer.pt"


@makes("object", needs="transformers", plain=False)
def trainer_rng(folder: Path) -> Path:
    return trained(folder) / "rng_state.pth"
