"""A training checkpoint that is always whole and that plain ``torch.load`` reads."""

from __future__ import annotations

import os
from collections import OrderedDict
from collections.abc import Collection, Mapping
from concurrent.futures import Future
from functools import partial
from pathlib import Path
from typing import Any, Literal, cast, overload

import torch
from torch import nn
from torch.amp import GradScaler
from torch.nn.modules.batchnorm import _NormBase
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from ...core.names import CHECKPOINTED, unwrapped
from ...core.records import FREEZE, ONLY
from ...errors import RefusedError, UsageError
from ...storage.staging import staged
from ...storage.targets import made_folder
from ..freezing.batchnorm import keeps_eval
from ..freezing.freeze import record_of
from ..loading.sharded import is_sharded, wraps_whole
from ..loading.tensors import is_declared
from ..loading.together import Together, tensors_of
from ..model_names import Parameters, places, slots
from ..optim.schedulers import lr_of
from ..optim.several import Label, Several, labelled, packed
from .asynchronous import done, settle, snapshot, start
from .loaders import Generators, place_and_rng
from .optimizers.entries import recordable
from .rng import rank, world
from .rows.rotation import Row
from .storable import storable

_EXTRA_STATE = "_extra_state"


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


@overload
def save_checkpoint(
    path: str | os.PathLike[str], *, model: nn.Module, asynchronous: Literal[True], **parts: Any
) -> Future[Path]: ...


@overload
def save_checkpoint(
    path: str | os.PathLike[str],
    *,
    model: nn.Module,
    asynchronous: Literal[False] = False,
    **parts: Any,
) -> Path: ...


