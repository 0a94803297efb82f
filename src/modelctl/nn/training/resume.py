"""Go on with a training from a checkpoint: read inertly, checked whole, then restored."""

from __future__ import annotations

import os
import warnings
from collections.abc import Mapping, MutableMapping
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.amp import GradScaler
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from ...core.checkpoint import Checkpoint
from ...core.matcher import without
from ...core.nodes import mapping
from ...core.sections import StateDict
from ...core.text import some
from ...core.tree import Path as Place
from ...errors import AmbiguousError, RefusedError, UsageError
from ...files import open as open_checkpoint
from ...surgery.carry.optimizer_names import assign_names
from ..freezing.freeze import set_grad
from ..loading.file_names import find_prefix
from ..loading.plan import Plan, plan_load, removed_names, saved_freeze
from ..loading.values import live
from ..model_names import Parameters, slots
from ..optim import schedulers
from ..optim.several import Label, Several, by_label, called, labelled, paired
from .notes import Notes
from .optimizer_state import OptimizerPlan, plan_optimizer
from .progress import finished_epochs, own_values
from .refreeze import Refreezing, check_wrapped
from .report import Resumed
from .rng import own_state, restore_rng
from .rotation import newest
from .scaler import check_scaler, find_scaler, scaler_differences
from .which_optimizer import check_apart, order_by_content


