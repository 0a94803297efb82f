"""What the ranks that share a model do, all do or none: where one of them is refused, the others
learn of it before they change anything, and before they wait for it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any, TypeVar

from torch import Tensor, distributed, nn

from ...errors import ModelctlError, RefusedError
from ..model_names import slots
from .sharded import groups

T = TypeVar("T")


def tensors_of(part: nn.Module | Mapping[str, Any] | None) -> list[Tensor]:
    """The parameters and buffers of a module, or the tensors of a state_dict."""
    if isinstance(part, Mapping):
        return [value for value in part.values() if isinstance(value, Tensor)]
    return [] if part is None else [slot.tensor for slot in slots(part)]


class Together:
    """The ranks that hold parts of the same DTensors; this one alone where there are none."""

    def __init__(self, *tensors: Tensor) -> None:
        self._groups = groups(tensors)

    @contextmanager
    def agreeing(self, when: str) -> Iterator[None]:
        """Raise on all ranks what one of them raises in the block. All have to come here.

        Raises:
            RefusedError: another one was refused; says which, and why.
        """
        try:
            yield
        except Exception as e:
            if self._groups:
                text = e.message if isinstance(e, ModelctlError) else f"{type(e).__name__}: {e}"
                self._first((_rank(), (text, getattr(e, "hint", None))))
            raise
        other = self._first(None)
        if other is not None:
            rank, (text, hint) = other
            raise RefusedError(f"rank {rank} stopped {when}: {text}", hint=hint)

    def of_first(self, value: T) -> T:
        """What the first of the ranks gives. All have to come here."""
        found = self._first((_rank() if self._groups else 0, value))
        return value if found is None else found[1]

    def members(self) -> set[int]:
        """All of these ranks. All have to come here."""
        known = {_rank()} if self._groups else {0}
        for group in self._groups:
            known = set().union(*_gathered(known, group))
        return known

    def _first(self, mine: tuple[int, Any] | None) -> tuple[int, Any] | None:
        """The pair of the first rank that has one. A mesh of several dimensions passes it on along
        one after the other."""
        for group in self._groups:
            found = [one for one in _gathered(mine, group) if one is not None]
            mine = min(found, default=None, key=lambda one: one[0])
        return mine


def _rank() -> int:
    return distributed.get_rank()


def _gathered(value: T, group: Any) -> list[T]:
    found: list[Any] = [None] * distributed.get_world_size(group)
    distributed.all_gather_object(found, value, group=group)
    return found
