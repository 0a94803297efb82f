"""Copies of a model's weights (averaged, target, best), and what they call its tensors.

A copy has the model's names and shapes: as they are, under a prefix (``ema_model.`` of
ema-pytorch, which keeps ``online_model.`` beside it), or flattened into one word, as what registers
buffers must (LitEma of latent-diffusion leaves the dots out, mmcv's EMAHook writes ``_``). It may
stand in the model's own state_dict (``model_ema.``, ``generator_ema.``, ``ema_…``), or be a list
without names, in the order of the parameters (``shadow_params``).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from ..matching.matcher import Shape
from ..matching.order import embeddings
from ..names import unwrapped
from ..nodes import Composite
from ..tensors import TensorRef
from .kinds import StateDict
from .optimizers import trainable
from .pairing import words

# Words in names that say that a part of a state_dict is a copy of the rest of it.
_EMA_WORDS = frozenset(("ema", "avg", "averaged", "shadow", "swa", "polyak"))
# And that it goes its own way beside what it copies: the teacher of DINO, targets of Q-learning.
_OWN_WAY_WORDS = frozenset(("teacher", "target", "targ", "tgt", "momentum", "slow", "delayed"))
# As much of a model has to be in what is its copy; less is enough in what has nothing else: not
# every buffer can be told from a parameter by its name.
_LEAST, _LEAST_ALONE = 0.9, 0.5
# A copy in a state_dict may be one of a part that has so many segments before it.
_DEEPEST, _MOST_TRIED = 4, 50


class Alias(NamedTuple):
    """What a copy calls one of the model's tensors: ``before`` and the rest of the name after
    ``part`` of the model's, as ``style`` writes it."""

    name: str
    before: str
    part: str
    style: str

    def renamed(self, new: str) -> str | None:
        """What the copy calls it when the model calls it ``new``; None where it can't say."""
        if not new.startswith(self.part):
            return None
        return self.before + STYLES[self.style](new[len(self.part) :])


STYLES: dict[str, Callable[[str], str]] = {
    "": lambda name: name,
    "without dots": lambda name: name.replace(".", ""),
    "with _": lambda name: name.replace(".", "_"),
}
Aliases = dict[str, Alias]


def shapes_of(entries: Mapping[str, Any]) -> dict[str, Shape]:
    """The shapes of what are tensors, of whatever kind."""
    return {
        name: tuple(node.shape)
        for name, node in entries.items()
        if isinstance(node, TensorRef | Composite)
    }


class Known(NamedTuple):
    """What is known of a model that other state_dicts may be copies of. ``least``: as many of its
    names are in a copy, which may lack what does not train; ``alone`` in one that has no others."""

    shapes: dict[str, Shape]
    least: float
    alone: float

    @classmethod
    def of(cls, model: StateDict) -> Known:
        told = len(trainable(model.tensors())) + len(model.composites())
        return cls(shapes_of(model.entries), max(1, _LEAST * told), max(1, _LEAST_ALONE * told))

    def aliases(self, copy: StateDict) -> Aliases:
        """For each name of a copy that is one of the model's, which; empty where it is no copy."""
        shapes = {} if len(copy.entries) < self.alone else shapes_of(copy.entries)
        if len(shapes) < self.alone:
            return {}
        for style in STYLES if len(shapes) >= self.least else ():
            if found := _under_prefixes(self, shapes, style):
                return found
        less = self._replace(least=self.alone)
        for style in STYLES:
            if _is_all_of(found := _under_prefixes(less, shapes, style), shapes):
                return found
        return {}

    def has_all_of(self, copy: StateDict) -> bool:
        """Whether another state_dict has no names and shapes but the model's."""
        return _is_all_of(self.aliases(copy), shapes_of(copy.entries))

    def holds(self, part: StateDict) -> bool:
        """Whether a state_dict has nothing but some of the model's tensors, however few."""
        shapes = shapes_of(part.entries)
        return bool(shapes) and len(shapes) < self.alone and shapes.items() <= self.shapes.items()


def _is_all_of(found: Aliases, shapes: Mapping[str, Shape]) -> bool:
    """Whether nothing else is there but what counts updates."""
    return bool(found) and not any(shape for name, shape in shapes.items() if name not in found)


def _under_prefixes(known: Known, copy: Mapping[str, Shape], style: str) -> Aliases:
    model = known.shapes
    write = STYLES[style]
    bare: dict[str, str] = {}
    for name in model:
        bare.setdefault(write(unwrapped(name)), name)
        bare.setdefault(write(name), name)
    groups: dict[str, Aliases] = {}
    for name, shape in copy.items():
        start = 0
        while True:
            rest = name[start:]
            own = bare.get(rest)
            if own is None and not style:
                own = bare.get(unwrapped(rest))
            if own is not None and model[own] == shape:
                part, before = _parted(own, rest, name[:start], style)
                groups.setdefault(name[:start], {})[name] = Alias(own, before, part, style)
            following = name.find(".", start) + 1
            if not following and style and start == 0:
                following = name.find("_") + 1  # ``ema_…``: what flattens has no other border
            if not following or following <= start:
                break
            start = following
    out: Aliases = {}
    for group in groups.values():
        if len({alias.name for alias in group.values()}) >= known.least:
            out.update(group)
    return out


