"""A load that is matched up and checked before anything changes, and then done."""

from __future__ import annotations

from collections.abc import Callable, Collection
from contextlib import nullcontext
from dataclasses import dataclass, field, replace
from typing import Any, TypeVar, cast

import torch
from torch import Tensor, nn
from torch.nn.modules.module import _IncompatibleKeys

from ...core.checkpoint import Checkpoint
from ...core.freeze_record import FreezeRecord
from ...core.matching.matcher import Prefixes, Shape, match_names, without
from ...core.names import unwrapped
from ...core.nodes import mapping
from ...core.records import FREEZE, ONLY, REMOVED, read_record
from ...core.sections import StateDict
from ...core.tensors import TensorRef, announce, announce_all
from ...core.text import prefix_command, some
from ...errors import RefusedError, UnsupportedError
from ..model_names import Parameters, Slot, is_lazy, places, slots
from .file_names import fits, match, prefixes
from .mapped import Mapper
from .module_hooks import Computed
from .positions import Grids, grids
from .reader import Reader, torch_dtype
from .report import LoadReport
from .sharded import check_kind, filled, is_sharded, local, within, wraps_whole
from .tensors import to_tensors
from .together import OneReader
from .values import live


def removed_names(ckpt: Checkpoint) -> list[str]:
    """What the file says was removed from its model, by name."""
    entries = read_record(ckpt, REMOVED)
    found = [mapping(entry) or {} for entry in entries] if isinstance(entries, list) else []
    return [entry["name"] for entry in found if isinstance(entry.get("name"), str)]


def saved_freeze(
    ckpt: Checkpoint, prefix: str, alone: bool = False, added: str = ""
) -> FreezeRecord | None:
    """The file's freeze record in the model's names, or None.

    Raises:
        UsageError: one that a newer modelctl wrote, or that is none.
    """
    record = read_record(ckpt, FREEZE)
    if record is None:
        return None
    return FreezeRecord.parse(record).without(prefix, alone).under(added)


def base_names(ckpt: Checkpoint, model: nn.Module, record: FreezeRecord | None) -> set[str]:
    """The model's names that a file of what trains alone leaves to its base: what its freeze
    record, in the model's names, has as frozen, and buffers."""
    if read_record(ckpt, ONLY) is None:
        return set()
    called = Parameters(model).called
    found = match_names([] if record is None else record.frozen, called).values()
    buffers = {s.name for s in slots(model) if not isinstance(s.tensor, nn.Parameter)}
    return buffers | {name for one in found for name in called[one]}


Pair = tuple[list[Slot], TensorRef]


