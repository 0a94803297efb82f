"""Go on with a training from a checkpoint: read inertly, checked whole, then restored."""

from __future__ import annotations

import os
import warnings
from collections.abc import MutableMapping
from contextlib import ExitStack
from typing import Any

from torch import nn
from torch.amp import GradScaler
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from ...errors import UsageError
from ...files import open as open_checkpoint
from ...storage.far.urls import is_far, shown
from ..loading.together import Together, tensors_of
from ..optim.several import Several, labelled
from .asynchronous import settle
from .loaders import Generators, LoaderPart
from .optimizers.restore import OptimizersPart, SchedulersPart
from .part import Part, Saved
from .progress import ProgressPart
from .report import Resumed
from .rng import RngPart
from .rows.rotation import newest
from .scaler import ScalerPart
from .weights import EmaPart, ModelPart


def resume(
    path: str | os.PathLike[str],
    *,
    model: nn.Module,
    optimizer: Several[Optimizer] = None,
    scheduler: Several[LRScheduler] = None,
    scaler: GradScaler | None = None,
    ema: nn.Module | MutableMapping[str, Any] | None = None,
    rng: bool = True,
    loader: Several[Any] = None,
    generators: Generators | None = None,
    on_mismatch: str = "error",
    key: str | None = None,
) -> Resumed:
    """Restore a training from a checkpoint of :func:`save_checkpoint`, of ``modelctl merge``, or
    of a script of your own in one of the usual layouts (``torch.save`` of a dict, timm,
    Lightning).

    Build model, optimizer and scheduler as at the start, then call this, on every rank. Nothing
    in the file is run, and nothing is changed before everything was seen to fit. Restored are the
    model's weights (each where it is, whatever device it was saved on), what trains (the freeze
    record, exactly: what it does not name is thawed; what the file does not know at all keeps
    what it has), the optimizer (its state on the device of
    each parameter), the scheduler, the scaler, the EMA copy, the place in the data, and last the
    random number generators.

    A file that has the average of the weights in the model's place, and what was trained beside it
    (mmengine, Lightning's weight averaging), gives the model what was trained, and ``ema`` the
    average. Of a file of several models ``key`` says which; its own optimizers are those that
    are named like it, or fit no other.

    The optimizer's entries are matched by name, so that it may have been re-ordered or grouped
    in another way; where the file has no ``param_names``, by position or by the only order that
    fits. Those that are not the model's and were given no name go by their place, with a warning.
    Groups that a saved optimizer has over parameters which the live one lacks (a block that
    was thawed before the save) are added, to the scheduler too. ``foreach``, ``fused``,
    ``capturable`` and ``differentiable`` stay as the constructor says; all other settings, of the
    scheduler too, are the saved ones, with a warning where they differ.

    Args:
        path: a file, a folder that ranks wrote, or a folder of such: there ``latest.*``, else the
            whole one that has come furthest.
        optimizer, scheduler: one, or several as they were saved: a list, or by name. Listed
            optimizers are told apart by the names of their parameters.
        ema: the averaged copy, or a state_dict whose tensors are to be filled.
        rng: restore the generators; under ``torch.distributed`` each rank its own.
        loader, generators: as they were saved. The next loop over a loader that has a state gives
            what was left of its epoch, to the bit; its workers start here.
        on_mismatch: ``"skip"`` is for another head: what the model lacks, or has in another
            shape, is left aside; what the file lacks keeps its values; the optimizer's state is
            kept for all else, and starts fresh there. So a bare model's training goes on in one
            with a head around it (``bert.`` before all its names).
        key: the dotted path of the model's state_dict, where the one that is found isn't meant.

    Raises:
        RefusedError: model, optimizer, scheduler, scaler, ema, loader or rng of the file don't fit
            the live one; another rank of a sharded model was refused; or the freeze record would
            change what trains inside a DistributedDataParallel, which looks only when it is built.
        AmbiguousError: which saved parameter, or which of several optimizers, is which can't be
            told.
        UsageError: a loader without a state; a scheduler of an optimizer that isn't given, or no
            way to treat mismatches.
        UnsupportedError: a section that is needed holds an object.
        UnreadableError: the file, or a folder without one.
        WriteError: an asynchronous save before this failed, and nobody was told yet.
    """
    if on_mismatch not in ("error", "skip"):
        raise UsageError(f"on_mismatch is 'error' or 'skip', not {on_mismatch!r}")
    settle()
    ranks = Together(*tensors_of(model), *tensors_of(ema))
    with ExitStack() as stack:
        with ranks.agreeing("before anything was changed"):
            path = newest(path)
            ckpt = stack.enter_context(open_checkpoint(path, key=key))
            path = shown(path) if is_far(path) else path
            saved = Saved(ckpt, path, on_mismatch == "skip")
            weights = ModelPart(saved, model)
            given = labelled(scheduler)
            optimizers = OptimizersPart(saved, weights, labelled(optimizer), [*given.values()])
            progress = ProgressPart(saved, optimizers)
            parts: list[Part] = [
                *(weights, optimizers, SchedulersPart(saved, optimizers, given)),
                *(ScalerPart(saved, scaler), EmaPart(saved, ema)),
                *(LoaderPart(saved, loader, generators, rng), RngPart(saved, rng, model)),
                progress,
            ]
            for part in parts:
                part.fit()
            for part in parts:
                part.read()
        with ranks.agreeing("while it read, and may be restored in part"):
            for part in parts:
                part.run()
    missing = [name for part in parts for name in part.missing]
    notes = [note for part in parts for note in part.notes]
    lacking = [name for name in missing if name != "rng"]
    if lacking:
        notes.append(f"not in the checkpoint: {', '.join(lacking)}; left as built")
    for note in notes:
        warnings.warn(note, stacklevel=2)
    return Resumed(
        path,
        progress.epoch,
        progress.step,
        progress.lr,
        progress.extra,
        restored=tuple(part.name for part in parts if part.restored),
        missing=tuple(missing),
        unused=tuple(name for part in parts for name in part.unused),
        model=weights.report,
        frozen=weights.frozen,
        joined=tuple(optimizers.joined),
        fresh=tuple(optimizers.fresh),
        dropped=tuple(optimizers.dropped),
        swapped=weights.swapped,
    )
