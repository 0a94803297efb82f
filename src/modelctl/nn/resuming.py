"""Go on with a training from a checkpoint: read inertly, checked whole, then restored."""

from __future__ import annotations

import os
import warnings
from dataclasses import dataclass
from typing import Any

from torch import nn
from torch.optim import Optimizer

from ..core.checkpoint import Checkpoint
from ..core.nodes import mapping
from ..core.records import FREEZE, read_record
from ..errors import AmbiguousError, RefusedError
from ..files import open as open_checkpoint
from . import schedules
from .freezing import Frozen, apply_record, set_grad
from .loading import LoadReport, Plan, plan_load
from .naming import Parameters
from .optimizers import OptimizerPlan, plan_optimizer
from .plain import live
from .rng import check_rng, restore_rng
from .text import some


@dataclass(frozen=True)
class Resumed:
    """Where the training stands; ``str()`` is for people. What the file lacks is None.

    Attributes:
        epoch: finished epochs: go on with ``range(state.epoch, epochs)``.
        step: finished optimizer steps.
        lr: the first group's, as restored, or what the file says without an optimizer.
        extra: your own values.
        restored: the sections that were restored.
        missing: those that were asked for and are not in the file.
        unused: those that are in the file and were not asked for.
        model: what was loaded into the model.
        frozen: what the freeze record did, or None.
        joined: parameters that joined the optimizer, because they had when this was saved.
        fresh: parameters of the optimizer that the saved one did not know: no state yet.
    """

    epoch: int | None
    step: int | None
    lr: float | None
    extra: Any
    restored: tuple[str, ...]
    missing: tuple[str, ...]
    unused: tuple[str, ...]
    model: LoadReport
    frozen: Frozen | None
    joined: tuple[str, ...] = ()
    fresh: tuple[str, ...] = ()

    def __str__(self) -> str:
        known = {"epoch": self.epoch, "step": self.step, "lr": self.lr}
        at = ", ".join(f"{key} {value}" for key, value in known.items() if value is not None)
        lines = [f"resumed at {at or 'an unknown point'}: {', '.join(self.restored)}"]
        for what, names in (
            ("not in the file", self.missing),
            ("in the file, not asked for", self.unused),
            ("joined the optimizer", self.joined),
            ("without optimizer state", self.fresh),
        ):
            if names:
                lines.append(f"{what}: {some(names)}")
        return "\n".join(lines)


def resume(
    path: str | os.PathLike[str],
    *,
    model: nn.Module,
    optimizer: Optimizer | None = None,
    scheduler: schedules.Schedulers = None,
    ema: nn.Module | None = None,
    rng: bool = True,
    key: str | None = None,
) -> Resumed:
    """Restore a training from a checkpoint of :func:`save_checkpoint` or ``modelctl merge``.

    Build model, optimizer and scheduler as at the start, then call this. Nothing in the file is
    run, and nothing is changed before everything was seen to fit. Restored are the model's
    weights (each where it is, whatever device it was saved on), what trains (the freeze record,
    exactly: what it does not name is thawed), the optimizer, the scheduler(s), and last the
    random number generators.

    The optimizer's entries are matched by name where the file has ``param_names``, so that it
    may have been re-ordered; else by position or by the only order that fits. Groups that a
    saved optimizer has over parameters which the live one lacks (a block that was thawed before
    the save) are added, to the scheduler too. ``foreach``, ``fused``, ``capturable`` and
    ``differentiable`` stay as the constructor says; all other settings are the saved ones, with
    a warning where the lr differs.

    Args:
        scheduler: one, or as many as were saved, in that order.
        ema: the averaged copy.
        rng: restore the generators.
        key: the dotted path of the model's state_dict, where the one that is found isn't meant.

    Raises:
        RefusedError: model, optimizer, scheduler, ema or rng of the file don't fit the live one.
        AmbiguousError: which saved parameter is which can't be told.
        UnsupportedError: a section that is needed holds an object.
        UnreadableError: the file.
    """
    with open_checkpoint(path, key=key) as ckpt:
        plan = _Plan(ckpt, os.fspath(path), model, optimizer, scheduler, ema, rng)
        return plan.run()