@dataclass
class Plan:
    """A load that was matched up but not done: which slots get which tensor.

    ``fill`` are tensors that are made, not read: what a module's own code gave, and counters on
    ``meta`` that a file of an old version does not have. ``prefixes`` are those that either
    side's names have, where something is missing without. ``grids`` are those of positions whose
    shape differs, by name, and ``resized`` those that are to be interpolated.
    """

    model: nn.Module
    pairs: list[Pair]
    report: LoadReport
    fill: list[tuple[list[Slot], Tensor]] = field(default_factory=list)
    extras: list[tuple[nn.Module, Any]] = field(default_factory=list)
    prefixes: Prefixes = field(default_factory=Prefixes)
    grids: dict[str, Grids] = field(default_factory=dict)
    resized: list[tuple[list[Slot], TensorRef, Grids]] = field(default_factory=list)

    @property
    def shapes(self) -> dict[str, Shape]:
        """Those that the model's tensors have in the file, by each of the model's names."""
        shapes = {name: theirs for name, theirs, _ in self.report.mismatched}
        filled: list[tuple[list[Slot], TensorRef | Tensor]] = [*self.pairs, *self.fill]
        for found, value in filled:
            shapes.update((slot.name, tuple(value.shape)) for slot in found)
        return shapes

    def check(self, path: str, *, strict: bool, device: torch.device | None = None) -> None:
        """Raises RefusedError, or UnsupportedError, where the plan must not be run; nothing was
        changed. ``device`` is where the model is to go."""
        report = self.report
        problems = report.problems()
        if not self.pairs or (strict and problems):
            parts = self.prefixes.of_parts
            if parts:
                part = some([f"model.get_submodule('{one[:-1]}')" for one in parts], 2)
                how = "rename the file's; 'modelctl match' finds the map"
                if len(parts) == 1:
                    how = f"'{prefix_command('add', path, parts[0])}'"
                hint = f"the file's names are those within {part}: load that, or {how}"
            elif wraps_whole(self.model):
                hint = (
                    "load before FullyShardedDataParallel wraps it, or inside its "
                    "summon_full_params(model)"
                )
            elif self.pairs:
                hint = "load_into(model, path, on_mismatch='skip') loads what fits"
                if report.prefix:
                    hint += f", prefix='{report.prefix}' looks at these names alone"
            elif self.prefixes.weak:
                hint = (
                    f"a few fit without '{self.prefixes.weak}': load_into(model, path, "
                    f"on_mismatch='skip', prefix='{self.prefixes.weak}') takes these"
                )
            else:
                hint = "'modelctl match' finds the rename that mends it"
            for name, grid in self.grids.items():
                problems.append(f"'{name}' has {grid}")
                hint = f"load_into(model, path, resize_pos_embed=True) interpolates it; {hint}"
            raise RefusedError(
                f"{path} does not fit the model: {'; '.join(problems) or 'no tensors'}", hint=hint
            )
        targets = [found for found, _ in (*self.pairs, *self.fill)]
        targets += [found for found, _, _ in self.resized]
        for found in targets:
            check_kind(found[0].name, found[0].tensor, device)
        filled = {id(slot.tensor) for found in targets for slot in found}
        left = [s for s in slots(self.model) if s.tensor.is_meta and id(s.tensor) not in filled]
        if left:
            hint = (
                "give these parts values first: module.to_empty(device=…), then its own "
                "initialisation (reset_parameters)"
            )
            if not all(isinstance(s.tensor, nn.Parameter) for s in left):
                hint = (
                    "build the model under 'with modelctl.nn.on_meta():', which leaves buffers "
                    f"their values; or {hint}"
                )
            raise RefusedError(
                f"{len(left)} tensors would stay on meta, without values: "
                f"{some([s.name for s in left])}",
                hint=hint,
            )

    @torch.no_grad()
    def run(
        self,
        device: torch.device | None = None,
        dtype: torch.dtype | None = None,
        progress: Callable[[int, int], object] | None = None,
        *,
        assign: bool = False,
        once: OneReader | None = None,
    ) -> None:
        """Copy the values, and bring the whole model to ``device`` and ``dtype``; ``progress`` is
        told the bytes that were read since the last call, and how many there are in all. With
        ``assign`` all that is loaded becomes a new tensor, mapped where the file has it as it is
        wanted. With ``once`` the first of several ranks reads for the others."""
        given, made = self.pairs, self.fill
        sharded = any(is_sharded(slot.tensor) for slot in slots(self.model))
        if sharded and dtype is not None:  # FSDP2 takes notice of this alone
            self.model.to(dtype=dtype)
            given = [(_anew(found), ref) for found, ref in given]
            made = [(_anew(found), value) for found, value in made]
        if assign:
            given = self._map(given, device, dtype)
        parts = [_share(found[0].tensor, ref) for found, ref in given]
        total = sum(part.nbytes for part in parts)
        if sharded:
            announce((part.storage, *span) for part in parts for span in part.spans())
        else:
            announce_all(parts)
        into = [_destination(found, ref, device, dtype, anew=assign) for found, ref in given]
        with nullcontext() if once is None else once.agreeing("while it read"):
            told = None if progress is None else lambda more: progress(more, total)
            with Reader(told) as reader:
                for part, (_, ref), dest in zip(parts, given, into, strict=True):
                    if once is None or once.reads:
                        reader.read(part, dest, compare=part.shape == ref.shape)
        if once is not None:
            once.share(into)
        for found, value in made:
            own = _share(found[0].tensor, value)
            _destination(found, value, device, dtype, anew=assign).copy_(own)
        for found, ref, grid in self.resized:
            value = grid.resized(to_tensors({"": ref})[""])
            _destination(found, value, device, dtype, anew=assign).copy_(value)
        for module, state in self.extras:
            module.set_extra_state(state)
        if device is not None or dtype is not None:
            self.model.to(device=device, dtype=dtype)
        found_not = _IncompatibleKeys([*self.report.missing], [*self.report.unexpected])
        for place in reversed(list(places(self.model))):  # children first, as load_state_dict
            for hook in place.module._load_state_dict_post_hooks.values():
                hook(place.module, found_not)

    def goals(
        self, device: torch.device | None, dtype: torch.dtype | None
    ) -> list[tuple[Any, ...]]:
        """What is read, for which name of the model, as what, to which kind of device, and how it
        lies there."""
        found = []
        for (slot, *_), ref in self.pairs:
            where, kind = _goal(slot.tensor, device, dtype)
            lies = () if is_lazy(slot.tensor) else slot.tensor.stride()
            found.append((slot.name, ref.shape, str(kind), where.type, lies))
        return found

    def _map(
        self, given: list[Pair], device: torch.device | None, dtype: torch.dtype | None
    ) -> list[Pair]:
        """Put in place what can be mapped; gives what has to be read."""
        mapper = Mapper()
        mapped = {}
        for i, (found, ref) in enumerate(given):
            old = found[0].tensor
            where, kind = _goal(old, device, dtype)
            if where.type == "cpu" and kind == torch_dtype(ref) and not is_lazy(old):
                new = mapper.tensor(ref)
                if new is not None:
                    mapped[i] = new.reshape(old.shape)
        for i, new in mapped.items():
            _put(given[i][0], new)
        names = [slot.name for i in mapped for slot in given[i][0]]
        self.report = replace(self.report, mapped=tuple(names))
        return [pair for i, pair in enumerate(given) if i not in mapped]


