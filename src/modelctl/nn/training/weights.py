"""Weights and what trains, back onto a live model and its averaged copy."""

from __future__ import annotations

from collections.abc import Iterable, MutableMapping
from dataclasses import replace
from typing import Any

import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from ...core.freeze_record import FreezeRecord
from ...core.matching.matcher import Shape, match_names, without
from ...core.names import AVERAGED, unwrapped
from ...core.nodes import mapping, with_entries
from ...core.records import ONLY, read_record
from ...core.sections import StateDict
from ...core.tensors import TensorRef
from ...core.text import some
from ...core.tree import path_text
from ...errors import RefusedError
from ..freezing.batchnorm import held_batchnorms, release_batchnorms
from ..freezing.freeze import Frozen, apply_record, count_trainable, set_grad
from ..loading.file_names import find_either
from ..loading.load import chosen_model
from ..loading.plan import Plan, base_names, plan_load, removed_names, saved_freeze
from ..loading.report import LoadReport
from ..model_names import Parameters, slots
from .part import Part, Saved

# What mmengine's averaged models call torch's ``n_averaged``.
STEPS = "steps"


class ModelPart(Part):
    """The model: its weights, and exactly what trained when it was saved.

    Attributes:
        params: the live model's parameters.
        freezing: what the freeze record changes; None where the file has none.
        frozen: what it did.
        swapped: where the weights come from, and where their average is, in a file that keeps the
            average in the model's place; else None.
    """

    name = "model"

    def __init__(self, saved: Saved, model: nn.Module) -> None:
        super().__init__(saved)
        self.live, self.params = model, Parameters(model)
        self.freezing: Refreezing | None = None
        self.frozen: Frozen | None = None
        self.swapped: tuple[str, str] | None = None
        self.part: set[str] = set()  # the file's names, where it has a part of the model

    def fit(self) -> None:
        found = chosen_model(self.saved.ckpt)
        # moments belong to what was being trained, not to its average
        raw = self.saved.sections.raw
        section = found if raw is None else _without_count(raw)
        if raw is not None:
            self.swapped = (path_text(raw.path), path_text(found.path))
        ckpt, affix = self.saved.ckpt, find_either(section, slots(self.live))
        self.part = {unwrapped(str(name)) for name in section.entries} if affix[1] else set()
        record = saved_freeze(ckpt, affix[0], added=affix[1])
        base = base_names(ckpt, self.live, record)
        self.plan = _loading(self.saved, self.live, section, affix, base, str(self.saved.path))
        if record is not None:
            self.freezing = Refreezing(self.live, record, self.report)
            self.check_wrapped(self.freezing.change)

    def run(self) -> None:
        self.plan.run()
        if self.freezing is not None:
            self.frozen = self.freezing.run()
        self.restored = True

    @property
    def report(self) -> LoadReport:
        """What is loaded."""
        return self.plan.report

    @property
    def shapes(self) -> dict[str, Shape]:
        """Those that the model's tensors have in the file, by the model's names."""
        return self.plan.shapes

    @property
    def renames(self) -> bool:
        """Whether the file has a prefix that the model lacks, or the other way round."""
        return bool(self.report.prefix or self.report.added)

    def own_name(self, name: str) -> str:
        """One of the file's names as the model has it; any other as it is."""
        if unwrapped(name) in self.part:
            return self.report.added + unwrapped(name)
        return without(name, self.report.prefix) or name

    def check_wrapped(self, change: Iterable[str]) -> None:
        """Raises RefusedError where what trains would change behind a wrapper that looks once."""
        held = self.params.by_name
        names = [name for name in change if held[name].is_floating_point()]
        if names and any(isinstance(m, DistributedDataParallel) for m in self.live.modules()):
            raise RefusedError(
                f"resuming changes what trains ({some(names, 3)}), and DistributedDataParallel "
                "looks at that only when it is built",
                hint="resume the bare model, or apply_freeze(model, path) first; then wrap it",
            )


