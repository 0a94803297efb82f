"""Weights from a file into a live model: tensor by tensor, checked before anything changes."""

from __future__ import annotations

import os
from collections import OrderedDict
from dataclasses import dataclass, field, replace
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn.modules.module import _IncompatibleKeys

from ...core.checkpoint import Checkpoint
from ...core.names import nearest, unwrapped
from ...core.nodes import mapping
from ...core.records import FREEZE, REMOVED, read_record
from ...core.sections import StateDict
from ...core.tensors import TensorRef
from ...core.text import some
from ...errors import RefusedError, UnsupportedError, UsageError
from ...files import open as open_checkpoint
from ..devices import Device, choose_device
from ..freezing.freeze import Frozen, apply_record, parse_record
from ..model_names import Slot, is_lazy, places, slots
from .file_names import find_prefix, fits, given_prefix, match, only_plain, without
from .module_hooks import Computed
from .reader import Reader
from .tensors import to_tensors
from .values import live

Path = str | os.PathLike[str]
Mismatch = tuple[str, tuple[int, ...], tuple[int, ...]]


@dataclass(frozen=True)
class LoadReport:
    """What :func:`load_into` did; ``str()`` is for people.

    Attributes:
        loaded: the model's names that got values.
        missing: the model's names that the file lacks: they keep their values.
        unexpected: the file's names that the model lacks: they are left aside.
        mismatched: (name, shape in the file, shape in the model): left as they are.
        removed: those of ``missing`` whose removal the file itself records (``strip-head``).
        frozen: what the file's freeze record did, or None.
        prefix: what was taken off the file's names, wrappers aside (Lightning's ``model.``).
    """

    loaded: tuple[str, ...]
    missing: tuple[str, ...] = ()
    unexpected: tuple[str, ...] = ()
    mismatched: tuple[Mismatch, ...] = ()
    removed: tuple[str, ...] = ()
    frozen: Frozen | None = None
    prefix: str = ""

    @property
    def skipped(self) -> tuple[str, ...]:
        """The file's tensors that were left aside: unexpected ones and those of other shapes."""
        return (*self.unexpected, *(name for name, _, _ in self.mismatched))

    def problems(self) -> list[str]:
        """A line for each kind of thing that does not fit, with the nearest names."""
        lines = []
        plain = [name for name in self.missing if name not in self.removed]
        if plain:
            lines.append(f"missing in the file: {_with_nearest(plain, self.unexpected)}")
        if self.removed:
            lines.append(f"removed from the file earlier: {some(self.removed)}")
        if self.unexpected:
            lines.append(f"not in the model: {some(self.unexpected)}")
        if self.mismatched:
            shapes = [f"{n} {list(theirs)} -> {list(own)}" for n, theirs, own in self.mismatched]
            lines.append(f"other shapes (file -> model): {some(shapes)}")
        return lines

    def __str__(self) -> str:
        lines = [f"loaded {len(self.loaded)} tensors", *self.problems()]
        if self.prefix:
            lines[0] += f", by the file's names without '{self.prefix}'"
        if self.frozen is not None:
            lines.append(f"freeze record applied: {self.frozen}")
        return "\n".join(lines)


