"""Surgery on PyTorch models and checkpoints: read, edit and write them without running them."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .core.checkpoint import Checkpoint as Checkpoint
    from .core.tensors import TensorRef as TensorRef
    from .core.tensors import TensorSpec as TensorSpec
    from .errors import ModelctlError as ModelctlError
    from .files import open as open
    from .files import save as save

__version__ = "0.1.0"

# Resolved on first use: importing modelctl costs nothing, and never imports torch.
_WHERE = {
    "Checkpoint": "core.checkpoint",
    "TensorRef": "core.tensors",
    "TensorSpec": "core.tensors",
    "ModelctlError": "errors",
    "open": "files",
    "save": "files",
}
__all__ = ["__version__", *_WHERE]


def __getattr__(name: str) -> Any:
    from importlib import import_module

    if name not in _WHERE:
        raise AttributeError(f"module 'modelctl' has no attribute '{name}'")
    value = getattr(import_module(f".{_WHERE[name]}", __name__), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(__all__)
