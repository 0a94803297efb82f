"""Formats of folders, by the suite that every format passes (:mod:`modelctl.testing`)."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from safetensors.torch import load_file, save_file
from torch.distributed.checkpoint.format_utils import dcp_to_torch_save

from modelctl.testing import FormatSuite, Sample

from ..test_conformance import weights


class TestDistributedCheckpoint(FormatSuite):
    name, label, kind = "dcp", "DCP, 1 file", "training checkpoint"
    writable = "dcp"

    def make(self, folder: Path, width: int) -> Sample:
        model, momentum = weights(width), torch.randn(3)
        saved = {
            "model": model,
            "optimizer": {
                "state": {"fc.bias": {"momentum_buffer": momentum}},
                "param_groups": [{"lr": 0.1, "params": ["fc.bias"]}],
            },
            "epoch": 3,
        }
        dcp.save(saved, checkpoint_id=str(folder / "a"))
        tensors = {f"model.{name}": tensor for name, tensor in model.items()}
        tensors["optimizer.state.fc.bias.momentum_buffer"] = momentum
        return Sample(folder / "a", tensors, model)

    def official(self, path: Path) -> dict[str, torch.Tensor]:
        out = path.parent / "official.pt"
        dcp_to_torch_save(str(path), out)
        loaded: dict[str, Any] = torch.load(out, weights_only=False)
        found = {f"model.{name}": tensor for name, tensor in loaded["model"].items()}
        moment = loaded["optimizer"]["state"]["fc.bias"]["momentum_buffer"]
        return {**found, "optimizer.state.fc.bias.momentum_buffer": moment}


class TestTrainingFolder(FormatSuite):
    """As transformers' Trainer writes one."""

    name, label, kind = "folder", "training folder: safetensors, torch zip", "training checkpoint"
    writable = "folder"

    def make(self, folder: Path, width: int) -> Sample:
        model, momentum = weights(width), torch.randn(3)
        where = folder / "checkpoint-3"
        where.mkdir()
        save_file(model, where / "model.safetensors", {"format": "pt"})
        optimizer = {
            "state": {0: {"momentum_buffer": momentum}},
            "param_groups": [{"lr": 0.1, "params": [0]}],
        }
        torch.save(optimizer, where / "optimizer.pt")
        (where / "trainer_state.json").write_text(json.dumps({"global_step": 3, "epoch": 1.0}))
        model = {name: model[name] for name in load_file(where / "model.safetensors")}
        tensors = {f"model.{name}": tensor for name, tensor in model.items()}
        tensors["optimizer.state.0.momentum_buffer"] = momentum
        return Sample(where, tensors, model)

    def official(self, path: Path) -> dict[str, torch.Tensor]:
        model = load_file(path / "model.safetensors")
        moment = torch.load(path / "optimizer.pt", weights_only=True)["state"][0]
        return {
            **{f"model.{name}": tensor for name, tensor in model.items()},
            "optimizer.state.0.momentum_buffer": moment["momentum_buffer"],
        }
