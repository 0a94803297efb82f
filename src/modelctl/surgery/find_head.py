"""Find the head: the layer that turns features into classes.

In this order: what the user names, what the file records, what frameworks call a head, the last
layer. Names and places are judged by shapes, and what is not clear is refused. docs/heads.md says
what is found in which model; the rules were measured on all of torchvision, timm and transformers.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Container, Iterable, Sequence
from itertools import pairwise
from shlex import quote
from typing import NamedTuple

from ..core.checkpoint import Checkpoint
from ..core.names import (
    Patterns,
    alphabetical,
    common_prefix,
    natural,
    parameters,
    select,
    unwrapped,
)
from ..core.nodes import mapping
from ..core.records import REMOVED, read_record
from ..core.tensors import TensorRef
from ..core.text import some
from ..errors import AmbiguousError, NoMatchError, RefusedError

# What frameworks call a head, as one segment of a path: fc, head_dist, lm_head, aux1. What is
# called pre_logits or conv_head comes before it.
_WORD = (
    r"(?:(?!pre_|conv_)(?:\w+_)?(?:head|classifier|classif|fc|logit)s?\d*"
    r"(?:_(?:dist|distill|out|proj))?"
    r"|(?:linear|score|prediction|output|out|cls)s?\d*|(?:last|final|output)_(?:layer|linear|fc)"
    r"|qa_outputs|class_embed|out_proj|linear_out|aux\d*|aux_?logits)"
)
# A path of such words from the model's root; inside, the layer may go by what it is.
_NAMED = re.compile(
    rf"(?:(?:model|net|network)\.)?{_WORD}(?:\.(?:{_WORD}|\d+))*"
    r"(?:\.(?:l|op|proj|decoder|conv|convolution))?",
    re.IGNORECASE,
)
_AUXILIARY = re.compile(r"(?:^|\.)aux", re.IGNORECASE)
# What a last layer may be that is not the head: the features before it.
_BEFORE = re.compile(r"(?:^|\.)(?:pre_\w+|conv_head|project\w*)$", re.IGNORECASE)
# Models that make boxes, key points or motion beside classes or instead of them.
_OTHER_TASKS = re.compile(
    r"(?:^|[._])(?:roi_heads|bbox\w*|regression\w*|rpn|anchors?|dfl|flow_head)(?:[._]|$)",
    re.IGNORECASE,
)
_CLASSES = re.compile(r"(?:^|[._])(?:cls|class\w*|score|logits|conf)(?:[._]|$)", re.IGNORECASE)


class Head(NamedTuple):
    """A head that was found: its modules and tensors, why, and how sure that is."""

    modules: tuple[str, ...]
    names: tuple[str, ...]
    evidence: str
    confidence: str  # "certain" (named by the user), "high", "medium"

    def __str__(self) -> str:
        return f"{', '.join(self.modules)} ({self.evidence}; confidence {self.confidence})"


class _Layer(NamedTuple):
    """A linear layer or a convolution: what it reads and makes, and its place among the modules
    (None where the order of the names says nothing)."""

    module: str
    inputs: int
    outputs: int
    dims: int
    place: int | None

    @property
    def makes(self) -> str:
        return f"{self.outputs} output{'' if self.outputs == 1 else 's'}"

    def __str__(self) -> str:
        return f"{self.module} ({self.makes})"


_Modules = dict[str, dict[str, TensorRef]]
_MOST = 64  # no model has so many heads; each is compared with each


def find_head(ckpt: Checkpoint, head: Patterns | None = None) -> Head:
    """The head of the model: ``head`` where given, else found by name and place.

    Raises:
        NoMatchError: there is none, or ``head`` matches nothing.
        AmbiguousError: several layers could be it.
        RefusedError: a model whose last layer makes something else (boxes, motion), or a head
            whose tensor is tied to another one.
    """
    tensors = ckpt.sections.model().tensors()
    if head is not None:
        chosen = select(list(tensors), head)
        above = tuple(dict.fromkeys(name.rpartition(".")[0] or name for name in chosen))
        return Head(above, tuple(chosen), "named by --head", "certain")
    _refuse_removed(ckpt, tensors)
    trained = parameters(ckpt.packed.unpacked(tensors))  # quantized ones with their real shapes
    found = head_of(tensors, trained)
    _refuse_tied(tensors, found.names)
    return found


def head_of(tensors: dict[str, TensorRef], trained: dict[str, TensorRef]) -> Head:
    """The head by name and place, among the parameters ``trained`` of all ``tensors``; whether it
    is tied to something is not asked.

    Raises:
        NoMatchError, AmbiguousError, RefusedError: as :func:`find_head`.
    """
    modules, ordered = _modules(trained), not alphabetical(list(trained))
    layers = [
        layer
        for place, (module, refs) in enumerate(modules.items())
        if (layer := _layer(module, refs, place if ordered else None)) is not None
    ]
    if not layers:
        raise NoMatchError(
            "no head is found: the model has no linear layer or convolution",
            hint="name it: --head PATTERN",
        )
    _refuse_other_tasks(tensors, layers)
    widths = Counter(refs["weight"].shape[:1] for refs in modules.values() if "weight" in refs)
    found = _by_name(modules, layers)
    evidence = ["named like a head"] if found else []
    found = found or [_by_place(modules, layers, widths)]
    outputs = found[0].outputs
    evidence.append(found[0].makes)
    at_end = ordered and any(layer.module == list(modules)[-1] for layer in found)
    alone = widths[(outputs,)] <= len(found)
    if at_end:
        evidence.append("the model's last layer")
    elif alone:
        evidence.append("which no other layer has")
    # The last of a Sequential may be what is left of one: its place is no evidence of its own.
    numbered = found[-1].module.rpartition(".")[2].isdecimal()
    sure = evidence[0].startswith("named") and (alone or (at_end and not numbered))
    return Head(
        tuple(layer.module for layer in found),
        tuple(_tensors_of(found, tensors)),
        ", ".join(evidence),
        "high" if sure else "medium",
    )


def _by_name(modules: _Modules, layers: Sequence[_Layer]) -> list[_Layer]:
    """The layers that are named like a head and feed no other such layer; empty where none is."""
    prefix = common_prefix(f"{module}." for module in modules)
    while prefix and _NAMED.fullmatch(prefix[:-1]):  # all of it is called so: a bare Sequential
        prefix = prefix[: prefix[:-1].rfind(".") + 1]
    named = {
        module for module in modules if _NAMED.fullmatch(unwrapped(module.removeprefix(prefix)))
    }
    candidates = [layer for layer in layers if layer.module in named]
    if len(candidates) > _MOST:
        raise AmbiguousError(
            f"{len(candidates)} layers could be the head: {_few(candidates)}",
            hint="name it: --head PATTERN",
        )
    ends = [one for one in candidates if not any(_feeds(one, other, named) for other in candidates)]
    for module, refs in modules.items():
        if module not in named or list(refs) != ["bias"]:
            continue
        outputs = refs["bias"].shape
        if not any((one.outputs,) == outputs for one in ends):
            raise RefusedError(
                f"the weight of the head '{module}' is not in the file: it is tied to "
                f"{_embedding(modules, outputs)}",
                hint=f"--head '{module}' strips what there is of it",
            )
    ends = [one for one in ends if not _normed(one, modules, prefix)]
    if len({one.outputs for one in ends}) > 1:
        raise AmbiguousError(
            f"several layers could be the head: {_few(ends)}",
            hint=f"name the one that is meant: --head '{ends[-1].module}'",
        )
    if ends and all(_AUXILIARY.search(one.module) for one in ends):
        raise NoMatchError(
            f"no head is found but auxiliary ones: {_few(ends)}",
            hint=f"name what is to go: --head '{ends[-1].module}'",
        )
    return ends


def _by_place(
    modules: _Modules, layers: Sequence[_Layer], widths: Counter[tuple[int, ...]]
) -> _Layer:
    """The last layer, where it is alone in what it makes and ends the only branch."""
    anchor, last = layers[-1], list(modules)[-1]
    hint = "is it stripped already? else name it: --head PATTERN"
    if anchor.place is None:
        raise NoMatchError(
            "no head is found: no layer is named like one, and the tensors are sorted by name, "
            "so that their order tells nothing",
            hint=f"name it: --head PATTERN (the layers are {_few(layers)})",
        )
    if anchor.module != last:
        what = f"its last parameters, '{last}', are no linear layer's or convolution's"
    elif _BEFORE.search(last):
        what = f"its last layer, {anchor}, is named like what comes before one"
    elif widths[(anchor.outputs,)] > 1:
        what = f"its last layer, {anchor}, is one of several alike"
    elif anchor.outputs > anchor.inputs:
        what = f"its last layer, {anchor}, makes more than the {anchor.inputs} inputs it reads"
    else:
        rival = _rival(anchor, layers)
        if rival is None:
            return anchor
        raise AmbiguousError(
            f"'{rival.module}' and '{anchor.module}' both end a branch: several heads?",
            hint=f"name the one that is meant: --head '{anchor.module}'",
        )
    raise NoMatchError(f"no head is found: {what}", hint=hint)


def _feeds(one: _Layer, other: _Layer, named: Container[str]) -> bool:
    """Whether ``other`` reads what ``one`` makes, as far as shapes, places and numbers tell."""
    above, _, name = one.module.rpartition(".")
    beside, _, next_name = other.module.rpartition(".")
    stem = name.rstrip("0123456789")
    numbered = above == beside and stem == next_name.rstrip("0123456789")
    if numbered:
        if natural(name) >= natural(next_name):
            return False
    elif one is other or (one.place or 0) > (other.place or 0):
        return False
    if not _fits(one, other):
        return False
    if one.outputs != other.outputs:
        return one.place is not None or numbered or one.inputs != other.outputs
    # As many outputs: heads side by side, or a hidden layer as wide as there are classes? fc1 and
    # fc2 are a chain; so are 0 and 3, where an activation follows 0: else they are a list of heads.
    return numbered and (bool(stem) or f"{above}.{int(name) + 1}" not in named)


def _fits(one: _Layer, other: _Layer) -> bool:
    flattened = one.dims > 2 and other.dims == 2 and other.inputs % max(one.outputs, 1) == 0
    return one.outputs == other.inputs or flattened


def _normed(layer: _Layer, modules: _Modules, prefix: str) -> bool:
    """Whether a norm over the layer's outputs follows it: no head has that."""
    order = list(modules)
    above = layer.module.rpartition(".")[0]
    beside = [module for module in order if module.rpartition(".")[0] == above]
    if len(above) < len(prefix) or not above:  # beside what stands at the top is all the model
        beside = []
    if layer.place is None:
        own = _number(layer.module)
        after = [module for module in beside if own < 0 or _number(module) > own]
    else:
        after = order[layer.place + 1 : layer.place + 2]
        if after != order[-1:]:  # what ends the model need not stand beside its head
            after = [module for module in after if module in beside]
    shape = (layer.outputs,)  # a weight alone is that of a loss
    return any(
        {"weight", "bias"} <= modules[module].keys() and modules[module]["weight"].shape == shape
        for module in after
    )