def _with_nearest(names: list[str], others: tuple[str, ...]) -> str:
    near = nearest(names[0], others, 1) if others else []
    return some(names) + (f" (nearest to the first: {near[0]})" if near else "")


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
        section = ckpt.sections.model()
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
) -> LoadReport:
    """Load a file's weights into a live model, and apply the file's freeze record.

    Values go straight into the model's parameters and buffers, one tensor at a time through
    bounded memory; nothing that the file names is run. Parameters stay the same objects, except
    those on ``meta``, which are made anew. Wrapper prefixes on either side don't matter; a tied
    tensor is loaded by any of its names. Files of older versions load as ``load_state_dict``
    would load them: the modules' own load hooks are asked what becomes of the names (on tensors
    without data, before anything is read), and their post-hooks are run. A freeze record only
    freezes (see :func:`apply_freeze`).

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
            names fit only without it (Lightning's ``model.``), and the report says so.

    Raises:
        RefusedError: names or shapes don't fit (with ``"error"``), nothing fits, a module's own
            code refuses the file, or something would stay on ``meta``; nothing was changed.
        AmbiguousError: which state_dict, or which prefix, is not clear.
        NoMatchError: no state_dict; no name with the prefix.
        UsageError: not a device, none that is there, or ``meta``; not a floating dtype; not a
            way to treat mismatches.
        CollisionError: two of the file's names mean the same tensor.
        UnsupportedError: a tensor that is needed is sparse, quantized or wrapped, or a module's
            own code computes it.
        UnreadableError: the file; where its structure is sound but its data can't be read, the
            model may have been loaded in part.
    """
    if on_mismatch not in ("error", "skip"):
        raise UsageError(f"on_mismatch is 'error' or 'skip', not {on_mismatch!r}")
    floating = isinstance(dtype, torch.dtype) and (dtype.is_floating_point or dtype.is_complex)
    if dtype is not None and not floating:
        raise UsageError(
            f"dtype is a floating torch.dtype, as torch.bfloat16, not {dtype!r}",
            hint="dtype=None leaves each tensor its own",
        )
    where = None if device is None else choose_device(device)
    if where is not None and where.type == "meta":
        raise UsageError(
            "device='meta' holds no values: nothing can be loaded there",
            hint="a model that was built on meta loads onto the CPU, or onto device='auto'",
        )
    with open_checkpoint(path, key=key) as ckpt:
        section = ckpt.sections.model()
        if prefix is None:
            start = find_prefix(section, slots(model))
        else:
            start = given_prefix(section, prefix)
        alone = prefix is not None
        plan = plan_load(model, section, removed=removed_names(ckpt), prefix=start, alone=alone)
        plan.check(os.fspath(path), strict=on_mismatch == "error")
        record = saved_freeze(ckpt, start, alone)
        plan.run(where, dtype)
        if record is None or not freezes(record):
            return plan.report
        return replace(plan.report, frozen=apply_record(model, record, strict=False))


def removed_names(ckpt: Checkpoint) -> list[str]:
    """What the file says was removed from its model, by name."""
    entries = read_record(ckpt, REMOVED)
    found = [mapping(entry) or {} for entry in entries] if isinstance(entries, list) else []
    return [entry["name"] for entry in found if isinstance(entry.get("name"), str)]


def saved_freeze(ckpt: Checkpoint, prefix: str, alone: bool = False) -> Any:
    """The file's freeze record in the model's names, or None."""
    record = read_record(ckpt, FREEZE)
    if record is None or not prefix:
        return record
    names, bn_eval, patterns = parse_record(record)
    frozen = [bare for name in names if (bare := without(name, prefix, alone)) is not None]
    kept = [bare for text in patterns if (bare := without(text, prefix, alone)) is not None]
    return {"version": 1, "frozen": frozen, "bn_eval": bn_eval, "patterns": kept}


def freezes(record: Any) -> bool:
    """Whether a record holds anything back; an empty one says that all of the model trains."""
    names, bn_eval, patterns = parse_record(record)
    return bool(names or (bn_eval and patterns))


@dataclass
class Plan:
    """A load that was matched up but not done: which slots get which tensor.

    ``fill`` are tensors that are made, not read: what a module's own code gave, and counters on
    ``meta`` that a file of an old version does not have.
    """

    model: nn.Module
    pairs: list[tuple[list[Slot], TensorRef]]
    report: LoadReport
    fill: list[tuple[list[Slot], Tensor]] = field(default_factory=list)
    extras: list[tuple[nn.Module, Any]] = field(default_factory=list)

    def check(self, path: str, *, strict: bool) -> None:
        """Raises RefusedError where the plan must not be run; nothing was changed."""
        report = self.report
        problems = report.problems()
        if not self.pairs or (strict and problems):
            if self.pairs:
                hint = "load_into(model, path, on_mismatch='skip') loads what fits"
                if report.prefix:
                    hint += f", prefix='{report.prefix}' looks at these names alone"
            else:
                hint = "'modelctl match' finds the rename that mends it"
            raise RefusedError(
                f"{path} does not fit the model: {'; '.join(problems) or 'no tensors'}", hint=hint
            )
        filled = {id(slot.tensor) for found, _ in (*self.pairs, *self.fill) for slot in found}
        left = [
            s.name for s in slots(self.model) if s.tensor.is_meta and id(s.tensor) not in filled
        ]
        if left:
            raise RefusedError(
                f"{len(left)} tensors would stay on meta, without values: {some(left)}",
                hint="build these parts on a real device before loading (module.to_empty, then "
                "its own initialisation)",
            )

    @torch.no_grad()
    def run(self, device: torch.device | None = None, dtype: torch.dtype | None = None) -> None:
        """Copy the values, and bring the whole model to ``device`` and ``dtype``."""
        with Reader() as reader:
            for found, ref in self.pairs:
                reader.read(ref, _destination(found, ref, device, dtype))
        for found, value in self.fill:
            _destination(found, value, device, dtype).copy_(value)
        for module, state in self.extras:
            module.set_extra_state(state)
        if device is not None or dtype is not None:
            self.model.to(device=device, dtype=dtype)
        found_not = _IncompatibleKeys([*self.report.missing], [*self.report.unexpected])
        for place in reversed(list(places(self.model))):  # children first, as load_state_dict
            for hook in place.module._load_state_dict_post_hooks.values():
                hook(place.module, found_not)


