"""A new head for a live model: fresh layers in its place, in the optimizer and the average."""

from __future__ import annotations

import operator
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim import Optimizer

from ...core.dtypes import BY_NAME
from ...core.names import Patterns
from ...core.storages import MemoryStorage
from ...core.tensors import TensorRef
from ...core.text import some
from ...errors import AmbiguousError, NoMatchError, RefusedError, UsageError
from ...surgery.find_head import Head, head_of
from ..freezing.freeze import remember
from ..model_names import Parameters, Slot, is_lazy, places, slots
from ..optim.several import Several, labelled, with_inner

# What models call the number of their classes, beside the layers that make them.
_NUMBERS = ("num_classes", "num_labels")


@dataclass(frozen=True)
class NewHead:
    """What :func:`replace_head` replaced.

    Attributes:
        modules: the layers, auxiliary heads included.
        names: their parameters.
        before, after: how many outputs each had and has.
        evidence: why this is the head, and ``confidence`` ("certain" where it was named, "high",
            "medium").
        numbers: the attributes that follow: ``num_classes``, ``config.num_labels``.
    """

    modules: tuple[str, ...]
    names: tuple[str, ...]
    before: int
    after: int
    evidence: str
    confidence: str
    numbers: tuple[str, ...] = ()

    def __str__(self) -> str:
        text = (
            f"{', '.join(self.modules)}: {self.before:,} -> {self.after:,} outputs "
            f"({self.evidence}; confidence {self.confidence})"
        )
        return f"{text}\n{', '.join(self.numbers)} = {self.after}" if self.numbers else text


class _Layer(NamedTuple):
    """A layer of the head: its name, and what it stands in, outermost first."""

    name: str
    module: Any  # Linear, Conv1d to 3d
    above: list[nn.Module]

    @property
    def outputs(self) -> int:
        return int(self.module.weight.shape[0])

    def parameters(self) -> dict[str, nn.Parameter]:
        return {f"{self.name}.{attr}": p for attr, p in self.module.named_parameters()}


def replace_head(
    model: nn.Module,
    num_classes: int,
    *,
    head: Patterns | None = None,
    optimizer: Several[Optimizer] = None,
    ema: nn.Module | None = None,
) -> NewHead:
    """Give a model a fresh head with ``num_classes`` outputs; all else stays as it is.

    The head is found as ``strip-head`` finds that of a file (docs/heads.md); auxiliary heads with
    as many outputs follow. Its layers (Linear, Conv1d to 3d) stay the objects that they are, with
    their hooks, dtype, device and mode; their weight and, where they had one, bias are new,
    initialised as the layer's class does (a transformers model's as that does), and train. What
    the model calls ``num_classes`` or ``num_labels`` follows, and in a transformers config
    ``id2label`` and ``label2id``, whose names start anew. The new values are drawn from torch's
    generator.

    ``optimizer``, one or several: the new parameters stand where the old ones stood, in the same
    group under the same ``param_names``, without state; every other parameter's next step is what
    it would have been. ``ema``, an ``AveragedModel`` or another copy: its head becomes a copy of
    the new one.

    Replace first, then wrap in DistributedDataParallel or shard.

    Args:
        head: names of the head's parameters or modules where it is not to be guessed, as globs.

    Raises:
        NoMatchError: there is no head, or ``head`` matches nothing.
        AmbiguousError: several layers could be it, or ``head`` means layers of different size.
        RefusedError: a detection or motion model without ``head``; a head that is tied,
            parametrized, quantized, sharded, another kind of layer or a language model's; a model
            in DistributedDataParallel; an optimizer that does not hold the head, or that keeps one
            flat state (LBFGS); an ``ema`` without this head. Nothing is changed then.
        UsageError: not a number of classes; a lazy model without shapes.
    """
    classes = _whole(num_classes)
    found = _find(model, head)
    layers = _layers(model, found)
    copies = [] if ema is None else _copied(ema, layers)
    held = {name: p for one in layers for name, p in one.parameters().items()}
    _refuse_tied(model, held)
    seats = _seats(optimizer, held)
    before, numbers = layers[0].outputs, []
    for one in layers:
        numbers += _renew(one, classes)
    for one, copy in zip(layers, copies, strict=False):  # no copies where there is no ema
        _renew(copy, classes, like=one)
    now = {name: p for one in layers for name, p in one.parameters().items()}
    for params, place, name in seats:
        params[place] = now[name]
    for each in with_inner(optimizer):
        for parameter in held.values():
            each.state.pop(parameter, None)
    remember(model, ())
    modules, names = tuple(one.name for one in layers), tuple(held)
    numbered = tuple(dict.fromkeys(numbers))
    return NewHead(modules, names, before, classes, found.evidence, found.confidence, numbered)