def _parted(own: str, rest: str, before: str, style: str) -> tuple[str, str]:
    """What of the model's name the copy leaves out, and what it has in its place."""
    if style or rest == own:
        return ("" if STYLES[style](own) == rest else own[: own.find(unwrapped(own))]), before
    if own.endswith(rest):  # the model is wrapped, the copy is not
        return own[: -len(rest)], before
    if rest.endswith(own):
        return "", before + rest[: -len(own)]
    shared = unwrapped(own)
    return own.removesuffix(shared), before + rest.removesuffix(shared)


def inside(model: StateDict) -> Aliases:
    """The copies in a state_dict of what else is in it, by names that say so."""
    return _called(model, _EMA_WORDS)


def beside(model: StateDict) -> Aliases:
    """The parts of a state_dict with the tensors of another one that go their own way: who keeps
    one may well want to be rid of the other."""
    return _called(model, _OWN_WAY_WORDS)


def _called(model: StateDict, said: frozenset[str]) -> Aliases:
    shapes = shapes_of(model.entries)
    parts: dict[str, dict[str, Shape]] = {}
    for name, shape in shapes.items():
        first = name.split(".")
        at = next((i for i, one in enumerate(first[:-1]) if _says(one, said)), None)
        if at is not None:
            parts.setdefault(".".join(first[: at + 1]) + ".", {})[name] = shape
        elif "ema" in said and len(first) == 1 and name.startswith("ema_"):
            parts.setdefault("ema_", {})[name] = shape
    if not parts:
        return {}
    tensors = model.tensors()
    copied = {name for copy in parts.values() for name in copy}
    rest = {name: shape for name, shape in shapes.items() if name not in copied}
    found: Aliases = {}
    for start, copy in parts.items():
        below = {name.removeprefix(start): shape for name, shape in copy.items()}
        best: Aliases = {}
        for prefix in _subtrees(rest, len(copy)):
            own = {name: shape for name, shape in rest.items() if name.startswith(prefix)}
            told = trainable({name: tensors[name] for name in own if name in tensors})
            style, pairs = _matched(_below(own, prefix), _below(told, prefix), below)
            if len(pairs) > len(best):
                best = {
                    start + name: Alias(prefix + one, start, prefix, style) for name, one in pairs
                }
        found.update(best)
    return found


def _below(names: Mapping[str, Shape], prefix: str) -> dict[str, Shape]:
    return {name[len(prefix) :]: shape for name, shape in names.items()}


def _matched(
    model: Mapping[str, Shape], wanted: Mapping[str, Shape], copy: Mapping[str, Shape]
) -> tuple[str, list[tuple[str, str]]]:
    """The style in which a copy has what is wanted of a model, and its names with the model's;
    none where it is no copy of it."""
    for style, write in STYLES.items():
        written = {write(name): name for name in model}
        pairs = [
            (name, written[name])
            for name, shape in copy.items()
            if name in written and model[written[name]] == shape
        ]
        told = len({one for _, one in pairs} & wanted.keys())
        others = copy.keys() - {name for name, _ in pairs}
        least = _LEAST if any(copy[name] for name in others) else _LEAST_ALONE  # as _is_all_of
        if wanted and told >= least * len(wanted):
            return style, pairs
    return "", []


def _subtrees(names: Mapping[str, Shape], size: int) -> list[str]:
    """Prefixes of names, from the root down: those of parts about as large as their copy, which
    may lack what does not train."""
    count: Counter[str] = Counter({"": len(names)})
    for name in names:
        parts = name.split(".")[:-1]
        for end in range(1, min(len(parts), _DEEPEST) + 1):
            count[".".join(parts[:end]) + "."] += 1
    likely = [prefix for prefix, n in count.items() if size // 2 <= n <= 3 * size]
    return sorted(likely, key=lambda prefix: prefix.count("."))[:_MOST_TRIED]


def _says(segment: str, said: frozenset[str]) -> bool:
    return not said.isdisjoint(words((segment,)))


def is_nameless_copy(node: Any, wanted: list[Shape]) -> bool:
    """Whether a list holds a tensor of each parameter, in their order; of a buffer that is called
    like a parameter perhaps none."""
    if not max(2, _LEAST_ALONE * len(wanted)) <= len(node) <= len(wanted):
        return False
    shapes = [one.shape for one in node if isinstance(one, TensorRef)]
    return len(shapes) == len(node) and embeddings([shapes], wanted)[1] > 0
