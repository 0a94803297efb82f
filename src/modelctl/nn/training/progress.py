"""What stands beside the parts of a checkpoint: its progress, and its writer's own values."""

from __future__ import annotations

from typing import Any

from ...core.nodes import mapping
from ...core.sections import Sections, is_model, is_optimizer
from ...core.tree import Path
from ...errors import UnsupportedError
from ..loading.values import live as made
from ..optim import schedulers
from .loaders import is_kept
from .optimizers.restore import OptimizersPart
from .part import Part, Saved
from .scaler import find_scaler


class ProgressPart(Part):
    """How far the training got, and what else its script kept: nothing that is restored.

    Attributes:
        epoch, step: what is finished; None where the file does not say.
        lr: the one that training goes on with.
        extra: the writer's own values by name.
    """

    def __init__(self, saved: Saved, optimizers: OptimizersPart) -> None:
        super().__init__(saved)
        self.optimizers = optimizers
        self.extra: Any = {}

    def fit(self) -> None:
        sections, top = self.saved.sections, self.saved.top
        self.epoch = finished_epochs(sections, top)
        self.step, self.lr = (found[1] if found else None for found in (sections.step, sections.lr))
        parts: list[Path] = [found.path for found in (*sections.models[:1], *sections.ema)]
        parts += [path for path, _ in (*sections.own_optimizers, *sections.own_schedulers)]
        parts += [found[0] for found in (sections.epoch, sections.step, sections.lr) if found]
        parts += [*sections.nameless_ema, *([sections.rng[0]] if sections.rng else [])]
        scaler = find_scaler(top)
        keys = {path[0] for path in parts if path} | ({scaler[0]} if scaler else set())
        own = {sections.loader[0][0]} if sections.loader and is_kept(sections.loader[1]) else ()
        if sections.model().path != ():
            self.extra, self.unused = own_values(top, {*keys, "rng", "scheduler", *own})

    def run(self) -> None:
        noted, live = self.lr, self.optimizers.live
        if not live:
            return
        lr = self.lr = schedulers.lr_of(next(iter(live.values())).param_groups[0])
        if lr is not None and not self.optimizers.plans and noted not in (None, lr):
            self.notes.append(
                f"the checkpoint's lr is {noted:g}, the optimizer's {lr:g} stays: the file has "
                "no optimizer state"
            )


def finished_epochs(sections: Sections, top: dict[Any, Any]) -> int | None:
    """Epochs that are done. Lightning and timm note the number of the one that they were in."""
    if sections.epoch is None:
        return None
    noted = int(sections.epoch[1])  # the Trainer's 1.5 is one epoch, and a half
    if "pytorch-lightning_version" in top:
        if _before(top["pytorch-lightning_version"], 1, 6):  # that noted the next one
            return noted
        done: Any = top
        for key in ("loops", "fit_loop", "epoch_progress", "current", "processed"):
            done = (mapping(done) or {}).get(key)
        return done if type(done) is int else noted + 1
    version = top.get("version")
    if {"arch", "state_dict", "optimizer"} <= top.keys() and type(version) is int and version > 1:
        return noted + 1  # before version 2, timm noted the next one
    return noted


def _before(version: Any, *numbers: int) -> bool:
    """Whether a version is an earlier one; one that isn't readable is not."""
    parts = version.split(".") if isinstance(version, str) else ()
    known = [int(part) for part in parts[: len(numbers)] if part.isdecimal()]
    return len(known) == len(numbers) and known < [*numbers]


def own_values(top: dict[Any, Any], known: set[Any]) -> tuple[Any, list[str]]:
    """The writer's own values by name, and the names of those that can't be made from a file.

    ``known`` are the keys of the parts. Other models and optimizers are parts of something else.
    """
    values = made(top["extra"], "extra") if "extra" in top else {}
    left = []
    for key, node in top.items():
        if key in known or key == "extra" or not isinstance(key, str):
            continue
        try:
            if is_model(node) or is_optimizer(node):
                raise UnsupportedError("a part of another training")
            value = made(node, key)
        except UnsupportedError:
            left.append(key)
            continue
        if isinstance(values, dict):
            values.setdefault(key, value)
    return values, left
