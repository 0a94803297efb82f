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
        'modelctl.nn needs torch: pip install "modelctl[torch]"', hint=None
    ) from None

if TYPE_CHECKING:
    from .devices import choose_device as choose_device
    from .devices import to_device as to_device
    from .devices import visible_devices as visible_devices
    from .freezing import Frozen as Frozen
    from .freezing import Trainable as Trainable
    from .freezing import apply_freeze as apply_freeze
    from .freezing import freeze as freeze
    from .freezing import freeze_record as freeze_record
    from .freezing import trainable as trainable
    from .groups import describe_groups as describe_groups
    from .groups import param_groups as param_groups
    from .loading import LoadReport as LoadReport
    from .loading import load as load
    from .loading import load_into as load_into
    from .model_summary import ModelSummary as ModelSummary
    from .model_summary import summary as summary
    from .modes import evaluating as evaluating
    from .naming import unwrap as unwrap
    from .resumed import Resumed as Resumed
    from .resuming import resume as resume
    from .saving import save_checkpoint as save_checkpoint
    from .schedules import warmup_cosine as warmup_cosine
    from .seeds import seed_everything as seed_everything
    from .thawing import unfreeze as unfreeze
    from .tracing import ForwardError as ForwardError

# Resolved on first use, like the names of modelctl itself.
_WHERE = {
    "ForwardError": "tracing",
    "Frozen": "freezing",
    "LoadReport": "loading",
    "ModelSummary": "model_summary",
    "Resumed": "resumed",
    "Trainable": "freezing",
    "apply_freeze": "freezing",
    "choose_device": "devices",
    "describe_groups": "groups",
    "evaluating": "modes",
    "freeze": "freezing",
    "freeze_record": "freezing",
    "load": "loading",
    "load_into": "loading",
    "param_groups": "groups",
    "resume": "resuming",
    "save_checkpoint": "saving",
    "seed_everything": "seeds",
    "summary": "model_summary",
    "to_device": "devices",
    "trainable": "freezing",
    "unfreeze": "thawing",
    "unwrap": "naming",
    "visible_devices": "devices",
    "warmup_cosine": "schedules",
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