def resume(
    path: str | os.PathLike[str],
    *,
    model: nn.Module,
    optimizer: Several[Optimizer] = None,
    scheduler: Several[LRScheduler] = None,
    scaler: GradScaler | None = None,
    ema: nn.Module | MutableMapping[str, Any] | None = None,
    rng: bool = True,
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
    each parameter), the scheduler, the scaler, the EMA copy, and last the random number
    generators.

    The optimizer's entries are matched by name, so that it may have been re-ordered or grouped
    in another way; where the file has no ``param_names``, by position or by the only order that
    fits. Those that are not the model's and were given no name go by their place, with a warning.
    Groups that a saved optimizer has over parameters which the live one lacks (a block that
    was thawed before the save) are added, to the scheduler too. ``foreach``, ``fused``,
    ``capturable`` and ``differentiable`` stay as the constructor says; all other settings, of the
    scheduler too, are the saved ones, with a warning where they differ.

    Args:
        path: a file, or a folder: there ``latest.*``, else the whole one that has come furthest.
        optimizer, scheduler: one, or several as they were saved: a list, or by name. Listed
            optimizers are told apart by the names of their parameters.
        ema: the averaged copy, or a state_dict whose tensors are to be filled.
        rng: restore the generators; under ``torch.distributed`` each rank its own.
        on_mismatch: ``"skip"`` is for another head: what the model lacks, or has in another
            shape, is left aside; what the file lacks keeps its values; the optimizer's state is
            kept for all else, and starts fresh there.
        key: the dotted path of the model's state_dict, where the one that is found isn't meant.

    Raises:
        RefusedError: model, optimizer, scheduler, scaler, ema or rng of the file don't fit the
            live one; or the freeze record would change what trains inside a
            DistributedDataParallel, which looks only when it is built.
        AmbiguousError: which saved parameter, or which of several optimizers, is which can't be
            told.
        UsageError: a scheduler of an optimizer that isn't given, or no way to treat mismatches.
        UnsupportedError: a section that is needed holds an object.
        UnreadableError: the file, or a folder without one.
    """
    if on_mismatch not in ("error", "skip"):
        raise UsageError(f"on_mismatch is 'error' or 'skip', not {on_mismatch!r}")
    path = newest(path)
    with open_checkpoint(path, key=key) as ckpt:
        plan = _Plan(ckpt, path, model, on_mismatch == "skip")
        plan.fit_optimizers(labelled(optimizer))
        plan.fit_schedulers(labelled(scheduler))
        plan.fit_scaler(scaler)
        plan.fit_ema(ema)
        plan.fit_rest(rng)
        state = plan.run()
    for note in plan.notes:
        warnings.warn(note, stacklevel=2)
    return state


class _Plan:
    """Everything that was read and found to fit; :meth:`run` is the part that changes things."""

    def __init__(self, ckpt: Checkpoint, path: Path, model: nn.Module, skip: bool) -> None:
        self.ckpt, self.path, self.live, self.skip = ckpt, path, model, skip
        self.sections, self.top = ckpt.sections, mapping(ckpt.root) or {}
        self.notes = Notes()
        self.missing: list[str] = []
        self.unused: list[str] = []
        self.params = Parameters(model)
        self._check_wrapped = partial(check_wrapped, model, self.params)
        self.model = self._loading(model, self.sections.model(), str(path))
        self.prefix = self.model.report.prefix
        record = saved_freeze(ckpt, self.prefix)
        self.freezing = None if record is None else Refreezing(model, record, self.model.report)
        if self.freezing is not None:
            self._check_wrapped(self.freezing.change)

    def _loading(self, model: nn.Module, saved: StateDict, where: str) -> Plan:
        prefix = find_prefix(saved, slots(model))
        plan = plan_load(model, saved, removed=removed_names(self.ckpt), prefix=prefix)
        try:
            plan.check(where, strict=not self.skip)
        except RefusedError as e:
            if plan.pairs and plan.report.problems() and not self.skip:
                e.hint = "resume(..., on_mismatch='skip') keeps what fits, the rest starts fresh"
            raise
        return plan

    def _wanted(self, name: str, asked: object, saved: object) -> bool:
        """Whether a section is both asked for and there."""
        if asked and not saved:
            self.missing.append(name)
        elif saved and not asked:
            self.unused.append(name)
        return bool(asked and saved)

    def fit_optimizers(self, optimizers: dict[Label, Optimizer]) -> None:
        self.optimizers = optimizers
        self.optimizing: dict[Label, OptimizerPlan] = {}
        self.reordered = False
        if optimizers and any(p.is_meta for p in self.live.parameters()):
            raise RefusedError(
                "the model is on meta, so the optimizer holds parameters that loading replaces",
                hint="load_into(model, path) first, then build the optimizer and resume",
            )
        saved = by_label(self.sections.optimizers)
        if not self._wanted("optimizer", optimizers, saved):
            return
        pairs = paired("optimizer", optimizers, saved)
        self._leave(saved, pairs, "optimizer")
        nodes: dict[Label, Any] = {label: node for label, (_, node) in pairs.items()}
        states: dict[Label, Any] = {
            label: self._with_own_names(live(node, called("optimizer", label)))
            for label, node in nodes.items()
        }
        if len(pairs) > 1 and not any(isinstance(label, str) for label in pairs):
            order = order_by_content([*optimizers.values()], [*states.values()], self.params)
            self.reordered = order != sorted(order)
            nodes = {i: nodes[j] for i, j in enumerate(order)}
            states = {i: states[j] for i, j in enumerate(order)}
        for label, state in states.items():
            self.optimizing[label] = plan = plan_optimizer(
                optimizers[label],
                state,
                self.params,
                partial(self._names_in_file, nodes[label]),
                skip=self.skip,
                scheduled=bool(self._saved_schedulers()),
            )
            if plan.by_place:
                self.notes.append(
                    f"{called('optimizer', label)}: parameters that are not the model's and have "
                    f"no names ({plan.by_place}) got the state of those in their places"
                )
            if plan.unknown:
                self.notes.append(
                    f"{called('optimizer', label)}: {some(plan.unknown)} in the checkpoint's "
                    f"groups is no setting of {type(optimizers[label]).__name__} here: it stays "
                    "there, without effect; build the groups with it where it has one"
                )
        check_apart(optimizers, self.optimizing)
        if self.freezing is None:
            held = self.params.by_name
            self._check_wrapped(name for name in self.joined if not held[name].requires_grad)

    @property
    def joined(self) -> list[str]:
        """Parameters that are to join an optimizer."""
        plans = self.optimizing.values()
        return [name for plan in plans for _, named in plan.added for name in named]

    def _leave(self, saved: Mapping[Label, Any], pairs: Mapping[Any, Any], what: str) -> None:
        if len(pairs) < len(saved):
            self.unused += [called(what, label) for label in saved if label not in pairs]

    def _with_own_names(self, saved: Any) -> Any:
        """A saved optimizer with names as the model has them: Lightning's begin with ``model.``."""
        for group in saved["param_groups"] if self.prefix else ():
            names = group.get("param_names") if isinstance(group, dict) else None
            if isinstance(names, list):
                group["param_names"] = [n and (without(str(n), self.prefix) or n) for n in names]
        return saved

    def _names_in_file(self, node: Any) -> dict[Any, str] | None:
        """Names of a saved optimizer's ids, where the file's own model proves them."""
        try:
            names = assign_names(node, self.sections.model().tensors())
        except (AmbiguousError, RefusedError):
            return None
        groups = [mapping(group) or {} for group in (mapping(node) or {})["param_groups"]]
        return {
            pid: without(name, self.prefix) or name
            for group, own in zip(groups, names, strict=True)
            for pid, name in zip(group["params"], own, strict=True)
            if name
        }

    def _saved_schedulers(self) -> dict[Label, Any]:
        saved = by_label(self.sections.schedulers)
        if not saved and "scheduler" in self.top:  # of a kind of its own
            saved = {None: self.top["scheduler"]}
        return saved

    def fit_schedulers(self, wanted: dict[Label, LRScheduler]) -> None:
        self.scheduling: dict[Label, tuple[Any, Any]] = {}
        self.schedulers = list(wanted.values())
        if self.optimizers:
            known = [one for one in self.schedulers if _driven_by(one) is not None]
            schedulers.check_owner(known, *self.optimizers.values())
        saved = self._saved_schedulers()
        if not self._wanted("scheduler", wanted, saved):
            return
        pairs = paired("scheduler", wanted, saved)
        if self.reordered and len(pairs) > 1 and not any(isinstance(one, str) for one in pairs):
            raise RefusedError(
                "the optimizers are listed in another order than when this was saved: whose each "
                "of the schedulers is can't be told",
                hint="give optimizer= and scheduler= in the order that was saved",
            )
        for label, (one, node) in pairs.items():
            state = live(node, called("scheduler", label))
            schedulers.check_same(one, state)
            self._check_groups(one, len(state.get("base_lrs") or ()))
            self.scheduling[label] = one, state
        self._leave(saved, pairs, "scheduler")

    def _plan_of(self, scheduler: Any) -> OptimizerPlan | None:
        for label, plan in self.optimizing.items():
            if self.optimizers[label] is _driven_by(scheduler):
                return plan
        return None

    def _check_groups(self, scheduler: Any, count: int) -> None:
        plan = self._plan_of(scheduler)
        where = "the saved optimizer" if plan else "the optimizer"
        driven = _driven_by(scheduler)
        groups = plan.saved["param_groups"] if plan else getattr(driven, "param_groups", ())
        if driven is not None and count and count != len(groups):
            raise RefusedError(
                f"the saved {type(scheduler).__name__} is over {count} groups, {where} has "
                f"{len(groups)}",
                hint="build the optimizer with the same groups, or resume without scheduler=",
            )

    def fit_scaler(self, scaler: GradScaler | None) -> None:
        self.scaler = scaler if scaler is not None and scaler.is_enabled() else None
        found = find_scaler(self.top)
        self.scaling: Any = None
        if self._wanted("scaler", self.scaler, found) and self.scaler and found:
            self.scaling = live(found[1], "scaler")
            check_scaler(self.scaler, self.scaling)

    def fit_ema(self, ema: nn.Module | MutableMapping[str, Any] | None) -> None:
        self.ema: Plan | None = None
        self.ema_numbers: tuple[MutableMapping[str, Any], dict[str, Any]] = {}, {}
        copies = self.sections.ema
        if self._wanted("ema", ema is not None, copies) and ema is not None:
            saved = copies[0]
            if not isinstance(ema, nn.Module):
                numbers = {k: v for k, v in saved.entries.items() if type(v) in (int, float)}
                self.ema_numbers = ema, {k: v for k, v in numbers.items() if k in ema}
                saved, ema = StateDict(saved.path, saved.tensors()), _holding(ema)
            self.ema = self._loading(ema, saved, f"{self.path}, ema")

    def fit_rest(self, rng: bool) -> None:
        node = self.top.get("rng")
        self.rng = own_state(live(node, "rng")) if rng and node is not None else None
        self._wanted("rng", rng, node if self.rng or not rng else None)
        sections = self.sections
        self.epoch = finished_epochs(sections, self.top)
        self.step, self.lr = (found[1] if found else None for found in (sections.step, sections.lr))
        parts: list[Place] = [found.path for found in (*sections.models, *sections.ema)]
        parts += [path for path, _ in (*sections.optimizers, *sections.schedulers)]
        parts += [found[0] for found in (sections.epoch, sections.step, sections.lr) if found]
        parts += [*sections.nameless_ema, *([sections.rng[0]] if sections.rng else [])]
        scaler = find_scaler(self.top)
        keys = {path[0] for path in parts if path} | ({scaler[0]} if scaler else set())
        self.extra: Any = {}
        if sections.model().path != ():
            self.extra, left = own_values(self.top, {*keys, "rng", "scheduler"})
            self.unused += left

    # -------------------------------------------------------------- from here on things change

    def run(self) -> Resumed:
        restored = ["model"]
        self.model.run()
        frozen = None if self.freezing is None else self.freezing.run()
        plans = list(self.optimizing.values())
        joined = self.joined
        if self.freezing is None:
            set_grad(self.params, joined, True)
        for label, plan in self.optimizing.items():
            one = self.optimizers[label]
            own = [each for each in self.schedulers if _driven_by(each) is one]
            what = called("optimizer", label)
            scheduled = any(_driven_by(each) is one for each, _ in self.scheduling.values())
            built = (
                None if scheduled else [(g["lr"], g.get("initial_lr")) for g in one.param_groups]
            )
            plan.run(one, own)
            new = not any("initial_lr" in group for group in plan.saved["param_groups"])
            overruled = built is not None and self.notes.overruled_lr(
                what, built, one.param_groups, new
            )
            self.notes.groups_differ(what, plan.changed, without="lr" if overruled else None)
        for label, (one, state) in self.scheduling.items():
            if _driven_by(one) is not None:  # of an unknown kind, it is not known what moves
                differ = schedulers.differences(one.state_dict(), state)
                self.notes.differ(called("scheduler", label), differ)
            plan_or_none = self._plan_of(one)
            if plan_or_none is not None:
                saved = len(plan_or_none.saved["param_groups"])
                state = schedulers.rearranged(state, one, plan_or_none.source, saved)
            one.load_state_dict(state)
        if self.scaler is not None and self.scaling is not None:
            self.notes.differ("scaler", scaler_differences(self.scaler, self.scaling))
            self.scaler.load_state_dict(self.scaling)
        if self.ema is not None:
            self.ema.run()
            self.ema_numbers[0].update(self.ema_numbers[1])
        lr = self._lr()
        if self.rng is not None:
            restore_rng(self.rng, self.live)
        done = {
            "optimizer": self.optimizing,
            "scheduler": self.scheduling,
            "scaler": self.scaling,
            "ema": self.ema,
            "rng": self.rng,
        }
        restored += [name for name, what in done.items() if what]
        lacking = [name for name in self.missing if name != "rng"]
        if lacking:
            self.notes.append(f"not in the checkpoint: {', '.join(lacking)}; left as built")
        return Resumed(
            self.path,
            self.epoch,
            self.step,
            lr,
            self.extra,
            tuple(restored),
            tuple(self.missing),
            tuple(self.unused),
            self.model.report,
            frozen,
            joined=tuple(joined),
            fresh=tuple(name for plan in plans for name in plan.fresh),
            dropped=tuple(name for plan in plans for name in plan.dropped),
        )

    def _lr(self) -> float | None:
        """The lr that training goes on with."""
        if not self.optimizers:
            return self.lr
        lr = float(next(iter(self.optimizers.values())).param_groups[0]["lr"])
        if not self.optimizing and self.lr not in (None, lr):
            self.notes.append(
                f"the checkpoint's lr is {self.lr:g}, the optimizer's {lr:g} stays: the file has "
                "no optimizer state"
            )
        return lr


def _driven_by(scheduler: Any) -> Any:
    """A scheduler's optimizer; None where one of another kind than torch's does not say."""
    return getattr(scheduler, "optimizer", None)


def _holding(ema: MutableMapping[str, Any]) -> nn.Module:
    """A module whose buffers are the tensors of a state_dict, to be filled."""
    holder = nn.Module()
    holder._buffers.update((k, v) for k, v in ema.items() if isinstance(v, torch.Tensor))
    return holder