def save_checkpoint(
    path: str | os.PathLike[str],
    *,
    model: nn.Module,
    optimizer: Several[Optimizer] = None,
    scheduler: Several[LRScheduler] = None,
    scaler: GradScaler | None = None,
    ema: nn.Module | Mapping[str, Any] | None = None,
    epoch: int | None = None,
    step: int | None = None,
    lr: float | None = None,
    rng: bool | str = True,
    loader: Several[Any] = None,
    generators: Generators | None = None,
    keep_last: int | None = None,
    keep_best: tuple[str, str, int] | None = None,
    overwrite: bool = True,
    asynchronous: bool = False,
    only: str | None = None,
    extra: Mapping[str, Any] | None = None,
    **extras: Any,
) -> Path | Future[Path]:
    """Save what :func:`resume` needs to go on as if nothing had happened. Gives the file's path.

    The file is a dict with the keys ``model``, ``optimizer``, ``scheduler``, ``scaler``, ``ema``,
    ``epoch``, ``step``, ``lr``, ``rng``, ``loader`` and ``extra``, without those that are not
    given; it appears whole or not at all, in a folder that is made where there is none, and loads
    with ``torch.load(path, weights_only=True)``, with ``mmap`` too. Names in ``model`` and ``ema``
    are without wrapper prefixes; an ``AveragedModel`` keeps its own (``module.``, ``n_averaged``),
    with which it is loaded again.
    ``model`` carries the freeze record; one without names says that everything trains.
    Optimizers carry the names of their parameters (``param_names``), whether or not they were
    built with them; ``""`` is one that is not the model's, and was given none.

    A path with fields, ``"run/epoch-{epoch:03d}.pt"``, is a row of files: fields of the last part
    of the path are filled in with ``epoch``, ``step``, ``lr`` and your own numbers and texts
    (``{{`` is a brace). Beside a row ``latest.pt`` always leads to the newest: a relative link,
    replaced at once; where the file system has no links, a hard link or a copy.

    With ``torch.distributed`` rank 0 writes. The other ranks may call this or not: they return
    at once and wait for nobody, so put a ``barrier()`` behind it where they read the file next.
    Only with ``rng="all"`` every rank has to call it, to hand its generators to rank 0.

    Of a model of DTensors (FSDP2, tensor parallel) every rank has to call it, and ``path`` becomes
    a folder of ``torch.distributed.checkpoint``, into which each writes its own parts. It appears
    whole or not at all; what one rank is refused, all are. The optimizer's state goes by the names
    of its parameters there.

    Args:
        optimizer, scheduler: one, or several as a list or as a dict of names.
        ema: an averaged copy (``AveragedModel`` or any other module), or its state_dict.
        epoch: the number of *finished* epochs: training goes on with ``range(epoch, epochs)``.
        step: the number of finished optimizer steps.
        lr: what to note as the learning rate; by default that of the first group.
        rng: save the state of the random number generators: torch's on the CPU and on every CUDA
            device, numpy's global one, Python's. ``"all"``: those of every rank, of ``loader`` and
            ``generators``, too.
        loader: what says itself where it is in the data, by ``state_dict()`` (torchdata's
            ``StatefulDataLoader``, a sampler with a state): one, or several as a list or by name;
            its own generators come along. A plain ``DataLoader`` keeps its generator alone, which
            is enough between two epochs; within one it is saved with a warning.
        generators: ``torch.Generator``s of your own, by name.
        keep_last: of a row keep so many files, the new one included: once it stands, those of
            earlier epochs and steps are removed, oldest first. Never removed: files of later
            epochs (an abandoned run's), and whatever the path with its fields could not have
            given.
        keep_best: ``("val_acc", "max", 3)``: of a row keep the three best by that number of yours
            (or ``lr``, …), too; without ``keep_last`` of the others only the new one. ``best.pt``
            is then the best so far, of later epochs, too: a hard link, or a copy where there are
            none (of a folder a relative link). It goes by the numbers in the files, so a resumed
            training knows them. NaN is never best; of equal ones the older is.
        overwrite: replace what stands there.
        asynchronous: copy all to the CPU (memory for one more of all that is saved), give a
            ``concurrent.futures.Future`` of the path, and write from a thread. One at a time: the
            next save, or :func:`resume`, waits for it, and raises its error where
            ``result()`` has not; so does the interpreter's exit wait. What was on a GPU is saved
            as on the CPU. Not for sharded models.
        only: ``"trainable"`` leaves out what is frozen, for adapters and heads on a large base:
            saved are the parameters that require grad (and their averages), the optimizer's state
            of these, buffers and extra states of the modules that hold them, and running
            statistics of norms that are not held in eval, which move. The file says so, and
            :func:`resume` and ``load_into`` leave all else as it is: build it from the same base.
        extra, extras: your own numbers, texts, tensors, lists and dicts, as a dict or by name.

    Raises:
        RefusedError: a value that ``weights_only`` would refuse, or :func:`resume` could not
            bring back; names its key. A scheduler's state counts: give LambdaLR a function or a
            callable object of plain attributes. Of a sharded model also what another rank was
            refused, and state that is not sharded as its parameter is.
        UsageError: no module, no dict of extras, a loader without a state, fields in the path
            without a value, or ``keep_last`` or ``keep_best`` without ``{epoch}`` or ``{step}``
            in it, or without such a number.
        WriteError: the file can't be written; what stood there is intact.
        DurabilityError: it was written whole, but its directory could not be synced.
    """
    settle()
    _check_given(model, extra)
    if only not in (None, "trainable"):
        raise UsageError(f"only is 'trainable' or None, not {only!r:.40}")
    if rng not in (True, False, "all"):
        raise UsageError(f"rng is True, False or 'all', not {rng!r}")
    # before anything that can fail on one rank alone
    position, drawn = place_and_rng(model, loader, generators, rng)
    optimizers, schedulers = labelled(optimizer), labelled(scheduler)
    content: dict[str, Any] = {"epoch": epoch, "step": step, "lr": lr}
    if lr is None and optimizers:
        content["lr"] = lr_of(next(iter(optimizers.values())).param_groups[0])
    content["extra"] = {**(extra or {}), **extras}
    tensors = [*tensors_of(model), *tensors_of(ema)]
    sharded = any(map(is_sharded, tensors))
    ranks = Together(*tensors)
    with ranks.agreeing("before anything was written"):
        plain = _plain(content)
        row = Row(
            path, {**plain["extra"], **plain}, keep_last, keep_best=keep_best, folders=sharded
        )
        if asynchronous and sharded:
            raise RefusedError(
                "asynchronous: the model is sharded, and its ranks agree with each other while "
                "they write: in a thread that would mix with what training says between them",
                hint="save without asynchronous=; or torch.distributed.checkpoint.async_save",
            )
        if rank() != 0 and not sharded:
            return done(row.path) if asynchronous else row.path
        row.check(overwrite)
        whole: dict[str, Any] = {"model": bare_state_dict(model)}
        if optimizers:
            states = _optimizer_states(optimizers, Parameters(model), only is not None)
            if sharded:
                for one in optimizers.values():
                    check_placed(one, Parameters(model))
                states = {label: by_name(state) for label, state in states.items()}
            whole["optimizer"] = packed(states)
        if schedulers:
            whole["scheduler"] = packed({k: one.state_dict() for k, one in schedulers.items()})
        if scaler is not None and scaler.is_enabled():
            whole["scaler"] = scaler.state_dict()
        if ema is not None:
            whole["ema"] = bare_state_dict(ema) if isinstance(ema, nn.Module) else ema
        records = _records(model)
        if only is not None:
            records[ONLY] = only
            kept = _trained(model)
            left_out = {*whole["model"]} - kept
            for key in ("model", "ema"):
                if key in whole:
                    whole[key] = _without(whole[key], left_out)
        whole["model"].__dict__["_metadata"].setdefault("", {}).update(records)
        whole = {key: storable(value, key, sharded=sharded) for key, value in whole.items()}
        for key in ("model", "ema"):
            _check_dense(key, whole.get(key, {}))
        whole.update((key, value) for key, value in plain.items() if key != "extra" or value)
        if drawn is not None:
            whole["rng"] = drawn
        if position is not None:
            whole["loader"] = position
    if sharded:
        from .save_together import save_together

        save_together(row, whole, records, ranks, overwrite=overwrite)
        return row.path
    if asynchronous:
        return start(partial(_write, row, snapshot(whole), overwrite))
    return _write(row, whole, overwrite)


