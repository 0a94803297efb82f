"""Where real frameworks keep model, EMA, optimizer, scheduler and progress."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import modelctl
from modelctl.core.sections import Sections
from modelctl.core.tree import path_text
from modelctl.errors import AmbiguousError, NoMatchError


class Parts:
    """A model, its optimizer and scheduler after a step."""

    def __init__(self) -> None:
        self.net = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4))
        self.optim = torch.optim.AdamW(self.net.parameters(), lr=0.25)
        self.sched = torch.optim.lr_scheduler.ConstantLR(self.optim, 1.0)
        self.net(torch.ones(2, 3)).sum().backward()
        self.optim.step()
        self.sched.step()
        self.model = self.net.state_dict()
        self.optimizer = self.optim.state_dict()
        self.scheduler = self.sched.state_dict()


def imagenet(p: Parts) -> Any:
    return {
        "epoch": 5,
        "arch": "resnet18",
        "state_dict": p.model,
        "best_acc1": torch.tensor(71.5),
        "optimizer": p.optimizer,
        "scheduler": p.scheduler,
    }


def timm(p: Parts) -> Any:
    return {
        "epoch": 5,
        "arch": "vit_tiny",
        "state_dict": p.model,
        "optimizer": p.optimizer,
        "version": 2,
        "args": argparse.Namespace(lr=0.5, epochs=300),
        "amp_scaler": {"scale": 65536.0, "growth_factor": 2.0, "_growth_tracker": 3},
        "state_dict_ema": p.model,
        "metric": 71.5,
    }


def lightning(p: Parts) -> Any:
    return {
        "epoch": 5,
        "global_step": 1200,
        "pytorch-lightning_version": "2.5.0",
        "state_dict": p.model,
        "loops": {"fit_loop": {"state_dict": {}, "epoch_progress": {"current": {"ready": 5}}}},
        "callbacks": {"EarlyStopping": {"best_score": torch.tensor(0.5), "wait_count": 0}},
        "optimizer_states": [p.optimizer],
        "lr_schedulers": [p.scheduler],
        "hyper_parameters": {"width": 3},
    }


def mmengine(p: Parts) -> Any:
    return {
        "meta": {"epoch": 5, "iter": 1200, "cfg": "model = dict()", "seed": 1},
        "state_dict": p.model,
        "message_hub": {"log_scalars": {}, "runtime_info": {"epoch": 4}, "resumed_keys": {}},
        "optimizer": p.optimizer,
        "param_schedulers": [p.scheduler, p.scheduler],
        "ema_state_dict": {"steps": torch.tensor(7)}
        | {f"module.{name}": value for name, value in p.model.items()},
    }


def ultralytics(p: Parts) -> Any:
    return {
        "epoch": 5,
        "best_fitness": 0.5,
        "model": p.net,
        "ema": p.net,
        "updates": 1200,
        "optimizer": p.optimizer,
        "train_args": {"lr0": 0.01, "epochs": 100, "model": "yolo.yaml"},
        "date": "2025-01-01",
        "version": "8.3.0",
    }


def deepspeed(p: Parts) -> Any:
    return {
        "module": p.model,
        "buffer_names": ["1.running_mean", "1.running_var"],
        "optimizer": p.optimizer,
        "param_shapes": [{name: value.shape for name, value in p.model.items()}],
        "frozen_param_shapes": None,
        "shared_params": {},
        "lr_scheduler": p.scheduler,
        "data_sampler": None,
        "global_steps": 1200,
        "global_samples": 9600,
        "dp_world_size": 2,
        "mp_world_size": 1,
        "ds_config": {"optimizer": {"type": "Adam", "params": {"lr": 0.1}}},
        "ds_version": "0.15.0",
    }


def tutorial(p: Parts) -> Any:
    return {
        "epoch": 5,
        "model_state_dict": p.model,
        "optimizer_state_dict": p.optimizer,
        "lr_scheduler_state_dict": p.scheduler,
        "loss": torch.tensor(0.5),
    }


def detectron(p: Parts) -> Any:
    return {
        "model": p.model,
        "optimizer": p.optimizer,
        "scheduler": p.scheduler,
        "iteration": 1200,
    }


def fairseq(p: Parts) -> Any:
    return {
        "args": None,
        "cfg": {"model": {"width": 3}, "optimizer": {"lr": [0.1]}},
        "model": p.model,
        "criterion": None,
        "optimizer_history": [{"num_updates": 1200, "lr_scheduler_state": {"best": None}}],
        "extra_state": {"epoch": 5, "metrics": {}},
        "last_optimizer_state": p.optimizer,
    }


def sb3(p: Parts) -> Any:
    return {
        "pytorch_variables.pth": {"log_ent_coef": torch.zeros(1)},
        "policy.pth": p.model,
        "policy.optimizer.pth": p.optimizer,
        "critic.optimizer.pth": p.optimizer,
    }


def allennlp(p: Parts) -> Any:
    return p.model


# model, ema, optimizers, schedulers, epoch, step, lr
Expected = tuple[str, list[str], list[str], list[str], int | None, int | None]
LAYOUTS: dict[str, tuple[Any, Expected]] = {
    "imagenet": (imagenet, ("state_dict", [], ["optimizer"], ["scheduler"], 5, None)),
    "timm": (timm, ("state_dict", ["state_dict_ema"], ["optimizer"], [], 5, None)),
    "lightning": (
        lightning,
        ("state_dict", [], ["optimizer_states.0"], ["lr_schedulers.0"], 5, 1200),
    ),
    "mmengine": (
        mmengine,
        (
            *("state_dict", ["ema_state_dict"], ["optimizer"]),
            *(["param_schedulers.0", "param_schedulers.1"], 5, 1200),
        ),
    ),
    "ultralytics": (ultralytics, ("model", ["ema"], ["optimizer"], [], 5, None)),
    "deepspeed": (deepspeed, ("module", [], ["optimizer"], ["lr_scheduler"], None, 1200)),
    "tutorial": (
        tutorial,
        (
            *("model_state_dict", [], ["optimizer_state_dict"]),
            *(["lr_scheduler_state_dict"], 5, None),
        ),
    ),
    "detectron": (detectron, ("model", [], ["optimizer"], ["scheduler"], None, 1200)),
    "fairseq": (fairseq, ("model", [], ["last_optimizer_state"], [], 5, 1200)),
    "sb3": (
        sb3,
        ("policy.pth", [], ["policy.optimizer.pth", "critic.optimizer.pth"], [], None, None),
    ),
    "allennlp": (allennlp, ("<root>", [], [], [], None, None)),
}


def sections_of(obj: Any, tmp_path: Path) -> Sections:
    torch.save(obj, tmp_path / "a.pt")
    with modelctl.open(tmp_path / "a.pt") as ckpt:
        return ckpt.sections


@pytest.mark.parametrize("name", LAYOUTS)
def test_layouts(name: str, tmp_path: Path) -> None:
    make, (model, ema, optimizers, schedulers, epoch, step) = LAYOUTS[name]
    parts = Parts()
    found = sections_of(make(parts), tmp_path)
    assert found.certain
    assert path_text(found.model().path) == model
    assert list(found.model().tensors()) == list(parts.model)
    assert [path_text(copy.path) for copy in found.ema] == ema
    assert [path_text(path) for path, _ in found.optimizers] == optimizers
    assert [path_text(path) for path, _ in found.schedulers] == schedulers
    assert (found.epoch and found.epoch[1]) == epoch
    assert (found.step and found.step[1]) == step
    assert set(found.lrs()) == ({0.25} if optimizers else set())
    kind = "state_dict" if model == "<root>" else "training checkpoint"
    assert found.kind == kind


def test_ultralytics_last_keeps_only_its_ema(tmp_path: Path) -> None:
    saved = {**ultralytics(Parts()), "model": None}
    found = sections_of(saved, tmp_path)
    assert path_text(found.model().path) == "ema"


NOT_SURE: dict[str, Any] = {
    "two nets": lambda p: {"netG": p.model, "netD": p.model, "optimizerG": p.optimizer},
    "agents": lambda p: {"actor": p.model, "critic": p.model, "epoch": 3},
    "two files": lambda p: {"encoder.pth": p.model, "decoder.pth": p.model},
    "deep": lambda p: {"parts": {"encoder": p.model, "decoder": p.model}},
}


@pytest.mark.parametrize("name", NOT_SURE)
def test_it_says_when_it_is_not_sure(name: str, tmp_path: Path) -> None:
    found = sections_of(NOT_SURE[name](Parts()), tmp_path)
    assert not found.certain
    assert len(found.models) == 2
    with pytest.raises(AmbiguousError, match="which state_dict is meant") as raised:
        found.model()
    assert "--key" in (raised.value.hint or "")


@pytest.mark.parametrize(
    "obj", [{"epoch": 3}, [], {"losses": [1.0, 2.0]}, "text", {"state": {}, "param_groups": []}]
)
def test_no_model_is_no_guess(obj: Any, tmp_path: Path) -> None:
    found = sections_of(obj, tmp_path)
    assert found.models == ()
    with pytest.raises(NoMatchError, match="no state_dict"):
        found.model()


def test_a_flag_is_no_epoch(tmp_path: Path) -> None:
    found = sections_of({**imagenet(Parts()), "epoch": True, "lr": False, "step": None}, tmp_path)
    assert (found.epoch, found.lr, found.step) == (None, None, None)


def test_a_file_named_by_its_key(tmp_path: Path) -> None:
    torch.save(NOT_SURE["agents"](Parts()), tmp_path / "a.pt")
    with modelctl.open(tmp_path / "a.pt", key="critic") as ckpt:
        assert ckpt.sections.model().path == ("critic",)
    with pytest.raises(NoMatchError, match="no state_dict at 'critics'") as raised:
        modelctl.open(tmp_path / "a.pt", key="critics")
    assert "critic" in (raised.value.hint or "")
