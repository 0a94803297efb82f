"""What the ranks that share a model do, all do or none: where one of them is refused, the others
learn of it before they change anything, and before they wait for it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import distributed, nn

from ...errors import ModelctlError, RefusedError
from ..model_names import slots
from .sharded import groups

_Refusal = tuple[int, str, str | None]


class Together:
    """The ranks that hold parts of a model's DTensors; none but this one where it has none."""

    def __init__(self, *models: nn.Module) -> None:
        self._groups = groups(slot.tensor for model in models for slot in slots(model))

    @property
    def several(self) -> bool:
        """Whether there are others."""
        return bool(self._groups)

    @contextmanager
    def agreeing(self, doing: str) -> Iterator[None]:
        """Raise on all ranks what one of them raises in the block. All have to come here.

        Raises:
            RefusedError: another one was refused; says which, and why.
        """
        try:
            yield
        except Exception as e:
            if self.several:
                text = e.message if isinstance(e, ModelctlError) else f"{type(e).__name__}: {e}"
                self._gather((distributed.get_rank(), text, getattr(e, "hint", None)))
            raise
        other = self._gather(None)
        if other is not None:
            rank, text, hint = other
            raise RefusedError(f"rank {rank} stopped {doing}: {text}", hint=hint)

    def _gather(self, mine: _Refusal | None) -> _Refusal | None:
        """The refusal of the first rank that has one. A mesh of several dimensions passes it on
        along one after the other."""
        for group in self._groups:
            found: list[Any] = [None] * distributed.get_world_size(group)
            distributed.all_gather_object(found, mine, group=group)
            mine = min((one for one in found if one is not None), default=None, key=_rank)
        return mine


def _rank(refusal: _Refusal) -> int:
    return refusal[0]
