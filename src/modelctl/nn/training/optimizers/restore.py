"""Optimizers and the schedulers that drive them: which saved one is which, and back onto them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from ....core.matching.matcher import match_names
from ....core.names import alphabetical
from ....core.nodes import mapping
from ....core.records import frozen_names
from ....core.text import some
from ....errors import AmbiguousError, CollisionError, RefusedError
from ....surgery.carry.optimizer_names import assign_names
from ...freezing.freeze import set_grad
from ...loading.values import live as made
from ...model_names import Parameters
from ...optim import schedulers
from ...optim.several import Label, by_label, called, paired
from ..part import Part, Saved
from ..weights import ModelPart
from .state import OptimizerPlan, plan_optimizer

_WAY_OUT = (
    "give optimizer= as it was saved, each over the same parameters, in the same order or under "
    "the same name; or resume without optimizer="
)


class OptimizersPart(Part):
    """The optimizers; parameters of theirs that the live ones lack join them.

    Attributes:
        live: the optimizers by their labels; ``schedulers`` are those that were given with them.
        plans: how each saved one goes onto the live one, by its label.
        reordered: whether listed ones were found to stand in another order than when saved.
        rescheduled: the schedulers whose own state comes back, too.
    """

    name = "optimizer"

    def __init__(
        self,
        saved: Saved,
        model: ModelPart,
        optimizers: dict[Label, Optimizer],
        schedulers: Sequence[LRScheduler],
    ) -> None:
        super().__init__(saved)
        self.model, self.live, self.schedulers = model, optimizers, schedulers
        self.plans: dict[Label, OptimizerPlan] = {}
        self.reordered = False
        self.rescheduled: list[Any] = []

    def fit(self) -> None:
        if self.live and any(p.is_meta for p in self.model.live.parameters()):
            raise RefusedError(
                "the model is on meta, so the optimizer holds parameters that loading replaces",
                hint="load_into(model, path) first, then build the optimizer and resume",
            )
        sections = self.saved.sections
        own = sections.own_optimizers  # of several models; all where more are given
        saved = by_label(own if len(self.live) <= len(own) else sections.optimizers)
        if not self._wanted(self.live, saved):
            return
        pairs = paired("optimizer", self.live, saved)
        self.unused += _left(saved, pairs, "optimizer")
        nodes: dict[Label, Any] = {label: node for label, (_, node) in pairs.items()}
        states: dict[Label, Any] = {
            label: self._with_own_names(self._made(node, called("optimizer", label)))
            for label, node in nodes.items()
        }
        params = self.model.params
        if len(pairs) > 1 and not any(isinstance(label, str) for label in pairs):
            order = order_by_content([*self.live.values()], [*states.values()], params)
            self.reordered = order != sorted(order)
            nodes = {i: nodes[j] for i, j in enumerate(order)}
            states = {i: states[j] for i, j in enumerate(order)}
        scheduled, reordered = bool(saved_schedulers(self.saved)), self._is_reordered()
        for label, state in states.items():
            names = partial(self._names_in_file, nodes[label])
            self.plans[label] = plan = plan_optimizer(
                *(self.live[label], state, params, names),
                shapes=self.model.shapes,
                skip=self.saved.skip,
                scheduled=scheduled,
                reordered=reordered,
            )
            self._note(called("optimizer", label), self.live[label], plan)
        check_apart(self.live, self.plans)
        if self.model.freezing is None:
            held = params.by_name
            late = [name for name in self.joined if not held[name].requires_grad]
            self.model.check_wrapped(late)

    def read(self) -> None:
        for label, plan in self.plans.items():
            plan.read(self.live[label])

    def run(self) -> None:
        if self.model.freezing is None:
            set_grad(self.model.params, self.joined, True)
        for label, plan in self.plans.items():
            one, what = self.live[label], called("optimizer", label)
            rescheduled = any(driven_by(each) is one for each in self.rescheduled)
            built = [(group["lr"], group.get("initial_lr")) for group in one.param_groups]
            plan.run(one, [each for each in self.schedulers if driven_by(each) is one])
            new = not any("initial_lr" in group for group in plan.saved["param_groups"])
            overruled = not rescheduled and self.notes.overruled_lr(
                what, built, one.param_groups, new
            )
            self.notes.groups_differ(what, plan.changed, without="lr" if overruled else None)
        self.restored = bool(self.plans)

    @property
    def joined(self) -> list[str]:
        """Parameters that are to join an optimizer."""
        return [name for plan in self.plans.values() for _, named in plan.added for name in named]

    @property
    def fresh(self) -> list[str]:
        """Parameters of the live ones that get no state."""
        return [name for plan in self.plans.values() for name in plan.fresh]

    @property
    def dropped(self) -> list[str]:
        """Parameters of the saved ones that are left aside."""
        return [name for plan in self.plans.values() for name in plan.dropped]

    def plan_of(self, optimizer: Any) -> OptimizerPlan | None:
        """That of a live one, by identity."""
        plans = (plan for label, plan in self.plans.items() if self.live[label] is optimizer)
        return next(plans, None)

    def _made(self, node: Any, what: str) -> Any:
        """A saved optimizer; of its state no tensor is read before it is known where it goes."""
        entries = mapping(node) or {}
        if "state" not in entries:
            return made(node, what)
        rest = {key: value for key, value in entries.items() if key != "state"}
        return {**made(rest, what), "state": made(entries["state"], f"{what}.state", lazy=True)}

    def _note(self, what: str, optimizer: Optimizer, plan: OptimizerPlan) -> None:
        if plan.by_place:
            self.notes.append(
                f"{what}: parameters that are not the model's and have no names "
                f"({plan.by_place}) got the state of those in their places"
            )
        if plan.reset:
            self.notes.append(
                f"{what}: {type(optimizer).__name__} has one state over all parameters, and "
                f"{some(plan.reset)} changed: it starts fresh"
            )
        if plan.unknown:
            self.notes.append(
                f"{what}: {some(plan.unknown)} in the checkpoint's groups is no setting of "
                f"{type(optimizer).__name__} here: it stays there, without effect; build the "
                "groups with it where it has one"
            )

    def _with_own_names(self, saved: Any) -> Any:
        """A saved optimizer with names as the model has them: Lightning's begin with ``model.``,
        those of a model that has got a head since lack ``bert.``."""
        for group in saved["param_groups"] if self.model.renames else ():
            names = group.get("param_names") if isinstance(group, dict) else None
            if isinstance(names, list):
                group["param_names"] = [n and self.model.own_name(str(n)) for n in names]
        return saved

    def _is_reordered(self) -> bool:
        """Whether the file has the model's parameters in another order: then it was built so. One
        with sorted names has lost its order."""
        names, params = [*self.saved.sections.model().entries], self.model.params
        kinds: dict[str, list[str]] = {}  # safetensors sorts by dtype first
        for name, ref in self.saved.sections.model().tensors().items():
            kinds.setdefault(str(ref.dtype), []).append(name)
        if alphabetical(names) or all(alphabetical(one) or len(one) == 1 for one in kinds.values()):
            return False
        bare = {name: self.model.own_name(name) for name in names}
        try:
            found = match_names(bare.values(), params.called)
        except CollisionError:
            return False
        order = [
            first
            for name in bare.values()
            if name in found
            for first in params.called[found[name]][:1]
        ]
        place = {name: i for i, name in enumerate(params.by_name)}
        places = [place[name] for name in dict.fromkeys(order)]
        return places != sorted(places)

    def _names_in_file(self, node: Any) -> dict[Any, str] | None:
        """Names of a saved optimizer's ids, where the file's own model proves them."""
        ckpt = self.saved.ckpt
        try:
            names = assign_names(node, ckpt.sections.model().tensors(), frozen_names(ckpt))
        except (AmbiguousError, RefusedError):
            return None
        groups = [mapping(group) or {} for group in (mapping(node) or {})["param_groups"]]
        return {
            pid: self.model.own_name(name)
            for group, own in zip(groups, names, strict=True)
            for pid, name in zip(group["params"], own, strict=True)
            if name
        }


class SchedulersPart(Part):
    """The schedulers, their lists in the order of the live optimizers' groups."""

    name = "scheduler"

    def __init__(
        self, saved: Saved, optimizers: OptimizersPart, given: dict[Label, LRScheduler]
    ) -> None:
        super().__init__(saved)
        self.optimizers, self.live = optimizers, given
        self.states: dict[Label, tuple[Any, Any]] = {}

    def fit(self) -> None:
        if self.optimizers.live:
            known = [one for one in self.live.values() if driven_by(one) is not None]
            schedulers.check_owner(known, *self.optimizers.live.values())
        saved = saved_schedulers(self.saved)
        if not self._wanted(self.live, saved):
            return
        pairs = paired("scheduler", self.live, saved)
        listed = len(pairs) > 1 and not any(isinstance(label, str) for label in pairs)
        if self.optimizers.reordered and listed:
            raise RefusedError(
                "the optimizers are listed in another order than when this was saved: whose each "
                "of the schedulers is can't be told",
                hint="give optimizer= and scheduler= in the order that was saved",
            )
        for label, (one, node) in pairs.items():
            state = made(node, called("scheduler", label))
            schedulers.check_same(one, state)
            self._check_groups(one, len(state.get("base_lrs") or ()))
            self.states[label] = one, state
        self.unused += _left(saved, pairs, "scheduler")
        self.optimizers.rescheduled += [one for one, _ in self.states.values()]

    def run(self) -> None:
        for label, (one, state) in self.states.items():
            if driven_by(one) is not None:  # of an unknown kind, it is not known what moves
                differ = schedulers.differences(one.state_dict(), state)
                self.notes.differ(called("scheduler", label), differ)
            plan = self.optimizers.plan_of(driven_by(one))
            if plan is not None:
                groups = len(plan.saved["param_groups"])
                state = schedulers.rearranged(state, one, plan.source, groups)
            one.load_state_dict(state)
        self.restored = bool(self.states)

    def _check_groups(self, scheduler: Any, count: int) -> None:
        driven = driven_by(scheduler)
        plan = self.optimizers.plan_of(driven)
        where = "the saved optimizer" if plan else "the optimizer"
        groups = plan.saved["param_groups"] if plan else getattr(driven, "param_groups", ())
        if driven is not None and count and count != len(groups):
            raise RefusedError(
                f"the saved {type(scheduler).__name__} is over {count} groups, {where} has "
                f"{len(groups)}",
                hint="build the optimizer with the same groups, or resume without scheduler=",
            )


