"""What ``load_state_dict`` would say, and the maps that mend it: the data behind ``match``."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from ...core.checkpoint import Checkpoint
from ...core.matching.matcher import COUNTER, Shape, Shapes, fits
from ...core.nodes import Composite, mapping
from ...core.tensors import TensorRef
from ...errors import UsageError
from ..architectures.identify import compared
from ..architectures.index import Architecture, find_architecture, shapes
from .load_hooks import Metadata, as_loaded, older_names, taken_as
from .make_maps import make_maps
from .pairing import pair
from .report import Fit, Map, Match, Mismatch


def match(
    ckpt: Checkpoint,
    like: Checkpoint | None = None,
    arch: str | None = None,
    arch_arg: Sequence[str] = (),
) -> Match:
    """Compare a checkpoint with a model that it is to be loaded into: a checkpoint of it, or a
    known architecture (``torchvision:resnet50``).

    ``arch_arg`` are options of the architecture: ``num_classes=10``, ``aux_logits=false``.
    Nothing but names and shapes is compared, and nothing is run: of what modules' own code makes
    of files of older versions torch's own is known here (BatchNorm's counters, ``weight_norm``).

    Raises:
        UsageError: not exactly one of ``like`` and ``arch``, or no such architecture or option.
        NoMatchError, AmbiguousError: no state_dict, or several.
    """
    found = _found(ckpt, like, arch, arch_arg)
    origins = [one.origin if one is not None else None for one in (ckpt, like)]
    source, target = (origin.path if origin else None for origin in origins)
    return found._replace(source=source, target=arch if like is None else target)


def _found(
    ckpt: Checkpoint, like: Checkpoint | None, arch: str | None, arch_arg: Sequence[str]
) -> Match:
    if (like is None) == (arch is None):
        raise UsageError(
            "what is it to be loaded into?" if like is None else "like and arch: one of them",
            hint="--like OTHER, or --arch torchvision:resnet50",
        )
    model = ckpt.sections.model()
    found = _names(model.entries)
    metadata = {name: mapping(value) or {} for name, value in model.metadata.items()}
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
        return match_shapes(found, expected, metadata)
    known = find_architecture(str(arch))
    classes, aux = _options(known, arch_arg)
    result, renamed = _match(found, shapes(known, classes, aux), metadata)
    if result.after.fits:
        return result
    # what the tensors ask for where nothing else is asked for
    plain = {name: shape for name, shape in renamed.items() if shape is not None}
    given = {text.partition("=")[0] for text in arch_arg}
    helpful = [arg for arg in compared(plain, known).args if arg.partition("=")[0] not in given]
    better = shapes(known, *_options(known, [*arch_arg, *helpful]))
    if _fit(renamed, better, metadata).problems < result.after.problems:
        return result._replace(options=helpful)
    return result


def match_shapes(found: Shapes, expected: Shapes, metadata: Metadata | None = None) -> Match:
    """As :func:`match`, for names and shapes; ``metadata`` is what the state_dict records of its
    modules."""
    return _match(found, expected, metadata or {})[0]


def _match(found: Shapes, expected: Shapes, metadata: Metadata) -> tuple[Match, Shapes]:
    """The match, and the shapes by the names that the maps give."""
    before = _fit(found, expected, metadata)
    if before.fits:
        return Match(before, [], before, [], 0, []), found
    older, older_there, taken = older_names(found), older_names(expected), taken_as(expected)
    there = {old: new for new, old in older_there.items()}
    pairing = pair(_called(found, older), _called(expected, older_there))
    left, added = pairing.prefixes
    goal, why = {}, {}
    for name in found:
        bare = older.get(name, name)
        if bare.startswith(left) and (bare := bare.removeprefix(left)) in pairing.pairs:
            new = added + pairing.pairs[bare]
            wanted = there.get(new, new)
            # torch takes the older one as it is
            goal[name] = new if name not in older and taken.get(wanted) == new else wanted
            why[name] = pairing.why[bare]
    goal.update(_with_their_modules(found, goal, expected))
    right = {
        name
        for name, shape in as_loaded(found, expected, metadata).names.items()
        if name in expected and fits(shape, expected[name])
    }
    right.update(old for new, old in taken.items() if new in right and old in found)
    made = make_maps(list(found), pairing.prefixes, goal, right, {*expected, *taken.values()})
    renamed = {made.now[name]: shape for name, shape in found.items()}
    modules = {_module(name): _module(new) for name, new in made.now.items()}
    after = _fit(renamed, expected, {modules.get(m, m): v for m, v in metadata.items()})
    if after.problems >= before.problems:
        return Match(before, [], before, pairing.unclear, made.more, []), found
    maps = []
    for text, names in made.maps:
        maps.append(Map(text, len(names), (*dict.fromkeys(why[n] for n in names if n in why),)))
    if made.prefix_first:
        maps[0] = maps[0]._replace(why=("prefix",))
    return Match(before, maps, after, pairing.unclear, made.more, []), renamed


def _names(entries: Mapping[str, Any]) -> dict[str, Shape | None]:
    return {
        name: value.shape if isinstance(value, TensorRef | Composite) else None
        for name, value in entries.items()
    }


def _with_their_modules(
    found: Shapes, goal: Mapping[str, str], expected: Shapes
) -> Iterator[tuple[str, str]]:
    """What says nothing by itself goes where all else in its module goes."""
    modules: dict[str, set[str]] = {}
    for name, new in goal.items():
        modules.setdefault(_module(name), set()).add(_module(new))
    for name in found:
        last = name.rpartition(".")[2]
        there = modules.get(_module(name), set())
        if name not in goal and last in (COUNTER, "_extra_state") and len(there) == 1:
            new = ".".join([*filter(None, there), last])
            if new in expected:
                yield name, new


def _called(names: Shapes, otherwise: Mapping[str, str]) -> Shapes:
    return {otherwise.get(name, name): shape for name, shape in names.items()}


def _module(name: str) -> str:
    return name.rpartition(".")[0]


def _fit(found: Shapes, expected: Shapes, metadata: Metadata) -> Fit:
    given, made = as_loaded(found, expected, metadata)
    missing = {
        name: shape for name, shape in expected.items() if name not in given and name not in made
    }
    unexpected = {name: shape for name, shape in given.items() if name not in expected}
    mismatched = [
        Mismatch(name, given[name], shape)
        for name, shape in expected.items()
        if name in given and not fits(given[name], shape)
    ]
    matched = len(given) - len(unexpected) - len(mismatched)
    return Fit(matched, missing, unexpected, mismatched, given.keys(), expected.keys())


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
