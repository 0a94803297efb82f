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
    from .files import save_parts as save_parts
    from .inspection.architectures.identify import identify as identify
    from .inspection.ls import list_tensors as list_tensors
    from .inspection.matching.match import match as match
    from .inspection.summary.summarize import summarize as summarize
    from .integrity.verify import verify as verify
    from .reports import diff as diff
    from .reports import hash as hash
    from .reports import ls as ls
    from .reports import show as show
    from .reports import summary as summary
    from .rewrite.edit import edit as edit
    from .rewrite.parts import merge_files as merge_files
    from .rewrite.parts import split_file as split_file
    from .rewrite.recipe_files import read_recipe as read_recipe
    from .scanning.scan import scan as scan
    from .surgery.convert import convert as convert
    from .surgery.find_head import find_head as find_head
    from .surgery.freeze import freeze as freeze
    from .surgery.freeze import unfreeze as unfreeze
    from .surgery.head import strip_head as strip_head
    from .surgery.merge import merge as merge
    from .surgery.prefix import add_prefix as add_prefix
    from .surgery.prefix import strip_prefix as strip_prefix
    from .surgery.recipe import apply as apply
    from .surgery.rename import drop as drop
    from .surgery.rename import keep as keep
    from .surgery.rename import rename as rename
    from .surgery.split import split as split

__version__ = "0.1.0"

# Those that take an opened checkpoint first, and no path.
_OF_CHECKPOINTS = frozenset(
    (
        *("strip_prefix", "add_prefix", "rename", "keep", "drop", "strip_head", "find_head"),
        *("freeze", "unfreeze", "convert", "split", "apply", "summarize", "list_tensors"),
        *("identify", "match", "save"),
    )
)
# Resolved on first use: importing modelctl costs nothing, and never imports torch.
_WHERE = {
    "Checkpoint": "core.checkpoint",
    "TensorRef": "core.tensors",
    "TensorSpec": "core.tensors",
    "ModelctlError": "errors",
    "open": "files",
    "save": "files",
    "strip_prefix": "surgery.prefix",
    "add_prefix": "surgery.prefix",
    "rename": "surgery.rename",
    "keep": "surgery.rename",
    "drop": "surgery.rename",
    "strip_head": "surgery.head",
    "find_head": "surgery.find_head",
    "freeze": "surgery.freeze",
    "unfreeze": "surgery.freeze",
    "convert": "surgery.convert",
    "merge": "surgery.merge",
    "split": "surgery.split",
    "save_parts": "files",
    "apply": "surgery.recipe",
    "edit": "rewrite.edit",
    "merge_files": "rewrite.parts",
    "split_file": "rewrite.parts",
    "read_recipe": "rewrite.recipe_files",
    "summarize": "inspection.summary.summarize",
    "list_tensors": "inspection.ls",
    "summary": "reports",
    "hash": "reports",
    "verify": "integrity.verify",
    "ls": "reports",
    "show": "reports",
    "diff": "reports",
    "identify": "inspection.architectures.identify",
    "match": "inspection.matching.match",
    "scan": "scanning.scan",
}
__all__ = ["__version__", *_WHERE]


def __getattr__(name: str) -> Any:
    from importlib import import_module

    if name not in _WHERE:
        raise AttributeError(f"module 'modelctl' has no attribute '{name}'")
    value = getattr(import_module(f".{_WHERE[name]}", __name__), name)
    if name in _OF_CHECKPOINTS:
        value = import_module(".core.checkpoint", __name__).of_checkpoint(value)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(__all__)
