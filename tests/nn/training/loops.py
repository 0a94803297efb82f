"""A small training, whole or in two processes: ``python -m tests.nn.training.loops FOLDER CASE…``.

PHASE is ``straight`` (10 steps), ``first`` (5 steps, then saves to PATH) or ``second`` (resumes
from PATH, 5 more steps); PATH is FOLDER / CASE. What each ended with goes to PATH.PHASE. As a
program it does the second phase.
"""

from __future__ import annotations

import random
import sys
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn, optim
from torch.optim import lr_scheduler
from torch.optim.swa_utils import AveragedModel

import modelctl.nn as mnn
from tests.nn.nets import Net

# Optimizer, scheduler, EMA, scaler, accumulation, dropout, freezing: each case has its own.
CASES = (
    *("sgd", "adamw", "scaled", "wrapped", "frozen", "reordered", "regrouped", "several"),
    *("thaw_before", "thaw_after", "freeze_between"),
)


def main(case: str, path: Path, phase: str) -> None:
    # what a new process must take from the checkpoint, and not from its own start
    seed = 0 if phase != "second" else 99
    torch.manual_seed(seed)
    random.seed(seed)
    np.random.seed(seed)
    bare = Net()
    model = nn.DataParallel(bare) if case == "wrapped" else bare
    if case in ("frozen", "thaw_before", "thaw_after"):
        mnn.freeze(model, "*", exclude="fc", bn_eval=True)
    parts = built(case, model, phase == "second")
    optimizers = list(each(parts["optimizer"]))
    scaler = parts["scaler"]
    start, stop = {"straight": (0, 10), "first": (0, 5), "second": (5, 10)}[phase]
    if phase == "second":
        state = mnn.resume(path, **parts)
        assert (state.epoch, state.step, state.extra) == (2, 5, {"best": 0.5})
    for step in range(start, stop):
        if (case, step) in (("thaw_before", 3), ("thaw_after", 7)):
            mnn.unfreeze(
                model,
                "layer2",
                optimizer=optimizers[0],
                scheduler=parts["scheduler"],
                lr=0.005,
            )
        if (case, step) == ("freeze_between", 3):
            mnn.freeze(model, "layer1", bn_eval=True)
        if (case, step) == ("freeze_between", 7):
            mnn.unfreeze(model, "layer1")
        noise = random.random() + np.random.rand()
        for _ in range(2):  # accumulation
            with torch.autocast("cpu", torch.bfloat16) if scaler else nullcontext():
                loss = model(torch.randn(4, 3, 8, 8)).square().mean() * noise
            (scaler.scale(loss) if scaler else loss).backward()
        if case == "scaled" and step == 6:  # a step that the scaler skips
            bare.fc.bias.grad.fill_(float("inf"))
        for optimizer in optimizers:
            scaler.step(optimizer) if scaler else optimizer.step()
            optimizer.zero_grad()
        if scaler:
            scaler.update()
        for one in each(parts["scheduler"]):
            one.step(*([1.0] if isinstance(one, lr_scheduler.ReduceLROnPlateau) else []))
        if parts["ema"] is not None:
            parts["ema"].update_parameters(bare)
        model.train()
    if phase == "first":
        mnn.save_checkpoint(path, **parts, epoch=2, step=5, best=np.float64(0.5))
    end = {
        "model": bare.state_dict(),
        "optimizer": [by_name(optimizer, bare) for optimizer in optimizers],
        "scheduler": [one.state_dict() for one in each(parts["scheduler"])],
        "ema": parts["ema"].state_dict() if parts["ema"] is not None else {},
        "scaler": scaler.state_dict() if scaler else {},
        "lrs": sorted({group["lr"] for one in optimizers for group in one.param_groups}),
        "grad": [name for name, p in bare.named_parameters() if p.requires_grad],
        "modes": [m.training for m in bare.modules()],
        "random": [random.random(), float(np.random.randn()), torch.randn(3)],
    }
    if case in ("reordered", "regrouped"):
        del end["scheduler"]  # its lists are in the order of the groups
    torch.save(end, f"{path}.{phase}")


def built(case: str, model: nn.Module, again: bool) -> dict[str, Any]:
    """The parts of a training; ``again`` is after the save, by a script that was edited."""
    parts: dict[str, Any] = {"model": model, "ema": None, "scaler": None}
    if case == "sgd":
        optimizer: Any = optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
        scheduler: Any = [lr_scheduler.MultiStepLR(optimizer, [3, 7])]
        scheduler.append(lr_scheduler.ReduceLROnPlateau(optimizer, patience=1))
    elif case == "adamw":
        older = not hasattr(torch.compiler, "set_stance")  # torch before 2.6: no names
        given = model.parameters() if older else model.named_parameters()
        optimizer = optim.AdamW(given, lr=0.01)
        inner = [
            lr_scheduler.LinearLR(optimizer, 0.1, total_iters=3),
            lr_scheduler.CosineAnnealingLR(optimizer, 10),
        ]
        scheduler = lr_scheduler.SequentialLR(optimizer, inner, [3])
        parts["ema"] = AveragedModel(model, multi_avg_fn=averaged)
    elif case == "scaled":
        optimizer = optim.SGD(model.parameters(), lr=0.1, momentum=0.9, nesterov=True)
        scheduler = lr_scheduler.OneCycleLR(optimizer, 0.2, total_steps=12)
        parts["scaler"] = torch.amp.GradScaler("cpu", init_scale=2.0**8, growth_interval=3)
        parts["ema"] = AveragedModel(model, use_buffers=True)
    elif case == "several":
        optimizer = {
            "trunk": optim.AdamW([p for n, p in model.named_parameters() if "fc" not in n]),
            "head": optim.SGD(model.fc.parameters(), lr=0.1, momentum=0.9),
        }
        scheduler = {name: lr_scheduler.StepLR(one, 2) for name, one in optimizer.items()}
    elif case == "regrouped":
        named = list(model.named_parameters())
        groups = [{"params": [p for _, p in part]} for part in (named[:4], named[4:])]
        optimizer = optim.Adam(groups[::-1] if again else model.parameters(), lr=0.01)
        scheduler = lr_scheduler.StepLR(optimizer, 2)
    else:
        groups = mnn.param_groups(model, {"fc": {"lr": 0.02}}, no_decay=True, lr=0.01)
        if case == "reordered" and again:
            groups.reverse()
            for group in groups:
                group["params"].reverse()
                group["param_names"].reverse()
        optimizer = optim.AdamW(groups)
        scheduler = mnn.warmup_cosine(optimizer, 3, 12)
    return {**parts, "optimizer": optimizer, "scheduler": scheduler}


def averaged(averages: Any, values: Any, _count: Any) -> None:
    torch._foreach_lerp_(averages, values, 0.1)


def each(several: Any) -> list[Any]:
    if isinstance(several, dict):
        return list(several.values())
    return several if isinstance(several, list) else [several]


def by_name(optimizer: Any, model: nn.Module) -> dict[str, Any]:
    names = {p: name for name, p in model.named_parameters()}
    return {names[p]: entry for p, entry in optimizer.state.items()}


def equal(a: Any, b: Any) -> bool:
    """The same values in the same containers, bit for bit."""
    if isinstance(a, torch.Tensor):
        return a.dtype == b.dtype and torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(equal(a[k], b[k]) for k in a)
    if isinstance(a, list | tuple):
        return len(a) == len(b) and all(map(equal, a, b))
    return bool(a == b)


if __name__ == "__main__":
    torch.set_num_threads(1)
    for one in sys.argv[2:]:
        main(one, Path(sys.argv[1]) / one, "second")
