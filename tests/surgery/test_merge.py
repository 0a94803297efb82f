"""merge: separately saved parts become one checkpoint that really resumes."""

from __future__ import annotations

import re
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import modelctl as mc
import modelctl.nn as mnn
from modelctl.errors import (
    AmbiguousError,
    CollisionError,
    ModelctlError,
    NoMatchError,
    RefusedError,
    UsageError,
)

from .nets import Net, load, opened, same_tensors, train


class Trained:
    def __init__(self, groups: int = 1) -> None:
        torch.manual_seed(1)
        self.net = Net()
        pairs = list(self.net.parameters())
        split = [pairs] if groups == 1 else [pairs[:4], pairs[4:]]
        self.optimizer = torch.optim.AdamW([{"params": part} for part in split], lr=0.1)
        self.scheduler = torch.optim.lr_scheduler.StepLR(self.optimizer, 2)
        train(self.net, self.optimizer, range(2))
        self.scheduler.step()

    def parts(self) -> dict[str, Any]:
        return {
            "model": self.net.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "scheduler": self.scheduler.state_dict(),
        }


@pytest.fixture
def trained() -> Trained:
    return Trained()


def merged(tmp_path: Path, files: dict[str, Any], **numbers: Any) -> Any:
    with ExitStack() as stack:
        parts = {
            name: stack.enter_context(opened(tmp_path / f"{name}.pt", obj))
            for name, obj in files.items()
        }
        return load(mc.merge(**parts, **numbers), tmp_path / "out.pt")


def test_it_resumes(tmp_path: Path, trained: Trained) -> None:
    out = merged(tmp_path, trained.parts(), epoch=3, step=40)
    assert list(out) == ["model", "optimizer", "scheduler", "epoch", "step"]
    assert (out["epoch"], out["step"]) == (3, 40)
    again = Trained()
    again.net.load_state_dict(out["model"])
    again.optimizer.load_state_dict(out["optimizer"])
    again.scheduler.load_state_dict(out["scheduler"])
    train(trained.net, trained.optimizer, range(5, 8))
    train(again.net, again.optimizer, range(5, 8))
    same_tensors(again.net.state_dict(), trained.net.state_dict())
    assert again.scheduler.last_epoch == 1


def test_only_a_model(tmp_path: Path, trained: Trained) -> None:
    out = merged(tmp_path, {"model": trained.net.state_dict()}, epoch=0)
    assert list(out) == ["model", "epoch"]
    assert out["model"]._metadata["bn1"] == {"version": 2}


def test_parts_are_found_in_whole_checkpoints(tmp_path: Path, trained: Trained) -> None:
    ema = {key: value + 1 for key, value in trained.net.state_dict().items()}
    whole = {"state_dict": trained.net.state_dict(), "state_dict_ema": ema, **trained.parts()}
    del whole["model"]
    files = {
        "model": trained.net.state_dict(),
        "optimizer": whole,
        "scheduler": whole,
        "ema": whole,
    }
    out = merged(tmp_path, files)
    assert list(out) == ["model", "optimizer", "scheduler", "ema"]
    same_tensors(out["ema"], ema)
    files["ema"] = ema
    same_tensors(merged(tmp_path, files)["ema"], ema)


EXAMPLE = {"epoch": 1, "arch": "net", "state_dict": None, "best_acc1": 0.5, "optimizer": None}
LIGHTNING = {
    "epoch": 1,
    "global_step": 9,
    "pytorch-lightning_version": "2.4",
    "state_dict": None,
    "optimizer_states": [None],
    "lr_schedulers": [None],
}


def filled(layout: dict[str, Any], trained: Trained) -> dict[str, Any]:
    parts = trained.parts()
    found = dict(layout)
    for key, part in (
        *(("state_dict", "model"), ("model_state_dict", "model"), ("optimizer", "optimizer")),
        *(("scheduler", "scheduler"), ("optimizer_state_dict", "optimizer")),
    ):
        if key in found:
            found[key] = parts[part]
    for key, part in (("optimizer_states", "optimizer"), ("lr_schedulers", "scheduler")):
        if key in found:
            found[key] = [parts[part]]
    return found


