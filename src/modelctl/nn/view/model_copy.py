"""A copy of a model that shares nothing which a forward may change: on ``meta``, or with values."""

from __future__ import annotations

import functools
import io
import types
import warnings
import weakref
from collections import OrderedDict, deque
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from ..model_names import is_lazy, unwrap

_ATOMS = frozenset({bool, int, float, str, type(None)})  # most of what a module has


class Copy(NamedTuple):
    """A copied model, and its tensors by the ids of those of the original.

    ``with_values`` are the copied tensors that are no parameters, each with the original.
    """

    model: nn.Module
    tensors: Mapping[int, Tensor]
    with_values: Sequence[tuple[Tensor, Tensor]] = ()


def structural_copy(model: nn.Module, device: torch.device) -> Copy:
    """The same modules, hooks and settings with tensors of their own on another device.

    On ``meta`` tensors have no values, so that this takes milliseconds for a model of any size.
    Copied are modules, and in their attributes tensors, containers, bound methods, partials, and
    objects of classes from the packages that the modules' classes are from. Anything else (a
    trainer, a tokenizer) is shared: what a forward does to such an object, or to a cache outside
    the model, it does to the original's. Wrappers inside (``torch.compile``) are taken off.
    """
    copier = _Copier(device, model)
    copied: nn.Module = copier.copy(model)
    tensors = {key: one for key, one in copier.done.items() if isinstance(one, Tensor)}
    pairs = [
        (tensors[id(one)], one)
        for one in copier.kept
        if id(one) in tensors and not isinstance(one, nn.Parameter)
    ]
    return Copy(copied, tensors, pairs)


def _package(kind: type) -> str:
    return kind.__module__.partition(".")[0]


def _is_code(value: Any) -> bool:
    return isinstance(value, type | types.FunctionType | types.ModuleType)


class _Copier:
    def __init__(self, device: torch.device, model: nn.Module) -> None:
        self.device = device
        # whose objects are the model's: a trainer's or a tokenizer's are not
        self.packages = {_package(type(module)) for module in model.modules()} - {"torch"}
        self.done: dict[int, Any] = {}
        self.kept: list[Any] = []  # so that no id is used twice

    def copy(self, value: Any) -> Any:
        if type(value) in _ATOMS:
            return value
        found = self.done.get(id(value))
        if found is not None:
            return found
        how = self._how(value)
        return value if how is None else how(value)

    def _how(self, value: Any) -> Callable[[Any], Any] | None:
        if isinstance(value, torch.jit.ScriptModule):
            return self._script
        if isinstance(value, nn.Module):
            return self._module
        if isinstance(value, Tensor):
            return self._tensor
        kind = type(value)
        if issubclass(kind, dict):
            return self._dict
        if kind in (list, set, tuple, deque) or (
            issubclass(kind, tuple) and hasattr(kind, "_fields")
        ):
            return self._items
        if kind is types.MethodType:
            return self._method
        if kind is functools.partial:
            return self._partial
        if kind is RemovableHandle:
            return self._handle
        if _package(kind) in self.packages and hasattr(value, "__dict__") and not _is_code(value):
            return self._object
        return None

    def _keep(self, value: Any, copied: Any) -> Any:
        self.done[id(value)] = copied
        self.kept.append(value)
        return copied

    def _module(self, module: nn.Module) -> nn.Module:
        if (inner := unwrap(module)) is not module:
            unwrapped: nn.Module = self._keep(module, self.copy(inner))
            return unwrapped
        # a GraphModule's own __new__ makes a new class
        copied: nn.Module = self._keep(module, object.__new__(type(module)))
        inside = copied.__dict__
        for name, value in vars(module).items():
            kind = type(value)
            if kind in _ATOMS:
                inside[name] = value
            elif kind in (dict, OrderedDict) and not value:  # hooks, mostly
                inside[name] = kind()
            else:
                # what Module.compile() left there would call the original
                inside[name] = None if name == "_compiled_call_impl" else self.copy(value)
        return copied

    def _object(self, value: Any) -> Any:
        """A helper of the model's own: a cache in it is not to hold what the copy computes."""
        try:
            copied = object.__new__(type(value))
        except TypeError:  # not made by Python alone
            return value
        self._keep(value, copied)
        copied.__dict__.update({name: self.copy(inner) for name, inner in vars(value).items()})
        return copied

    def _script(self, module: Any) -> Any:
        """By way of a file: a ScriptModule can't be moved to meta."""
        file = io.BytesIO()
        jit: Any = torch.jit
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)  # torch would rather not
            jit.save(module, file)
            file.seek(0)
            return self._keep(module, jit.load(file, map_location=self.device))

    def _tensor(self, tensor: Tensor) -> Tensor:
        with torch.no_grad():
            copied = self._values(tensor)
        if copied.requires_grad != tensor.requires_grad:
            copied.requires_grad_(tensor.requires_grad)
        if isinstance(tensor, nn.Parameter) and not isinstance(copied, nn.Parameter):
            copied = nn.Parameter(copied, tensor.requires_grad)
        for name, value in vars(tensor).items():
            copied.__dict__.setdefault(name, value)
        self._keep(tensor, copied)
        return copied

    def _values(self, tensor: Tensor) -> Tensor:
        if is_lazy(tensor):
            kind: Any = type(tensor)
            made: Tensor = kind(tensor.requires_grad, self.device, tensor.dtype)
            return made
        plain = type(tensor) in (Tensor, nn.Parameter) and tensor.layout == torch.strided
        if self.device.type == "meta" and plain and not tensor.is_quantized:
            return torch.empty_strided(
                tensor.size(), tensor.stride(), dtype=tensor.dtype, device="meta"
            )
        moved = tensor.detach().to(self.device)
        return moved.clone() if moved.device.type != "meta" else moved

    def _dict(self, found: dict[Any, Any]) -> Any:
        try:
            copied = found.copy()  # keeps the class (OrderedDict) and what it does
        except Exception:
            return found
        self._keep(found, copied)
        for key, value in found.items():
            new = self.copy(value)
            if new is not value:
                copied[key] = new
        return copied

    def _items(self, found: Any) -> Any:
        if isinstance(found, list | deque):
            empty: Any = deque(maxlen=found.maxlen) if isinstance(found, deque) else []
            copied = self._keep(found, empty)
            copied.extend(self.copy(value) for value in found)
            return copied
        values = [self.copy(value) for value in found]
        if isinstance(found, set):
            return self._keep(found, set(values))
        return self._keep(found, type(found)(*values) if hasattr(found, "_fields") else (*values,))

    def _method(self, method: types.MethodType) -> Any:
        return types.MethodType(method.__func__, self.copy(method.__self__))

    def _partial(self, call: functools.partial[Any]) -> Any:
        keywords = {name: self.copy(value) for name, value in call.keywords.items()}
        made = functools.partial(self.copy(call.func), *map(self.copy, call.args), **keywords)
        made.__dict__.update(call.__dict__)
        return made

    def _handle(self, handle: Any) -> Any:
        """A hook's handle removes it from the module that it is of: from the copied one here."""
        copied = self._keep(handle, RemovableHandle.__new__(RemovableHandle))
        copied.__dict__.update(handle.__dict__)
        copied.hooks_dict_ref = self._reference(handle.hooks_dict_ref)
        extra = getattr(handle, "extra_dict_ref", ())
        copied.extra_dict_ref = tuple(self._reference(one) for one in extra)
        return copied

    def _reference(self, reference: Any) -> Any:
        hooks = reference()
        return reference if hooks is None else weakref.ref(self.copy(hooks))