def _number(module: str) -> int:
    own = module.rpartition(".")[2]
    return int(own) if own.isdecimal() else -1


def _rival(anchor: _Layer, layers: Sequence[_Layer]) -> _Layer | None:
    """The end of another branch: beside the last layer, or in the same place of a twin."""
    for one, following in pairwise(layers):
        beside = one.module.rpartition(".")[0] == anchor.module.rpartition(".")[0]
        if following is anchor and beside and one.inputs == anchor.inputs:
            return one if one.outputs != anchor.inputs else None
        tail = one.module.partition(".")[2]
        if tail and tail == anchor.module.partition(".")[2] and not _fits(one, following):
            return one
    return None


def _modules(tensors: dict[str, TensorRef]) -> _Modules:
    """The parameters of each module that has some, in the order of the file."""
    found: _Modules = {}
    for name, ref in tensors.items():
        module, _, last = name.rpartition(".")
        owner, parametrized, _ = module.rpartition(".parametrizations.weight")
        if parametrized or last in ("weight_orig", "weight_v"):
            # weight_norm, spectral_norm and pruning keep the weight in parts: the big one counts
            module, last = owner or module, "weight" if len(ref.shape) > 1 else last
        if module:
            found.setdefault(module, {}).setdefault(last, ref)
    return found


