"""Where a checkpoint keeps its model, EMA copies, optimizer, scheduler, progress and rng.

The one place that knows the layouts of real frameworks. Sources of the key names: the ImageNet
and DCGAN examples of pytorch/examples (``state_dict``, ``optimizer``, ``epoch``), timm
(``state_dict_ema``), Lightning (``optimizer_states``, ``lr_schedulers``, ``global_step``),
mmengine (``meta``, ``param_schedulers``, ``ema_state_dict``), fairseq and DeiT (``model``),
DeepSpeed (``module``), stable-baselines3 (``policy.pth``, ``policy.optimizer.pth``), and torch's
own tutorials (``model_state_dict``).
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Any

from ..errors import AmbiguousError, NoMatchError
from .modules import module_tensors
from .names import nearest
from .nodes import ABSENT, Composite, Obj, attributes, children, is_module, mapping
from .numbers import plain_number
from .tensors import TensorRef
from .text import some
from .tree import Path, get, is_leaf, path_text, walk

_MODEL_KEYS = (
    *("state_dict", "model_state_dict", "model", "model_state", "net", "network", "module"),
    *("weights", "params", "parameters", "policy.pth"),
)
_EMA_KEYS = (
    *("state_dict_ema", "ema_state_dict", "model_ema", "ema", "ema_model", "ema_model_state_dict"),
    *("model_ema_state_dict", "params_ema", "shadow_params"),
)
_OPTIMIZER_KEYS = (
    *("optimizer", "optimizer_state_dict", "optimizer_states", "optimizer_state", "optim"),
    *("optim_state_dict", "opt", "optimizers"),
)
_SCHEDULER_KEYS = (
    *("scheduler", "lr_scheduler", "scheduler_state_dict", "lr_scheduler_state_dict"),
    *("lr_schedulers", "param_schedulers", "schedulers", "lr_scheduler_state", "sched"),
)
_EPOCH_KEYS = ("epoch", "epochs", "last_epoch", "current_epoch", "start_epoch")
_STEP_KEYS = (
    *("step", "global_step", "steps", "iteration", "iter", "iterations", "global_steps"),
    *("num_updates",),
)
_LR_KEYS = ("lr", "learning_rate")
# Where progress is kept that does not stand at the top.
_PROGRESS = ("meta",)
_RNG_KEYS = ("rng", "rng_state", "rng_states", "cuda_rng_state", "torch_rng_state")


@dataclass(frozen=True)
class StateDict:
    """A state_dict in the tree: a mapping of names to tensors (and a few other values), or a
    whole module that would give one."""

    path: Path
    node: Any

    @cached_property
    def entries(self) -> dict[str, Any]:
        if is_module(self.node):
            return dict(module_tensors(self.node))
        return mapping(self.node) or {}

    @property
    def is_module(self) -> bool:
        """True for a whole module: its entries are those of the state_dict that it would give."""
        return is_module(self.node)

    def tensors(self) -> dict[str, TensorRef]:
        return {name: ref for name, ref in self.entries.items() if isinstance(ref, TensorRef)}

    def composites(self) -> dict[str, Composite]:
        """The entries that are tensors of another kind: sparse, quantized, wrapped."""
        return {name: node for name, node in self.entries.items() if isinstance(node, Composite)}

    @property
    def metadata(self) -> dict[str, Any]:
        """``_metadata``: for each module (``""`` is the root) what its class recorded."""
        if isinstance(self.node, Obj):
            found = mapping(attributes(self.node).get("_metadata"))
            return found or {}
        return {}


@dataclass(frozen=True)
class Sections:
    """The parts of a checkpoint with a meaning; what isn't there is empty or None.

    Attributes:
        models: the candidates for the model's state_dict, best first; ``certain`` says whether
            the first is clearly the one.
        ema: averaged copies of the model; ``nameless_ema`` are the paths of those that are no
            state_dict (a list ``shadow_params``, a whole module).
        optimizers, schedulers: (path, node) of each.
        epoch, step, lr, rng: (path, value) of each, or None.
    """

    root: Any
    models: tuple[StateDict, ...] = ()
    certain: bool = True
    ema: tuple[StateDict, ...] = ()
    nameless_ema: tuple[Path, ...] = ()
    optimizers: tuple[tuple[Path, Any], ...] = ()
    schedulers: tuple[tuple[Path, Any], ...] = ()
    epoch: tuple[Path, Any] | None = None
    step: tuple[Path, Any] | None = None
    lr: tuple[Path, Any] | None = None
    rng: tuple[Path, Any] | None = None

    def model(self) -> StateDict:
        """The model's state_dict.

        Raises:
            NoMatchError: there is none.
            AmbiguousError: there are several, and none is clearly the model's.
        """
        if not self.models:
            raise NoMatchError(
                "no state_dict is found in this file",
                hint="'modelctl ls --section all' lists every tensor, 'modelctl show' all else",
            )
        if not self.certain:
            found = some([path_text(model.path) for model in self.models], 6)
            raise AmbiguousError(
                f"which state_dict is meant? found {found}", hint="pick one with --key"
            )
        return self.models[0]

    @property
    def kind(self) -> str:
        """What the file is, in the field's words."""
        if not self.models:
            if isinstance(self.root, TensorRef):
                return "tensor"
            return "optimizer" if self.optimizers else "object"
        if self.models[0].path == ():
            return "whole module" if self.models[0].is_module else "state_dict"
        extra = (self.optimizers, self.schedulers, self.epoch, self.step, self.ema)
        return "training checkpoint" if any(extra) else "checkpoint"

    def lrs(self) -> list[float]:
        """The learning rate of each param_group, or the one recorded beside the model."""
        found = [
            lr
            for _, node in self.optimizers
            for group in param_groups(node)
            if isinstance(lr := plain_number(group.get("lr")), int | float)
        ]
        if not found and self.lr is not None:
            found = [self.lr[1]]
        return found