def saved_schedulers(saved: Saved) -> dict[Label, Any]:
    """Those in the file, by what they are called; one of a kind of its own, too."""
    found = by_label(saved.sections.own_schedulers)
    return found or ({None: saved.top["scheduler"]} if "scheduler" in saved.top else {})


def driven_by(scheduler: Any) -> Any:
    """A scheduler's optimizer; None where one of another kind than torch's does not say."""
    return getattr(scheduler, "optimizer", None)


def _left(saved: Mapping[Label, Any], pairs: Mapping[Any, Any], what: str) -> list[str]:
    """What those are called that were not asked for."""
    if len(pairs) == len(saved):
        return []
    return [called(what, label) for label in saved if label not in pairs]


# ------------------------------------------------------------------ which is which


def order_by_content(
    live: Sequence[Optimizer], saved: Sequence[Any], params: Parameters
) -> list[int]:
    """For each live optimizer of a list the place of the saved one that holds what it holds.

    Where places are as good as anything (several over the same parameters, saved ones without
    names) they count.

    Raises:
        AmbiguousError: which is which can't be told.
    """
    held = [
        {name for group in one.param_groups for p in group["params"] if (name := params.name_of(p))}
        for one in live
    ]
    known = [_names(one, params) for one in saved]
    best = []
    for mine in held:
        shares = [len(mine & theirs) / max(1, len(mine | theirs)) for theirs in known]
        best.append({i for i, share in enumerate(shares) if share == max(shares)})
    if all(i in found for i, found in enumerate(best)):
        return [*range(len(live))]
    order = [found.pop() for found in best if len(found) == 1]
    if len({*order}) < len(live):
        raise AmbiguousError(
            f"which of the {len(live)} optimizers is which can't be told: by the names of their "
            "parameters they don't go one to one with those of the checkpoint",
            hint=_WAY_OUT,
        )
    return order


def _names(saved: Any, params: Parameters) -> set[str]:
    groups = saved.get("param_groups", ()) if isinstance(saved, dict) else ()
    names = [
        name
        for group in groups
        if isinstance(group, dict)
        for name in group.get("param_names") or ()
        if isinstance(name, str)
    ]
    try:
        found = match_names(dict.fromkeys(names), params.called)
    except CollisionError:
        return set()
    return {first for name in found.values() for first in params.called[name]}


def check_apart(
    optimizers: Mapping[Label, Optimizer], plans: Mapping[Label, OptimizerPlan]
) -> None:
    """Raises RefusedError where a parameter would join one optimizer, and another has it that had
    not when this was saved."""
    for label, plan in plans.items():
        joining = {id(p): name for _, named in plan.added for name, p in named.items()}
        for other, one in optimizers.items():
            held = [id(p) for group in one.param_groups for p in group["params"]]
            for both in [key for key in held if key in joining and key not in plans[other].ids]:
                raise RefusedError(
                    f"the checkpoint's {called('optimizer', label)} has '{joining[both]}', which "
                    f"{called('optimizer', other)} holds here: both would train it",
                    hint=_WAY_OUT,
                )
