"""The order of a model's parameters where its file has lost it: safetensors sorts names.

In known code what stands below a module has an order. A model is laid out as an architecture if
each of its modules has the names below it that a module called so has there; the orders that all
such architectures give are the possible ones. ``docs/make_orders.py`` makes the table of
transformers, torchvision and timm; it is read when it is first needed.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import NamedTuple

from ...errors import AmbiguousError
from ..names import natural, unwrapped
from ..text import some

_TABLE = Path(__file__).with_name("module_orders.json.gz")

# No known architecture has modules in so many others.
_DEEPEST = 100

# What a module is called, and the names below it.
Below = tuple[str, frozenset[str]]
Tree = dict[str, "Tree | str"]


class Table(NamedTuple):
    """Of which versions it is made, and the orders of each architecture's modules."""

    made_of: dict[str, str]
    architectures: dict[str, dict[Below, list[list[str]]]]


@cache
def table() -> Table:
    """The table, read from the package."""
    import gzip
    import json

    data = json.loads(gzip.decompress(_TABLE.read_bytes()))
    orders = [((label, frozenset(order)), order) for label, *order in data["orders"]]
    architectures: dict[str, dict[Below, list[list[str]]]] = {}
    for name, numbers in data["architectures"].items():
        own = architectures.setdefault(name, {})
        for below, order in map(orders.__getitem__, numbers):
            own.setdefault(below, []).append(order)
    return Table(data["made_of"], architectures)


def possible_orders(names: Iterable[str]) -> list[list[str]]:
    """The orders that a model's parameters can have, by all architectures that have its modules.

    Raises:
        AmbiguousError: no known architecture has all of them, or one has them in several orders.
    """
    tree = tree_of(names)
    wanted = dict.fromkeys(
        (label, frozenset(below))
        for label, below in labelled(tree)
        if len(below) > 1 and not all(map(str.isdecimal, below))
    )
    alike = {
        name: own for name, own in table().architectures.items() if wanted.keys() <= own.keys()
    }
    if not alike:
        raise AmbiguousError(_unknown(wanted))
    for name, own in alike.items():
        for one in wanted:
            if len(own[one]) > 1:
                raise AmbiguousError(f"{name} has {_named(one)} in several orders")
    choices = {_choice(own, wanted): own for own in alike.values()}
    return [[*ordered(tree, {one: own[one][0] for one in wanted})] for own in choices.values()]


def _choice(own: Mapping[Below, list[list[str]]], wanted: Iterable[Below]) -> tuple[str, ...]:
    return tuple(".".join(own[one][0]) for one in wanted)


def tree_of(names: Iterable[str]) -> Tree:
    """The modules, with the whole name of each parameter at its place.

    Raises:
        AmbiguousError: two names are one, or one is a module, too.
    """
    root: Tree = {}
    for name in names:
        *modules, last = unwrapped(name).split(".")
        if len(modules) > _DEEPEST:
            raise AmbiguousError(f"a name of {len(modules):,} modules: no known architecture's")
        inner = root
        for module in modules:
            below = inner.setdefault(module, {})
            if isinstance(below, str):
                raise AmbiguousError(f"'{below}' is a parameter and a module")
            inner = below
        if last in inner:
            raise AmbiguousError(f"'{name}' is there twice")
        inner[last] = name
    return root


def labelled(tree: Tree) -> Iterator[tuple[str, Tree]]:
    """Each module, called as its place says, numbers aside; the first with several names below it
    has none, so that no prefix counts."""
    root = tree
    while len(root) == 1 and isinstance(below := next(iter(root.values())), dict):
        root = below
    return _labelled(root, "")


def _labelled(tree: Tree, label: str) -> Iterator[tuple[str, Tree]]:
    yield label, tree
    for name, below in tree.items():
        if isinstance(below, dict):
            yield from _labelled(below, label if name.isdecimal() else name)


def ordered(tree: Tree, orders: Mapping[Below, Sequence[str]]) -> Iterator[str]:
    """The names as ``named_parameters()`` has them: a module's own before those of the modules in
    it, numbers as numbers, the rest by ``orders``."""
    by_id = {id(below): label for label, below in labelled(tree)}
    return _ordered(tree, orders, by_id)


def _ordered(
    tree: Tree, orders: Mapping[Below, Sequence[str]], labels: Mapping[int, str]
) -> Iterator[str]:
    below = labels.get(id(tree), ""), frozenset(tree)
    order = orders.get(below) or sorted(tree, key=natural)
    for name in sorted(order, key=lambda one: not isinstance(tree[one], str)):
        inner = tree[name]
        if isinstance(inner, str):
            yield inner
        else:
            yield from _ordered(inner, orders, labels)


def _unknown(wanted: Iterable[Below]) -> str:
    """What of a model's modules no known architecture has."""
    known = {one for own in table().architectures.values() for one in own}
    strange = next((one for one in wanted if one not in known), None)
    if strange is None:
        return "no known architecture has all of its modules"
    where = f" in a '{strange[0]}'" if strange[0] else ""
    return f"no known architecture has {_named(strange)}{where}"


def _named(below: Below) -> str:
    return some(sorted(below[1]), 4)