class _Plan:
    """Everything that was read and found to fit; :meth:`run` is the part that changes things."""

    def __init__(
        self,
        ckpt: Checkpoint,
        path: str,
        model: nn.Module,
        optimizer: Optimizer | None,
        scheduler: schedules.Schedulers,
        ema: nn.Module | None,
        rng: bool,
    ) -> None:
        self.live, self.optimizer, self.scheduler = model, optimizer, scheduler
        sections, top = ckpt.sections, mapping(ckpt.root) or {}
        self.model = plan_load(model, sections.model())
        self.model.check(path, strict=True)
        if optimizer is not None and any(p.is_meta for p in model.parameters()):
            raise RefusedError(
                "the model is on meta, so the optimizer holds parameters that loading replaces",
                hint="load_into(model, path) first, then build the optimizer and resume",
            )
        self.record = read_record(ckpt, FREEZE)
        self.params = Parameters(model)
        self.missing: list[str] = []
        self.unused: list[str] = []

        saved = _only(sections.optimizers, "optimizer")
        self.optimizing: OptimizerPlan | None = None
        if self._wanted("optimizer", optimizer, saved) and optimizer is not None:
            self.optimizing = plan_optimizer(optimizer, live(saved, "optimizer"), self.params)
        if optimizer is not None:
            schedules.check_owner(scheduler, optimizer)

        states = _scheduler_states(top.get("scheduler"), [n for _, n in sections.schedulers])
        wanted = schedules.each(scheduler)
        self.scheduling: list[Any] = []
        if self._wanted("scheduler", wanted or None, states or None):
            self.scheduling = live(states, "scheduler")
            self._check_schedulers(wanted)

        copies = sections.ema
        self.ema: Plan | None = None
        if self._wanted("ema", ema, copies or None) and ema is not None:
            self.ema = plan_load(ema, copies[0])
            self.ema.check(f"{path}, ema", strict=True)

        node = top.get("rng")
        self.rng = live(node, "rng") if rng and node is not None else None
        if self.rng is not None:
            check_rng(self.rng)
        elif node is not None:
            self.unused.append("rng")
        elif rng:
            self.missing.append("rng")
        self.extra = live(top["extra"], "extra") if "extra" in top else None
        self.epoch, self.step, self.lr = (
            None if found is None else found[1]
            for found in (sections.epoch, sections.step, sections.lr)
        )

    def _wanted(self, name: str, live: Any, saved: Any) -> bool:
        """Whether a section is both asked for and there."""
        if live is not None and saved is None:
            self.missing.append(name)
        elif live is None and saved is not None:
            self.unused.append(name)
        return live is not None and saved is not None

    def _check_schedulers(self, wanted: list[Any]) -> None:
        if len(wanted) != len(self.scheduling):
            raise RefusedError(
                f"the checkpoint has {len(self.scheduling)} schedulers, {len(wanted)} are given"
            )
        groups = self._groups_saved()
        for one, state in zip(wanted, self.scheduling, strict=True):
            _same_scheduler(one, state)
            count = len(state.get("base_lrs") or ())
            if self.optimizing is None and count and count != len(one.optimizer.param_groups):
                raise RefusedError(
                    f"the saved {type(one).__name__} is over {count} groups, the optimizer has "
                    f"{len(one.optimizer.param_groups)}"
                )
            if self.optimizing is not None and count and count != groups:
                raise RefusedError(
                    f"the saved {type(one).__name__} is over {count} groups, the saved optimizer "
                    f"has {groups}"
                )

    def _groups_saved(self) -> int:
        return len(self.optimizing.saved["param_groups"]) if self.optimizing is not None else 0

    def run(self) -> Resumed:
        restored = ["model"]
        self.model.run()
        frozen = None
        if self.record is not None:
            frozen = apply_record(self.live, self.record, exact=True, strict=False)
        joined: list[str] = []
        fresh: list[str] = []
        if self.optimizing is not None and self.optimizer is not None:
            joined = [name for _, named in self.optimizing.added for name in named]
            fresh = self.optimizing.fresh
            if self.record is None:
                set_grad(self.params, joined, True)
            self._warn_of_lrs(self.optimizing)
            self.optimizing.run(self.optimizer, self.scheduler)
            restored.append("optimizer")
        if self.scheduling:
            for one, state in zip(schedules.each(self.scheduler), self.scheduling, strict=True):
                if self.optimizing is not None:
                    source = self.optimizing.source
                    state = schedules.rearranged(state, one, source, self._groups_saved())
                one.load_state_dict(state)
            restored.append("scheduler")
        if self.ema is not None:
            self.ema.run()
            restored.append("ema")
        lacking = [name for name in self.missing if name != "rng"]
        if lacking:
            warnings.warn(f"not in the checkpoint: {', '.join(lacking)}", stacklevel=4)
        lr = self.lr
        if self.optimizer is not None:
            lr = float(self.optimizer.param_groups[0]["lr"])
            if self.optimizing is None and self.lr is not None and self.lr != lr:
                warnings.warn(
                    f"the checkpoint's lr is {self.lr:g}, the optimizer's {lr:g} stays: the file "
                    "has no optimizer state",
                    stacklevel=4,
                )
        if self.rng is not None:
            restore_rng(self.rng)
            restored.append("rng")
        return Resumed(
            self.epoch,
            self.step,
            lr,
            self.extra,
            tuple(restored),
            tuple(self.missing),
            tuple(self.unused),
            self.model.report,
            frozen,
            tuple(joined),
            tuple(fresh),
        )

    def _warn_of_lrs(self, plan: OptimizerPlan) -> None:
        for i, own, theirs in plan.lrs:
            warnings.warn(
                f"group {i}: the optimizer was built with lr {own:g}, the checkpoint has "
                f"{theirs:g}, which is used",
                stacklevel=5,
            )


def _only(found: tuple[tuple[Any, Any], ...], what: str) -> Any:
    if len(found) > 1:
        raise AmbiguousError(f"the checkpoint has {len(found)} {what}s; one can be resumed")
    return found[0][1] if found else None


def _scheduler_states(node: Any, found: list[Any]) -> list[Any]:
    """The saved schedulers. ChainedScheduler's state has no ``last_epoch`` to be found by."""
    if node is None:
        return found
    return node if isinstance(node, list) else [node]


def _same_scheduler(scheduler: Any, state: Any) -> None:
    """Raises RefusedError where a saved state has other attributes than the live scheduler."""
    own = scheduler.state_dict()
    sound = isinstance(state, dict)
    mine, theirs = ({key for key in one if not key.startswith("_")} for one in (own, state or {}))
    inner = [len(one.get("_schedulers") or ()) if sound else 0 for one in (own, state)]
    # private ones come and go with versions of torch
    if not sound or mine - {"verbose"} != theirs - {"verbose"} or inner[0] != inner[1]:
        differ = sorted(mine ^ theirs)
        raise RefusedError(
            f"the checkpoint's scheduler is no {type(scheduler).__name__}"
            + (f": they differ in {some(differ)}" if differ else ""),
            hint="build the scheduler that was saved, or resume without scheduler=",
        )
    for child, saved in zip(
        getattr(scheduler, "_schedulers", ()), state.get("_schedulers") or (), strict=True
    ):
        _same_scheduler(child, saved)