@pytest.mark.parametrize("layout", [EXAMPLE, LIGHTNING], ids=["example", "lightning"])
def test_like(tmp_path: Path, trained: Trained, layout: dict[str, Any]) -> None:
    like = filled(layout, trained)
    out = merged(tmp_path, {**trained.parts(), "like": like}, epoch=7, step=70)
    same_tensors(out["state_dict"], trained.net.state_dict())
    assert out["epoch"] == 7
    if layout is LIGHTNING:
        assert out["global_step"] == 70
        optimizer, scheduler = out["optimizer_states"][0], out["lr_schedulers"][0]
        assert "optimizer" not in out
    else:
        optimizer, scheduler = out["optimizer"], out["scheduler"]
    again = Trained()
    again.optimizer.load_state_dict(optimizer)
    assert scheduler["last_epoch"] == 1
    assert not {"model", "arch", "pytorch-lightning_version"} & set(out)


def test_updating_a_checkpoint_keeps_its_layout_and_all_else(
    tmp_path: Path, trained: Trained
) -> None:
    saved = {**filled(EXAMPLE, trained), "args": {"lr": 5}}
    out = merged(tmp_path, {"model": saved}, epoch=12, set={"best_acc1": 0.75, "note": "x"})
    assert list(out) == [*saved, "note"]
    assert (out["epoch"], out["best_acc1"], out["arch"], out["args"]) == (
        12,
        0.75,
        "net",
        {"lr": 5},
    )
    assert len(out["optimizer"]["state"]) == 9


def test_updating_a_checkpoint_into_another_layout_loses_nothing(
    tmp_path: Path, trained: Trained
) -> None:
    saved = {**filled(EXAMPLE, trained), "args": {"lr": 5}}
    out = merged(tmp_path, {"model": saved, "like": filled(LIGHTNING, trained)}, step=5)
    assert len(out["optimizer_states"][0]["state"]) == 9
    assert (out["epoch"], out["global_step"], out["best_acc1"]) == (1, 5, 0.5)
    assert out["args"] == {"lr": 5}
    assert not {"optimizer", "model"} & set(out)
    clash = {"model": trained.net.state_dict(), "epoch": 1, "state_dict": "why not"}
    with pytest.raises(CollisionError, match="'state_dict'"):
        merged(tmp_path, {"model": clash, "like": filled(EXAMPLE, trained)})
    two = {"model": trained.net.state_dict(), "optimizers": [trained.optimizer.state_dict()] * 2}
    with pytest.raises(AmbiguousError):
        merged(tmp_path, {"model": two, "like": filled(EXAMPLE, trained)})


def test_lr_goes_everywhere(tmp_path: Path) -> None:
    trained = Trained(groups=2)
    out = merged(tmp_path, trained.parts(), lr=0.025)
    assert out["lr"] == 0.025
    assert [group["lr"] for group in out["optimizer"]["param_groups"]] == [0.025, 0.025]
    assert [group["initial_lr"] for group in out["optimizer"]["param_groups"]] == [0.025, 0.025]
    assert out["scheduler"]["base_lrs"] == [0.025, 0.025]
    assert out["scheduler"]["_last_lr"] == [0.025, 0.025]
    again = Trained(groups=2)
    again.optimizer.load_state_dict(out["optimizer"])
    again.scheduler.load_state_dict(out["scheduler"])
    again.scheduler.step()  # epoch 2 of StepLR(2): a tenth of the new lr
    assert again.optimizer.param_groups[0]["lr"] == pytest.approx(0.0025)


@pytest.mark.parametrize("chained", [False, True])
def test_lr_goes_into_chained_schedulers(tmp_path: Path, trained: Trained, chained: bool) -> None:
    kinds = torch.optim.lr_scheduler
    optimizer = torch.optim.SGD(trained.net.parameters(), lr=0.1, momentum=0.9)
    inner: list[Any] = [kinds.LinearLR(optimizer), kinds.CosineAnnealingLR(optimizer, 9)]
    made = kinds.ChainedScheduler(inner) if chained else kinds.SequentialLR(optimizer, inner, [3])
    parts = {
        "model": trained.net.state_dict(),
        "optimizer": optimizer.state_dict(),
        "scheduler": made.state_dict(),
    }
    out = merged(tmp_path, parts, lr=0.5)
    now = optimizer.param_groups[0]["lr"]
    assert now != 0.1
    assert out["scheduler"]["_last_lr"] == [0.5]
    for state in out["scheduler"]["_schedulers"]:
        assert state["base_lrs"] == [pytest.approx(0.1 * 0.5 / now)]
    made.load_state_dict(out["scheduler"])


