"""A ``torch.amp.GradScaler`` and its state."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch.amp import GradScaler

from ...core.nodes import mapping
from ...errors import AmbiguousError, RefusedError
from ..loading.values import live
from .part import Part, Saved

_KEYS = frozenset(("scale", "growth_factor", "backoff_factor", "growth_interval"))


class ScalerPart(Part):
    """The scaler; one that is not enabled is none."""

    name = "scaler"

    def __init__(self, saved: Saved, scaler: GradScaler | None) -> None:
        super().__init__(saved)
        self.live = scaler if scaler is not None and scaler.is_enabled() else None
        self.state: Any = None

    def fit(self) -> None:
        found = find_scaler(self.saved.top)
        if self._wanted(self.live, found) and self.live and found:
            self.state = live(found[1], "scaler")
            _check(self.live, self.state)

    def run(self) -> None:
        if self.live is not None and self.state is not None:
            self.notes.differ("scaler", _differences(self.live, self.state))
            self.live.load_state_dict(self.state)
            self.restored = True


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


def _differences(scaler: GradScaler, state: Mapping[str, Any]) -> dict[str, tuple[Any, Any]]:
    """The settings in which a scaler and a saved state differ: (own, saved) by name."""
    own = scaler.state_dict()
    settings = ("growth_factor", "backoff_factor", "growth_interval")
    return {key: (own[key], state[key]) for key in settings if own[key] != state[key]}


def _check(scaler: GradScaler, state: Any) -> None:
    """Raises RefusedError where a saved state is not what ``GradScaler.state_dict`` gives."""
    numbers = {key: state.get(key) for key in scaler.state_dict()}
    odd = [key for key, value in numbers.items() if type(value) not in (int, float)]
    if odd:
        raise RefusedError(
            f"the checkpoint's scaler has no number for {', '.join(odd)}",
            hint="resume without scaler=: it finds its scale anew in a few steps",
        )
