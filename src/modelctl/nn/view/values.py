"""Values of small tensors on ``meta``: masks, lengths and positions that a forward looks at.

A tensor on meta has a storage without bytes; kept beside it, the bytes are there for all views of
it, whatever autograd makes of the tensor objects. What an operator gives for inputs whose values
are all known is computed for real, too; where one is unknown (a weight, an image) so is the result.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from functools import cache
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from .kernels import each, tensors_in

aten: Any = torch.ops.aten

# Bytes of a tensor whose values are kept: a mask of 2,048 x 1,024 and less.
SMALL = 2 << 20
# Of these the values follow from the arguments, whatever the tensor has that is one of them.
_CONSTANT: dict[Any, Any] = {
    aten.zeros_like: 0, aten.ones_like: 1, aten.new_zeros: 0, aten.new_ones: 1,
    aten.full_like: None, aten.new_full: None,
}  # fmt: skip
# A value of these is no number of the tensor's: undefined, or random.
_UNDEFINED = frozenset(
    (
        *(aten.empty, aten.empty_like, aten.empty_strided, aten.new_empty, aten.new_empty_strided),
        *(aten.empty_permuted, aten.resize_),
    )
)


class Values:
    """The values that are known of tensors on meta."""

    def __init__(self) -> None:
        # by storage; the one on meta is kept, so that no other gets its place
        self._known: dict[int, tuple[Any, Tensor]] = {}
        # of tensors in memory those that got values that nobody knows
        self._stale: dict[int, Any] = {}

    def learn(self, on_meta: Tensor, value: Tensor) -> None:
        """The values of a tensor on meta, where it is small, plain, and all of its storage."""
        if not _is_plain(on_meta) or not _is_plain(value) or value.is_meta:
            return
        storage = on_meta.untyped_storage()
        if storage.nbytes() > SMALL or on_meta.dtype != value.dtype:
            return
        room = torch.zeros(storage.nbytes(), dtype=torch.uint8)
        self._known[storage._cdata] = storage, room
        view = self.of(on_meta)
        if view is None or view.shape != value.shape:
            del self._known[storage._cdata]
            return
        view.copy_(value)

    def on_meta(self, value: Tensor) -> Tensor:
        """A tensor with values as one on meta, of which they are known."""
        if value.is_meta:
            return value
        made = torch.empty_strided(value.size(), value.stride(), dtype=value.dtype, device="meta")
        if not self.is_stale(value):
            self.learn(made, value.detach())
        return made

    def is_stale(self, tensor: Tensor) -> bool:
        """Whether a tensor in memory should have values that are not known."""
        return bool(self._stale) and (
            _is_plain(tensor) and tensor.untyped_storage()._cdata in self._stale
        )

    def knows(self, tensor: Tensor) -> bool:
        """Whether the values of a tensor are known."""
        if not tensor.is_meta:
            return not self.is_stale(tensor)
        return _is_plain(tensor) and tensor.untyped_storage()._cdata in self._known

    def of(self, tensor: Tensor) -> Tensor | None:
        """The values of a tensor, in memory; None where they are not known."""
        if not tensor.is_meta:
            return None if self.is_stale(tensor) else tensor
        if not _is_plain(tensor):
            return None
        found = self._known.get(tensor.untyped_storage()._cdata)
        if found is None:
            return None
        return torch.empty(0, dtype=tensor.dtype).set_(
            found[1].untyped_storage(), tensor.storage_offset(), tensor.size(), tensor.stride()
        )

    def forget(self, tensors: Iterable[Tensor]) -> None:
        """What was written to, by an operator whose result is not known."""
        for tensor in filter(_is_plain, tensors):
            storage = tensor.untyped_storage()
            if tensor.is_meta:
                self._known.pop(storage._cdata, None)
            else:
                self._stale[storage._cdata] = storage

    def computed(self, func: Any, args: Any, kwargs: Any) -> Any:
        """What an operator gives, for real; None where an input is not known, or none is needed.

        What it writes to is written here, too.
        """
        inputs = [*tensors_in(args), *tensors_in(kwargs)]
        if not all(map(self.knows, inputs)) or not _computes(func):
            return None
        real: dict[int, Tensor] = {}
        for one in inputs:
            value = self.of(one)
            if value is None:
                return None
            real[id(one)] = value
        args, kwargs = each((args, kwargs), lambda one: real[id(one)])
        if "device" in kwargs:
            kwargs = {**kwargs, "device": torch.device("cpu")}
        try:
            return func(*args, **kwargs)
        except (RuntimeError, IndexError, ValueError, TypeError, NotImplementedError):
            return None  # of the real kernels, which the one of meta does not ask

    def packed(self, given: Tensor, lengths: Tensor, batch_first: bool) -> Any:
        """``_pack_padded_sequence``: how many of the sequences are as long as each step is for
        Python to know; None where the lengths are not known."""
        known = self.of(lengths)
        if known is None or given.dim() < 2:
            return None
        one = torch.zeros(given.shape[:2])
        data, sizes = aten._pack_padded_sequence(one.unsqueeze(-1), known.cpu(), batch_first)
        shape = (data.shape[0], *given.shape[2:])
        return torch.empty(shape, dtype=given.dtype, device=given.device), sizes

    def constant(self, func: Any, args: Sequence[Any], out: Any) -> None:
        """What the values of a new tensor are that takes only its kind from another."""
        packet = func._overloadpacket
        if packet in _CONSTANT and isinstance(out, Tensor) and _is_small(out):
            value = _CONSTANT[packet]
            if value is None:
                value = args[-1]
            self.learn(out, torch.full(out.shape, value, dtype=out.dtype))

    def follow(self, out: Any, real: Any) -> None:
        """What came out on meta has the values that came out for real."""
        for one, value in zip(tensors_in(out), tensors_in(real), strict=False):
            if one.is_meta and self.of(one) is None:
                self.learn(one, value)


class FromPython(TorchFunctionMode):
    """Where Python's own values become tensors on meta, or tensors become those, below all
    operators."""

    def __init__(self, values: Values) -> None:
        super().__init__()
        self.values = values

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is torch.tensor and str(kwargs.get("device")) == "meta":
            made = torch.tensor(*args, **{**kwargs, "device": "cpu", "requires_grad": False})
            grad = kwargs.get("requires_grad", False)
            return self.values.on_meta(made).requires_grad_(grad)
        if func is Tensor.__getitem__:
            args = (args[0], _indices(args[1]))
        elif func is Tensor.tolist:
            known = self.values.of(args[0])
            return (args[0] if known is None else known).tolist()
        return func(*args, **kwargs)


def _indices(index: Any) -> Any:
    """An index with lists of numbers as tensors."""
    if isinstance(index, tuple):
        return tuple(map(_indices, index))
    if isinstance(index, list) and index and all(type(one) is int for one in index):
        return torch.tensor(index)
    return index


@cache
def _computes(func: Any) -> bool:
    """Whether what an operator gives follows from its inputs."""
    seeded = torch.Tag.nondeterministic_seeded in func.tags
    return func._overloadpacket not in _UNDEFINED and not seeded


@cache
def is_view(func: Any) -> bool:
    """Whether all that comes out are views of what goes in: their values are known with it."""
    returns = func._schema.returns
    return bool(returns) and all(
        one.alias_info is not None and not one.alias_info.is_write for one in returns
    )


def written(func: Any, args: Sequence[Any], kwargs: Any) -> list[Tensor]:
    """The tensors that an operator writes to."""
    found: list[Tensor] = []
    for i, name in _written_at(func):
        found += tensors_in(args[i] if i < len(args) else kwargs.get(name))
    return found


@cache
def _written_at(func: Any) -> list[tuple[int, str]]:
    return [
        (i, argument.name)
        for i, argument in enumerate(func._schema.arguments)
        if argument.alias_info is not None and argument.alias_info.is_write
    ]


def _is_plain(tensor: Tensor) -> bool:
    return (
        tensor.layout == torch.strided
        and not tensor.is_quantized
        and not torch.nn.parameter.is_lazy(tensor)
    )


def _is_small(tensor: Tensor) -> bool:
    return _is_plain(tensor) and tensor.numel() * tensor.element_size() <= SMALL
