"""How far a training got: numbers at the top of a checkpoint, or where trainers keep them."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator
from typing import Any, NamedTuple

from ...errors import ModelctlError
from ..nodes import mapping
from ..numbers import only_value, plain_number
from ..tensors import TensorRef
from ..tree import Path

# Below the top; 'common' is Megatron's, the last two are fairseq's.
_PLACES: tuple[Path, ...] = (
    *(
        (name,)
        for name in ("meta", "trainer", "trainer_state", "train_state", "progress", "common")
    ),
    *(("extra_state",), ("extra_state", "train_iterator"), ("optimizer_history", -1)),
)
# 'best_acc1', 'best_val_loss', 'best'; when that was is another thing. 'metric' is timm's.
_BEST = re.compile(r"best(?!.*(epoch|step|iter|path|index))(_.*)?|metric", re.ASCII | re.DOTALL)


class Best(NamedTuple):
    """The best value so far of a metric, as the file calls it; ``path`` is where it stands."""

    path: Path
    name: str
    value: float


def number(top: dict[Any, Any], names: tuple[str, ...], kind: Any) -> tuple[Path, Any] | None:
    """(path, value) of the first number that is called so."""
    for path, entries in _places(top):
        for name in names:
            value = entries.get(name)
            if path == ("train_state",) and isinstance(value, TensorRef):  # torchtitan's
                value = _value(value)
                value = int(value) if value is not None and value.is_integer() else value
            if isinstance(value, kind) and not isinstance(value, bool):
                if isinstance(value, float) and not math.isfinite(value):
                    continue
                return (*path, name), value
    return None


def best(top: dict[Any, Any]) -> Best | None:
    """The best value of a metric, a number or a tensor of one; Lightning's, as it is monitored."""
    for path, entries in _places(top):
        for name, value in entries.items():
            if isinstance(name, str) and _BEST.fullmatch(name):
                found = _value(value)
                if found is not None:
                    return Best((*path, name), name, found)
    for name, callback in (mapping(top.get("callbacks")) or {}).items():
        entries = mapping(callback) or {}
        found = _value(entries.get("best_model_score"))
        if found is not None:
            monitor = entries.get("monitor")
            called = f"best {monitor}" if isinstance(monitor, str) else "best_model_score"
            return Best(("callbacks", name, "best_model_score"), called, found)
    return None


def last_loss(top: dict[Any, Any]) -> float | None:
    """The loss that was logged last, of the Trainer's ``log_history``."""
    log = (mapping(top.get("trainer_state")) or {}).get("log_history")
    for entry in reversed(log) if isinstance(log, list) else ():
        found = _value((mapping(entry) or {}).get("loss"))
        if found is not None:
            return found
    return None


def _places(top: dict[Any, Any]) -> Iterator[tuple[Path, dict[Any, Any]]]:
    yield (), top
    for path in _PLACES:
        node: Any = top
        real: Path = ()
        for key in path:
            if isinstance(node, list):
                node, key = (node[-1], len(node) - 1) if node else (None, 0)
            else:
                node = (mapping(node) or {}).get(key)
            real = (*real, key)
        entries = mapping(node)
        if entries:
            yield real, entries


def _value(node: Any) -> float | None:
    node = plain_number(node)
    if isinstance(node, TensorRef):
        try:
            node = only_value(node)
        except ModelctlError:  # one that can't be read is no reason to show nothing else
            return None
    if isinstance(node, bool) or not isinstance(node, int | float) or not math.isfinite(node):
        return None
    return float(node)