def _write(row: Row, whole: dict[str, Any], overwrite: bool) -> Path:
    with (
        made_folder(os.path.dirname(os.path.abspath(row.path))),
        staged(row.path, overwrite=overwrite) as sink,
    ):
        stream = _Stream(sink)
        torch.save(whole, cast(Any, stream))
        if stream.failed is not None:
            raise stream.failed
    row.finish()
    return row.path


def _plain(content: dict[str, Any]) -> dict[str, Any]:
    """What stands beside the parts, checked."""
    plain = {key: storable(value, key) for key, value in content.items() if value is not None}
    for key, kind in (("epoch", int), ("step", int), ("lr", float)):
        if key in plain and type(plain[key]) not in (int, kind):
            raise RefusedError(
                f"{key}={plain[key]!r:.40} is no {'number' if kind is float else 'integer'}"
            )
    return plain


def _check_given(model: object, extra: object) -> None:
    if not isinstance(model, nn.Module):
        raise UsageError(
            f"model is a {type(model).__name__}, no nn.Module",
            hint="give the model itself: what trains and its names are taken from it",
        )
    if wraps_whole(model) and world() > 1:
        raise RefusedError(
            "the model is inside FullyShardedDataParallel, whose state_dict waits for all ranks: "
            "the first one can not write a file alone",
            hint="fully_shard (FSDP2) is saved; or use torch.distributed.checkpoint yourself",
        )
    if extra is not None and not isinstance(extra, Mapping):
        raise UsageError(
            f"extra is a {type(extra).__name__}, no dict of names and values",
            hint="extra={'losses': losses}, or losses=losses",
        )


def _check_dense(key: str, state: Mapping[Any, Any]) -> None:
    for name, value in state.items():
        if is_sharded(value):
            continue
        if isinstance(value, torch.Tensor) and is_declared(type(value)):
            raise RefusedError(
                f"'{key}.{name}' is a {type(value).__name__}: only plain tensors can be loaded "
                "into a model",
                hint="save_checkpoint is for models of plain tensors; torch.save takes any",
            )
        if isinstance(value, torch.Tensor) and value.layout != torch.strided:
            raise RefusedError(
                f"'{key}.{name}' is {str(value.layout).removeprefix('torch.')}: only dense tensors "
                "can be loaded into a model",
                hint="register_buffer(name, tensor, persistent=False) leaves it out",
            )


def _records(model: nn.Module) -> dict[str, Any]:
    """The freeze record: an empty one says that all trains."""
    record = record_of(model)
    if record.bn_eval or next(model.parameters(), None) is not None:
        return {FREEZE: record.node()}
    return {}


def _optimizer_states(
    optimizers: Mapping[Label, Optimizer], params: Parameters, trained_only: bool
) -> dict[Label, dict[str, Any]]:
    """The optimizers' state_dicts, with the model's own names of their parameters: recorded ones
    may be missing, or relative to a part of the model. One that is not the model's keeps the
    name that was recorded, or has "". With ``trained_only`` without the state of what is frozen."""
    states = {}
    for label, optimizer in optimizers.items():
        state = optimizer.state_dict()
        names = recordable(optimizer, params)
        if any(name for group in names for name in group):
            groups = zip(state["param_groups"], names, strict=True)
            state["param_groups"] = [{**group, "param_names": own} for group, own in groups]
        if trained_only:
            live = [p for group in optimizer.param_groups for p in group["params"]]
            ids = [key for group in state["param_groups"] for key in group["params"]]
            frozen = {key for key, p in zip(ids, live, strict=True) if not p.requires_grad}
            kept = {key: value for key, value in state["state"].items() if key not in frozen}
            state["state"] = kept
        states[label] = state
    return states


