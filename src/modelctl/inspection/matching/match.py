"""What ``load_state_dict`` would say, and the maps that mend it: the data behind ``match``."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from ...core.checkpoint import Checkpoint
from ...core.matching.matcher import COUNTER, Shape, Shapes, counts, fits
from ...core.nodes import Composite, mapping
from ...core.tensors import TensorRef
from ...errors import UsageError
from ..architectures.identify import compared
from ..architectures.index import Architecture, find_architecture, shapes
from .make_maps import make_maps
from .pairing import Unclear, any_number, pair


class Mismatch(NamedTuple):
    """A tensor that both have, with other shapes (None: it is no tensor)."""

    name: str
    found: Shape | None
    expected: Shape | None


class Fit(NamedTuple):
    """What ``load_state_dict(strict=True)`` would say: how many tensors fit, and what doesn't;
    ``found`` and ``expected`` are all names."""

    matched: int
    missing: dict[str, Shape | None]
    unexpected: dict[str, Shape | None]
    mismatched: list[Mismatch]
    found: Collection[str]
    expected: Collection[str]

    @property
    def fits(self) -> bool:
        return not self.problems

    @property
    def problems(self) -> int:
        return len(self.missing) + len(self.unexpected) + len(self.mismatched)


class Map(NamedTuple):
    """A map for ``rename``, how many tensors it moves, and the evidence: ``prefix``, ``shape``,
    ``order``."""

    map: str
    tensors: int
    why: tuple[str, ...]


class Match(NamedTuple):
    """What fits as it is, the maps that mend what they can (in order), what fits ``after`` them,
    modules alike of which no evidence tells which is which (``unclear``), how many ``more`` maps
    it would take, which are too many or in each other's way, and options of the architecture with
    which more would fit."""

    before: Fit
    maps: list[Map]
    after: Fit
    unclear: list[Unclear]
    more: int
    options: list[str]


def match(
    ckpt: Checkpoint,
    like: Checkpoint | None = None,
    arch: str | None = None,
    arch_arg: Sequence[str] = (),
) -> Match:
    """Compare a checkpoint with a model that it is to be loaded into: a checkpoint of it, or a
    known architecture (``torchvision:resnet50``).

    ``arch_arg`` are options of the architecture: ``num_classes=10``, ``aux_logits=false``.
    Nothing but names and shapes is compared, and nothing is run: what modules' own code makes of
    files of older versions is not known here, but for BatchNorm's counters.

    Raises:
        UsageError: not exactly one of ``like`` and ``arch``, or no such architecture or option.
        NoMatchError, AmbiguousError: no state_dict, or several.
    """
    if (like is None) == (arch is None):
        raise UsageError(
            "what is it to be loaded into?" if like is None else "like and arch: one of them",
            hint="--like OTHER, or --arch torchvision:resnet50",
        )
    model = ckpt.sections.model()
    found = _names(model.entries)
    versions = {
        name: (mapping(value) or {}).get("version") for name, value in model.metadata.items()
    }
    if like is not None:
        if arch_arg:
            raise UsageError("arch_arg is for arch: a checkpoint is as it is")
        entries = _names(like.sections.model().entries)
        # what else stands in a flat state_dict is no part of the model
        expected = {
            name: shape
            for name, shape in entries.items()
            if shape is not None or name.endswith("_extra_state")
        }
        return match_shapes(found, expected, versions)
    known = find_architecture(str(arch))
    classes, aux = _options(known, arch_arg)
    result, renamed = _match(found, shapes(known, classes, aux), versions)
    if result.after.fits:
        return result
    # what the tensors ask for where nothing else is asked for
    plain = {name: shape for name, shape in renamed.items() if shape is not None}
    given = {text.partition("=")[0] for text in arch_arg}
    helpful = [arg for arg in compared(plain, known).args if arg.partition("=")[0] not in given]
    better = shapes(known, *_options(known, [*arch_arg, *helpful]))
    if _fit(renamed, better, versions).problems < result.after.problems:
        return result._replace(options=helpful)
    return result


def match_shapes(
    found: Shapes, expected: Shapes, versions: Mapping[str, Any] | None = None
) -> Match:
    """As :func:`match`, for names and shapes; ``versions`` are those that the state_dict records
    of its modules."""
    return _match(found, expected, versions or {})[0]


def _match(found: Shapes, expected: Shapes, versions: Mapping[str, Any]) -> tuple[Match, Shapes]:
    """The match, and the shapes by the names that the maps give."""
    before = _fit(found, expected, versions)
    if before.fits:
        return Match(before, [], before, [], 0, []), found
    pairing = pair(found, expected)
    right = {n for n, shape in found.items() if n in expected and fits(shape, expected[n])}
    made = make_maps(list(found), pairing.prefixes, pairing.pairs, right, expected)
    renamed = {made.now[name]: shape for name, shape in found.items()}
    modules = {_module(name): _module(new) for name, new in made.now.items()}
    after = _fit(renamed, expected, {modules.get(m, m): v for m, v in versions.items()})
    if after.problems >= before.problems:
        return Match(before, [], before, pairing.unclear, made.more, []), found
    maps = []
    for text, names in made.maps:
        keys = (name.removeprefix(pairing.prefixes[0]) for name in names)
        why = dict.fromkeys(pairing.why[key] for key in keys if key in pairing.why)
        maps.append(Map(text, len(names), tuple(why)))
    if made.prefix_first:
        maps[0] = maps[0]._replace(why=("prefix",))
    return Match(before, maps, after, pairing.unclear, made.more, []), renamed


def fold(names: Collection[str], among: Iterable[str]) -> list[tuple[str, int]]:
    """Names by module, as far up as all that is in a module is among them, and with ``*`` for
    numbers where several modules differ in nothing else; with how many names that are; in order.
    ``among`` are the names of all tensors that are there."""
    broken = {""}
    for name in among:
        if name not in names and name.rpartition(".")[2] != COUNTER:
            broken.update(_modules_of(name))
    folded: dict[str, int] = {}
    for name in names:
        top = next((module for module in _modules_of(name) if module not in broken), name)
        folded[top] = folded.get(top, 0) + 1
    alike: dict[str, list[str]] = {}
    for top in folded:
        alike.setdefault(any_number(top), []).append(top)
    return [
        (path if len(tops) > 1 else tops[0], sum(folded[top] for top in tops))
        for path, tops in alike.items()
    ]


def _modules_of(name: str) -> Iterator[str]:
    """The modules that a tensor is in, the outermost first."""
    at = name.find(".")
    while at >= 0:
        yield name[:at]
        at = name.find(".", at + 1)


def _names(entries: Mapping[str, Any]) -> dict[str, Shape | None]:
    return {
        name: value.shape if isinstance(value, TensorRef | Composite) else None
        for name, value in entries.items()
    }


def _module(name: str) -> str:
    return name.rpartition(".")[0]


def _fit(found: Shapes, expected: Shapes, versions: Mapping[str, Any]) -> Fit:
    missing = {
        name: shape
        for name, shape in expected.items()
        if name not in found and not _is_made(name, versions)
    }
    unexpected = {name: shape for name, shape in found.items() if name not in expected}
    mismatched = [
        Mismatch(name, found[name], shape)
        for name, shape in expected.items()
        if name in found and not fits(found[name], shape)
    ]
    matched = len(found) - len(unexpected) - len(mismatched)
    return Fit(matched, missing, unexpected, mismatched, found.keys(), expected.keys())


def _is_made(name: str, versions: Mapping[str, Any]) -> bool:
    """Whether torch makes a tensor that a state_dict of that version can't have."""
    module, _, last = name.rpartition(".")
    return last == COUNTER and not counts(versions.get(module))


# ---------------------------------------------------------------------- options of architectures


def _options(known: Architecture, given: Sequence[str]) -> tuple[int | None, bool | None]:
    classes: int | None = None
    aux: bool | None = None
    may = [*(["num_classes"] if known.classes else []), *([known.aux.option] if known.aux else [])]
    for text in given:
        name, _, value = text.partition("=")
        if name not in may:
            raise UsageError(
                f"{known.names[0]} has no option '{name}' that changes its tensors"
                if name
                else f"'{text}' is no option: NAME=VALUE is",
                hint=f"there is {', '.join(may)}" if may else None,
            )
        if name == "num_classes":
            if not value.isdecimal() or not 0 < int(value) < 1 << 31:
                raise UsageError(f"num_classes is a number from 1, not '{value}'")
            classes = int(value)
        elif value.lower() in ("true", "false"):
            aux = value.lower() == "true"
        else:
            raise UsageError(f"{name} is true or false, not '{value}'")
    return classes, aux
