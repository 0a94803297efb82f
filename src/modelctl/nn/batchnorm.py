"""BatchNorm that stays in eval mode: its running statistics move even with frozen parameters.

The module's class is exchanged for a subclass of it whose ``train`` keeps eval. That holds
through ``model.train()``, wrapping, copying and pickling, needs no hook on the model, and goes
away without a trace. Pickling a module names the function below instead of the made-up class.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import cache
from typing import Any, cast

from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from .naming import Parameters, places


class _KeepsEval:
    """Goes before a BatchNorm class: eval mode, whatever is asked for."""

    def train(self, mode: bool = True) -> Any:
        return super().train(False)  # type: ignore[misc]

    def __reduce_ex__(self, protocol: Any) -> Any:
        func, args, *rest = cast(tuple[Any, ...], super().__reduce_ex__(protocol))
        plain = _plain(type(self))
        args = tuple(plain if arg is type(self) else arg for arg in args)
        return _made, (plain, func, args), *rest


@cache
def _keeping_eval(cls: type) -> type:
    body: dict[str, Any] = {"__module__": cls.__module__, "__doc__": cls.__doc__}
    becomes = getattr(cls, "cls_to_become", None)
    if becomes is not None:  # a lazy BatchNorm takes this class once it knows its size
        body["cls_to_become"] = _keeping_eval(becomes)
    return type(cls.__name__, (_KeepsEval, cls), body)


def _plain(cls: type) -> type:
    return next(base for base in cls.__mro__[1:] if not issubclass(base, _KeepsEval))


def _made(cls: type, func: Callable[..., Any], args: tuple[Any, ...]) -> Any:
    made = func(*args)
    made.__class__ = _keeping_eval(cls)
    return made


def is_batchnorm(module: nn.Module) -> bool:
    """BatchNorm of any kind: 1d, 2d, 3d, synchronised, lazy, and subclasses."""
    return isinstance(module, _BatchNorm)


def keeps_eval(module: nn.Module) -> bool:
    """True for a BatchNorm that :func:`keep_eval` was called on."""
    return isinstance(module, _KeepsEval)


def keep_eval(module: nn.Module) -> None:
    """Put a BatchNorm in eval mode, to stay there."""
    if not keeps_eval(module):
        module.eval()
        module.__class__ = _keeping_eval(cast(Any, type(module)))


def release(module: nn.Module, training: bool) -> None:
    """Undo :func:`keep_eval`; ``training`` is the mode that the module takes."""
    if keeps_eval(module):
        module.__class__ = cast(Any, _plain(type(module)))
        module.train(training)


# ------------------------------------------------------------------ those of a model


def _batchnorms(model: nn.Module) -> dict[str, nn.Module]:
    return {p.name: p.module for p in places(model) if is_batchnorm(p.module)}


def bare_batchnorms(model: nn.Module) -> dict[str, nn.Module]:
    """BatchNorms without parameters: they have only their own name to be called by."""
    return {
        name: module
        for name, module in _batchnorms(model).items()
        if name and next(module.parameters(recurse=False), None) is None
    }


def all_frozen(model: nn.Module, params: Parameters, touched: Iterable[str]) -> list[str]:
    """The BatchNorms with parameters that are all frozen, one of them in ``touched``."""
    ids = {id(params.by_name[name]) for name in touched}
    found = []
    for name, module in _batchnorms(model).items():
        own = list(module.parameters())
        if any(id(p) in ids for p in own) and not any(p.requires_grad for p in own):
            found.append(name)
    return found


def keep_all_eval(model: nn.Module, names: Iterable[str]) -> list[str]:
    known = _batchnorms(model)
    fresh = [name for name in names if not keeps_eval(known[name])]
    for name in fresh:
        keep_eval(known[name])
    return fresh


def held_batchnorms(model: nn.Module) -> dict[str, nn.Module]:
    """The BatchNorms that are kept in eval, by name."""
    return {n: m for n, m in _batchnorms(model).items() if keeps_eval(m)}


def release_batchnorms(model: nn.Module, named: Iterable[str] = ()) -> list[str]:
    """Let the BatchNorms train that have a trainable parameter, or that are ``named``.

    Each takes the mode of the module it stands in.
    """
    released, wanted = [], set(named)
    for name, _, module, parent in list(places(model)):
        if keeps_eval(module) and (
            name in wanted or any(p.requires_grad for p in module.parameters())
        ):
            release(module, parent.training if parent is not None else True)
            released.append(name)
    return released