def _whole(num_classes: int) -> int:
    try:
        number = 0 if isinstance(num_classes, bool) else operator.index(num_classes)
    except TypeError:
        number = 0
    if number < 1:
        raise UsageError(f"num_classes={num_classes!r:.40}: it must be a whole number, 1 or more")
    return number


# ------------------------------------------------------------------ which it is


def _find(model: nn.Module, head: Patterns | None) -> Head:
    found = slots(model)
    lazy = [slot.name for slot in found if is_lazy(slot.tensor)]
    if lazy:
        raise UsageError(
            f"{some(lazy, 3)}: no shape yet", hint="run a batch through the model first"
        )
    if head is not None:
        names = Parameters(model).select(head)
        modules = tuple(dict.fromkeys(name.rpartition(".")[0] for name in names))
        return Head(modules, tuple(names), "named by head=", "certain")
    try:
        return head_of(_refs(found, (Tensor,)), _refs(found, (nn.Parameter,)))
    except (AmbiguousError, NoMatchError, RefusedError) as e:
        # the same words, as a parameter instead of an option
        way_out = (
            (e.hint or "").replace("--head PATTERN", "head=PATTERN").replace("--head ", "head=")
        )
        raise type(e)(e.message, hint=way_out or None) from None


def _refs(found: Iterable[Slot], kinds: tuple[type, ...]) -> dict[str, TensorRef]:
    """Live tensors as the files' rules want them: names and shapes, tied ones in one storage."""
    storages: dict[int, MemoryStorage] = {}
    return {
        slot.name: TensorRef(
            BY_NAME["float32"],
            tuple(slot.tensor.shape),
            storages.setdefault(id(slot.tensor), MemoryStorage(b"")),
            role="parameter" if isinstance(slot.tensor, nn.Parameter) else "buffer",
        )
        for slot in found
        if isinstance(slot.tensor, kinds)
    }


def _layers(model: nn.Module, found: Head) -> list[_Layer]:
    """The layers of the head, each checked to be one that can be made anew."""
    if any(isinstance(one, DistributedDataParallel) for one in model.modules()):
        raise RefusedError(
            "DistributedDataParallel looks at the parameters only when it is built: it would not "
            "synchronise a new head",
            hint="replace the head of the bare model (modelctl.nn.unwrap), then wrap it anew",
        )
    layers = [_layer(model, name) for name in found.modules]
    outside = [name for name in found.names if name.rpartition(".")[0] not in found.modules]
    if outside:
        raise RefusedError(f"a part of the head stands outside of its layers: {some(outside)}")
    if len({one.outputs for one in layers}) > 1:
        sizes = [f"{one.name} ({one.outputs} outputs)" for one in layers]
        raise AmbiguousError(
            f"head= means layers of different size: {some(sizes)}",
            hint=f"name the one that is meant: head='{layers[-1].name}'",
        )
    words = getattr(model, "get_output_embeddings", None)
    if callable(words) and any(one.module is words() for one in layers):
        raise RefusedError(
            f"'{layers[0].name}' makes a language model's tokens, no classes",
            hint="model.resize_token_embeddings(n) changes how many, …ForSequenceClassification "
            "has a head of classes",
        )
    return layers


def _layer(model: nn.Module, name: str) -> _Layer:
    by_name = {place.name: place.module for place in places(model)}
    module = by_name.get(name)
    parts = name.split(".")
    above = [by_name[""], *(by_name[".".join(parts[:i])] for i in range(1, len(parts)))]
    if module is None or "parametrizations" in parts or hasattr(module, "parametrizations"):
        raise RefusedError(
            f"the head '{name.partition('.parametrizations')[0]}' is parametrized",
            hint="torch.nn.utils.parametrize.remove_parametrizations first, and anew after",
        )
    weight = module._parameters.get("weight")
    kind = type(module).__name__
    if not isinstance(module, (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)) or weight is None:
        raise RefusedError(
            f"'{name}' is a {kind}, no Linear and no convolution that can be made anew"
        )
    if getattr(module, "groups", 1) != 1:
        raise RefusedError(f"'{name}' is a convolution in {module.groups} groups")
    if type(weight) is not nn.Parameter or not weight.dtype.is_floating_point:
        raise RefusedError(
            f"'{name}.weight' is a {type(weight.data).__name__} of {weight.dtype}: sharded and "
            "quantized heads can't be made anew",
            hint="replace the head first, then shard or quantize the model",
        )
    return _Layer(name, module, above)


