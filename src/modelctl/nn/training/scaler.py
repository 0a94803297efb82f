"""The state of a ``torch.amp.GradScaler``."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch.amp import GradScaler

from ...core.nodes import mapping
from ...errors import AmbiguousError, RefusedError

_KEYS = frozenset(("scale", "growth_factor", "backoff_factor", "growth_interval"))


def find_scaler(top: dict[Any, Any]) -> tuple[Any, Any] | None:
    """Key and state of the scaler in a checkpoint, whatever it is called there.

    Raises:
        AmbiguousError: there are several.
    """
    nodes = [(key, mapping(value) or {}) for key, value in top.items()]
    found = [(key, node) for key, node in nodes if _KEYS.issubset(node)]
    if len(found) > 1:
        keys = ", ".join(str(key) for key, _ in found)
        raise AmbiguousError(
            f"the checkpoint has {len(found)} GradScalers ({keys}); one can be resumed"
        )
    return found[0] if found else None


def scaler_differences(scaler: GradScaler, state: Mapping[str, Any]) -> dict[str, tuple[Any, Any]]:
    """The settings in which a scaler and a saved state differ: (own, saved) by name."""
    own = scaler.state_dict()
    settings = ("growth_factor", "backoff_factor", "growth_interval")
    return {key: (own[key], state[key]) for key in settings if own[key] != state[key]}


def check_scaler(scaler: GradScaler, state: Any) -> None:
    """Raises RefusedError where a saved state is not what ``GradScaler.state_dict`` gives."""
    numbers = {key: state.get(key) for key in scaler.state_dict()}
    odd = [key for key, value in numbers.items() if type(value) not in (int, float)]
    if odd:
        raise RefusedError(
            f"the checkpoint's scaler has no number for {', '.join(odd)}",
            hint="resume without scaler=: it finds its scale anew in a few steps",
        )
