"""How far a training got, in the layouts that popular training scripts write."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

import modelctl as mc
import modelctl.nn as mnn
from modelctl.inspection.overview import Overview, Seen

MODEL = {"a.weight": torch.zeros(3, 2), "a.bias": torch.zeros(3)}


def optimizer() -> dict[str, Any]:
    params = [t.clone().requires_grad_() for t in MODEL.values()]
    made = torch.optim.AdamW(params, lr=3e-4)
    for param in params:
        param.grad = torch.zeros_like(param)
    made.step()
    return made.state_dict()


# Each as its library writes it, and what people ask it for: epoch, step, lr, the best so far.
LAYOUTS: dict[str, tuple[dict[str, Any], tuple[Any, Any, list[float], Any]]] = {
    "nanoGPT": (
        {
            "model": MODEL,
            "optimizer": optimizer(),
            "model_args": {"n_layer": 12, "n_head": 12, "vocab_size": 50304, "dropout": 0.0},
            "iter_num": 2000,
            "best_val_loss": torch.tensor(1.4697),
            "config": {"learning_rate": 1e-3, "max_iters": 5000},
        },
        (None, 2000, [3e-4], ("best_val_loss", 1.4697)),
    ),
    "timm": (
        {
            "epoch": 12,
            "arch": "resnet50",
            "state_dict": MODEL,
            "optimizer": optimizer(),
            "version": 2,
            "metric": 78.31,
        },
        (12, None, [3e-4], ("metric", 78.31)),
    ),
    "torchvision": (
        {"model": MODEL, "optimizer": optimizer(), "epoch": 3, "best_acc1": torch.tensor([69.5])},
        (3, None, [3e-4], ("best_acc1", 69.5)),
    ),
    "mmdet": (
        {
            "meta": {"epoch": 12, "iter": 87960, "mmdet_version": "2.25", "best_score": 0.374},
            "state_dict": MODEL,
            "optimizer": optimizer(),
        },
        (12, 87960, [3e-4], ("best_score", 0.374)),
    ),
    "ultralytics": (
        {
            "epoch": 41,
            "best_fitness": 0.3746,
            "model": MODEL,
            "ema": None,
            "updates": 900,
            "optimizer": optimizer(),
            "train_args": {"lr0": 0.01, "epochs": 100},
        },
        (41, None, [3e-4], ("best_fitness", 0.3746)),
    ),
    "fairseq": (
        {
            "args": None,
            "model": MODEL,
            "optimizer_history": [
                {"optimizer_name": "FairseqAdam", "num_updates": 500},
                {"optimizer_name": "FairseqAdam", "num_updates": 1200},
            ],
            "extra_state": {
                "train_iterator": {"epoch": 3, "iterations_in_epoch": 200, "shuffle": True},
                "val_loss": 4.1,
                "best": 4.05,
            },
            "last_optimizer_state": optimizer(),
        },
        (3, 1200, [3e-4], ("best", 4.05)),
    ),
    "detectron2": (
        {
            "model": MODEL,
            "optimizer": optimizer(),
            "iteration": 89999,
            "scheduler": {"last_epoch": 90000, "_last_lr": [2e-5], "base_lrs": [2e-2]},
        },
        (None, 89999, [3e-4], None),
    ),
    "Lightning": (
        {
            "epoch": 12,
            "global_step": 48750,
            "state_dict": MODEL,
            "optimizer_states": [optimizer()],
            "callbacks": {
                "EarlyStopping": {"wait_count": 0, "best_score": torch.tensor(0.3)},
                "ModelCheckpoint{'monitor': 'val_loss'}": {
                    "monitor": "val_loss",
                    "best_model_score": torch.tensor(0.2817),
                },
            },
        },
        (12, 48750, [3e-4], ("best val_loss", 0.2817)),
    ),
    "Trainer": (
        {
            "model": MODEL,
            "optimizer": optimizer(),
            "trainer_state": {
                "epoch": 0.5,
                "global_step": 20,
                "best_metric": 0.25,
                "log_history": [{"loss": 3.5, "step": 10}, {"loss": 2.5}, {"eval_loss": 0.25}],
            },
        },
        (0.5, 20, [3e-4], ("best_metric", 0.25)),
    ),
    "whisper": ({"dims": {"n_mels": 80}, "model_state_dict": MODEL}, None),
    "SAM": (MODEL, None),
}


@pytest.mark.parametrize("name", LAYOUTS)
def test_what_people_ask_for(name: str, tmp_path: Path) -> None:
    layout, asked = LAYOUTS[name]
    torch.save(layout, tmp_path / "c.pt")
    with mc.open(tmp_path / "c.pt") as ckpt:
        report = mc.summary(ckpt)
        shown = str(mc.show(ckpt))
    said = report.as_dict()["training"]
    if asked is None:
        assert said is None
        return
    epoch, step, lr, best = asked
    assert (said["epoch"], said["step"], said["lr"]) == (epoch, step, lr)
    if best is None:
        assert said["best"] is None
    else:
        assert said["best"]["name"] == best[0]
        assert said["best"]["value"] == pytest.approx(best[1])
        assert f" · {best[0]} {best[1]:g}" in str(report)
    assert said["loss"] == (2.5 if name == "Trainer" else None)
    if name == "Trainer":
        assert "epoch 0.5 · step 20 · best_metric 0.25 · loss 2.5" in str(report)
    if name == "nanoGPT":
        assert "n_layer" in shown
        assert "50304" in shown


@pytest.mark.parametrize(
    "value", [float("nan"), True, "0.3", None, [0.3], torch.zeros(2), {"a": 1.0}]
)
def test_what_is_no_number_is_no_best(value: Any, tmp_path: Path) -> None:
    torch.save({"model": MODEL, "epoch": 3, "best_loss": value, "best_epoch": 2}, tmp_path / "c.pt")
    with mc.open(tmp_path / "c.pt") as ckpt:
        best = mc.summary(ckpt).as_dict()["training"]["best"]
    assert best is None


@pytest.mark.parametrize(("noted", "finished"), [(0.5, 0), (1.0, 1), (2.75, 2)])
def test_an_epoch_that_is_not_finished(noted: float, finished: int, tmp_path: Path) -> None:
    """The panel shows how far it got, a resumed training goes on with the epoch it was in."""
    net = torch.nn.Linear(2, 3)
    state = {"epoch": noted, "global_step": 7}
    torch.save({"model": net.state_dict(), "trainer_state": state}, tmp_path / "c.pt")
    with mc.open(tmp_path / "c.pt") as ckpt:
        said = mc.summary(ckpt).as_dict()["training"]
    assert said["epoch"] == noted
    assert isinstance(said["epoch"], int) == noted.is_integer()
    assert mnn.resume(tmp_path / "c.pt", model=net).epoch == finished


def test_a_run_has_a_row_each(tmp_path: Path) -> None:
    """Epoch, best metric and loss of each checkpoint; what none has recorded is empty."""
    for i, loss in enumerate((3.5, 2.5, None)):
        log = [{"loss": loss}] if loss else []
        state = {"epoch": i / 2, "best_metric": loss and loss / 2, "log_history": log}
        torch.save({"model": MODEL, "trainer_state": state}, tmp_path / f"c{i}.pt")
    seen = [Seen(p.name, mc.summary(p)) for p in sorted(tmp_path.iterdir())]
    table = Overview(seen).page().data
    assert table is not None
    names = [column.name for column in table.columns]
    rows = [dict(zip(names, row, strict=True)) for row in table.rows]
    assert [(row["epoch"], row["best"], row["loss"]) for row in rows] == [
        (0, 1.75, 3.5),
        (0.5, 1.25, 2.5),
        (1, None, None),
    ]
