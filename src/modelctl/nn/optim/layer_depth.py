"""How deep each parameter lies: the stem, the blocks in their order, the head."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from torch import nn
from torch.nn.modules.batchnorm import _NormBase

from ...core.names import Patterns
from ...errors import AmbiguousError, NoMatchError
from ..model_names import Parameters, places, slots

_NORMS = (_NormBase, nn.LayerNorm, nn.GroupNorm)
# Siblings that are numbered: 0, layer1, encoder_layer_0, denseblock1, Mixed_5b.
_NUMBERED = re.compile(r"(.*?)\d+[a-z]?")
_SAY = "name the layers from the input on: layers=['embed', 'blocks.0', 'blocks.1']"


def is_norm(module: nn.Module) -> bool:
    """BatchNorm, InstanceNorm, LayerNorm, GroupNorm, and whatever is called an RMSNorm."""
    return isinstance(module, _NORMS) or "rmsnorm" in type(module).__name__.lower()


def depths(
    model: nn.Module, params: Parameters, layers: Sequence[Patterns] | None = None
) -> dict[str, int]:
    """The number of the layer that each parameter is in, counted from the input.

    ``layers`` says them: of the patterns the first that matches decides, and what none matches
    is the head, one layer after them. Without it they are found: the blocks are the longest row
    of siblings that are numbered (``layer1`` …, ``blocks.0`` …, ``features.0`` …); each is a
    layer. What is registered before the first is the stem, a layer before them; what is after
    the last is the head, a layer after them. What stands between two blocks, and norms right
    after the last one, go with the block before.

    Raises:
        NoMatchError: no such row; one of ``layers`` matches nothing.
        AmbiguousError: two rows of blocks about as long (an encoder and a decoder).
    """
    if layers is not None:
        return _as_said(params, layers)
    blocks = _blocks(model, params)
    norms = {slot.name for slot in slots(model) if is_norm(slot.owner)}
    found: dict[str, int] = {}
    layer, ended = 0, False
    entered: set[str] = set()
    for name in params.by_name:
        block = next((b for b in blocks if name.startswith(b + ".")), None)
        if block is not None:
            entered.add(block)
            layer = blocks.index(block) + 1
        elif len(entered) == len(blocks):
            ended = ended or name not in norms
            layer = len(blocks) + ended
        found[name] = layer
    return found


def _as_said(params: Parameters, layers: Sequence[Patterns]) -> dict[str, int]:
    found: dict[str, int] = {}
    for i, patterns in enumerate(layers):
        for name in params.select(patterns):
            found.setdefault(name, i)
    return {name: found.get(name, len(layers)) for name in params.by_name}


@dataclass(frozen=True)
class _Row:
    """Numbered siblings: their names, how many tensors they hold, and whether they are blocks
    of several layers each or bare layers."""

    names: tuple[str, ...]
    tensors: int
    composite: bool


def _blocks(model: nn.Module, params: Parameters) -> tuple[str, ...]:
    rows = list(_Tree(model, params).rows(""))
    if not rows:
        raise NoMatchError(
            f"no layers are found in {type(model).__name__}: it has no numbered siblings "
            "(layer1, layer2, … or blocks.0, blocks.1, …)",
            hint=_SAY,
        )
    best = max(rows, key=lambda row: row.tensors)
    for row in rows:
        as_long = 2 * len(row.names) >= len(best.names) and 4 * row.tensors >= best.tensors
        if row is not best and row.composite and as_long:
            raise AmbiguousError(
                f"two rows of blocks, {_span(best)} and {_span(row)}: "
                "which of them comes first can't be told",
                hint=_SAY,
            )
    return best.names


def _span(row: _Row) -> str:
    return f"'{row.names[0]}' to '{row.names[-1]}'"


class _Tree:
    """The modules that hold parameters, by name, wrappers left out; tied parameters count where
    their first name is."""

    def __init__(self, model: nn.Module, params: Parameters) -> None:
        self.holds: dict[str, int] = {}
        self.leaves: dict[str, set[str]] = {}
        norms = {place.name for place in places(model) if is_norm(place.module)}
        self.norms = norms
        for name in params.by_name:
            owner = name.rpartition(".")[0]
            for prefix in _prefixes(owner):
                self.holds[prefix] = self.holds.get(prefix, 0) + 1
                self.leaves.setdefault(prefix, set())
                if owner not in norms:
                    self.leaves[prefix].add(owner)
        self.children: dict[str, list[str]] = {}
        for place in places(model):
            if place.name and self.holds.get(place.name):
                self.children.setdefault(place.name.rpartition(".")[0], []).append(place.name)

    def rows(self, parent: str) -> Iterable[_Row]:
        """The rows of numbered siblings, none of them within another."""
        series: dict[str, list[str]] = {}
        children = self.children.get(parent, [])
        for name in children:
            numbered = _NUMBERED.fullmatch(name.rpartition(".")[2])
            if numbered and name not in self.norms:
                series.setdefault(numbered[1], []).append(name)
        taken: set[str] = set()
        for names in series.values():
            tensors = sum(self.holds[name] for name in names)
            # one that is nearly all of it is no block beside others, but what holds the blocks
            if len(names) > 1 and 5 * max(self.holds[name] for name in names) <= 4 * tensors:
                taken.update(names)
                composite = all(len(self.leaves[name]) > 1 for name in names)
                yield _Row(tuple(names), tensors, composite)
        for name in children:
            if name not in taken:
                yield from self.rows(name)


def _prefixes(name: str) -> list[str]:
    parts = name.split(".")
    return [".".join(parts[:end]) for end in range(1, len(parts) + 1)] if name else []
