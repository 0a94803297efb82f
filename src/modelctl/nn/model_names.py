"""What the tensors of a live model are called: wrappers ignored, tied ones once.

A live model shows its wrappers (DataParallel, DistributedDataParallel, ``torch.compile``,
``checkpoint_wrapper``), so a child that is really called ``module`` keeps its name here; for
names from elsewhere (files, records, patterns) only the text tells, and an exact match comes
first.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Iterable, Iterator
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from ..core.names import RESERVED, WRAPPERS, Patterns, as_list, select, unwrapped
from ..errors import NoMatchError, UsageError

_PARAMETRIZED = re.compile(r"(?:^|(?<=\.))parametrizations\.([^.]+)\.original\d*$")
_WRAPPED_REGEX = re.compile(rf"^(\^?)(?:(?:{'|'.join(WRAPPERS)})\\?\.)+")


def _wrapped(module: nn.Module) -> tuple[str, nn.Module] | None:
    """The child of a wrapper, with its name; None for any other module."""
    if isinstance(module, nn.DataParallel | DistributedDataParallel):
        return "module", module.module
    if isinstance(module, torch.jit.ScriptModule):
        return None
    for name in RESERVED:
        inner = module._modules.get(name)
        if inner is not None:
            return name, inner
    return None


def unwrap(model: nn.Module) -> nn.Module:
    """The model inside DataParallel, DistributedDataParallel, and the modules of
    ``torch.compile`` and ``checkpoint_wrapper``."""
    _check_module(model)
    while (found := _wrapped(model)) is not None:
        model = found[1]
    return model


def _check_module(model: object) -> None:
    if not isinstance(model, nn.Module):
        raise UsageError(
            f"{type(model).__name__} is no nn.Module",
            hint="give the model itself, not its state_dict or its parameters",
        )


def kind_of(module: nn.Module) -> str:
    """The name of its class; of a TorchScript module that of the class it was made from."""
    if isinstance(module, torch.jit.ScriptModule):
        return str(getattr(module, "original_name", type(module).__name__))
    return type(module).__name__


class Place(NamedTuple):
    """A module where it stands: its name without and with wrappers, and what it stands in."""

    name: str
    raw: str
    module: nn.Module
    parent: nn.Module | None


def places(model: nn.Module) -> Iterator[Place]:
    """Every module under each of its names, parents first; wrappers themselves left out.

    Raises:
        UsageError: not a module.
    """
    _check_module(model)
    stack = [Place("", "", model, None)]
    while stack:
        place = stack.pop()
        found = _wrapped(place.module)
        if found is not None:
            name, inner = found
            stack.append(Place(place.name, _join(place.raw, name), inner, place.module))
            continue
        yield place
        stack.extend(
            Place(_join(place.name, name), _join(place.raw, name), child, place.module)
            for name, child in reversed(place.module._modules.items())
            if child is not None
        )


def _join(path: str, name: str) -> str:
    return f"{path}.{name}" if path else name


class Slot(NamedTuple):
    """A parameter or buffer where it stands: ``getattr(owner, attr)``.

    ``name`` is without wrappers, ``raw`` is what ``named_parameters`` calls it; ``state_dict``
    does, too, without ``checkpoint_wrapper``'s segment. ``persistent`` is False for a buffer that
    a state_dict leaves out.
    """

    name: str
    raw: str
    owner: nn.Module
    attr: str
    tensor: Tensor
    persistent: bool = True


def slots(model: nn.Module) -> list[Slot]:
    """Every parameter and buffer under each of its names, in ``state_dict``'s order."""
    _check_module(model)
    _reshard(model)
    found = []
    for name, raw, module, _ in places(model):
        left_out = module._non_persistent_buffers_set
        for attr, tensor in (*module._parameters.items(), *module._buffers.items()):
            if tensor is not None:
                full, full_raw = _join(name, attr), _join(raw, attr)
                found.append(Slot(full, full_raw, module, attr, tensor, attr not in left_out))
    return found


def _reshard(model: nn.Module) -> None:
    """Have FSDP2 put its own parameters back: after a forward, those that were gathered for it may
    stand in their place, and what is done to these is lost."""
    homes = ("torch.distributed.fsdp", "torch.distributed._composable.fsdp")
    kinds = [getattr(sys.modules.get(home), "FSDPModule", None) for home in homes]
    known = tuple(kind for kind in kinds if isinstance(kind, type))
    for module in model.modules() if known else ():
        if isinstance(module, known):
            cast(Any, module).reshard()


class Parameters:
    """The parameters of a model, each once under its first name (wrappers left out).

    Attributes:
        by_name: the parameters by their first names, in the model's order.
        called: for every name that one can go by (those of tied ones, and ``fc.weight`` for
            ``fc.parametrizations.weight.original0``) the first names that it stands for.
    """

    def __init__(self, model: nn.Module) -> None:
        self.by_name: dict[str, nn.Parameter] = {}
        self.called: dict[str, list[str]] = {}
        first: dict[int, str] = {}
        plain: list[tuple[str, str]] = []
        for slot in slots(model):
            if not isinstance(slot.tensor, nn.Parameter):
                continue
            name = first.setdefault(id(slot.tensor), slot.name)
            self.by_name.setdefault(name, slot.tensor)
            self.called[slot.name] = [name]
            if _PARAMETRIZED.search(slot.name):
                plain.append((_PARAMETRIZED.sub(r"\1", slot.name), name))
        for alias, name in plain:
            if name not in self.called.setdefault(alias, []):
                self.called[alias].append(name)
        self._names = {id(parameter): name for name, parameter in self.by_name.items()}

    def name_of(self, parameter: Tensor) -> str | None:
        """The first name of a parameter, by identity; None where it is not the model's."""
        return self._names.get(id(parameter))

    def select(
        self, patterns: Patterns, *, exclude: Patterns = (), regex: bool = False
    ) -> list[str]:
        """First names of the parameters that the patterns mean, in the model's order.

        Raises:
            NoMatchError: a pattern, or all together, match nothing.
            UsageError: not a regular expression.
        """
        taken = self._matched(patterns, regex)
        left = taken - self._matched(exclude, regex) if as_list(exclude) else taken
        if not left:
            raise NoMatchError(
                f"nothing is left: what {as_list(patterns)} match, {as_list(exclude)} take away"
            )
        return [name for name in self.by_name if name in left]

    def _matched(self, patterns: Patterns, regex: bool) -> set[str]:
        wanted = [plain_pattern(pattern, self.called, regex) for pattern in as_list(patterns)]
        if not wanted:
            raise NoMatchError("no pattern is given", hint="'*' means every parameter")
        found = select(self.called, wanted, regex=regex, what="parameter")
        return {name for alias in found for name in self.called[alias]}


def plain_pattern(pattern: str, names: Iterable[str], regex: bool = False) -> str:
    """The pattern without wrapper prefixes, unless a name here really begins with one."""
    if any(name.split(".", 1)[0] in WRAPPERS for name in names):
        return pattern
    return _WRAPPED_REGEX.sub(r"\1", pattern) if regex else unwrapped(pattern)


def is_lazy(tensor: Tensor) -> bool:
    """True for a parameter or buffer of a lazy module that has no shape yet."""
    return bool(torch.nn.parameter.is_lazy(tensor))


def numel(tensor: Tensor) -> int:
    """Elements of a tensor; 0 for one that has no shape yet."""
    return 0 if is_lazy(tensor) else tensor.numel()