def _destination(
    found: list[Slot],
    value: TensorRef | Tensor,
    device: torch.device | None,
    dtype: torch.dtype | None,
) -> Tensor:
    """The tensor to read into, in the model under each of its names."""
    old = found[0].tensor
    if not is_lazy(old):  # a backward over the old values must fail, as after load_state_dict
        torch.autograd.graph.increment_version(old)
    where = device or (torch.device("cpu") if old.is_meta else old.device)
    floating = old.dtype.is_floating_point or old.dtype.is_complex
    kind = dtype if dtype is not None and floating else old.dtype
    if is_lazy(old):
        cast(Any, old).materialize(value.shape, device=where, dtype=kind)
        return old.detach()
    if old.is_meta:
        new = torch.empty_like(old, device=where, dtype=kind, requires_grad=False)
        if isinstance(old, nn.Parameter):
            made = nn.Parameter(new, requires_grad=old.requires_grad)
            made.__dict__.update(old.__dict__)
            new = made
        for slot in found:
            setattr(slot.owner, slot.attr, new)
        return new.detach()
    if old.device != where or old.dtype != kind:
        old.data = torch.empty_like(old, device=where, dtype=kind)
    return old.detach()


def plan_load(
    model: nn.Module,
    section: StateDict,
    *,
    removed: list[str] | tuple[str, ...] = (),
    prefix: str = "",
    alone: bool = False,
) -> Plan:
    """Match a file's state_dict with a model, by names without wrappers and ``prefix`` (with
    ``alone`` those that begin with it only); nothing is changed.

    Raises:
        CollisionError: two of the file's names mean the same tensor.
        RefusedError: a module's own code refuses the file.
        UnsupportedError: one that the model has is sparse, quantized or wrapped in the file, or
            computed by a module's own code.
    """
    states = _extra_states(model)
    names = {slot.name for slot in slots(model) if slot.persistent}
    matched = match(model, section, names, states.keys(), prefix, alone=alone)
    tied: dict[int, list[Slot]] = {}
    for slot in slots(model):  # again: a module's own code may have changed it
        if slot.persistent:
            tied.setdefault(id(slot.tensor), []).append(slot)
    plan = Plan(model, [], LoadReport(()))
    loaded, missing, mismatched = [], [], []
    for group in tied.values():
        own = [slot.name for slot in group]
        # as load_state_dict, which copies every one of tied names: the last counts
        value = next((matched.values[n] for n in reversed(own) if n in matched.values), None)
        tensor = group[0].tensor
        if isinstance(value, Computed):
            raise UnsupportedError(
                f"'{own[0]}' is computed from the file's tensors by {value.by}'s own code",
                hint="model.load_state_dict(load(path)) runs that",
            )
        if value is None and own[0] not in matched.old_norms:
            missing += own
        elif value is None:
            if tensor.is_meta:
                plan.fill.append((group, torch.zeros(tensor.shape, dtype=tensor.dtype)))
        elif not fits(value, tensor):
            mismatched.append((own[0], tuple(value.shape), tuple(tensor.shape)))
        else:
            loaded += own
            if isinstance(value, TensorRef):
                plan.pairs.append((group, value))
            else:
                plan.fill.append((group, value))
    for name, module in states.items():
        if name in matched.extras:
            loaded.append(name)
            plan.extras.append((module, live(matched.extras[name], name)))
        else:
            missing.append(name)
    gone = {unwrapped(bare) for name in removed if (bare := without(name, prefix, alone))}
    plan.report = LoadReport(
        tuple(loaded),
        tuple(missing),
        tuple(matched.unexpected),
        tuple(mismatched),
        tuple(name for name in missing if unwrapped(name) in gone),
        prefix=prefix,
    )
    return plan


def _extra_states(model: nn.Module) -> dict[str, nn.Module]:
    """The modules with a state of their own beside tensors, by its name in a state_dict."""
    return {
        (f"{place.name}." if place.name else "") + "_extra_state": place.module
        for place in places(model)
        if type(place.module).get_extra_state is not nn.Module.get_extra_state
    }
