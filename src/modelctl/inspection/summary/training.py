"""The training panel: how far a training got, and with which optimizer."""

from __future__ import annotations

from typing import Any, NamedTuple

from ...core.checkpoint import Checkpoint
from ...core.matching.optimizer_states import kinds
from ...core.nodes import mapping
from ...core.sections import is_optimizer_object, param_groups
from ...core.sections.kinds import optimizer_entries
from ...core.tensors import StorageRef, TensorRef
from ...core.text import count, size
from ...core.tree import path_text, walk

_MOST = 4  # of many lrs


class Training(NamedTuple):
    """The training panel: progress, and what the optimizer is and takes."""

    epoch: float | None
    step: int | None
    lr: list[float]
    optimizer: str | None
    groups: int
    states: int
    optimizer_bytes: int
    scheduler: bool
    ema: list[str]
    best: tuple[str, float] | None = None
    loss: float | None = None

    def as_dict(self) -> dict[str, Any]:
        return {
            "epoch": self.epoch,
            "step": self.step,
            "lr": self.lr,
            "optimizer": self.optimizer,
            "best": self.best and dict(zip(("name", "value"), self.best, strict=True)),
            "loss": self.loss,
        }

    @property
    def text(self) -> str:
        """The panel in a line."""
        parts = []
        if self.epoch is not None:
            parts.append(f"epoch {round(self.epoch, 3)}")
        if self.step is not None:
            parts.append(f"step {self.step:,}")
        if self.best is not None:
            parts.append(f"{self.best[0]} {self.best[1]:g}")
        if self.loss is not None:
            parts.append(f"loss {self.loss:g}")
        if self.lr:
            parts.append("lr " + ", ".join(f"{lr:g}" for lr in self.lr[:_MOST]))
        if self.groups:
            states = f"state of {count(self.states, 'parameter')}"
            held = f"{count(self.groups, 'group')}, {states}, {size(self.optimizer_bytes)}"
            parts.append(f"optimizer {self.optimizer or 'of an unknown kind'} ({held})")
        if self.scheduler:
            parts.append("scheduler")
        parts += [f"EMA copy {name}" for name in self.ema]
        return " · ".join(parts)


def training_of(ckpt: Checkpoint) -> Training | None:
    sections = ckpt.sections
    optimizers = [node for _, node in (*sections.optimizers, *sections.optimizer_objects)]
    copies = [path_text(copy.path) for copy in sections.ema]
    copies += [path_text(path) for path in sections.nameless_ema]
    found = (optimizers, sections.epoch, sections.step, sections.schedulers, copies)
    if not any(found):
        return None
    kinds = [kind for node in optimizers if (kind := optimizer_kind(node))]
    states = sum(len(_states(node)) for node in optimizers)
    storages: dict[int, int] = {}
    for node in optimizers:
        for _, value in walk(node):
            if isinstance(value, TensorRef | StorageRef):
                storages[id(value.storage)] = value.storage.nbytes
    return Training(
        _whole(sections.epoch[1]) if sections.epoch else None,
        sections.step[1] if sections.step else None,
        list(dict.fromkeys(sections.lrs())),
        ", ".join(dict.fromkeys(kinds)) or None,
        sum(len(param_groups(node)) for node in optimizers),
        states,
        sum(storages.values()),
        bool(sections.schedulers),
        copies,
        sections.best and (sections.best.name, sections.best.value),
        sections.loss,
    )


def _whole(epoch: float) -> float:
    """The Trainer's 2.0 as 2; within an epoch it is as it is."""
    return int(epoch) if epoch == int(epoch) else epoch


def _states(optimizer: Any) -> list[Any]:
    """What it keeps of each parameter."""
    state = optimizer_entries(optimizer).get("state")
    return state if isinstance(state, list) else [*(mapping(state) or {}).values()]


def optimizer_kind(optimizer: Any) -> str | None:
    """Which optimizer a state_dict is of, as far as the keys of its state and groups tell."""
    if is_optimizer_object(optimizer):
        return str(optimizer.func.name)
    keys = [key for value in _states(optimizer) for key in (mapping(value) or {})]
    groups = param_groups(optimizer)
    return " or ".join(kinds(keys, groups[0] if groups else {})) or None
