"""Weights from a file into a live model: tensor by tensor, checked before anything changes."""

from __future__ import annotations

import os
from collections import OrderedDict
from contextlib import ExitStack
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from ...core.checkpoint import Checkpoint
from ...core.pages import told
from ...core.sections import StateDict
from ...core.tree import path_text
from ...errors import AmbiguousError, UsageError
from ...files import open as open_checkpoint
from ...progress import on_terminal
from ...storage.far.urls import shown
from ..devices import Device, choose_device
from ..freezing.freeze import apply_record, check_record
from ..model_names import slots
from .file_names import find_either, given_prefix, only_plain
from .plan import base_names, plan_load, removed_names, saved_freeze
from .report import LoadReport
from .sharded import is_sharded
from .tensors import to_tensors
from .together import OneReader, Together, tensors_of
from .values import live

Path = str | os.PathLike[str]
# ------------------------------------------------------------------ load


def load(
    path: Path, *, device: str | int | torch.device = "cpu", key: str | None = None
) -> dict[str, Any]:
    """The model's state_dict in a file of any format that modelctl reads; nothing is run.

    Names are the file's own, and the versions of modules that it recorded go along
    (``_metadata``), so that ``load_state_dict`` treats it as what ``torch.load`` gives. Tied
    tensors are one tensor; views of one storage share it where that reads no more than they
    need. ``device`` is where the tensors go, whatever device they were saved on, chosen as by
    :func:`choose_device`. ``key`` is the dotted path of the state_dict, where the one that is
    found isn't meant.

    Raises:
        UnreadableError: the file.
        UnsupportedError: a dtype that this torch lacks; a sparse, quantized or wrapped tensor;
            an extra state that is an object.
        UsageError: not a device, or none that is there.
        NoMatchError, AmbiguousError: no state_dict, or which one is not clear.
    """
    if device is None:
        raise UsageError("device=None is no device", hint="device='cpu' is the default")
    where = choose_device(device)
    with open_checkpoint(path, key=key) as ckpt:
        section = chosen_model(ckpt)
        only_plain(section, [*section.composites()])
        tensors = to_tensors(section.tensors(), where)
        state: OrderedDict[str, Any] = OrderedDict(
            (name, tensors[name] if name in tensors else live(entry, name))
            for name, entry in section.entries.items()
            if isinstance(name, str)
        )
        if section.metadata:
            recorded = live(section.metadata, "_metadata")
            state.__dict__["_metadata"] = OrderedDict(recorded)
        return state


def chosen_model(ckpt: Checkpoint) -> StateDict:
    """The model's state_dict in a file.

    Raises:
        NoMatchError, AmbiguousError: there is none, or which one is not clear.
    """
    try:
        return ckpt.sections.model()
    except AmbiguousError as e:
        paths = [path_text(model.path) for model in ckpt.sections.models]
        e.hint = f"pick one with key=, as key={paths[0]!r}"
        raise


# ------------------------------------------------------------------ load_into