def _copied(ema: nn.Module, layers: Iterable[_Layer]) -> list[_Layer]:
    """The same layers of an averaged copy, which AveragedModel has as its ``module``."""
    inside = getattr(ema, "module", None)
    bare = inside if isinstance(inside, nn.Module) else ema
    found = []
    for one in layers:
        try:
            copy = _layer(bare, one.name)
        except (KeyError, RefusedError):
            copy = None
        if copy is None or copy.module is one.module or copy.outputs != one.outputs:
            raise RefusedError(
                f"ema= is no copy of this model: it has no '{one.name}' of its own with "
                f"{one.outputs} outputs"
            )
        found.append(copy)
    return found


def _refuse_tied(model: nn.Module, held: Mapping[str, nn.Parameter]) -> None:
    """Raises RefusedError where another module holds a parameter of the head, too. (A module that
    goes by two names is one.)"""
    names = {id(parameter): name for name, parameter in held.items()}
    owners: dict[int, tuple[nn.Module, str]] = {}
    for slot in slots(model):
        if id(slot.tensor) not in names:
            continue
        owner, name = owners.setdefault(id(slot.tensor), (slot.owner, slot.name))
        if owner is not slot.owner:
            raise RefusedError(
                f"the head is tied: '{name}' is '{slot.name}'",
                hint="give it a tensor of its own first: layer.weight = "
                "nn.Parameter(layer.weight.detach().clone())",
            )


# ------------------------------------------------------------------ anew


def _seats(
    optimizer: Several[Optimizer], held: Mapping[str, nn.Parameter]
) -> list[tuple[list[nn.Parameter], int, str]]:
    """Where each parameter of the head stands: the list of its group, and its place there."""
    optimizers = labelled(optimizer)
    names = {id(parameter): name for name, parameter in held.items()}
    seats = []
    for one in optimizers.values():
        for group in one.param_groups:
            here = [(i, names[id(p)]) for i, p in enumerate(group["params"]) if id(p) in names]
            if here and type(one).__name__ == "LBFGS":
                raise RefusedError(
                    "LBFGS has one flat state over all parameters: none can take another's place",
                    hint="replace the head without optimizer=, and make a new LBFGS",
                )
            seats += [(group["params"], i, name) for i, name in here]
    without = [name for name in held if name not in {name for _, _, name in seats}]
    if optimizers and without:
        raise RefusedError(
            f"the optimizer does not hold {some(without)}",
            hint="replace the head without optimizer=, then modelctl.nn.unfreeze(model, "
            f"'{without[0].rpartition('.')[0]}', optimizer=optimizer) adds the new one",
        )
    return seats


def _renew(layer: _Layer, classes: int, like: _Layer | None = None) -> list[str]:
    """New parameters for a layer, or copies of those of ``like``; gives what else followed."""
    module, before = layer.module, layer.outputs
    for name, old in list(module.named_parameters()):
        new = torch.empty((classes, *old.shape[1:]), dtype=old.dtype, device=old.device)
        trains = like is None or old.requires_grad
        setattr(module, name, nn.Parameter(new, requires_grad=trains))
    setattr(module, "out_features" if isinstance(module, nn.Linear) else "out_channels", classes)
    if like is None:
        module.reset_parameters()
        for one in layer.above:
            if any(kind.__name__ == "PreTrainedModel" for kind in type(one).__mro__):
                cast(Any, one)._init_weights(module)
                break
    else:
        with torch.no_grad():
            for name, value in like.module.named_parameters():
                module.get_parameter(name).copy_(value)
    return _follow(layer.above, before, classes)


def _follow(above: Iterable[nn.Module], before: int, classes: int) -> list[str]:
    """Set what the modules around a head call the number of classes."""
    names = []
    for module in above:
        for name in _NUMBERS:
            if vars(module).get(name) == before:
                setattr(module, name, classes)
                names.append(name)
        config: Any = vars(module).get("config")
        if getattr(config, "num_labels", None) == before and hasattr(config, "id2label"):
            config.id2label = {i: f"LABEL_{i}" for i in range(classes)}
            config.label2id = {label: i for i, label in config.id2label.items()}
            names.append("config.num_labels")
            if (before == 1) != (classes == 1):  # a regression, or none any more
                config.problem_type = None
    return names
