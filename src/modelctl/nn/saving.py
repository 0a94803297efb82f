"""A training checkpoint that is always whole and that plain ``torch.load`` reads."""

from __future__ import annotations

import os
from collections import OrderedDict
from collections.abc import Mapping
from typing import Any, cast

import torch
from torch import nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from ..core.names import unwrapped
from ..core.records import FREEZE
from ..errors import RefusedError
from ..files import staged
from . import schedules
from .freezing import freeze_record, was_frozen
from .naming import places, slots
from .plain import storable
from .rng import rng_state


class _Stream:
    """What ``torch.save`` writes to: a staged output. Keeps the error of the disk, which torch
    would report as its own."""

    def __init__(self, sink: Any) -> None:
        self.sink = sink
        self.failed: OSError | None = None

    def write(self, data: Any) -> int:
        view = memoryview(data)
        if self.failed is None:
            try:
                self.sink.write(view)
            except OSError as e:  # torch's writer must not unwind through its destructor
                self.failed = e
        return view.nbytes

    def flush(self) -> None:
        pass


def save_checkpoint(
    path: str | os.PathLike[str],
    *,
    model: nn.Module,
    optimizer: Optimizer | None = None,
    scheduler: schedules.Schedulers = None,
    ema: nn.Module | Mapping[str, Any] | None = None,
    epoch: int | None = None,
    step: int | None = None,
    extra: Any = None,
    rng: bool = True,
    overwrite: bool = True,
) -> None:
    """Save what :func:`resume` needs to go on as if nothing had happened.

    The file is a dict with the keys ``model``, ``optimizer``, ``scheduler``, ``ema``, ``epoch``,
    ``step``, ``lr`` (of the first group), ``rng`` and ``extra``, without those that are not
    given; it appears whole or not at all, and loads with ``torch.load(path,
    weights_only=True)``. Names in ``model`` and ``ema`` are without wrapper prefixes. Where
    something is frozen, or was by :func:`freeze`, ``model`` carries the freeze record.

    Args:
        scheduler: one, or several as a list (saved as one).
        ema: an averaged copy, or its state_dict.
        epoch: the number of *finished* epochs: training goes on with ``range(epoch, epochs)``.
        step: the number of finished optimizer steps.
        extra: your own numbers, texts, tensors, lists and dicts (``{"scaler":
            scaler.state_dict()}``).
        rng: save the state of the random number generators: torch's on the CPU and on every CUDA
            device, numpy's global one, Python's.
        overwrite: replace what stands there.

    Raises:
        RefusedError: a value that ``weights_only`` would refuse; names its key. A scheduler's
            state counts: give LambdaLR a function or a callable object of plain attributes.
        WriteError: the file can't be written; what stood there is intact.
        DurabilityError: it was written whole, but its directory could not be synced.
    """
    content: dict[str, Any] = {"model": bare_state_dict(model)}
    if was_frozen(model):
        content["model"]._metadata.setdefault("", {})[FREEZE] = freeze_record(model)
    if optimizer is not None:
        content["optimizer"] = optimizer.state_dict()
        content["lr"] = float(optimizer.param_groups[0]["lr"])
    found = schedules.each(scheduler)
    if found:
        states = [one.state_dict() for one in found]
        content["scheduler"] = states[0] if isinstance(scheduler, LRScheduler) else states
    if ema is not None:
        content["ema"] = bare_state_dict(ema) if isinstance(ema, nn.Module) else ema
    given = {"epoch": epoch, "step": step, "extra": extra}
    content.update((key, value) for key, value in given.items() if value is not None)
    plain = {key: storable(value, key) for key, value in content.items()}
    for key in ("epoch", "step"):
        if key in plain and type(plain[key]) is not int:
            raise RefusedError(f"{key}={plain[key]!r:.40} is no integer")
    if rng:
        plain["rng"] = rng_state()
    with staged(path, overwrite=overwrite) as sink:
        stream = _Stream(sink)
        torch.save(plain, cast(Any, stream))
        if stream.failed is not None:
            raise stream.failed


def bare_state_dict(model: nn.Module) -> OrderedDict[str, Any]:
    """A model's state_dict, named as the bare model's is: without wrappers, at any depth."""
    state = model.state_dict()
    tensors = {slot.raw: slot.name for slot in slots(model)}
    modules = {place.raw: place.name for place in places(model)}
    renamed = OrderedDict((_bare(name, tensors, modules), value) for name, value in state.items())
    metadata = OrderedDict(
        (modules[name], entry)
        for name, entry in getattr(state, "_metadata", {}).items()
        if name in modules  # a wrapper's own entry has nothing to belong to
    )
    renamed.__dict__["_metadata"] = metadata
    return renamed


def _bare(name: str, tensors: Mapping[str, str], modules: Mapping[str, str]) -> str:
    if name in tensors:
        return tensors[name]
    module, _, last = name.rpartition(".")
    if module in modules:
        return f"{modules[module]}.{last}" if modules[module] else last
    return unwrapped(name)