def _trained(model: nn.Module) -> set[str]:
    """The names in its state_dict of all that training changes.

    Raises:
        RefusedError: nothing trains.
    """
    found = slots(model)
    trained = [slot for slot in found if slot.tensor.requires_grad]
    if not trained:
        raise RefusedError(
            "only='trainable': every parameter is frozen, so nothing would be saved",
            hint="unfreeze what trains; or save without only=",
        )
    owners = {id(slot.owner) for slot in trained}
    kept = {slot.name for slot in trained}
    for slot in found:
        moves = isinstance(slot.owner, _NormBase) and not keeps_eval(slot.owner)
        if not isinstance(slot.tensor, nn.Parameter) and (id(slot.owner) in owners or moves):
            kept.add(slot.name)
    for place in places(model):
        if id(place.module) in owners:
            kept.add(f"{place.name}.{_EXTRA_STATE}" if place.name else _EXTRA_STATE)
    return kept


def _without(state: Mapping[str, Any], left_out: Collection[str]) -> OrderedDict[str, Any]:
    """A state_dict, or an average's, without these of the model's names."""
    kept = OrderedDict(
        (name, value) for name, value in state.items() if unwrapped(name) not in left_out
    )
    if "_metadata" in getattr(state, "__dict__", {}):
        holders = {"", *(name.rpartition(".")[0] for name in kept)}
        metadata = state.__dict__["_metadata"]
        kept.__dict__["_metadata"] = OrderedDict(
            (name, entry) for name, entry in metadata.items() if name in holders
        )
    return kept


def check_placed(optimizer: Optimizer, params: Parameters) -> None:
    """Raises RefusedError where the state of a sharded parameter is not sharded as that is: of what
    is plain only one rank's would be saved, of what is placed otherwise the wrong rows."""
    for parameter, state in optimizer.state.items():
        sharded = isinstance(state, Mapping) and is_sharded(parameter)
        for key, value in state.items() if sharded else ():
            if not isinstance(value, torch.Tensor) or value.numel() < 2:
                continue
            placed: Any = getattr(value, "placements", None)
            own: Any = cast(Any, parameter).placements
            if placed is None or (value.shape == parameter.shape and placed != own):
                raise RefusedError(
                    f"the optimizer's '{key}' of '{params.name_of(parameter)}' is "
                    f"{placed or 'no DTensor'}, the parameter {own}: its values are not known to "
                    "be where it says",
                    hint="a newer torch may keep them together; or save without optimizer=",
                )


def by_name(state: Mapping[str, Any]) -> dict[str, Any]:
    """An optimizer's state_dict with the names of its parameters for their numbers, as
    torch.distributed.checkpoint.state_dict has it: any number of ranks finds its parts so.

    Raises:
        RefusedError: a parameter without a name.
    """
    names: dict[Any, str] = {}
    groups = []
    for group in state["param_groups"]:
        own = group.get("param_names") or [""] * len(group["params"])
        names.update(zip(group["params"], own, strict=True))
        groups.append({**group, "params": [*own], "param_names": [*own]})
    if "" in names.values():
        raise RefusedError(
            "the optimizer has parameters that are not the model's, and were given no names",
            hint="AdamW([('t', t), …]) names them",
        )
    known = {names.get(key, key): value for key, value in state["state"].items()}
    return {"state": known, "param_groups": groups}


def bare_state_dict(model: nn.Module) -> OrderedDict[str, Any]:
    """A model's state_dict, named as the bare model's is: without wrappers, at any depth."""
    state = model.state_dict()
    tensors = {_shown(slot.raw): slot.name for slot in slots(model)}
    modules = {place.raw: place.name for place in places(model)}
    shown = {_shown(raw): name for raw, name in modules.items()}
    renamed = OrderedDict((_bare(name, tensors, shown), value) for name, value in state.items())
    metadata = OrderedDict(
        (modules[name], entry)
        for name, entry in getattr(state, "_metadata", {}).items()
        if name in modules  # a wrapper's own entry has nothing to belong to
    )
    renamed.__dict__["_metadata"] = metadata
    return renamed


def _shown(raw: str) -> str:
    """A name as ``state_dict`` has it: checkpoint_wrapper hides its own segment there, though
    not in the ``_metadata``."""
    return ".".join(part for part in raw.split(".") if part != CHECKPOINTED)


def _bare(name: str, tensors: Mapping[str, str], modules: Mapping[str, str]) -> str:
    if name in tensors:
        return tensors[name]
    module, _, last = name.rpartition(".")
    if module in modules:
        return f"{modules[module]}.{last}" if modules[module] else last
    return unwrapped(name)