def load_into(
    model: nn.Module,
    path: Path,
    *,
    device: Device = None,
    dtype: torch.dtype | None = None,
    on_mismatch: str = "error",
    key: str | None = None,
    prefix: str | None = None,
    assign: bool = False,
    resize_pos_embed: bool = False,
    read_once: bool = False,
    progress: bool = True,
) -> LoadReport:
    """Load a file's weights into a live model, and apply the file's freeze record.

    Values go straight into the model's parameters and buffers, one tensor at a time through
    bounded memory; nothing that the file names is run. Parameters stay the same objects, except
    those on ``meta``, which are made anew. Wrapper prefixes on either side don't matter; a tied
    tensor is loaded by any of its names. Files of older versions load as ``load_state_dict``
    would load them: the modules' own load hooks are asked what becomes of the names (on tensors
    without data, before anything is read), and their post-hooks are run. A freeze record only
    freezes (see :func:`apply_freeze`). Of a file of what trains alone (``save_checkpoint(...,
    only="trainable")``) all else keeps its values.

    Of a model of DTensors (FSDP2, tensor parallel) all ranks call this, and each reads its own
    parts alone; those on ``meta`` come to the device of their mesh. Checksums of whole tensors are
    not compared then. What one rank is refused, all are: the others raise RefusedError.

    Args:
        device: where the whole model goes, chosen as by :func:`choose_device`; by default each
            tensor stays where it is, and those on ``meta`` go to the CPU.
        dtype: what the model's floating tensors become; by default each keeps its own, and the
            file's values are converted to that.
        on_mismatch: ``"error"`` changes nothing unless every name and shape fits; ``"skip"``
            loads what fits and reports the rest.
        key: the dotted path of the state_dict, where the one that is found isn't meant.
        prefix: what the names that are meant begin with, to be taken off (``"teacher."``): no
            other names count then. By default a prefix that the model lacks is found where the
            names fit only without it (Lightning's ``model.``), and the report says so; likewise
            one that the file lacks, which has a part of the model (``bert.`` before a head).
        assign: give the model new tensors in place of its own, for the CPU mapped from the file
            and not copied: what is in another dtype than the model's, deflated, far, in pieces
            or not aligned is read as ever. What is written to a parameter then stays in this
            process, and the file as it is. It must not be cut short or overwritten while the
            model lives (replaced by another one under its name it may be), and checksums are not
            compared. Build the optimizer afterwards: it would hold the old parameters.
        resize_pos_embed: interpolate learned position embeddings (ViT) of another grid of patches,
            bicubic with antialias; tokens before the grid are kept. By default they don't fit.
        read_once: for ranks of ``torch.distributed`` that each hold the whole model (as for
            DistributedDataParallel), and all call this: on each machine the first of them reads,
            and sends the values to the others; what it is refused, or finds damaged, all are told,
            and the others' models are as they were. Without a process group it changes nothing.
            It pays where reading is slow, not where all read from one page cache.
        progress: show a bar on stderr where that is a terminal and it takes more than a second.

    Raises:
        RefusedError: names or shapes don't fit (with ``"error"``), nothing fits, a module's own
            code refuses the file, something would stay on ``meta``, freeze inside
            DistributedDataParallel, or ranks that are to ``read_once`` have different models;
            nothing was changed.
        AmbiguousError: which state_dict, or which prefix, is not clear.
        NoMatchError: no state_dict; no name with the prefix.
        UsageError: not a device, none that is there, or ``meta``; not a floating dtype; not a
            way to treat mismatches; ``assign`` or ``read_once`` of a model of DTensors, or both.
        CollisionError: two of the file's names mean the same tensor.
        UnsupportedError: a tensor that is needed is sparse, quantized or wrapped, in the file or
            in the model; a DTensor of sums (``Partial``); a module's own code computes it.
        UnreadableError: the file; where its structure is sound but its data can't be read, the
            model may have been loaded in part.
    """
    once = OneReader() if read_once else None
    held = tensors_of(model)
    ranks = once or Together(*held)
    with ExitStack() as stack:
        with ranks.agreeing("before anything was changed"):
            if on_mismatch not in ("error", "skip"):
                raise UsageError(f"on_mismatch is 'error' or 'skip', not {on_mismatch!r}")
            where = _device(device)
            _check_dtype(dtype)
            if assign and any(map(is_sharded, held)):
                raise UsageError(
                    "assign=True maps whole tensors, and the model has DTensors",
                    hint="without it each rank reads its own parts alone",
                )
            if read_once:
                _check_read_once(held, assign)
            ckpt = stack.enter_context(open_checkpoint(path, key=key))
            section = chosen_model(ckpt)
            alone = prefix is not None
            added = ""
            if prefix is None:
                start, added = find_either(section, slots(model))
            else:
                start = given_prefix(section, prefix)
            gone = removed_names(ckpt)
            record = saved_freeze(ckpt, start, alone, added)
            plan = plan_load(
                *(model, section),
                removed=gone,
                prefix=start,
                alone=alone,
                added=added,
                resize=resize_pos_embed,
                base=base_names(ckpt, model, record),
            )
            plan.check(shown(path), strict=on_mismatch == "error", device=where)
            if record is not None and record.freezes:
                check_record(model, record)
        if once is not None:
            once.check_alike(plan.goals(where, dtype))
        with ranks.agreeing("while it read, and the model may be loaded in part"):
            with on_terminal(progress) as bar:
                reading = told(bar, os.path.basename(shown(path)))
                plan.run(where, dtype, reading, assign=assign, once=once)
            if record is None or not record.freezes:
                return plan.report
            return replace(plan.report, frozen=apply_record(model, record, strict=False))


def _device(device: Device) -> torch.device | None:
    where = None if device is None else choose_device(device)
    if where is not None and where.type == "meta":
        raise UsageError(
            "device='meta' holds no values: nothing can be loaded there",
            hint="a model that was built on meta loads onto the CPU, or onto device='auto'",
        )
    return where


def _check_read_once(held: list[Tensor], assign: bool) -> None:
    if any(map(is_sharded, held)):
        raise UsageError(
            "read_once=True is for ranks that hold the same values, and the model has DTensors",
            hint="without it each rank reads its own parts alone",
        )
    if assign:
        raise UsageError(
            "read_once=True sends values, and assign=True maps the file in their place",
            hint="with assign=True alone ranks of one machine share the file's pages",
        )


def _check_dtype(dtype: object) -> None:
    floating = isinstance(dtype, torch.dtype) and (dtype.is_floating_point or dtype.is_complex)
    if dtype is not None and not floating:
        raise UsageError(
            f"dtype is a floating torch.dtype, as torch.bfloat16, not {dtype!r}",
            hint="dtype=None leaves each tensor its own",
        )
