"""How deep each parameter lies: the stem, the blocks in their order, the head."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

from torch import nn
from torch.nn.modules.batchnorm import _NormBase

from ...core.names import Patterns
from ...errors import AmbiguousError, NoMatchError
from ..model_names import Parameters, kind_of, places, slots, unwrap

_NORMS = (_NormBase, nn.LayerNorm, nn.GroupNorm)
# Siblings that are numbered: 0, layer1, encoder_layer_0, denseblock1, Mixed_5b.
_NUMBERED = re.compile(r"(.*?)\d+[a-z]?")
# What blocks of a stage are called before their number, if anything: others that are numbered, as
# branches, experts and convolutions, are parts of a block, and may work side by side.
_BLOCK = re.compile(r"(\w*(layer|block|stage|unit|cell|level)s?|[bs])?[._]?", re.IGNORECASE)
_ENDING = re.compile("merging|transition", re.IGNORECASE)
_SAY = "name the layers from the input on: layers=['embed', 'blocks.0', 'blocks.1']"


def is_norm(module: nn.Module) -> bool:
    """BatchNorm, InstanceNorm, LayerNorm, GroupNorm, and whatever is called an RMSNorm."""
    return isinstance(module, _NORMS) or "rmsnorm" in type(module).__name__.lower()


def depths(
    model: nn.Module, params: Parameters, layers: Sequence[Patterns] | None = None
) -> dict[str, int]:
    """The number of the layer that each parameter is in, counted from the input.

    ``layers`` says them: of the patterns the first that matches decides, and what none matches
    is the head, one layer after them. Without it a model that tells its layers itself, by timm's
    ``group_matcher``, has those. Else they are found: the longest row of siblings that are
    numbered (``layer1`` …, ``blocks.0`` …, ``features.0`` …), and where one of them is a stage,
    the row of blocks in it: each block is a layer. What is registered before the first is the
    stem, a layer before them; what is after the last is the head, a layer after them. Blocks in
    a row of their own after these (class attention) follow them. What else
    a stage has goes with the block next to it; a single layer between two stages with the block
    after it, where it downsamples for that one (ConvNeXt), or before it, where it is called a
    merging or a transition (Swin, DenseNet); norms and single layers of the row right after the
    last block go with that one.

    Raises:
        NoMatchError: no such row; one of ``layers`` matches nothing.
        AmbiguousError: two rows of blocks about as long (an encoder and a decoder).
    """
    if layers is not None:
        return _as_said(params, layers)
    own = _as_the_model_says(model, params)
    return own if own is not None else _found(model, params)


def _as_the_model_says(model: nn.Module, params: Parameters) -> dict[str, int] | None:
    """By timm's own code, which ``param_groups_layer_decay`` uses, too."""
    matcher = getattr(unwrap(model), "group_matcher", None)
    if not callable(matcher):
        return None
    try:
        from timm.models import group_parameters
    except ImportError:
        return None
    named: Any = SimpleNamespace(named_parameters=lambda: iter(params.by_name.items()))
    found = group_parameters(named, matcher(coarse=False), reverse=True)
    last = max(found.values(), default=0)
    return {name: found.get(name, last) for name in params.by_name}


def _found(model: nn.Module, params: Parameters) -> dict[str, int]:
    tree = _Tree(model, params)
    row = _row(model, tree)
    stages = [one for one in row if tree.is_composite(one)] or [*row]
    stages += tree.more_blocks(row)
    blocks = [(stage, inner) for stage in stages for inner in tree.blocks_in(stage)]
    number = {inner: i for i, (_, inner) in enumerate(blocks, 1)}
    first: dict[str, int] = {}  # the first block of a stage
    for stage, inner in blocks:
        first.setdefault(stage, number[inner])
    found: dict[str, int] = {}
    layer, ended = 0, False
    for name in params.by_name:
        around = _prefixes(name.rpartition(".")[0])
        block = next((number[one] for one in around if one in number), None)
        at_least = next((first[one] for one in around if one in first), None)
        single = next((one for one in around if one in row), None)
        if block is not None:
            layer = found[name] = block
        elif at_least is not None:
            found[name] = max(at_least, layer)
        elif single is not None:
            found[name] = layer if not layer or tree.ends_a_stage(single) else layer + 1
            found[name] = min(found[name], len(blocks))
        else:
            if layer == len(blocks):  # a norm within a head is the head's
                outside = (one for one in around if not row[0].startswith(one + "."))
                alone = name in tree.norm_params and not any(tree.leaves[one] for one in outside)
                ended = ended or not alone
            found[name] = layer + ended
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


def _row(model: nn.Module, tree: _Tree) -> tuple[str, ...]:
    """The numbered siblings that are the layers, or the stages of which they are."""
    rows = list(tree.rows(""))
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
        modules = {place.name: place.module for place in places(model)}
        norms = {name for name, module in modules.items() if is_norm(module)}
        self.norms = norms
        self.norm_params = {slot.name for slot in slots(model) if is_norm(slot.owner)}
        self.kinds = {name: kind_of(module) for name, module in modules.items()}
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
                composite = all(self.is_composite(name) for name in names)
                yield _Row(tuple(names), tensors, composite)
        for name in children:
            if name not in taken:
                yield from self.rows(name)

    def is_composite(self, name: str) -> bool:
        """Whether it holds several layers, norms not counted."""
        return len(self.leaves[name]) > 1

    def blocks_in(self, stage: str) -> list[str]:
        """The blocks of a stage, one after the other; itself, where it is none.

        A stage is a row of blocks of one class, and little beside it: what downsamples.
        """
        rows = [row for row in self.rows(stage) if row.composite]
        if len(rows) != 1:
            return [stage]
        names = rows[0].names
        inside = sum(len(self.leaves[name]) for name in names)
        alike = len({self.kinds[name] for name in names}) == 1
        if not alike or 3 * inside < 2 * len(self.leaves[stage]) or not _is_row_of_blocks(names):
            return [stage]
        return [block for name in names for block in self.blocks_in(name)]

    def more_blocks(self, row: Sequence[str]) -> list[str]:
        """Blocks in a row of their own after the ``row``: those in which the class token attends
        to the others (CaiT, XCiT)."""
        order = {name: i for i, name in enumerate(self.holds)}
        found: list[str] = []
        for other in self.rows(""):
            after = order[other.names[0]] > order[row[-1]]
            called = other.names[0].rpartition(".")[0].rpartition(".")[2]
            if after and other.composite and re.search("block|layer", called, re.IGNORECASE):
                found += other.names
        return found

    def ends_a_stage(self, name: str) -> bool:
        """Whether it is a layer that belongs to the stage before it."""
        return bool(_ENDING.search(self.kinds[name]))


def _is_row_of_blocks(names: Sequence[str]) -> bool:
    parent, _, own = names[0].rpartition(".")
    numbered = _NUMBERED.fullmatch(own)
    before = numbered[1] if numbered else ""
    called = before or parent.rpartition(".")[2]
    return bool(_BLOCK.fullmatch(before)) and "expert" not in called.lower()


def _prefixes(name: str) -> list[str]:
    parts = name.split(".")
    return [".".join(parts[:end]) for end in range(1, len(parts) + 1)] if name else []