def is_state_dict(node: Any) -> bool:
    """True for a mapping of string names to tensors; ``_extra_state`` and the like may stand in
    between, but no further level that holds tensors."""
    entries = mapping(node)
    if not entries:
        return False
    tensors = 0
    for key, value in entries.items():
        if not isinstance(key, str):
            return False
        if isinstance(value, TensorRef | Composite):
            tensors += 1
        elif not (key.endswith("_extra_state") or isinstance(value, str | int | float | None)):
            return False
    return tensors > 0 and 2 * tensors >= len(entries)


def is_model(node: Any) -> bool:
    """True for what a model can be saved as: its state_dict, or all of it."""
    return is_state_dict(node) or is_module(node)


def is_optimizer(node: Any) -> bool:
    """True for what ``torch.optim.Optimizer.state_dict`` gives."""
    entries = mapping(node)
    return (
        entries is not None
        and mapping(entries.get("state", ABSENT)) is not None
        and isinstance(entries.get("param_groups"), list)
    )


def is_scheduler(node: Any) -> bool:
    """True for what ``torch.optim.lr_scheduler.LRScheduler.state_dict`` gives."""
    entries = mapping(node)
    if entries is None or not {"last_epoch", "_schedulers"} & entries.keys():
        return False
    # a checkpoint may have a key last_epoch, too
    return not any(is_optimizer(part) or is_state_dict(part) for part in (node, *entries.values()))


def param_groups(optimizer: Any) -> list[dict[Any, Any]]:
    """The param_groups of an optimizer's state_dict that are mappings."""
    groups = (mapping(optimizer) or {}).get("param_groups", [])
    return [found for group in groups if (found := mapping(group)) is not None]


def find_sections(root: Any, key: Path | None = None) -> Sections:
    """Find the sections of a tree; ``key`` is the path of the model's state_dict where known."""
    top = mapping(root) or {}
    ema, nameless = _find_ema(top)
    models, certain = _find_models(root, top)
    if key is not None:
        models, certain = (StateDict(key, _chosen(root, key)),), True
        ema = tuple(copy for copy in ema if copy.path != key)
    return Sections(
        root,
        models=models,
        certain=certain,
        ema=ema,
        nameless_ema=nameless,
        optimizers=tuple(_each(root, top, _optimizer_keys(top), is_optimizer)),
        schedulers=tuple(_each(root, top, _SCHEDULER_KEYS, is_scheduler)),
        epoch=_number(top, _EPOCH_KEYS, int),
        step=_number(top, _STEP_KEYS, int),
        lr=_number(top, _LR_KEYS, int | float),
        rng=next(((((name,), top[name])) for name in _RNG_KEYS if name in top), None),
    )


