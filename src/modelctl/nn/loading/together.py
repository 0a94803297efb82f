"""What the ranks that share a model do, all do or none: where one of them is refused, the others
learn of it before they change anything, and before they wait for it."""

from __future__ import annotations

import os
import socket
import uuid
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, TypeVar

import torch
from torch import Tensor, distributed, nn

from ...errors import ModelctlError, RefusedError
from ..model_names import slots
from .sharded import groups

T = TypeVar("T")

# What is sent at once. Smaller tensors are put together; larger ones go from and to their own
# memory.
_BUCKET, _SMALL = 32 << 20, 1 << 20


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


class OneReader(Together):
    """The ranks on this machine, of which the first reads for all; this one alone where there is
    no process group. All ranks of the job have to come here.

    Attributes:
        reads: whether this is the one.
    """

    def __init__(self) -> None:
        group = _on_this_machine()
        self._groups = [] if group is None else [group]
        self.reads = group is None or distributed.get_rank(group) == 0

    def check_alike(self, plan: object) -> None:
        """Raises RefusedError, on all of them, where one is to do something else than the first."""
        first = self.of_first(plan)
        with self.agreeing("before anything was changed"):
            if first != plan:
                raise RefusedError(
                    "this rank's model, file or device is another than that of the first one on "
                    "this machine, which was to read for all",
                    hint="load without read_once=True",
                )

    def share(self, tensors: Iterable[Tensor]) -> None:
        """Give all what the tensors of the first one hold: the same, in one order on each rank,
        with the same strides."""
        flat = [(tensor, _flat(tensor)) for tensor in tensors if tensor.numel()]
        pieces = [piece for _, one in flat for piece in torch.split(one.view(torch.uint8), _BUCKET)]
        for group in self._groups:
            spoken = {one.partition(":")[0] for one in _backends(group)}
            few: dict[torch.device, list[Tensor]] = {}
            for piece in pieces:
                if piece.device.type in spoken and piece.numel() >= _SMALL:
                    _broadcast(piece, group)
                    continue
                held = few.setdefault(piece.device, [])
                held.append(piece)
                if sum(one.numel() for one in held) >= _BUCKET:
                    _broadcast_all(few.pop(piece.device), group, spoken)
            for held in few.values():
                _broadcast_all(held, group, spoken)
        for tensor, one in flat:
            if one.data_ptr() != tensor.data_ptr():
                tensor.copy_(one.view(tensor.shape))


def _flat(tensor: Tensor) -> Tensor:
    """Its elements as they lie in memory, where they lie without gaps; else a copy of them."""
    order = sorted(range(tensor.ndim), key=tensor.stride, reverse=True)
    turned = tensor.permute(order)
    return (turned if turned.is_contiguous() else tensor.contiguous()).view(-1)


def _broadcast_all(pieces: list[Tensor], group: Any, spoken: set[str]) -> None:
    sizes = [piece.numel() for piece in pieces]
    one = torch.cat(pieces)
    if one.device.type not in spoken:
        one = one.to(torch.device("cuda", torch.cuda.current_device()))
    _broadcast(one, group)
    for piece, found in zip(pieces, torch.split(one, sizes), strict=True):
        piece.copy_(found)


def _broadcast(tensor: Tensor, group: Any) -> None:
    distributed.broadcast(tensor, distributed.get_global_rank(group, 0), group=group)


def _backends(group: Any) -> list[str]:
    """``device:backend`` of each kind of device whose tensors a group can send."""
    found: str = distributed.get_backend_config(group)
    return found.split(",")


_known: tuple[Any, Any] = (None, None)  # all ranks, and those on this machine


def _on_this_machine() -> Any:
    """The process group of the ranks on this machine; None where there is but one. Made once."""
    global _known
    if not distributed.is_available() or not distributed.is_initialized():
        return None
    world = distributed.group.WORLD
    if _known[0] is not world:
        # torchrun says which machine of its own it is; the rest is for other launchers
        here = os.environ.get("GROUP_RANK"), socket.gethostname(), uuid.getnode()
        where = _gathered(here, world)
        made = None
        for one in dict.fromkeys(where):  # all ranks make all groups
            ranks = [rank for rank, at in enumerate(where) if at == one]
            group = distributed.new_group(ranks)
            if one == here and len(ranks) > 1:
                made = group
        _known = world, made
    return _known[1]


def _rank() -> int:
    return distributed.get_rank()


def _gathered(value: T, group: Any) -> list[T]:
    found: list[Any] = [None] * distributed.get_world_size(group)
    distributed.all_gather_object(found, value, group=group)
    return found