class EmaPart(Part):
    """The averaged copy: a module, or a state_dict whose tensors are filled."""

    name = "ema"

    def __init__(self, saved: Saved, ema: nn.Module | MutableMapping[str, Any] | None) -> None:
        super().__init__(saved)
        self.live = ema
        self.plan: Plan | None = None
        self.numbers: dict[str, Any] = {}

    def fit(self) -> None:
        sections = self.saved.sections
        copies = [one for one in sections.ema if one is not sections.raw]
        if sections.raw is not None:
            copies.insert(0, self._average(sections.model(), sections.raw))
        if not self._wanted(self.live is not None, copies) or self.live is None:
            return
        section, model = copies[0], self.live
        if not isinstance(model, nn.Module):
            numbers = {k: v for k, v in section.entries.items() if type(v) in (int, float)}
            self.numbers = {k: v for k, v in numbers.items() if k in model}
            section, model = StateDict(section.path, section.tensors()), _holding(model)
        base, affix = set(), find_either(section, slots(model))
        if read_record(self.saved.ckpt, ONLY) is not None:  # what the model has, its average has
            known = {affix[1] + unwrapped(str(name)) for name in sections.model().entries}
            base = {one.name for one in slots(model) if unwrapped(one.name) not in known}
        where = f"{self.saved.path}, ema"
        self.plan = _loading(self.saved, model, section, affix, base, where)

    def _average(self, model: StateDict, raw: StateDict) -> StateDict:
        """What stands in the model's place, with the count of what was averaged that the file has
        elsewhere, where the live copy has one."""
        live = self.live
        names = [slot.name for slot in slots(live)] if isinstance(live, nn.Module) else live or ()
        beside = mapping(self.saved.top.get("averaging_state")) or {}
        count = beside.get(AVERAGED, raw.entries.get(STEPS))
        if AVERAGED not in names or not isinstance(count, TensorRef) or model.is_module:
            return model
        return StateDict(model.path, with_entries(model.node, {**model.entries, AVERAGED: count}))

    def run(self) -> None:
        if self.plan is None:
            return
        self.plan.run()
        if isinstance(self.live, MutableMapping):
            self.live.update(self.numbers)
        self.restored = True


def _without_count(raw: StateDict) -> StateDict:
    """What was trained, without mmengine's count of what was averaged, which is its copy's."""
    if raw.is_module or STEPS not in raw.entries:
        return raw
    entries = {name: node for name, node in raw.entries.items() if name != STEPS}
    return StateDict(raw.path, with_entries(raw.node, entries))


def _loading(
    saved: Saved,
    model: nn.Module,
    section: StateDict,
    affix: tuple[str, str],
    base: set[str],
    where: str,
) -> Plan:
    prefix, added = affix  # what comes off the file's names, and before them
    gone = removed_names(saved.ckpt)
    plan = plan_load(model, section, removed=gone, prefix=prefix, added=added, base=base)
    try:
        plan.check(where, strict=not saved.skip)
    except RefusedError as e:
        if plan.pairs and plan.report.problems() and not saved.skip:
            e.hint = "resume(..., on_mismatch='skip') keeps what fits, the rest starts fresh"
        raise
    return plan


def _holding(ema: MutableMapping[str, Any]) -> nn.Module:
    """A module whose buffers are the tensors of a state_dict, to be filled."""
    holder = nn.Module()
    holder._buffers.update((k, v) for k, v in ema.items() if isinstance(v, torch.Tensor))
    return holder


# ------------------------------------------------------------------ what trains


class Refreezing:
    """A freeze record that was compared with a model; nothing is changed yet.

    What the record does not name was trained when it was written. What the file does not know at
    all (a part that the model has got since) keeps what it has.

    Attributes:
        change: the parameters whose ``requires_grad`` changes.
    """

    def __init__(self, model: nn.Module, record: FreezeRecord, loaded: LoadReport) -> None:
        self.model, self.record, self.params = model, record, Parameters(model)
        called = self.params.called
        found = match_names(record.frozen, called).values()
        frozen = {n for name in found for n in called[name]}
        known = [*loaded.loaded, *(name for name, _, _ in loaded.mismatched)]
        self.modules = {name.rpartition(".")[0] for name in known}
        grads = {name: p.requires_grad for name, p in self.params.by_name.items()}
        self.thaw = {n for n in {*known} & {*grads} if not grads[n] and n not in frozen}
        self.change = [n for n in grads if n in self.thaw or (n in frozen and grads[n])]

    def run(self) -> Frozen:
        """Thaw what trained, and then freeze what did not."""
        before = count_trainable(self.params)
        thawed = set_grad(self.params, [n for n in self.change if n in self.thaw], True)
        held = [n for n in held_batchnorms(self.model) if n in self.modules]
        held = [] if self.record.bn_eval else held
        released = release_batchnorms(self.model, held)
        frozen = apply_record(self.model, self.record, strict=False)
        return replace(
            frozen,
            changed=(*frozen.changed, *thawed),
            before=before,
            batchnorms=(*released, *frozen.batchnorms),
        )
