"""A small training in a process of its own: ``python -m tests.nn.training FOLDER PHASE CASE…``.

PHASE is ``straight`` (10 steps), ``first`` (5 steps, then saves to PATH) or ``second`` (resumes
from PATH, 5 more steps); PATH is FOLDER / CASE. What each ended with goes to PATH.PHASE.
"""

from __future__ import annotations

import random
import sys
from pathlib import Path

import numpy as np
import torch
from torch import nn, optim

import modelctl.nn as mnn

from .nets import Net

torch.set_num_threads(1)


def main(case: str, path: Path, phase: str) -> None:
    # what a new process must take from the checkpoint, and not from its own start
    seed = 0 if phase != "second" else 99
    torch.manual_seed(seed)
    random.seed(seed)
    np.random.seed(seed)
    bare = Net()
    model = nn.DataParallel(bare) if case == "wrapped" else bare
    thaws = "thaw" in case
    if thaws or case == "frozen":
        mnn.freeze(model, "*", exclude="fc", bn_eval=True)
    if case == "sgd":
        optimizer = optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    elif case == "adamw":
        optimizer = optim.AdamW(model.named_parameters(), lr=0.01)
    else:
        groups = mnn.param_groups(model, {"fc": {"lr": 0.02}}, no_decay=True, lr=0.01)
        if case == "reordered" and phase == "second":
            groups.reverse()
            for group in groups:
                group["params"].reverse()
                group["param_names"].reverse()
        optimizer = optim.AdamW(groups)
    ema = optim.swa_utils.AveragedModel(bare) if case == "adamw" else None
    if case == "sgd":
        scheduler = [optim.lr_scheduler.MultiStepLR(optimizer, [3, 7])]
        scheduler.append(optim.lr_scheduler.ReduceLROnPlateau(optimizer, patience=1))
    elif case == "adamw":
        scheduler = SEQUENTIAL(optimizer)
    else:
        scheduler = mnn.warmup_cosine(optimizer, 3, 12)
    parts = {"model": model, "optimizer": optimizer, "scheduler": scheduler, "ema": ema}
    start, stop = {"straight": (0, 10), "first": (0, 5), "second": (5, 10)}[phase]
    if phase == "second":
        state = mnn.resume(path, **parts)
        assert (state.epoch, state.step, state.extra) == (2, 5, {"best": 0.5})
    for step in range(start, stop):
        if (case == "thaw_before" and step == 3) or (case == "thaw_after" and step == 7):
            mnn.unfreeze(model, "layer2", optimizer=optimizer, scheduler=scheduler, lr=0.005)
        noise = random.random() + np.random.rand()
        for _ in range(2):  # accumulation
            (model(torch.randn(4, 3, 8, 8)).square().mean() * noise).backward()
        optimizer.step()
        optimizer.zero_grad()
        for one in mnn_each(scheduler):
            one.step(*([1.0] if isinstance(one, optim.lr_scheduler.ReduceLROnPlateau) else []))
        if ema is not None:
            ema.update_parameters(bare)
        model.train()
    if phase == "first":
        mnn.save_checkpoint(path, **parts, epoch=2, step=5, extra={"best": np.float64(0.5)})
    end = {
        "model": bare.state_dict(),
        "optimizer": by_name(optimizer, bare),
        "ema": ema.state_dict() if ema is not None else {},
        "lrs": sorted(group["lr"] for group in optimizer.param_groups),
        "grad": [name for name, p in bare.named_parameters() if p.requires_grad],
        "modes": [m.training for m in bare.modules()],
        "random": [random.random(), float(np.random.randn()), torch.randn(3)],
    }
    torch.save(end, f"{path}.{phase}")


def SEQUENTIAL(optimizer):
    parts = [
        optim.lr_scheduler.LinearLR(optimizer, 0.1, total_iters=3),
        optim.lr_scheduler.CosineAnnealingLR(optimizer, 10),
    ]
    return optim.lr_scheduler.SequentialLR(optimizer, parts, [3])


def mnn_each(scheduler):
    return scheduler if isinstance(scheduler, list) else [scheduler]


def by_name(optimizer, model):
    names = {p: name for name, p in model.named_parameters()}
    return {names[p]: entry for p, entry in optimizer.state.items()}


if __name__ == "__main__":
    for one in sys.argv[3:]:
        main(one, Path(sys.argv[1]) / one, sys.argv[2])
