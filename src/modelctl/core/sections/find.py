"""Where a checkpoint keeps its models, their copies, optimizers, schedulers, progress, rng, loader.

What a part is, its structure says (:mod:`.kinds`), wherever it stands. Which of several state_dicts
is the model, and whose the rest is, names say, as real frameworks give them. Sources of the key
names: the ImageNet and DCGAN examples of pytorch/examples (``state_dict``, ``optimizer``,
``epoch``), timm (``state_dict_ema``), Lightning (``optimizer_states``, ``lr_schedulers``,
``global_step``, ``current_model_state``), mmengine (``meta``, ``param_schedulers``,
``ema_state_dict``), fairseq and DeiT (``model``), DeepSpeed (``module``), stable-baselines3
(``policy.pth``, ``policy.optimizer.pth``), and torch's own tutorials (``model_state_dict``).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from ...errors import AmbiguousError, NoMatchError
from ..matching.matcher import Shape
from ..names import nearest
from ..nodes import children, mapping
from ..numbers import plain_number
from ..tensors import TensorRef
from ..text import some
from ..tree import Path, get, holds_tensors, is_leaf, path_text, walk
from . import copies, pairing
from .kinds import (
    StateDict,
    is_model,
    is_optimizer,
    like_layers,
    param_groups,
)
from .optimizers import held_by, trainable
from .progress import Best, best, last_loss, number
from .search import Found, search

_MODEL_KEYS = (
    *("state_dict", "model_state_dict", "model", "model_state", "net", "network", "module"),
    *("weights", "params", "parameters", "policy.pth"),
)
_EMA_KEYS = frozenset(
    (
        *("state_dict_ema", "ema_state_dict", "model_ema", "ema", "ema_model", "params_ema"),
        *("ema_model_state_dict", "model_ema_state_dict", "shadow_params"),
    )
)
# Where state_dicts are no models: what a trainer keeps of itself.
_OTHERS = frozenset(
    (
        *("rng", "rng_state", "rng_states", "cuda_rng_state", "torch_rng_state", "callbacks"),
        *("loader", "loaders", "loader_state", "dataloader", "dataloaders", "dataloader_state"),
        *("train_loader", "train_dataloader", "sampler", "sampler_state", "generators"),
        *("loops", "scaler", "amp_scaler", "amp", "grad_scaler", "message_hub", "metrics"),
        *("averaging_state", "hyper_parameters", "datamodule", "state", "param_groups"),
    )
)
_EPOCH_KEYS = ("epoch", "epochs", "last_epoch", "current_epoch", "start_epoch")
_STEP_KEYS = (
    *("step", "global_step", "steps", "iteration", "iter", "iterations", "global_steps"),
    *("num_updates", "iter_num"),
)
_LR_KEYS = ("lr", "learning_rate")
_RNG_KEYS = ("rng", "rng_state", "rng_states", "cuda_rng_state", "torch_rng_state")
_LOADER_KEYS = (
    *("loader", "loader_state", "dataloader", "dataloader_state", "dataloader_state_dict"),
    *("train_loader", "train_dataloader", "sampler", "sampler_state"),
)


@dataclass(frozen=True)
class Sections:
    """The parts of a checkpoint with a meaning; what isn't there is empty or None.

    Attributes:
        models: the state_dicts of models, best first; ``certain`` says whether the first is
            clearly the one that is meant; ``in_order`` are the same in the file's order.
        ema: copies of that model (averaged, best, target), and what else has a tensor of its names
            and shapes for each parameter (gradients); ``nameless_ema`` are the paths of those
            that are no state_dict (a list ``shadow_params``).
        parts: those of nothing but some of that model's names and shapes, in whatever sense.
        raw: the copy that holds what was being trained, where the model's own place holds the
            average (mmengine, Lightning's weight averaging).
        optimizers, schedulers: (path, node) of each, whichever model's it is.
        optimizer_objects: optimizers that were pickled themselves.
        epoch, step, lr, rng, loader: (path, value) of each, or None.
    """

    root: Any
    models: tuple[StateDict, ...] = ()
    in_order: tuple[StateDict, ...] = ()
    certain: bool = True
    ema: tuple[StateDict, ...] = ()
    nameless_ema: tuple[Path, ...] = ()
    parts: tuple[StateDict, ...] = ()
    raw: StateDict | None = None
    optimizers: tuple[tuple[Path, Any], ...] = ()
    schedulers: tuple[tuple[Path, Any], ...] = ()
    optimizer_objects: tuple[tuple[Path, Any], ...] = ()
    epoch: tuple[Path, Any] | None = None
    step: tuple[Path, Any] | None = None
    lr: tuple[Path, Any] | None = None
    rng: tuple[Path, Any] | None = None
    loader: tuple[Path, Any] | None = None

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

    @cached_property
    def owners(self) -> tuple[tuple[StateDict, ...] | None, ...]:
        """For each optimizer the models that it is over, in the file's order; () where it is over
        none of them, None where that isn't clear."""
        models = self.in_order
        found = pairing.owners(self.optimizers, models, self._tensors_beside())
        return tuple(None if of is None else tuple(models[i] for i in of) for of in found)

    @cached_property
    def own_optimizers(self) -> tuple[tuple[Path, Any], ...]:
        """Those of the first model, and those that may be."""
        return tuple(
            found
            for found, of in zip(self.optimizers, self.owners, strict=True)
            if of is None or any(one is self.models[0] for one in of)
        )

    @cached_property
    def own_optimizer_objects(self) -> tuple[tuple[Path, Any], ...]:
        """The pickled ones of the first model, and those that are no other model's in the file."""
        if len(self.models) < 2:
            return self.optimizer_objects
        held = [{ref.identity for ref in one.tensors().values()} for one in self.models]
        return tuple(
            (path, node)
            for path, node in self.optimizer_objects
            for own in [{one.identity for one in held_by(node)}]
            if own & held[0] or not any(own & other for other in held[1:])
        )

    def _tensors_beside(self) -> dict[Path, Shape]:
        """The tensors that stand beside the optimizers or in what does, and are of no model."""
        parts = (*self.models, *self.ema, *self.parts)
        places = {path[:-1] for path, _ in self.optimizers}
        places |= {
            (label,)
            for label, node in (mapping(self.root) or {}).items()
            if mapping(node) and not is_optimizer(node)
        }
        places -= {one.path for one in parts}
        return {
            (*place, label): node.shape
            for place in places
            for label, node in (mapping(get(self.root, place)) or {}).items()
            if isinstance(node, TensorRef)
        }

    @property
    def unknown_optimizers(self) -> tuple[Path, ...]:
        """What is called like an optimizer, at any depth, or stands in such a part beside one, and
        holds tensors, but is none that is known."""
        parts = (*self.optimizers, *self.optimizer_objects, *self.schedulers)
        known = {path for path, _ in parts} | {one.path for one in (*self.models, *self.ema)}
        known.update(self.nameless_ema)
        found: list[Path] = []
        todo: list[tuple[Path, Any]] = [((), self.root)]
        seen: set[int] = set()
        while todo:
            path, node = todo.pop()
            if path in known or is_leaf(node) or id(node) in seen:
                continue
            seen.add(id(node))
            called = any(isinstance(label, str) and "optim" in label.lower() for label in path)
            if called and not any(one[: len(path)] == path for one in known):
                found += [path] if holds_tensors(node) else []
                continue
            below = [((*path, label), child) for label, child in children(node)]
            todo += reversed(below)
        return tuple(found)

    @property
    def own_schedulers(self) -> tuple[tuple[Path, Any], ...]:
        """Those that no name gives to another model."""
        others = [pairing.words(model.path) for model in self.models[1:]]
        own = [pairing.words(model.path) for model in self.models[:1]]
        return tuple(
            (path, node)
            for path, node in self.schedulers
            if not any(
                said and pairing.alike(said, other)
                for said in [pairing.words(path)]
                for other in others
                if other not in own
            )
        )

    @property
    def kind(self) -> str:
        """What the file is, in the field's words."""
        if not self.models:
            if isinstance(self.root, TensorRef):
                return "tensor"
            return "optimizer" if self.optimizers or self.optimizer_objects else "object"
        if self.models[0].path == ():
            return "whole module" if self.models[0].is_module else "state_dict"
        extra = (self.optimizers, self.optimizer_objects, self.schedulers, self.epoch, self.step)
        return "training checkpoint" if any((*extra, self.ema)) else "checkpoint"

    @cached_property
    def best(self) -> Best | None:
        """The best value so far of a metric; it is read where it is a tensor."""
        return best(mapping(self.root) or {})

    @cached_property
    def loss(self) -> float | None:
        """The last loss that the Trainer's log has."""
        return last_loss(mapping(self.root) or {})

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


def find_sections(root: Any, key: Path | None = None) -> Sections:
    """Find the sections of a tree; ``key`` is the path of the model's state_dict where known."""
    found = search(root)
    top = mapping(root) or {}
    models, certain = _models(found.models)
    if key is not None:
        chosen = next((one for one in found.models if one.path == key), None)
        chosen = chosen or StateDict(key, _chosen(root, key))
        models, certain = [chosen, *(one for one in models if one.path != key)], True
    first = models[0] if models else None
    ema = _copies(found, models, named=certain and key is None) if first else []
    parts = _parts(found, models) if first and certain and key is None else []
    ours = {one.path for one in (*ema, *parts)}
    models = [one for one in models if one.path not in ours]
    place = {one.path: i for i, one in enumerate(found.models)}
    return Sections(
        root,
        models=tuple(models),
        in_order=tuple(sorted(models, key=lambda one: place.get(one.path, -1))),
        certain=certain,
        ema=tuple(ema),
        nameless_ema=tuple(_nameless(top, found, first)),
        parts=tuple(parts),
        raw=_raw(top, first, ema),
        optimizers=tuple(found.optimizers),
        schedulers=tuple(found.schedulers),
        optimizer_objects=tuple(found.objects),
        epoch=number(top, _EPOCH_KEYS, int | float),
        step=number(top, _STEP_KEYS, int),
        lr=number(top, _LR_KEYS, int | float),
        rng=_first(top, _RNG_KEYS),
        loader=_first(top, _LOADER_KEYS),
    )


def _first(top: dict[Any, Any], names: tuple[str, ...]) -> tuple[Path, Any] | None:
    """The first of these entries that is there; Megatron has one a rank, of rng_state
    ``rng_state/shard_0.0_1.1``."""
    for name in names:
        parts = (key for key in top if isinstance(key, str) and key.startswith(f"{name}/shard_"))
        for key in (name, *parts):
            if key in top:
                return (key,), top[key]
    return None


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
    """The paths of all state_dicts and whole modules, in order."""
    return [model.path for model in search(root).models]


# ---------------------------------------------------------------------- models and copies


def _models(found: list[StateDict]) -> tuple[list[StateDict], bool]:
    """The models among all state_dicts, best first, and whether the first is clearly meant."""
    if found and found[0].path == ():
        return found[:1], True
    named = [one for name in _MODEL_KEYS for one in found if one.path == (name,)]
    others = [one for one in found if one not in named and not _is_others(one.path)]
    plain = [one for one in others if not _says_copy(one.path)]
    likely = [one for one in plain if _is_likely(one)]
    if named:
        return [*named, *likely], True
    candidates = likely or plain or others
    return candidates, len(candidates) <= 1


def _is_others(path: Path) -> bool:
    return any(
        isinstance(label, str)
        and (
            label.partition("/")[0] in _OTHERS
            or "optim" in label.lower()
            or "sched" in label.lower()
        )
        for label in path
    )


def _says_copy(path: Path) -> bool:
    known = path[:1] and path[0] in _EMA_KEYS
    return bool(known) or not pairing.COPY_WORDS.isdisjoint(pairing.words(path))


def _is_likely(model: StateDict) -> bool:
    """A state_dict that does look like a model's, not like some tensors under names."""
    return model.is_module or like_layers(model.entries)


def _copies(found: Found, models: list[StateDict], *, named: bool) -> list[StateDict]:
    """The copies of the first of the models among all state_dicts.

    A name that says so is enough where it says of no other model; with the same names and shapes
    one that says nothing is a copy, too, where the first is known by its name (``named``) and no
    optimizer is called like the other.
    """
    first, rest = models[0], [one for one in models[1:] if not _says_copy(one.path)]
    if first.path == () or len(found.models) < 2:
        return []
    known = copies.Known.of(first)
    own = pairing.words(first.path)
    others = [pairing.words(one.path) for one in rest]
    optimizers = [pairing.words(path) for path, _ in (*found.optimizers, *found.objects)]
    out = []
    for one in found.models:
        if one is first or found.is_of_another(one.path, first.path):
            continue
        words = pairing.words(one.path)
        kept = _is_others(one.path)
        if _says_copy(one.path) or kept:
            said = pairing.without_copy_words(words)
            if said and said != own and any(said == other for other in others):
                continue
            if said and own and not pairing.alike(said, own) and _is_alike_any(said, others):
                continue
            by_name = not kept and one.path[0] in _EMA_KEYS and not said
            if by_name or known.aliases(one):
                out.append(one)
        elif named and known.has_all_of(one) and not _is_alike_any(words, optimizers):
            out.append(one)
    return out


def _parts(found: Found, models: list[StateDict]) -> list[StateDict]:
    """The state_dicts of some of the first model's tensors that no optimizer is called like."""
    first = models[0]
    if len(models) < 2 or first.path == ():
        return []
    known = copies.Known.of(first)
    optimizers = [pairing.words(path) for path, _ in (*found.optimizers, *found.objects)]
    return [
        one
        for one in models[1:]
        if known.holds(one)
        and not found.is_of_another(one.path, first.path)
        and not _is_alike_any(pairing.words(one.path), optimizers)
    ]


def _is_alike_any(words: pairing.Words, others: list[pairing.Words]) -> bool:
    return any(words and pairing.alike(words, other) for other in others)


def _nameless(top: dict[Any, Any], found: Found, first: StateDict | None) -> Iterator[Path]:
    """Copies without names: under keys that say so, or lists of just the model's shapes."""
    under = []
    for name in _EMA_KEYS & top.keys():
        named = any(one.path[:1] == (name,) for one in found.models)
        if not named and any(isinstance(part, TensorRef) for _, part in walk(top[name])):
            under.append((name,))
            yield (name,)
    if first is None or first.path == () or not found.lists:
        return
    tensors = first.tensors()
    wanted = [[*trainable(tensors).values()], [ref.shape for ref in tensors.values()]]
    for path, node in found.lists:
        if path[:1] not in under and any(copies.is_nameless_copy(node, one) for one in wanted):
            yield path


def _raw(top: dict[Any, Any], first: StateDict | None, ema: list[StateDict]) -> StateDict | None:
    """mmengine's EMAHook puts the average in ``state_dict`` when it saves, as Lightning's
    WeightAveraging does, and what is trained beside it."""
    if first is None or first.path != ("state_dict",):
        return None
    for one in ema:
        swapped = one.path == ("ema_state_dict",) and "steps" in one.entries
        if (swapped and "message_hub" in top) or one.path == ("current_model_state",):
            return one
    return None