LR = torch.optim.lr_scheduler
SCHEDULES: dict[str, Callable[[Any], Any]] = {
    "LambdaLR": lambda o: LR.LambdaLR(o, lambda t: 1 - t / 20),
    "MultiplicativeLR": lambda o: LR.MultiplicativeLR(o, lambda t: 0.9),
    "StepLR": lambda o: LR.StepLR(o, 4),
    "MultiStepLR": lambda o: LR.MultiStepLR(o, [4, 12]),
    "ConstantLR": lambda o: LR.ConstantLR(o, 0.5, 12),
    "LinearLR": lambda o: LR.LinearLR(o, 0.5, 1.0, 12),
    "ExponentialLR": lambda o: LR.ExponentialLR(o, 0.9),
    "PolynomialLR": lambda o: LR.PolynomialLR(o, 20, 2.0),
    "warmup_cosine": lambda o: mnn.warmup_cosine(o, 2, 20),
    "warmup_cosine, min_lr": lambda o: mnn.warmup_cosine(o, 2, 20, min_lr=0.01),
    "warmup_cosine, warming up": lambda o: mnn.warmup_cosine(o, 14, 20),
    "CosineAnnealingWarmRestarts": lambda o: LR.CosineAnnealingWarmRestarts(o, 12, eta_min=0.01),
    "CosineAnnealingLR": lambda o: LR.CosineAnnealingLR(o, 20, eta_min=0.01),
    "CyclicLR": lambda o: LR.CyclicLR(o, 0.01, 0.1, step_size_up=6),
    "OneCycleLR": lambda o: LR.OneCycleLR(o, max_lr=0.1, total_steps=20),
    "ReduceLROnPlateau": lambda o: LR.ReduceLROnPlateau(o, patience=3, min_lr=0.002),
    "SequentialLR": lambda o: LR.SequentialLR(
        o, [LR.LinearLR(o, 0.1, 1.0, 4), LR.StepLR(o, 3), LR.ExponentialLR(o, 0.5)], [4, 12]
    ),
    "ChainedScheduler": lambda o: LR.ChainedScheduler(
        [LR.ConstantLR(o, 0.5, 12), LR.ExponentialLR(o, 0.9)], optimizer=o
    ),
    "SWALR": lambda o: torch.optim.swa_utils.SWALR(o, 0.05, anneal_epochs=15),
}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", SCHEDULES)
def test_a_schedule_goes_on_from_another_lr(name: str, tmp_path: Path) -> None:
    """A third of the present lr: each later one is a third of what it would be."""

    def parts() -> tuple[Any, Any, Any]:
        net = Net()
        optimizer = torch.optim.SGD(net.parameters(), lr=0.1, momentum=0.9)
        return net, optimizer, SCHEDULES[name](optimizer)

    def step(optimizer: Any, scheduler: Any) -> float:
        optimizer.step()
        scheduler.step(*([1.0] if name == "ReduceLROnPlateau" else []))
        return float(optimizer.param_groups[0]["lr"])

    net, optimizer, scheduler = parts()
    lrs = [step(optimizer, scheduler) for _ in range(10)]
    saved = {
        "model": net.state_dict(),
        "optimizer": optimizer.state_dict(),
        "scheduler": scheduler.state_dict(),
    }
    if any(callable(value) for value in saved["scheduler"].values()):
        pytest.skip("this torch saves a function with it, which is not written out again")
    with opened(tmp_path / "in.pt", saved) as ckpt:
        mc.save(mc.merge(model=ckpt, lr=lrs[-1] / 3), tmp_path / "out.pt")
    other, made, goes_on = parts()
    found = torch.load(tmp_path / "out.pt", weights_only=True)
    other.load_state_dict(found["model"])
    made.load_state_dict(found["optimizer"])
    goes_on.load_state_dict(found["scheduler"])
    assert made.param_groups[0]["lr"] == pytest.approx(lrs[-1] / 3)
    for _ in range(8):
        assert step(made, goes_on) == pytest.approx(step(optimizer, scheduler) / 3, rel=1e-6)


