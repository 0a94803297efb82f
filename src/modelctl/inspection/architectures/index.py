"""The architectures that are known by name: torchvision's, from the index in the package.

``docs/make_architectures.py`` makes it of torchvision itself; it is read when it is first needed. A
module is a mapping of names, in the order of the state_dict, to shapes or to the numbers of the
modules inside it; a negative dimension -a is a times the number of classes.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

from ...core.names import nearest
from ...errors import UsageError

Shape = tuple[int, ...]
Module = dict[str, "int | list[int]"]

FROM = "torchvision:"
_INDEX = Path(__file__).with_name("index.json.gz")


class Auxiliary(NamedTuple):
    """Heads that only training needs: the option that adds them, the modules that they are, and
    whether they are there by default."""

    option: str
    modules: tuple[str, ...]
    default: bool


class Architecture(NamedTuple):
    """An architecture: ``names`` of all models with these very tensors (``torchvision:resnet50``),
    the plainest first; the number of its root; how many tensors it has at most and, without any
    head, at least (``num_batches_tracked`` aside); its number of ``classes`` by default, where it
    has classes; its auxiliary heads, where it has some."""

    names: tuple[str, ...]
    root: int
    most: int
    least: int
    classes: int | None
    aux: Auxiliary | None


class Index(NamedTuple):
    """All architectures, and the modules that they are made of, each once."""

    version: str
    modules: list[Module]
    architectures: list[Architecture]


@cache
def index() -> Index:
    """The index, read from the package."""
    import gzip
    import json

    data = json.loads(gzip.decompress(_INDEX.read_bytes()))
    same: dict[int, list[str]] = {}
    for name, facts in data["architectures"].items():
        same.setdefault(facts["root"], []).append(name)
    found = []
    for root, names in same.items():
        names.sort(key=lambda name: (len(name), name))  # resnet50 before quantized_resnet50
        facts = data["architectures"][names[0]]
        counts = facts["most"], facts["least"], facts.get("classes")
        found.append(Architecture(tuple(FROM + one for one in names), root, *counts, _aux(facts)))
    return Index(data["torchvision"], data["modules"], found)


def example_input(found: Architecture) -> Shape | None:
    """The shape of an image or a clip that the architecture takes, with a batch of one; None
    where it takes something else (detection, optical flow)."""
    name = found.names[0].removeprefix(FROM)
    if name.startswith(("raft", "ssd", "fcos", "retinanet")) or "rcnn" in name:
        return None
    first = next((len(shape) for _, shape in tensors(found.root) if len(shape) > 3), 0)
    return {4: (1, 3, 224, 224), 5: (1, 3, 16, 224, 224)}.get(first)


def _aux(facts: Mapping[str, Any]) -> Auxiliary | None:
    aux = facts.get("aux")
    return Auxiliary(aux["option"], tuple(aux["modules"]), aux["default"]) if aux else None


def find_architecture(name: str) -> Architecture:
    """The architecture of that name (``torchvision:resnet50``).

    Raises:
        UsageError: there is none.
    """
    known = {name: found for found in index().architectures for name in found.names}
    if name not in known:
        near = [one for one in nearest(name.removeprefix(FROM), _bare(known)) if one]
        raise UsageError(
            f"there is no architecture '{name}'",
            hint="nearest: " + ", ".join(FROM + one for one in near)
            if near
            else f"known are those of torchvision {index().version}: torchvision:resnet50",
        )
    return known[name]


def _bare(names: Mapping[str, Any]) -> list[str]:
    return [name.removeprefix(FROM) for name in names]


def tensors(number: int, prefix: str = "") -> Iterator[tuple[str, list[int]]]:
    """(name, shape) of all tensors of a module, in the order of its state_dict; dimensions that
    follow the number of classes are negative."""
    for name, value in index().modules[number].items():
        if isinstance(value, int):
            yield from tensors(value, f"{prefix}{name}.")
        else:
            yield prefix + name, value


def shapes(
    found: Architecture, classes: int | None = None, aux: bool | None = None
) -> dict[str, Shape]:
    """The state_dict of an architecture, as names and shapes: as it is built by default, or with
    that many classes, with or without its auxiliary heads."""
    n = found.classes if classes is None else classes
    left_out: tuple[str, ...] = ()
    if found.aux is not None and not (found.aux.default if aux is None else aux):
        left_out = found.aux.modules
    return {
        name: tuple(dim if dim >= 0 else -dim * (n or 0) for dim in shape)
        for name, shape in tensors(found.root)
        if name.partition(".")[0] not in left_out
    }
