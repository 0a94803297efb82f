"""Find the head: the layer that turns features into classes.

The rules and the names are those of OPTIMIZER, "Head names" (measured on torchvision and timm).
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import NamedTuple

from ..core.checkpoint import Checkpoint
from ..core.names import Patterns, select, unwrapped
from ..core.records import REMOVED, read_record
from ..core.roles import parameters
from ..core.tensors import TensorRef
from ..core.tree import mapping
from ..errors import AmbiguousError, NoMatchError, RefusedError

# Modules that frameworks call their head, by their path from the model's root.
_HEAD_NAMES = re.compile(
    r"(?:(?:model|net|network|backbone|encoder|resnet|base_model)\.)?(?:"
    r"fc|linear|head|head_dist|heads|heads\.head|head\.(?:fc|l|fc2|\d+)|head_dist\.fc|last_linear|"
    r"classifier|classifier\.\d+|classifiers?\.(?:fc|out_proj|dense)|"
    r"lm_head|score|qa_outputs|class_embed|logits|output_layer|"
    r"classification_head(?:\.\w+)*|classif|cls(?:\.\w+)*|fc_out|out_proj|"
    r"aux_?logits\.fc|aux\d\.fc\d?|aux_classifier\.\d+|aux_head\.\d+|last_layer|output|out"
    r")",
    re.IGNORECASE,
)
_MAIN_NAMES = re.compile(r"^(?!aux)", re.IGNORECASE)
_DETECTION = re.compile(r"(?:^|[._])(?:roi_heads|bbox\w*|regression\w*|rpn|anchors?)(?:[._]|$)")


class Head(NamedTuple):
    """A head that was found: its modules and tensors, why, and how sure that is."""

    modules: tuple[str, ...]
    names: tuple[str, ...]
    evidence: str
    confidence: str  # "certain" (named by the user), "high", "medium"

    def __str__(self) -> str:
        return f"{', '.join(self.modules)} ({self.evidence}; confidence {self.confidence})"


def find_head(ckpt: Checkpoint, head: Patterns | None = None) -> Head:
    """The head of the model: ``head`` where given, else found by name and place.

    Raises:
        NoMatchError: there is none, or ``head`` matches nothing.
        AmbiguousError: several layers could be it.
        RefusedError: a detection model (its last layer is a box regression), or a head whose
            tensor is tied to another one.
    """
    tensors = ckpt.sections.model().tensors()
    if head is not None:
        chosen = select(list(tensors), head)
        named_modules = tuple(dict.fromkeys(name.rpartition(".")[0] or name for name in chosen))
        return Head(named_modules, tuple(chosen), "named by --head", "certain")
    modules_of = _modules(parameters(tensors))
    before = read_record(ckpt, REMOVED)
    if isinstance(before, list) and before:
        names_before = [str((mapping(one) or {}).get("name")) for one in before]
        raise NoMatchError(
            f"the head was removed already: {', '.join(names_before[:4])}",
            hint="name what else is to go: --head PATTERN",
        )
    layers = {  # what can be a head: a linear layer or a convolution
        module: refs for module, refs in modules_of.items() if _classes(refs) is not None
    }
    if any(_DETECTION.search(module) for module in modules_of):
        found = next(module for module in modules_of if _DETECTION.search(module))
        raise RefusedError(
            f"this looks like a detection model ('{found}'): its last layer is no classifier",
            hint=f"name its head: --head PATTERN (its last layer is '{list(modules_of)[-1]}')",
        )
    if not layers:
        raise NoMatchError("no head is found: the model has no linear layer or convolution")
    anchor = list(modules_of)[-1]
    repeated = _repeated(modules_of)
    bare = {module: unwrapped(module) for module in layers}
    named = [
        module
        for module in layers
        if _HEAD_NAMES.fullmatch(bare[module]) and not _superseded(module, layers)
    ]
    if named:
        main = anchor if anchor in named else _main(named, bare)
        classes = _classes(layers[main])
        modules = [module for module in named if _classes(layers[module]) == classes]
        others = [module for module in named if module not in modules]
        if others and anchor not in named:
            raise AmbiguousError(
                f"several layers could be the head: {', '.join(named)}",
                hint=f"name it: --head '{named[-1]}'",
            )
        evidence = f"named like a head, {_outputs(classes)}"
        if anchor in modules:
            evidence += ", the model's last layer"
        confidence = "high" if anchor in modules else "medium"
    elif anchor in layers and anchor not in repeated:
        twin = _twin(anchor, layers)
        if twin is not None:
            raise AmbiguousError(
                f"'{twin}' and '{anchor}' read the same features: several heads?",
                hint=f"name the one that is meant: --head '{anchor}'",
            )
        modules = [anchor]
        evidence = f"the model's last layer, {_outputs(_classes(layers[anchor]))}"
        confidence = "medium"
    else:
        what = (
            f"its last layer '{anchor}' is one of several alike"
            if anchor in layers
            else f"its last parameters, '{anchor}', are a normalisation's"
        )
        raise NoMatchError(
            f"no head is found: {what}", hint="is it stripped already? else name it with --head"
        )
    inside = tuple(modules)
    names = [name for name in tensors if any(name.startswith(module + ".") for module in inside)]
    _refuse_tied(tensors, names)
    return Head(inside, tuple(names), evidence, confidence)


def _modules(names: dict[str, TensorRef]) -> dict[str, dict[str, TensorRef]]:
    """The parameters of each module that has some, in the order of the file."""
    found: dict[str, dict[str, TensorRef]] = {}
    for name, ref in names.items():
        module, _, last = name.rpartition(".")
        if module:
            found.setdefault(module, {})[last] = ref
    return found


def _classes(refs: dict[str, TensorRef]) -> int | None:
    """The outputs of a linear layer or convolution, None for any other module."""
    weight = refs.get("weight")
    if weight is None or len(weight.shape) < 2:
        return None
    bias = refs.get("bias")
    if bias is not None and bias.shape != weight.shape[:1]:
        return None
    return weight.shape[0]


def _outputs(classes: int | None) -> str:
    return f"{classes} output{'' if classes == 1 else 's'}"


def _repeated(modules: dict[str, dict[str, TensorRef]]) -> set[str]:
    """The modules inside (or that are) one of several numbered siblings of the same make-up."""
    makeup: dict[tuple[str, str], set[str]] = {}
    for module, refs in modules.items():
        parts = module.split(".")
        for i, part in enumerate(parts):
            if part[-1:].isdecimal():  # blocks.3, and layer3, too
                key = (".".join(parts[:i]), part)
                makeup.setdefault(key, set()).update(
                    ".".join([*parts[i + 1 :], last]) for last in refs
                )
    alike: dict[tuple[str, frozenset[str]], list[str]] = {}
    for (above, number), names in makeup.items():
        stem = number.rstrip("0123456789")
        block = f"{above}.{number}".lstrip(".")
        alike.setdefault((f"{above}.{stem}", frozenset(names)), []).append(block)
    blocks = {block for group in alike.values() if len(group) > 1 for block in group}
    return {
        module
        for module in modules
        if any(module == block or module.startswith(block + ".") for block in blocks)
    }


def _twin(anchor: str, layers: dict[str, dict[str, TensorRef]]) -> str | None:
    """The layer before the last one, where it stands beside it and has as many inputs."""
    order = list(layers)
    at = order.index(anchor)
    if at == 0:
        return None
    twin = order[at - 1]
    beside = twin.rpartition(".")[0] == anchor.rpartition(".")[0]
    inputs = [layers[name]["weight"].shape[1:] for name in (twin, anchor)]
    chained = layers[twin]["weight"].shape[0] == inputs[1][0]  # one feeds the other
    return twin if beside and inputs[0] == inputs[1] and not chained else None


def _superseded(module: str, layers: dict[str, dict[str, TensorRef]]) -> bool:
    """Of a Sequential called ``classifier``, only the last layer is the head."""
    above, _, number = module.rpartition(".")
    if not number.isdecimal():
        return False
    later = [
        other
        for other in layers
        if other.rpartition(".")[0] == above
        and other.rpartition(".")[2].isdecimal()
        and int(other.rpartition(".")[2]) > int(number)
    ]
    return bool(later)


def _main(named: list[str], bare: dict[str, str]) -> str:
    return next((module for module in named[::-1] if _MAIN_NAMES.match(bare[module])), named[-1])


def _refuse_tied(tensors: dict[str, TensorRef], head: Sequence[str]) -> None:
    inside = {tensors[name].identity: name for name in head}
    for name, ref in tensors.items():
        if name not in head and ref.identity in inside:
            raise RefusedError(
                f"the head's '{inside[ref.identity]}' is tied to '{name}'",
                hint=f"--head '{inside[ref.identity].rpartition('.')[0]}' strips its name anyway",
            )
