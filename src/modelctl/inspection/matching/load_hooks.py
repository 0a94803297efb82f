"""What torch's own modules make of older names when ``load_state_dict`` asks them.

``torch.nn.utils.parametrizations.weight_norm`` takes the names of the ``weight_norm`` before it,
BatchNorm makes the counter that files before torch 0.4.1 lack, and the old ``spectral_norm`` the
vector that those before torch 1.0 lack. No other way is known to torch: from new names to old ones,
or between both kinds of ``spectral_norm``, it takes a rename.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

from ...core.matching.matcher import COUNTER, Shape, Shapes, counts

# What modules recorded of themselves in a state_dict: by path, {"version": 2} and the like.
Metadata = Mapping[str, Mapping[Any, Any]]

# What a parametrization calls its tensors, below 'parametrizations.weight.', and what it was
# before there were any, after 'weight'.
_WEIGHT_NORM = {"original0": "_g", "original1": "_v"}
_SPECTRAL_NORM = {"original": "_orig", "0._u": "_u", "0._v": "_v"}

_ORIGINAL = re.compile(r"((?:.*\.)?)parametrizations\.([^.]+)\.(original0?)", re.DOTALL)


class Given(NamedTuple):
    """The names that a state_dict has when modules' hooks are through with it, and those that are
    made then, not read."""

    names: dict[str, Shape | None]
    made: set[str]


def as_loaded(found: Shapes, expected: Shapes, metadata: Metadata) -> Given:
    """What a model with the names ``expected`` reads of a state_dict."""
    names, made = dict(found), set()
    for new, old in _weight_norms(expected):
        if all(name in names for name in old):
            names.update(zip(new, [names.pop(name) for name in old], strict=True))
    for name in expected:
        module, _, last = name.rpartition(".")
        if last == COUNTER and not counts(metadata.get(module, {}).get("version")):
            made.add(name)
        elif last.endswith("_orig") and "spectral_norm" not in metadata.get(module, {}):
            weight = name.removesuffix("_orig")
            u, v = weight + "_u", weight + "_v"
            its = {u, v} <= expected.keys() and weight not in expected
            if its and {weight, name, u} <= names.keys():
                del names[weight]
                names.pop(v, None)
                made.add(v)
    return Given(names, made)


def taken_as(expected: Shapes) -> dict[str, str]:
    """For names of a model the older ones that torch takes for them."""
    return {
        name: before
        for new, old in _weight_norms(expected)
        for name, before in zip(new, old, strict=True)
    }


def older_names(names: Shapes) -> dict[str, str]:
    """What parametrized tensors were called before, where nothing else is called so: by these
    both kinds are one."""
    older: dict[str, str] = {}
    for new, old in (*_weight_norms(names), *_spectral_norms(names)):
        if not any(name in names for name in old):
            older.update(zip(new, old, strict=True))
    return older


def _weight_norms(names: Shapes) -> Iterator[tuple[list[str], list[str]]]:
    """The two tensors of each: as they are called, and as they were."""
    for new, old in _parametrized(names, "original0", _WEIGHT_NORM):
        norm, whole = names[new[0]], names[new[1]]
        if norm is not None and whole is not None and _is_norm(norm, whole):
            yield new, old


def _spectral_norms(names: Shapes) -> Iterator[tuple[list[str], list[str]]]:
    yield from _parametrized(names, "original", _SPECTRAL_NORM)


def _parametrized(
    names: Shapes, first: str, parts: Mapping[str, str]
) -> Iterator[tuple[list[str], list[str]]]:
    for name in names:
        found = _ORIGINAL.fullmatch(name) if name.endswith("." + first) else None
        if found is None or found[3] != first:
            continue
        module, tensor = found[1], found[2]
        new = [f"{module}parametrizations.{tensor}.{part}" for part in parts]
        if all(one in names for one in new):
            yield new, [f"{module}{tensor}{part}" for part in parts.values()]


def _is_norm(norm: Shape, whole: Shape) -> bool:
    """Whether a tensor may be the norm of another one: over all of it, or all but one dimension."""
    if not norm:
        return True
    longer = [a for a, b in zip(norm, whole, strict=False) if a != 1]
    return (
        len(norm) == len(whole)
        and len(longer) <= 1
        and all(a in (1, b) for a, b in zip(norm, whole, strict=True))
    )
