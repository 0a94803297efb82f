"""BatchNorm that stays in eval mode: its running statistics move even with frozen parameters.

Its ``train`` is covered by an attribute of that name, which takes a mode and does nothing:
``bool``. That holds through ``model.train()``, wrapping, copying and pickling. The class stays the
plain one, no hook is needed, and a pickle of the module names nothing but ``bool``: it opens, and
holds, without modelctl.
"""

from __future__ import annotations

from collections.abc import Iterable

from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from ..model_names import Parameters, Place, places

# On a module: the children that were put in lasting eval. What rebuilds them
# (``convert_sync_batchnorm``) copies the values it knows, and loses the hold without a word.
_KEPT = "_modelctl_kept_eval"


def is_batchnorm(module: nn.Module) -> bool:
    """BatchNorm of any kind: 1d, 2d, 3d, synchronised, lazy, and subclasses."""
    return isinstance(module, _BatchNorm)


def keeps_eval(module: nn.Module) -> bool:
    """True for a BatchNorm that :func:`keep_eval` was called on."""
    return vars(module).get("train") is bool


def keep_eval(module: nn.Module) -> None:
    """Put a BatchNorm in eval mode, to stay there; its ``train`` and ``eval`` do nothing then."""
    if not keeps_eval(module):
        module.eval()
        vars(module)["train"] = bool


def release(module: nn.Module, training: bool) -> None:
    """Undo :func:`keep_eval`; ``training`` is the mode that the module takes."""
    if keeps_eval(module):
        del vars(module)["train"]
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
    for place in places(model):
        if keeps_eval(place.module):
            _note(place, True)
    return fresh


def _note(place: Place, kept: bool) -> None:
    """Note in the module around a BatchNorm that it is kept in eval, or no longer."""
    if place.parent is None:
        return
    around, child = vars(place.parent), place.raw.rpartition(".")[2]
    others = [name for name in around.pop(_KEPT, ()) if name != child]
    if kept or others:
        around[_KEPT] = [*others, child] if kept else others


def lost_batchnorms(model: nn.Module) -> list[str]:
    """The frozen BatchNorms that were kept in eval, and were rebuilt without that since."""
    return [
        place.name
        for place in places(model)
        if is_batchnorm(place.module)
        and not keeps_eval(place.module)
        and place.parent is not None
        and place.raw.rpartition(".")[2] in vars(place.parent).get(_KEPT, ())
        and not any(p.requires_grad for p in place.module.parameters())
    ]


def held_batchnorms(model: nn.Module) -> dict[str, nn.Module]:
    """The BatchNorms that are kept in eval, by name."""
    return {n: m for n, m in _batchnorms(model).items() if keeps_eval(m)}


def release_batchnorms(model: nn.Module, named: Iterable[str] = ()) -> list[str]:
    """Let the BatchNorms train that have a trainable parameter, or that are ``named``.

    Each takes the mode of the module it stands in.
    """
    released, wanted = [], set(named)
    for place in list(places(model)):
        name, _, module, parent = place
        if is_batchnorm(module) and (
            name in wanted or any(p.requires_grad for p in module.parameters())
        ):
            _note(place, False)
            if keeps_eval(module):
                release(module, parent.training if parent is not None else True)
                released.append(name)
    return released
