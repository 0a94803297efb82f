"""Write the index of architectures from torchvision's own models: python docs/make_architectures.py

Each model is built with two numbers of classes, and with and without its auxiliary heads: what
differs between the state_dicts says which dimensions follow the number of classes, and which
modules are optional. Nothing is listed by hand. inspection/architectures.py reads the index.
"""

from __future__ import annotations

import gzip
import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torchvision
from make_heads import kind, state_dict
from torchvision.models import list_models

INDEX = Path(__file__).parents[1] / "src/modelctl/inspection/architectures/index.json.gz"
AUXILIARY = ("aux_logits", "aux_loss")
# A number that no model has by default, to solve for what is made of it.
FEW = 7

Shapes = dict[str, list[int]]


def shapes(name: str, classes: int | None = None, **options: bool) -> Shapes:
    """The shapes of a model's state_dict, in its order."""
    found = state_dict(name, classes, **options)
    return {key: list(tensor.shape) for key, tensor in found.items()}


def solve(default: int, few: int) -> int:
    """A dimension as it is, or -a where it is a times the number of classes."""
    if default == few:
        return default
    a, rest = divmod(few, FEW)
    assert rest == 0
    return -a


def described(name: str) -> tuple[Shapes, dict[str, Any]]:
    """The shapes of a model with all its heads, and what else the index says of it: how many
    classes it has by default, which option adds its auxiliary heads, what they are called, and
    whether it has them by default."""
    full = default = shapes(name)
    facts: dict[str, Any] = {}
    options: dict[str, bool] = {}
    for option in AUXILIARY if kind(name) != "detection" else ():  # they take any option
        try:
            full, bare = shapes(name, **{option: True}), shapes(name, **{option: False})
        except (TypeError, NotImplementedError):  # no such option
            continue
        modules = dict.fromkeys(key.partition(".")[0] for key in full if key not in bare)
        if not modules:  # it takes any option
            continue
        assert all((key.partition(".")[0] in modules) == (key not in bare) for key in full)
        assert default in (full, bare)
        facts["aux"] = {"option": option, "modules": [*modules], "default": default == full}
        options = {option: True}
    try:
        few = shapes(name, FEW, **options)
    except TypeError:  # it knows no classes
        return full, facts
    assert list(full) == list(few)
    solved = {key: [*map(solve, full[key], few[key])] for key in full}
    for key, shape in full.items():
        for n, dim in zip(shape, solved[key], strict=True):
            if dim < 0:
                facts.setdefault("classes", n // -dim)
            assert n == (dim if dim >= 0 else -dim * facts["classes"])
    return solved, facts


class Index:
    """Modules that are alike are kept once, however many models have them, so that a model is
    the number of its root; models with the very same tensors have the same root."""

    def __init__(self) -> None:
        self.modules: list[dict[str, Any]] = []
        self.numbers: dict[str, int] = {}
        self.architectures: dict[str, dict[str, Any]] = {}

    def add(self, name: str) -> None:
        """Build a model and keep what it is made of."""
        found, facts = described(name)
        tree: dict[str, Any] = {}
        for key, shape in found.items():
            *modules, last = key.split(".")
            inner = tree
            for module in modules:
                inner = inner.setdefault(module, {})
            inner[last] = shape
        root = self._number(tree)
        assert list(self._names(root)) == list(found), f"{name}: not in the order of its modules"
        counted = [key for key in found if not key.endswith("num_batches_tracked")]
        optional = (*facts.get("aux", {}).get("modules", ()), None)
        least = [
            key
            for key in counted
            if min(found[key], default=0) >= 0 and key.partition(".")[0] not in optional
        ]
        sizes = {"most": len(counted), "least": len(least)}
        self.architectures[name] = {"root": root, **sizes, **facts}

    def _number(self, tree: dict[str, Any]) -> int:
        module = {k: self._number(v) if isinstance(v, dict) else v for k, v in tree.items()}
        number = self.numbers.setdefault(json.dumps(module), len(self.modules))
        if number == len(self.modules):
            self.modules.append(module)
        return number

    def _names(self, number: int, prefix: str = "") -> Iterable[str]:
        for key, value in self.modules[number].items():
            if isinstance(value, int):
                yield from self._names(value, f"{prefix}{key}.")
            else:
                yield prefix + key


def make(names: Iterable[str] | None = None) -> dict[str, Any]:
    """The index of all models, or of ``names``."""
    index = Index()
    for name in list_models() if names is None else names:
        index.add(name)
    return {
        "torchvision": torchvision.__version__.partition("+")[0],
        "architectures": index.architectures,
        "modules": index.modules,
    }


if __name__ == "__main__":
    text = json.dumps(make(), separators=(",", ":"))
    # no time in it: the same models make the same file
    INDEX.write_bytes(gzip.compress(text.encode(), 9, mtime=0))
    print(f"{INDEX}: {INDEX.stat().st_size:,} bytes")
