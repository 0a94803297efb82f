"""The tensors of saved states, read to where an optimizer will have them: on the way to a device no
more than a few chunks are in host memory."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from ....core.tensors import TensorRef
from ...loading.reader import Reader, torch_dtype
from ...loading.sharded import filled, is_sharded, local, within
from ...loading.tensors import to_tensors

_Goal = tuple[torch.device, torch.dtype]
_CPU = torch.device("cpu")


class States:
    """Saved states whose tensors are references, each of a parameter or of none: ``add`` says what
    is wanted, ``read`` reads it all at once, and ``made`` gives a state with its tensors."""

    def __init__(self, optimizer: Optimizer) -> None:
        # one with a way of its own says itself where its state goes, and as what
        self._usual = type(optimizer).load_state_dict is Optimizer.load_state_dict
        self._plain: dict[torch.device, dict[int, TensorRef]] = {}
        self._cast: dict[tuple[int, _Goal], tuple[TensorRef, Tensor]] = {}
        self._parts: dict[tuple[int, int], tuple[TensorRef, Tensor]] = {}
        self._made: dict[torch.device, dict[int, Tensor]] = {}

    def add(self, state: Any, parameter: Tensor | None = None) -> None:
        _each(state, "", lambda key, ref: self._want(key, ref, parameter))

    def read(self) -> None:
        """Read what was added.

        Raises:
            UnreadableError: the file's data.
            UnsupportedError: a dtype that this torch lacks.
        """
        for device, refs in self._plain.items():
            self._made[device] = to_tensors(refs, device)
        with Reader() as reader:
            for ref, dest in self._cast.values():
                reader.read(ref, dest)
            for ref, room in self._parts.values():
                part = within(ref, room)
                reader.read(part, local(room), compare=part.shape == ref.shape)

    def made(self, state: Any, parameter: Tensor | None = None) -> Any:
        """A state that was added, for the same parameter."""
        return _each(state, "", lambda key, ref: self._tensor(key, ref, parameter))

    def _want(self, key: Any, ref: TensorRef, parameter: Tensor | None) -> None:
        if parameter is not None and is_by_element(key, ref, parameter):
            room = filled(parameter, local(parameter).device, torch_dtype(ref))
            self._parts[id(ref), id(parameter)] = ref, room
            return
        device, dtype = goal = self._goal(key, ref, parameter)
        if dtype == torch_dtype(ref):
            self._plain.setdefault(device, {})[id(ref)] = ref
        elif (id(ref), goal) not in self._cast:
            made = torch.empty(ref.shape, dtype=dtype, device=device)
            self._cast[id(ref), goal] = ref, made

    def _tensor(self, key: Any, ref: TensorRef, parameter: Tensor | None) -> Tensor:
        if (id(ref), id(parameter)) in self._parts:
            return self._parts[id(ref), id(parameter)][1]
        goal = self._goal(key, ref, parameter)
        known = self._cast.get((id(ref), goal))
        return self._made[goal[0]][id(ref)] if known is None else known[1]

    def _goal(self, key: Any, ref: TensorRef, parameter: Tensor | None) -> _Goal:
        """Where ``Optimizer.load_state_dict`` would bring it, and as what."""
        dtype = torch_dtype(ref)
        if parameter is None or not self._usual or key == "step" or is_sharded(parameter):
            return _CPU, dtype
        return parameter.device, parameter.dtype if parameter.is_floating_point() else dtype


def is_by_element(key: Any, value: TensorRef, parameter: Tensor) -> bool:
    """Whether it is sharded as its parameter is."""
    counts = not value.shape and key == "step"  # of a parameter that is one number, too
    return is_sharded(parameter) and value.shape == tuple(parameter.shape) and not counts


def _each(value: Any, key: Any, of: Callable[[Any, TensorRef], Any]) -> Any:
    """The same with something else for each reference, given with the last key before it."""
    if isinstance(value, TensorRef):
        return of(key, value)
    if isinstance(value, Mapping):
        found = {name: _each(inner, name, of) for name, inner in value.items()}
        return found if type(value) is dict else _like(value, found)
    if type(value) in (list, tuple):
        return type(value)(_each(inner, key, of) for inner in value)
    return value


def _like(value: Mapping[Any, Any], entries: dict[Any, Any]) -> Any:
    made: Any = type(value)()
    for key, inner in entries.items():  # update() of a Counter would count
        made[key] = inner
    return made