def _layer(module: str, refs: dict[str, TensorRef], place: int | None) -> _Layer | None:
    weight, bias = refs.get("weight"), refs.get("bias")
    if weight is None or len(weight.shape) < 2:
        return None
    if bias is not None and bias.shape != weight.shape[:1]:
        return None
    return _Layer(module, weight.shape[1], weight.shape[0], len(weight.shape), place)


def _tensors_of(found: Iterable[_Layer], tensors: dict[str, TensorRef]) -> list[str]:
    """All tensors of the layers, and a bias of theirs that stands above (``lm_head.bias``)."""
    inside = tuple(f"{layer.module}." for layer in found)
    above = {f"{layer.module.rpartition('.')[0]}.bias": (layer.outputs,) for layer in found}
    return [
        name
        for name, ref in tensors.items()
        if name.startswith(inside) or above.get(name) == ref.shape
    ]


def _few(layers: Sequence[_Layer]) -> str:
    return some([str(layer) for layer in layers], 6)


def _embedding(modules: _Modules, shape: tuple[int, ...]) -> str:
    for module, refs in modules.items():
        weight = refs.get("weight")
        if weight is not None and len(weight.shape) == 2 and weight.shape[:1] == shape:
            return f"'{module}.weight'"
    return "the embedding"


def _refuse_removed(ckpt: Checkpoint, tensors: Iterable[str]) -> None:
    record = read_record(ckpt, REMOVED)
    removed = [str((mapping(one) or {}).get("name")) for one in record or ()]
    if removed and not {unwrapped(name) for name in tensors}.intersection(map(unwrapped, removed)):
        raise NoMatchError(
            f"the head was removed already: {some(removed, 4)}",
            hint="name what else is to go: --head PATTERN",
        )


def _refuse_other_tasks(tensors: Iterable[str], layers: Sequence[_Layer]) -> None:
    sign = next((name for name in tensors if _OTHER_TASKS.search(name)), None)
    if sign is None:
        return
    classes = [layer for layer in layers if _CLASSES.search(layer.module)]
    likely = f" (likely: {_few(classes[-3:])})" if classes else ""
    raise RefusedError(
        f"no head is guessed: this looks like a detection or motion model ('{sign}')",
        hint=f"name it: --head PATTERN{likely}",
    )


def _refuse_tied(tensors: dict[str, TensorRef], head: Sequence[str]) -> None:
    inside, own = {tensors[name].identity: name for name in head}, set(head)
    for name, ref in tensors.items():
        if ref.identity in inside and name not in own:
            tied = inside[ref.identity]
            raise RefusedError(
                f"the head's '{tied}' is tied to '{name}'",
                hint=f"--head {quote(tied.rpartition('.')[0])} strips its name anyway",
            )