def test_a_schedule_that_can_t_be_scaled_is_refused(tmp_path: Path, trained: Trained) -> None:
    def refused(optimizer: Any, scheduler: Any, match: str) -> None:
        saved = {
            "model": trained.net.state_dict(),
            "optimizer": optimizer.state_dict(),
            "scheduler": scheduler.state_dict(),
        }
        with opened(tmp_path / "in.pt", saved) as ckpt, pytest.raises(RefusedError, match=match):
            mc.merge(model=ckpt, lr=0.5)

    optimizer = torch.optim.SGD(trained.net.parameters(), lr=0.1)
    refused(optimizer, LR.LambdaLR(optimizer, lambda t: 0.0), "'optimizer': the lr is 0 at this")
    groups = [{"params": [p], "lr": 0.1 * (i + 1)} for i, p in enumerate(trained.net.parameters())]
    optimizer = torch.optim.SGD(groups, lr=0.1)
    schedule = LR.CosineAnnealingLR(optimizer, 9, eta_min=0.01)
    refused(optimizer, schedule, "'scheduler' has one eta_min for groups of different lrs")
    optimizer = torch.optim.SGD(trained.net.parameters(), lr=0.1)
    schedule = LR.StepLR(optimizer, 2)
    optimizer.param_groups[0]["lr"] = None
    refused(optimizer, schedule, "'optimizer' finds its own lr")


def test_last_epoch_in_a_checkpoint_makes_it_no_scheduler(tmp_path: Path, trained: Trained) -> None:
    saved = {
        "model": trained.net.state_dict(),
        "optimizer": trained.optimizer.state_dict(),
        "last_epoch": 4,
    }
    out = merged(tmp_path, {"model": saved}, lr=0.5, epoch=5)
    assert out["optimizer"]["param_groups"][0]["lr"] == 0.5
    assert out["last_epoch"] == 5
    assert "epoch" not in out
    with opened(tmp_path / "in.pt", saved) as ckpt:
        assert ckpt.sections.schedulers == ()


def test_set(tmp_path: Path, trained: Trained) -> None:
    saved = {"model": trained.net.state_dict(), "hparams": {"wd": 1, "betas": [0.9, 0.99]}, "n": 1}
    values = {
        "hparams.wd": 2,
        "hparams.betas.1": 0.95,
        "hparams.new": None,
        "seed": [1, {"a": "b"}],
    }
    out = merged(tmp_path, {"model": saved}, set=values)
    assert out["hparams"] == {"wd": 2, "betas": [0.9, 0.95], "new": None}
    assert out["seed"] == [1, {"a": "b"}]
    for wrong in ("nothing.x", "n.x", "hparams.betas.2", "hparams.", "", "hparams.betas.x.y"):
        with pytest.raises(UsageError, match="--set"):
            merged(tmp_path, {"model": saved}, set={wrong: 1})
    with pytest.raises(ModelctlError):  # what is set must leave the model where it was
        merged(tmp_path, {"model": saved}, set={"model": 1})


def test_what_does_not_belong_together(tmp_path: Path, trained: Trained) -> None:
    def refused(net: nn.Module, optimizer: torch.optim.Optimizer) -> None:
        train(net, optimizer, range(1))
        files = {"model": trained.net.state_dict(), "optimizer": optimizer.state_dict()}
        with pytest.raises(RefusedError):
            merged(tmp_path, files)

    other = Net(classes=3)
    refused(other, torch.optim.AdamW(other.parameters()))
    refused(other, torch.optim.AdamW(other.named_parameters()))
    backwards = list(trained.net.parameters())[::-1]
    refused(trained.net, torch.optim.AdamW(backwards))
    bigger = nn.Sequential(Net(), nn.Linear(5, 5))
    refused(bigger, torch.optim.AdamW(bigger.parameters()))


