"""What stands beside the parts of a checkpoint: its progress, and its writer's own values."""

from __future__ import annotations

from typing import Any

from ...core.nodes import mapping
from ...core.sections import Sections, is_model, is_optimizer
from ...errors import UnsupportedError
from ..loading.values import live


def finished_epochs(sections: Sections, top: dict[Any, Any]) -> int | None:
    """Epochs that are done. Lightning and timm note the number of the one that they were in."""
    if sections.epoch is None:
        return None
    noted: int = sections.epoch[1]
    if "pytorch-lightning_version" in top:
        done: Any = top
        for key in ("loops", "fit_loop", "epoch_progress", "current", "processed"):
            done = (mapping(done) or {}).get(key)
        return done if type(done) is int else noted + 1
    version = top.get("version")
    if {"arch", "state_dict", "optimizer"} <= top.keys() and type(version) is int and version > 1:
        return noted + 1  # before version 2, timm noted the next one
    return noted


def own_values(top: dict[Any, Any], known: set[Any]) -> tuple[Any, list[str]]:
    """The writer's own values by name, and the names of those that can't be made from a file.

    ``known`` are the keys of the parts. Other models and optimizers are parts of something else.
    """
    values = live(top["extra"], "extra") if "extra" in top else {}
    left = []
    for key, node in top.items():
        if key in known or key == "extra" or not isinstance(key, str):
            continue
        try:
            if is_model(node) or is_optimizer(node):
                raise UnsupportedError("a part of another training")
            value = live(node, key)
        except UnsupportedError:
            left.append(key)
            continue
        if isinstance(values, dict):
            values.setdefault(key, value)
    return values, left