def _chosen(root: Any, key: Path) -> Any:
    try:
        node = get(root, key)
    except KeyError:
        node = None
    if node is None or not is_model(node):
        known = [path_text(path) for path in state_dicts(root)]
        near = [name for name in nearest(path_text(key), known) if name in known] or known[:3]
        raise NoMatchError(
            f"there is no state_dict at '{path_text(key)}'",
            hint=f"found: {', '.join(near)}" if near else None,
        )
    return node


def state_dicts(root: Any) -> list[Path]:
    """The paths of all state_dicts and whole modules down to the third level, in order."""
    return [path for path, _ in _each_model(root)]


def _each_model(root: Any) -> list[tuple[Path, Any]]:
    found: list[tuple[Path, Any]] = []
    level: list[tuple[Path, Any]] = [((), root)]
    for _ in range(3):
        below = []
        for path, node in level:
            if is_model(node):
                found.append((path, node))
            else:
                below += [
                    ((*path, label), child) for label, child in children(node) if not is_leaf(child)
                ]
        level = below
    return found


def _find_ema(top: dict[Any, Any]) -> tuple[tuple[StateDict, ...], tuple[Path, ...]]:
    """EMA copies, also inside what the averaging keeps beside them (decay, number of updates);
    and the paths of those that have no names."""
    found: list[StateDict] = []
    nameless: list[Path] = []
    for name in _EMA_KEYS:
        node = top.get(name)
        if is_model(node):
            found.append(StateDict((name,), node))
        elif node is not None:
            inside = [(label, child) for label, child in children(node) if is_model(child)]
            found += [StateDict((name, label), child) for label, child in inside]
            if not inside and any(isinstance(part, TensorRef) for _, part in walk(node)):
                nameless.append((name,))
    return tuple(found), tuple(nameless)


def _find_models(root: Any, top: dict[Any, Any]) -> tuple[tuple[StateDict, ...], bool]:
    if is_model(root):
        return (StateDict((), root),), True
    named = [
        StateDict((name,), top[name]) for name in _MODEL_KEYS if name in top and is_model(top[name])
    ]
    if named:
        return tuple(named), True
    other = [
        StateDict(path, node)
        for path, node in _each_model(root)
        if path[0] not in (*_OPTIMIZER_KEYS, *_SCHEDULER_KEYS, *_RNG_KEYS)
        and path[0] not in ("state", "param_groups")
    ]
    plain = [found for found in other if found.path[0] not in _EMA_KEYS]
    candidates = plain or other
    return tuple(candidates), len(candidates) <= 1


def _optimizer_keys(top: dict[Any, Any]) -> tuple[str, ...]:
    """The usual keys, and what else has a name like them (``last_optimizer_state``)."""
    others = (key for key in top if isinstance(key, str) and "optim" in key.lower())
    return tuple(dict.fromkeys((*_OPTIMIZER_KEYS, *others)))


def _each(root: Any, top: dict[Any, Any], names: tuple[str, ...], test: Any) -> Any:
    if test(root):
        yield (), root
        return
    for name in names:
        node = top.get(name)
        if test(node):
            yield (name,), node
        elif isinstance(node, list) or (mapping(node) is not None and node):
            for label, child in children(node):
                if test(child):
                    yield (name, label), child


def _number(top: dict[Any, Any], names: tuple[str, ...], kind: Any) -> tuple[Path, Any] | None:
    places: list[tuple[Path, dict[Any, Any]]] = [((), top)]
    places += [((name,), mapping(top.get(name)) or {}) for name in _PROGRESS]
    for path, entries in places:
        for name in names:
            value = entries.get(name)
            if isinstance(value, kind) and not isinstance(value, bool):
                return (*path, name), value
    return None