def test_doubts_are_said(tmp_path: Path) -> None:
    net = nn.Sequential(*(nn.Linear(2, 2) for _ in range(3)))
    optimizer = torch.optim.AdamW(net[1].parameters())
    train(net[1], optimizer, range(1))
    scheduler = torch.optim.lr_scheduler.StepLR(
        torch.optim.SGD([{"params": [p]} for p in net[0].parameters()], lr=1), 1
    )
    with (
        opened(tmp_path / "m.pt", net.state_dict()) as model,
        opened(tmp_path / "o.pt", optimizer.state_dict()) as opt,
        opened(tmp_path / "s.pt", scheduler.state_dict()) as sched,
    ):
        notes = mc.merge(model=model, optimizer=opt).notes
        with pytest.raises(RefusedError, match="2 base_lrs, the optimizer 1 param_groups"):
            mc.merge(model=model, optimizer=opt, scheduler=sched)
    assert any("ways" in note.text and note.level == "warning" for note in notes)


def test_an_ema_copy_of_another_model(tmp_path: Path) -> None:
    wrapped = {f"module.{name}": value for name, value in Net().state_dict().items()}
    merged(tmp_path, {"model": Net().state_dict(), "ema": wrapped})
    with pytest.raises(RefusedError, match=r"'fc.weight' has the shape \[3, 6\], the model's \[5"):
        merged(tmp_path, {"model": Net().state_dict(), "ema": Net(classes=3).state_dict()})
    with pytest.raises(RefusedError, match="no name is one of the model's"):
        merged(tmp_path, {"model": Net().state_dict(), "ema": nn.Linear(2, 2).state_dict()})


def test_state_that_is_one_for_all_goes_through(tmp_path: Path) -> None:
    net = Net()
    optimizer = torch.optim.LBFGS(net.parameters())
    image = torch.randn(2, 3, 4, 4)

    def closure() -> torch.Tensor:
        optimizer.zero_grad()
        loss = net(image).square().sum()
        loss.backward()
        return loss

    optimizer.step(closure)
    parts = {"model": net.state_dict(), "optimizer": optimizer.state_dict()}
    with (
        opened(tmp_path / "m.pt", parts["model"]) as model,
        opened(tmp_path / "o.pt", parts["optimizer"]) as opt,
    ):
        out = mc.merge(model=model, optimizer=opt)
        assert any("LBFGS" in note.text for note in out.notes)
        loaded = load(out, tmp_path / "out.pt")
    torch.optim.LBFGS(net.parameters()).load_state_dict(loaded["optimizer"])


def test_mistakes(tmp_path: Path, trained: Trained) -> None:
    parts = trained.parts()
    with pytest.raises(UsageError, match="no model"):
        mc.merge()
    for numbers in (
        {"epoch": -1},
        {"step": -1},
        {"lr": -0.1},
        {"lr": float("nan")},
        {"lr": float("inf")},
    ):
        with pytest.raises(UsageError):
            merged(tmp_path, {"model": parts["model"]}, **numbers)
    with pytest.raises(NoMatchError, match="no optimizer is found"):
        merged(tmp_path, {"model": parts["model"], "optimizer": parts["model"]})
    with pytest.raises(NoMatchError, match="no scheduler is found"):
        merged(tmp_path, {"model": parts["model"], "scheduler": parts["optimizer"]})
    with pytest.raises(NoMatchError):
        merged(tmp_path, {"model": parts["optimizer"]}, epoch=1)
    two = {"optimizers": [parts["optimizer"], parts["optimizer"]]}
    with pytest.raises(AmbiguousError, match="2 optimizers"):
        merged(tmp_path, {"model": parts["model"], "optimizer": two})


