"""What ``load_state_dict`` would say, and the maps that mend it: the data behind ``match``."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from ...core.checkpoint import Checkpoint
from ...core.matching.matcher import COUNTER, Shape, Shapes, counts, fits
from ...core.nodes import Composite, mapping
from ...core.tensors import TensorRef
from ...errors import UsageError
from ..architectures.identify import compared
from ..architectures.index import Architecture, find_architecture, shapes
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
    Nothing but names and shapes is compared, and nothing is run: what modules' own code makes of
    files of older versions is not known here, but for BatchNorm's counters.

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
