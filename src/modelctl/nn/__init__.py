"""modelctl on live ``torch.nn.Module``s: freezing, param groups, loading, saving and resuming.

The only part of modelctl that imports torch, and the only one that needs it.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from ..errors import MissingExtraError

try:
    import torch as _torch  # noqa: F401
except ModuleNotFoundError as e:
    if e.name != "torch":
        raise
    raise MissingExtraError(
        "modelctl.nn needs torch: pip install -e '.[torch]', as README says", hint=None
    ) from None

if TYPE_CHECKING:
    from .devices import choose_device as choose_device
    from .devices import to_device as to_device
    from .devices import visible_devices as visible_devices
    from .freezing.freeze import Frozen as Frozen
    from .freezing.freeze import Trainable as Trainable
    from .freezing.freeze import apply_freeze as apply_freeze
    from .freezing.freeze import freeze as freeze
    from .freezing.freeze import freeze_record as freeze_record
    from .freezing.freeze import trainable as trainable
    from .freezing.unfreeze import unfreeze as unfreeze
    from .loading.load import load as load
    from .loading.load import load_into as load_into
    from .loading.on_meta import on_meta as on_meta
    from .loading.report import LoadReport as LoadReport
    from .model_names import unwrap as unwrap
    from .modes import evaluating as evaluating
    from .optim.groups import describe_groups as describe_groups
    from .optim.groups import param_groups as param_groups
    from .optim.schedulers import warmup_cosine as warmup_cosine
    from .seeds import seed_everything as seed_everything
    from .training.report import Resumed as Resumed
    from .training.resume import resume as resume
    from .training.save import save_checkpoint as save_checkpoint
    from .tuning.head import NewHead as NewHead
    from .tuning.head import replace_head as replace_head
    from .tuning.lr_range import LrRange as LrRange
    from .tuning.lr_range import lr_find as lr_find
    from .tuning.pixels import mean_std as mean_std
    from .view.summary import ModelSummary as ModelSummary
    from .view.summary import summary as summary
    from .view.trace import ForwardError as ForwardError

# Resolved on first use, like the names of modelctl itself.
_WHERE = {
    "ForwardError": "view.trace",
    "Frozen": "freezing.freeze",
    "LoadReport": "loading.report",
    "LrRange": "tuning.lr_range",
    "ModelSummary": "view.summary",
    "NewHead": "tuning.head",
    "Resumed": "training.report",
    "Trainable": "freezing.freeze",
    "apply_freeze": "freezing.freeze",
    "choose_device": "devices",
    "describe_groups": "optim.groups",
    "evaluating": "modes",
    "freeze": "freezing.freeze",
    "freeze_record": "freezing.freeze",
    "load": "loading.load",
    "load_into": "loading.load",
    "lr_find": "tuning.lr_range",
    "mean_std": "tuning.pixels",
    "on_meta": "loading.on_meta",
    "param_groups": "optim.groups",
    "replace_head": "tuning.head",
    "resume": "training.resume",
    "save_checkpoint": "training.save",
    "seed_everything": "seeds",
    "summary": "view.summary",
    "to_device": "devices",
    "trainable": "freezing.freeze",
    "unfreeze": "freezing.unfreeze",
    "unwrap": "model_names",
    "visible_devices": "devices",
    "warmup_cosine": "optim.schedulers",
}
__all__ = [*_WHERE]


def __getattr__(name: str) -> Any:
    from importlib import import_module

    if name not in _WHERE:
        raise AttributeError(f"module 'modelctl.nn' has no attribute '{name}'")
    value = getattr(import_module(f".{_WHERE[name]}", __name__), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(__all__)