def test_what_an_epoch_or_a_lr_does_not_reach_is_told(tmp_path: Path) -> None:
    net = Net()
    optimizer = torch.optim.SGD(
        [{"params": [*net.parameters()][:3]}, {"params": [*net.parameters()][3:], "lr": 0.2}],
        lr=0.1,
    )
    torch.optim.lr_scheduler.OneCycleLR(optimizer, [0.1, 0.2], total_steps=10)
    saved = {
        "state_dict": net.state_dict(),
        "optimizer_states": [optimizer.state_dict()],
        "epoch": 2,
        "loops": {"fit_loop": {"epoch_progress": {"current": {"processed": 2}}}},
        "lr_schedulers": [None],
        "param_schedulers": [{"base_values": [0.1], "last_step": 3}],
    }
    with opened(tmp_path / "in.ckpt", saved) as ckpt:
        out = mc.merge(model=ckpt, epoch=5, lr=0.5)
    assert "lr" not in out.root  # nothing there reads one
    text = " ".join(map(str, out.notes))
    assert "Lightning goes on from 'loops'" in text
    assert "'param_schedulers' is called like a scheduler, but is none that is known" in text
    rates = [(g["lr"], g["max_lr"]) for g in optimizer.param_groups]
    for group, (now, most) in zip(
        out.sections.optimizers[0][1]["param_groups"], rates, strict=True
    ):
        assert group["max_lr"] == pytest.approx(most * 0.5 / now)
    assert "2 different lrs become one" in text


# ---------------------------------------------------------------------- what is replaced


def noted(tmp_path: Path, files: dict[str, Any], **numbers: Any) -> list[str]:
    with ExitStack() as stack:
        parts = {
            name: stack.enter_context(opened(tmp_path / f"{name}.pt", obj))
            for name, obj in files.items()
        }
        return [f"{note.level}: {note.text}" for note in mc.merge(**parts, **numbers).notes]


def test_another_optimizer_is_told(tmp_path: Path, trained: Trained) -> None:
    sgd = torch.optim.SGD(trained.net.parameters(), lr=0.1, momentum=0.9)
    train(trained.net, sgd, range(1))
    whole = {"model": trained.net.state_dict(), "optimizer": sgd.state_dict()}
    adamw = trained.optimizer.state_dict()
    (told,) = noted(tmp_path, {"model": whole, "optimizer": adamw})
    assert re.match(r"warning: optimizer is replaced: SGD -> (Adam or )?AdamW", told)  # old torch
    (told,) = noted(tmp_path, {"model": {**whole, "optimizer": adamw}, "optimizer": adamw})
    assert re.match(r"info: optimizer is replaced, both (Adam or )?AdamW", told)
    assert noted(tmp_path, {"model": whole["model"], "optimizer": adamw}) == []


def test_another_scheduler_and_ema_are_told(tmp_path: Path, trained: Trained) -> None:
    parts = trained.parts()
    whole = {**parts, "ema": parts["model"]}
    files = {"model": whole, "scheduler": parts["scheduler"], "ema": parts["model"]}
    assert noted(tmp_path, files) == ["info: scheduler is replaced", "info: ema is replaced"]


def test_values_that_are_set_over_others_are_told(tmp_path: Path, trained: Trained) -> None:
    whole = {"model": trained.net.state_dict(), "best": 0.5, "args": {"lrs": [1, 2]}, "same": 1}
    values = {"best": 0.75, "args.lrs": 3, "args.new": 1, "same": 1}
    assert noted(tmp_path, {"model": whole}, set=values) == [
        "info: best: 0.5 -> 0.75",
        "info: args.lrs: [1, 2] -> 3",
    ]
    assert noted(tmp_path, {"model": whole}, set={"args.lrs.1": 5}) == ["info: args.lrs.1: 2 -> 5"]


def test_a_list_of_lrs_stays_one(tmp_path: Path, trained: Trained) -> None:
    whole = {"model": trained.net.state_dict(), "lr": [0.1, 0.01]}
    assert noted(tmp_path, {"model": whole}, lr=0.5) == ["info: lr: [0.1, 0.01] -> [0.5, 0.5]"]
    assert merged(tmp_path, {"model": whole}, lr=0.5)["lr"] == [0.5, 0.5]
    (told,) = noted(tmp_path, {"model": {**whole, "lr": {"a": 1.0}}}, lr=0.5)
    assert told == "warning: lr was a dict, and is 0.5 now"


def test_nothing_to_merge(tmp_path: Path, trained: Trained) -> None:
    with pytest.raises(UsageError, match="nothing to merge"):
        noted(tmp_path, {"model": trained.net.state_dict()})
