"""What live modules themselves make of a file's names: their own load hooks, asked without data.

A module may know files of older versions of itself (``_load_from_state_dict``, pre-hooks): it
renames, drops or adds entries of the state_dict before it loads them. Here it gets a state_dict of
``meta`` tensors, from which nothing can be copied, and what it did to that is what is loaded.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase
from torch.nn.modules.instancenorm import _InstanceNorm
from torch.nn.modules.lazy import LazyModuleMixin

from ...core.records import without_records
from ...core.tensors import TensorRef
from ...errors import RefusedError
from ..model_names import Place, places
from .values import live

# Their rules are part of the matching itself.
_KNOWN = (nn.Module, _NormBase, _InstanceNorm)
_LOADERS = {cls._load_from_state_dict for cls in _KNOWN}


class Computed(NamedTuple):
    """A value that a module's own code made from those of the file; ``by`` is its class."""

    by: str


Value = TensorRef | Tensor | Computed


def ask_modules(
    model: nn.Module, state: Mapping[str, TensorRef], metadata: Mapping[str, Any]
) -> dict[str, Value]:
    """The state_dict as the modules' own rules would have it.

    Args:
        state: the file's tensors, by the model's names without wrappers.
        metadata: what the file recorded of each module (``{"version": 2}``), by such names, as
            nodes.

    Raises:
        RefusedError: a module's own code raises.
    """
    current: dict[str, Value] = dict(state)
    for place in list(places(model)):
        if _has_rules(place.module):
            prefix = f"{place.name}." if place.name else ""
            below = {name: value for name, value in current.items() if name.startswith(prefix)}
            for name in below:
                del current[name]
            current.update(_ask(place, prefix, below, metadata.get(place.name)))
    return current


def _has_rules(module: nn.Module) -> bool:
    if isinstance(module, LazyModuleMixin):  # its hook makes the parameters
        return False
    return (
        bool(module._load_state_dict_pre_hooks)
        or type(module)._load_from_state_dict not in _LOADERS
    )


def _ask(place: Place, prefix: str, given: dict[str, Value], entry: Any) -> dict[str, Value]:
    module = place.module
    recorded = live(without_records(entry), f"_metadata.{place.name}")
    # a file of a format that keeps no versions is taken for an old one first, as by torch
    attempts = [recorded] if "version" in recorded else [{}, {"version": module._version}]
    for metadata in attempts:
        with torch.inference_mode(False), torch.no_grad():
            stand_ins = {name: _stand_in(value) for name, value in given.items()}
            asked, before = dict(stand_ins), dict(vars(module))
            try:
                _run(module, asked, prefix, dict(metadata))
                _check_untouched(module, before, stand_ins)
            except Exception as e:
                failed = e
                continue
            known = _Known(stand_ins, given, type(module).__name__)
            return {name: known.value(found) for name, found in asked.items()}
    raise RefusedError(
        f"'{place.name or type(module).__name__}' ({type(module).__name__}) can't load this file: "
        f"its own code raises {type(failed).__name__}: {failed}",
        hint="model.load_state_dict(load(path)) shows where",
    )


def _run(module: nn.Module, state: dict[str, Any], prefix: str, metadata: dict[str, Any]) -> None:
    lists: tuple[list[str], list[str], list[str]] = ([], [], [])
    if type(module)._load_from_state_dict not in _LOADERS:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", ".*which is a no-op.*")  # that is the point of it
            module._load_from_state_dict(state, prefix, metadata, False, *lists)
        return
    for hook in module._load_state_dict_pre_hooks.values():
        hook(state, prefix, metadata, False, *lists)


def _check_untouched(
    module: nn.Module, before: dict[str, Any], stand_ins: dict[str, Tensor]
) -> None:
    """Raises RefusedError where the module took values as they are, and gives it back its own."""
    ours = {id(tensor) for tensor in stand_ins.values()}
    taken = [name for name, value in vars(module).items() if id(value) in ours]
    for name in taken:
        vars(module).pop(name)
        if name in before:
            vars(module)[name] = before[name]
    if taken:
        raise RefusedError(f"it sets '{taken[0]}' from the file by itself")


def _stand_in(value: Value) -> Tensor:
    if isinstance(value, TensorRef):
        dtype = getattr(torch, value.dtype.name, torch.uint8)
        return torch.empty_strided(value.shape, value.stride, dtype=dtype, device="meta")
    return value if isinstance(value, Tensor) else torch.empty(0, device="meta")


class _Known:
    """Tells what an entry became: one of the file's, a view of one, a new value."""

    def __init__(self, stand_ins: dict[str, Tensor], given: dict[str, Value], by: str) -> None:
        self.by_storage = {
            tensor.untyped_storage()._cdata: (tensor, given[name])
            for name, tensor in stand_ins.items()
        }
        self.by = by

    def value(self, found: Any) -> Value:
        if not isinstance(found, Tensor):
            return Computed(self.by)
        if not found.is_meta:
            return found
        stand_in, value = self.by_storage.get(found.untyped_storage()._cdata, (None, None))
        if stand_in is None or value is None or stand_in._version or found.dtype != stand_in.dtype:
            return Computed(self.by)
        if found is stand_in or not isinstance(value, TensorRef):
            return value
        return value.replace(
            shape=tuple(found.shape),
            stride=found.stride(),
            offset=value.offset + found.storage_offset(),
        )
