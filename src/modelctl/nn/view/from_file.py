"""The live view of a file: the model that its tensors are of, and whether they fit."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import nn

from ...core.checkpoint import Checkpoint
from ...core.dtypes import BY_NAME
from ...core.nodes import ordered_dict
from ...core.storages import MemoryStorage
from ...core.tensors import TensorRef
from ...errors import NoMatchError, RefusedError, UsageError
from ...inspection.architectures.identify import certain_of
from ...inspection.summary.summarize import summarize
from ...storage.streams import is_stream
from ..freezing.freeze import apply_record
from ..loading.file_names import find_prefix
from ..loading.plan import plan_load, removed_names, saved_freeze
from ..loading.report import LoadReport
from ..model_names import slots
from .build import build, load_whole, parse_arguments
from .report import View
from .summary import summary

# What torch computes with; fp8 is for storage alone.
_RUNNABLE = ("float64", "float32", "float16", "bfloat16")


def view(
    ckpt: Checkpoint,
    sizes: Mapping[str, tuple[int, ...]] | Sequence[tuple[int, ...]] | None,
    *,
    arch: str | None = None,
    arch_args: Sequence[str] = (),
    dtypes: Mapping[str, str] | Sequence[str] = (),
    trust: bool = False,
    device: str = "meta",
    depth: int | str = "auto",
    fold: bool | None = None,
    sort: str = "file",
) -> View:
    """The live view of a checkpoint: of ``arch``, of the module that it holds, or of the
    architecture that its tensors certainly are.

    The file's names and shapes are compared with the model first; of its tensors nothing is read.
    The table has the file's dtype where it has one, and its freeze record. ``sizes`` are whole
    shapes of the inputs, batch dimension included. ``trust`` is leave to run what a whole module
    or a TorchScript program holds. ``sort`` is the order of the rows: ``file`` (the model's),
    ``name``, ``params`` or ``size``, the largest first.

    Raises:
        RefusedError: no model without ``arch`` or ``trust``; the model has none of the tensors.
        ForwardError: the forward raised. UsageError, MissingExtraError, ModelctlError: see
            :func:`build`.
    """
    real = device != "meta"
    identified, fit = False, None
    if arch is not None:
        model = build(arch, parse_arguments(arch_args), meta=not real)
    elif arch_args:
        raise UsageError("--arch-arg needs --arch")
    elif (kind := _whole(ckpt)) is not None:
        model = _trusted(ckpt, kind, trust)
    else:
        if ckpt.program is not None:
            raise UsageError(
                "the file holds an exported program, with the shapes that it recorded",
                hint="'modelctl summary' without an input shows them; --arch takes another model",
            )
        best = certain_of(ckpt)
        if best is None:
            raise RefusedError(
                "which model these tensors are of is not certain",
                hint="--arch says it: torchvision:resnet50, package.module:factory, "
                "file.py:factory; 'modelctl identify' shows what comes near",
            )
        arch, arch_args, identified = best.names[0], best.args, True
        model = build(arch, parse_arguments(arch_args), meta=not real)
    if arch is not None:
        fit = _fit(ckpt, model, arch)
    data = summary(
        model,
        sizes,
        dtypes=_dtypes(dtypes),
        batch_size=None,
        depth=depth,
        fold=fold,
        device=device,
    )
    found = View(summarize(ckpt, None, False), data, arch, tuple(arch_args), identified, fit)
    found.sort(sort)
    return found


def names_and_shapes(arch: str, arch_args: Sequence[str] = ()) -> Checkpoint:
    """The state_dict of an architecture as a checkpoint without values, for what compares names
    and shapes (:func:`modelctl.match`).

    Raises:
        UsageError, MissingExtraError, ModelctlError: see :func:`build`.
    """
    state = build(arch, parse_arguments(arch_args)).state_dict()
    nothing = MemoryStorage(b"")
    return Checkpoint(
        ordered_dict(
            {
                name: TensorRef(BY_NAME["float32"], tuple(value.shape), nothing)
                if isinstance(value, torch.Tensor)
                else None
                for name, value in state.items()
            }
        )
    )


def _dtypes(names: Mapping[str, str] | Sequence[str]) -> Any:
    """Dtypes by their names, as ``summary`` takes them.

    Raises:
        UsageError: torch has no such dtype.
    """
    for name in names.values() if isinstance(names, Mapping) else names:
        if not isinstance(getattr(torch, name, None), torch.dtype):
            raise UsageError(f"'{name}' is no dtype", hint="int64 and float32 are")
    if isinstance(names, Mapping):
        return {key: getattr(torch, name) for key, name in names.items()}
    return [getattr(torch, name) for name in names] or None


def _whole(ckpt: Checkpoint) -> str | None:
    """Whether the file holds a module that can be run: ``module``, ``program``."""
    if ckpt.program is not None and ckpt.program.loader is not None:
        return "program"
    models = ckpt.sections.models
    return "module" if models and models[0].is_module else None


def _trusted(ckpt: Checkpoint, kind: str, trust: bool) -> nn.Module:
    path = ckpt.origin.path if ckpt.origin is not None else ""
    if not trust:
        what = {
            "module": "a whole module: to call it, torch unpickles it, which runs whatever the "
            "file says",
            "program": "a TorchScript program: to call it is to run the file's own code",
        }[kind]
        raise RefusedError(
            f"the file holds {what}",
            hint="--trust, if you know who made it; --arch builds the model from code of yours; "
            "without an input 'modelctl summary' runs nothing",
        )
    if is_stream(path):
        raise UsageError("torch runs a file, and stdin is none", hint="call it by its name")
    return load_whole(path, kind)


def _fit(ckpt: Checkpoint, model: nn.Module, arch: str) -> LoadReport:
    section = ckpt.sections.model()
    prefix = find_prefix(section, slots(model))
    try:
        plan = plan_load(model, section, removed=removed_names(ckpt), prefix=prefix)
    except NoMatchError:
        plan = None
    if plan is None or not plan.report.loaded:
        raise RefusedError(
            f"{arch} has none of the file's tensors",
            hint="'modelctl identify' shows what they may be",
        )
    _take_dtype(model, section.tensors())
    record = saved_freeze(ckpt, prefix)
    if record is not None:
        apply_record(model, record, strict=False)
    return plan.report


def _take_dtype(model: nn.Module, tensors: Mapping[str, TensorRef]) -> None:
    """The dtype in which the file has its parameters, where that is one."""
    names = {ref.dtype.name for ref in tensors.values() if ref.dtype.is_floating}
    if len(names) == 1 and (name := names.pop()) in _RUNNABLE:
        model.to(getattr(torch, name))
