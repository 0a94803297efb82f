"""Weights from a file into a live model: tensor by tensor, checked before anything changes."""

from __future__ import annotations

import os
from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase

from ..core.checkpoint import Checkpoint
from ..core.names import nearest, unwrapped
from ..core.nodes import mapping
from ..core.records import FREEZE, REMOVED, read_record
from ..core.sections import StateDict
from ..core.tensors import TensorRef
from ..errors import RefusedError, UnsupportedError, UsageError
from ..files import open as open_checkpoint
from .freezing import Frozen, apply_record
from .naming import Slot, is_lazy, match_names, places, slots
from .plain import live
from .tensors import Device, read_into, resolve_device, to_tensors
from .text import some

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
    """

    loaded: tuple[str, ...]
    missing: tuple[str, ...] = ()
    unexpected: tuple[str, ...] = ()
    mismatched: tuple[Mismatch, ...] = ()
    removed: tuple[str, ...] = ()
    frozen: Frozen | None = None

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
        if self.frozen is not None:
            lines.append(f"freeze record applied: {self.frozen}")
        return "\n".join(lines)


def _with_nearest(names: list[str], others: tuple[str, ...]) -> str:
    near = nearest(names[0], others, 1) if others else []
    return some(names) + (f" (nearest to the first: {near[0]})" if near else "")


# ------------------------------------------------------------------ load


def load(path: Path, *, device: Device = "cpu", key: str | None = None) -> dict[str, Tensor]:
    """The model's state_dict in a file of any format that modelctl reads; nothing is run.

    Names are the file's own. Tied tensors are one tensor; views of one storage share it where
    that reads no more than they need. ``device`` is where the tensors go, whatever device they
    were saved on; ``"auto"`` is cuda where there is one, else mps, else cpu. ``key`` is the
    dotted path of the state_dict, where the one that is found isn't meant.

    Raises:
        UnreadableError: the file.
        UnsupportedError: a dtype that this torch lacks; a sparse, quantized or wrapped tensor.
        NoMatchError, AmbiguousError: no state_dict, or which one is not clear.
    """
    where = resolve_device(device)
    with open_checkpoint(path, key=key) as ckpt:
        section = ckpt.sections.model()
        _only_plain(section, section.composites())
        return to_tensors(section.tensors(), where)


def _only_plain(section: StateDict, names: Iterable[str]) -> None:
    """Raises UnsupportedError where one of these is a sparse, quantized or wrapped tensor."""
    odd = {name: node.layout for name, node in section.composites().items() if name in {*names}}
    for name, layout in odd.items():
        raise UnsupportedError(
            f"'{name}' is a {layout} tensor ({len(odd)} such): only strided ones are loaded",
            hint="save it dense, or drop it from the file with modelctl",
        )


# ------------------------------------------------------------------ load_into


def load_into(
    model: nn.Module,
    path: Path,
    *,
    device: Device = None,
    dtype: torch.dtype | None = None,
    on_mismatch: str = "error",
    key: str | None = None,
) -> LoadReport:
    """Load a file's weights into a live model, and apply the file's freeze record.

    Values go straight into the model's parameters and buffers, one tensor at a time through
    bounded memory; nothing that the file names is run. Parameters stay the same objects, except
    those on ``meta``, which are made anew. Wrapper prefixes on either side don't matter; a tied
    tensor is loaded by any of its names. As in torch, a BatchNorm saved before version 2 may lack
    ``num_batches_tracked``, and shape ``[1]`` loads into a scalar. Modules' own load hooks are
    not run. A freeze record only freezes (see :func:`apply_freeze`).

    Args:
        device: where the whole model goes, ``"auto"`` included; by default each tensor stays
            where it is, and those on ``meta`` go to the CPU.
        dtype: what the model's floating tensors become; by default each keeps its own, and the
            file's values are converted to that.
        on_mismatch: ``"error"`` changes nothing unless every name and shape fits; ``"skip"``
            loads what fits and reports the rest.
        key: the dotted path of the state_dict, where the one that is found isn't meant.

    Raises:
        RefusedError: names or shapes don't fit (with ``"error"``), nothing fits, or something
            would stay on ``meta``; nothing was changed.
        UsageError: not a device, or not a way to treat mismatches.
        CollisionError: two of the file's names mean the same tensor.
        UnsupportedError: a tensor that is needed is sparse, quantized or wrapped.
        UnreadableError: the file; where its structure is sound but its data can't be read, the
            model may have been loaded in part.
    """
    if on_mismatch not in ("error", "skip"):
        raise UsageError(f"on_mismatch is 'error' or 'skip', not {on_mismatch!r}")
    where = resolve_device(device)
    with open_checkpoint(path, key=key) as ckpt:
        plan = plan_load(model, ckpt.sections.model(), removed=_removed(ckpt))
        plan.check(os.fspath(path), strict=on_mismatch == "error")
        record = read_record(ckpt, FREEZE)
        plan.run(where, dtype)
        if record is None:
            return plan.report
        return replace(plan.report, frozen=apply_record(model, record, strict=False))


def _removed(ckpt: Checkpoint) -> list[str]:
    entries = read_record(ckpt, REMOVED)
    found = [mapping(entry) or {} for entry in entries] if isinstance(entries, list) else []
    return [entry["name"] for entry in found if isinstance(entry.get("name"), str)]


@dataclass
class Plan:
    """A load that was matched up but not done: which slots get which tensor of the file.

    ``zeros`` are counters on ``meta`` that a file of an old version does not have.
    """

    model: nn.Module
    pairs: list[tuple[list[Slot], TensorRef]]
    report: LoadReport
    zeros: list[Slot] = field(default_factory=list)
    extras: list[tuple[str, nn.Module, Any]] = field(default_factory=list)

    def check(self, path: str, *, strict: bool) -> None:
        """Raises RefusedError where the plan must not be run; nothing was changed."""
        report = self.report
        problems = report.problems()
        if not self.pairs or (strict and problems):
            raise RefusedError(
                f"{path} does not fit the model: {'; '.join(problems) or 'no tensors'}",
                hint="load_into(model, path, on_mismatch='skip') loads what fits"
                if self.pairs
                else "'modelctl match' finds the rename that mends it",
            )
        filled = {id(slot.tensor) for found, _ in self.pairs for slot in found}
        filled.update(id(slot.tensor) for slot in self.zeros)
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
        for found, ref in self.pairs:
            read_into(ref, _destination(found, ref, device, dtype))
        for slot in self.zeros:
            setattr(slot.owner, slot.attr, torch.zeros_like(slot.tensor, device=device or "cpu"))
        for _, module, value in self.extras:
            module.set_extra_state(value)
        if device is not None or dtype is not None:
            self.model.to(device=device, dtype=dtype)


def _destination(
    found: list[Slot], ref: TensorRef, device: torch.device | None, dtype: torch.dtype | None
) -> Tensor:
    """The tensor to read into, in the model under each of its names."""
    old = found[0].tensor
    where = device or (torch.device("cpu") if old.is_meta else old.device)
    floating = old.dtype.is_floating_point or old.dtype.is_complex
    kind = dtype if dtype is not None and floating else old.dtype
    if is_lazy(old):
        cast(Any, old).materialize(ref.shape, device=where, dtype=kind)
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
    model: nn.Module, section: StateDict, *, removed: list[str] | tuple[str, ...] = ()
) -> Plan:
    """Match a file's state_dict with a model, by names without wrappers; nothing is changed.

    Raises:
        CollisionError: two of the file's names mean the same tensor.
        UnsupportedError: one that the model has is sparse, quantized or wrapped in the file.
    """
    refs = section.tensors()
    own: dict[str, Slot] = {slot.name: slot for slot in slots(model) if slot.persistent}
    states = _extra_states(model)
    found = match_names(
        [name for name in section.entries if isinstance(name, str)], {**own, **states}
    )
    _only_plain(section, found)
    tied: dict[int, list[Slot]] = {}
    for slot in own.values():
        tied.setdefault(id(slot.tensor), []).append(slot)
    given: dict[str, TensorRef] = {}
    extras, with_state = [], set()
    for name, meant in found.items():
        if meant in states:
            with_state.add(meant)
            extras.append((meant, states[meant], live(section.entries[name], name)))
        elif name in refs:
            given[meant] = refs[name]
    old_norms = _old_norms(model, section)
    pairs, loaded, missing, mismatched, zeros = [], [], [], [], []
    for group in tied.values():
        names = [slot.name for slot in group]
        # as load_state_dict, which copies every one of tied names: the last counts
        ref = next((given[name] for name in reversed(names) if name in given), None)
        tensor = group[0].tensor
        if ref is None:
            if names[0] not in old_norms:
                missing += names
            elif tensor.is_meta:
                zeros += group
        elif _fits(ref, tensor):
            pairs.append((group, ref))
            loaded += names
        else:
            mismatched.append((names[0], ref.shape, tuple(tensor.shape)))
    missing += [name for name in states if name not in with_state]
    gone = {unwrapped(name) for name in removed}
    report = LoadReport(
        tuple(loaded + [name for name, _, _ in extras]),
        tuple(missing),
        tuple(name for name in section.entries if isinstance(name, str) and name not in found),
        tuple(mismatched),
        tuple(name for name in missing if unwrapped(name) in gone),
    )
    return Plan(model, pairs, report, zeros, extras)


def _fits(ref: TensorRef, tensor: Tensor) -> bool:
    if is_lazy(tensor):
        return True
    # before 0.4 there were no scalars
    return tuple(tensor.shape) == ref.shape or (tensor.ndim == 0 and ref.shape == (1,))


def _extra_states(model: nn.Module) -> dict[str, nn.Module]:
    """The modules with a state of their own beside tensors, by its name in a state_dict."""
    return {
        (f"{place.name}." if place.name else "") + "_extra_state": place.module
        for place in places(model)
        if type(place.module).get_extra_state is not nn.Module.get_extra_state
    }


def _old_norms(model: nn.Module, section: StateDict) -> set[str]:
    """``num_batches_tracked`` of the norms that the file has in a version from before it."""
    versions = {}
    for name, entry in section.metadata.items():
        if isinstance(name, str):
            versions[unwrapped(f"{name}.x")[:-2]] = (mapping(entry) or {}).get("version")
    return {
        f"{place.name}.num_batches_tracked" if place.name else "num_batches_tracked"
        for place in places(model)
        if isinstance(place.module, _NormBase)
        and place.module.track_running_stats
        and (versions.get(place.name) or 1) < 2
    }