Value = TypeVar("Value", TensorRef, Tensor)


def _share(tensor: Tensor, value: Value) -> Value:
    """What of a value goes into this rank's part of a tensor of the model."""
    return within(value, tensor) if is_sharded(tensor) else value


def _anew(found: list[Slot]) -> list[Slot]:
    """The same places, with what stands there now."""
    return [slot._replace(tensor=getattr(slot.owner, slot.attr)) for slot in found]


def _goal(
    old: Tensor, device: torch.device | None, dtype: torch.dtype | None
) -> tuple[torch.device, torch.dtype]:
    """Where the values of a tensor of the model go, and as what."""
    where = device or (torch.device("cpu") if old.is_meta else old.device)
    floating = old.dtype.is_floating_point or old.dtype.is_complex
    return where, dtype if dtype is not None and floating else old.dtype


def _put(found: list[Slot], new: Tensor) -> Tensor:
    """A new tensor in the model under each of the names of an old one, as what that was."""
    old = found[0].tensor
    if isinstance(old, nn.Parameter):
        made = nn.Parameter(new, requires_grad=old.requires_grad)
        made.__dict__.update(old.__dict__)
        new = made
    for slot in found:
        setattr(slot.owner, slot.attr, new)
    return new


def _destination(
    found: list[Slot],
    value: TensorRef | Tensor,
    device: torch.device | None,
    dtype: torch.dtype | None,
    *,
    anew: bool = False,
) -> Tensor:
    """The tensor to read into, in the model under each of its names."""
    old = found[0].tensor
    anew = (anew or old.is_meta) and not is_lazy(old)
    # a backward over the old values must fail, as after load_state_dict; torch before 2.5 minds
    # that tensors of inference have no version
    if not anew and not is_lazy(old) and not old.is_inference():
        torch.autograd.graph.increment_version(old)
    sharded = is_sharded(old)
    where, kind = _goal(old, device, dtype)
    if is_lazy(old):
        cast(Any, old).materialize(value.shape, device=where, dtype=kind)
        return old.detach()
    if anew:
        if sharded:
            return local(_put(found, filled(old, device, kind)))
        new = torch.empty_like(old, device=where, dtype=kind, requires_grad=False)
        return _put(found, new).detach()
    if sharded:
        return local(old)
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
    added: str = "",
    resize: bool = False,
    base: Collection[str] = (),
) -> Plan:
    """Match a file's state_dict with a model, by names without wrappers and ``prefix`` (with
    ``alone`` those that begin with it only), and with ``added`` before them; nothing is changed.
    With ``resize`` positions of another grid are to be interpolated. ``base`` are the model's names
    that the file may lack.

    Raises:
        CollisionError: two of the file's names mean the same tensor.
        RefusedError: a module's own code refuses the file.
        UnsupportedError: one that the model has is sparse, quantized or wrapped in the file, or
            computed by a module's own code.
    """
    states = _extra_states(model)
    names = {slot.name for slot in slots(model) if slot.persistent}
    matched = match(model, section, names, states.keys(), prefix, alone=alone, added=added)
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
            grid = None if is_sharded(tensor) else grids(group[0], tuple(value.shape))
            if grid is not None and resize and isinstance(value, TensorRef):
                loaded += own
                plan.resized.append((group, value, grid))
                continue
            if grid is not None:
                plan.grids[own[0]] = grid
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
    if missing and not prefix and not added:
        plan.prefixes = prefixes(section, slots(model))
    gone = {added + unwrapped(bare) for name in removed if (bare := without(name, prefix, alone))}
    plan.report = LoadReport(
        tuple(loaded),
        tuple(missing),
        tuple(matched.unexpected),
        tuple(mismatched),
        tuple(name for name in missing if unwrapped(name) in gone),
        prefix=prefix,
        added=added,
        base=tuple(name for name in missing if name in base),
    )
    return plan


def _extra_states(model: nn.Module) -> dict[str, nn.Module]:
    """The modules with a state of their own beside tensors, by its name in a state_dict."""
    return {
        (f"{place.name}." if place.name else "") + "_extra_state": place.module
        for place in places(model)
        if type(place.module).get_extra_state is not nn.Module.get_extra_state
    }
