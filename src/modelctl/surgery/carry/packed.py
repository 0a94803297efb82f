"""The pieces of a quantized weight stay together, and what torchao says of it follows its name."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from itertools import takewhile

from ...core.notes import Note, warning
from ...core.packed import PackedWeights, Weight
from ...core.text import count, some
from .state_dict import Renaming


def apart(packed: PackedWeights, renaming: Renaming) -> Iterator[Note]:
    """A warning where a change of names leaves a quantized weight with some of its pieces."""
    torn = {
        name: how
        for name, weight in packed.weights.items()
        if (how := _torn(weight, renaming)) is not None
    }
    for name, how in [*torn.items()][:1]:
        more = f"; so do {count(len(torn) - 1, 'other')}" if len(torn) > 1 else ""
        module = packed.weights[name].module or name
        yield warning(
            f"the quantized weight '{name}' comes apart: {how}{more}",
            f"take all of a module: '{module}'",
        )


def _torn(weight: Weight, renaming: Renaming) -> str | None:
    """What becomes of the pieces, where they don't stay together."""
    now = {name: renaming.get(name, name) for name in weight.pieces}
    gone = [_last(name) for name, new in now.items() if new is None]
    if len(gone) == len(now):
        return None
    if gone:
        kept = [_last(name) for name, new in now.items() if new is not None]
        return f"it keeps {some(kept)} and loses {some(gone)}"
    start = _common(*now)
    stems = {
        str(new).removesuffix(name[start:]) if str(new).endswith(name[start:]) else None
        for name, new in now.items()
    }
    if len(stems) == 1 and None not in stems:
        return None
    return f"its pieces become {some([str(new) for new in now.values()])}"


def _common(first: str, *others: str) -> int:
    """How many letters the names have in common at their start."""
    alike = (set(letters) for letters in zip(first, *others, strict=False))
    return sum(1 for _ in takewhile(lambda letters: len(letters) == 1, alike))


def _last(name: str) -> str:
    return name.rpartition(".")[2]


# Where torchao says in safetensors which tensors there are.
_NAMES = "tensor_names"


def renamed_metadata(
    metadata: Mapping[str, str], packed: PackedWeights, renaming: Renaming
) -> Mapping[str, str]:
    """What torchao says of each tensor (docs/formats.md#quantized-weights) under its new name."""
    try:
        names = json.loads(metadata.get(_NAMES, "null"))
    except (ValueError, RecursionError):
        return metadata
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        return metadata
    now = {name: _renamed(name, packed, renaming) for name in names}
    kept = {key: now.get(key, key) for key in metadata}
    found = {new: metadata[key] for key, new in kept.items() if new is not None}
    return {**found, _NAMES: json.dumps([new for new in now.values() if new is not None])}


def _renamed(name: str, packed: PackedWeights, renaming: Renaming) -> str | None:
    weight = packed.weights.get(name)
    if weight is None:
        return renaming.get(name, name)
    new = renaming.get(weight.packed, weight.packed)
    if new is None:
        return None
    module, dot, last = new.rpartition(".")
    if not (last.startswith("_") and last.endswith("_qdata")):
        return name  # it came apart, which is said
    return module + dot + last.removeprefix("_").removesuffix("_qdata")
