"""Which tensor of a file is which of a live model: by names, whatever was wrapped around either."""

from __future__ import annotations

import re
from collections.abc import Collection, Set
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase

from ...core.matching import matcher
from ...core.matching.matcher import match_names, without
from ...core.names import AVERAGED, unwrapped
from ...core.nodes import mapping
from ...core.sections import StateDict
from ...core.tensors import TensorRef
from ...core.text import some
from ...errors import AmbiguousError, UnsupportedError
from ..model_names import Slot, is_lazy, places
from .module_hooks import Value, ask_modules

# A module's name with a dot in it, as torch allowed before 0.4: "norm.1" is "norm1" now.
_DOTTED = re.compile(r"(?<=[^\W\d])\.(?=\d+\.)")


@dataclass(frozen=True)
class Matched:
    """What a file has for a model.

    Attributes:
        values: what the model's tensors get, by their names (without wrappers).
        extras: what ``set_extra_state`` of the model's modules gets, as nodes of the file, by
            the model's names.
        unexpected: the file's names that mean nothing in the model.
        old_norms: the norms' counters that the file's version did not have yet.
    """

    values: dict[str, Value]
    extras: dict[str, Any]
    unexpected: list[str]
    old_norms: set[str]


def match(
    model: nn.Module,
    section: StateDict,
    own: Set[str],
    states: Set[str],
    prefix: str = "",
    *,
    alone: bool = False,
    added: str = "",
) -> Matched:
    """Match a file's state_dict with a model's names; nothing is changed.

    Args:
        own: the names of the model's tensors, and ``states`` those of its extra states, both
            without wrappers.
        prefix: what is taken off those of the file's names that begin with it; with ``alone``
            no others count.
        added: what comes before all of them, where the file has a part of the model.

    Raises:
        CollisionError: two of the file's names mean the same tensor.
        RefusedError: a module's own code raises over the file.
        UnsupportedError: one that the model has is sparse, quantized or wrapped in the file.
    """
    plain = _plain(section, prefix, alone)
    if added:
        plain = {name: added + unwrapped(bare) for name, bare in plain.items()}
    found = match_names(plain.values(), {*own, *states})
    meant = {name: found.get(bare) or unwrapped(bare) for name, bare in plain.items()}
    only_plain(section, [name for name, key in meant.items() if key in own])
    refs = section.tensors()
    called: dict[str, str] = {}  # what stands for which of the file's names
    extras = {}
    for name, key in meant.items():
        if key in states:
            extras[key] = section.entries[name]
        elif name in refs:
            called.setdefault(key, name)
    recorded = _recorded(section, prefix, alone, added)
    values = ask_modules(model, {key: refs[name] for key, name in called.items()}, recorded)
    for key in [key for key in values if key not in own]:
        joined = [name for name in _joined(key) if name in own and name not in values]
        if len(joined) == 1:
            values[joined[0]] = values.pop(key)
    taken = {name for key, name in called.items() if key not in values or key in own}
    taken.update(name for name, key in meant.items() if key in states)
    if all(name == AVERAGED or name.startswith("module.") for name in _names(section)):
        taken.add(AVERAGED)  # no part of the model that was averaged
    return Matched(
        {key: value for key, value in values.items() if key in own},
        extras,
        [name for name in (plain if alone else _names(section)) if name not in taken],
        _old_norms(model, recorded),
    )


def _names(section: StateDict) -> list[str]:
    return [name for name in section.entries if isinstance(name, str)]


def _plain(section: StateDict, prefix: str, alone: bool) -> dict[str, str]:
    """For the file's names that count those without the prefix; where two would be the same,
    the one that had it counts."""
    found = {name: without(name, prefix, alone) for name in _names(section)}
    taken = {bare for name, bare in found.items() if bare != name}
    return {
        name: bare
        for name, bare in found.items()
        if bare is not None and not (bare == name and unwrapped(bare) in taken)
    }


def _joined(name: str) -> list[str]:
    """The names that come of ``norm.1.weight`` by joining: ``norm1.weight``."""
    return [name[: dot.start()] + name[dot.end() :] for dot in _DOTTED.finditer(name)]


def only_plain(section: StateDict, names: Collection[str]) -> None:
    """Raises UnsupportedError where one of these is a sparse, quantized or wrapped tensor."""
    odd = {name: node.layout for name, node in section.composites().items() if name in {*names}}
    for name, layout in odd.items():
        raise UnsupportedError(
            f"'{name}' is a {layout} tensor ({len(odd)} such): only strided ones are loaded",
            hint="save it dense, or drop it from the file with modelctl",
        )


def fits(value: TensorRef | Tensor, tensor: Tensor) -> bool:
    """Whether a value can be copied into a tensor of the model."""
    return matcher.fits(tuple(value.shape), _shape(tensor))


def _shape(tensor: Tensor) -> matcher.Shape | None:
    return None if is_lazy(tensor) else tuple(tensor.shape)


# ------------------------------------------------------------------ the prefix


def given_prefix(section: StateDict, prefix: str) -> str:
    """A prefix as the caller wrote it, with its dot and without wrappers.

    Raises:
        NoMatchError: none of the file's names begins with it.
    """
    return matcher.given_prefix(_names(section), prefix)


def find_prefix(section: StateDict, slots: list[Slot]) -> str:
    """What has to be taken off the file's names so that they are the model's: mostly nothing.

    Raises:
        AmbiguousError: the model fits without either of several.
    """
    return find_either(section, slots)[0]


def find_either(section: StateDict, slots: list[Slot]) -> tuple[str, str]:
    """What has to be taken off the file's names so that they are the model's, and what has to be
    put before them, where the file has a part of the model: mostly nothing, and never both.

    Raises:
        AmbiguousError: the model fits without either of several.
    """
    found = prefixes(section, slots)
    if found.rivals and not found.of_model:
        shown = some([f"'{prefix}'" for prefix in found.rivals], 4)
        raise AmbiguousError(
            f"{found.tensors} tensors fit the model without the prefix {shown}: which one is "
            "meant?",
            hint=f"load_into(model, path, prefix='{found.rivals[0]}')",
        )
    return found.found, found.expected


def prefixes(section: StateDict, slots: list[Slot]) -> matcher.Prefixes:
    """What the names of the file, or those of the model, have before them."""
    shapes = {name: ref.shape for name, ref in section.tensors().items()}
    return matcher.find_prefixes(shapes, {s.name: _shape(s.tensor) for s in slots if s.persistent})


# ------------------------------------------------------------------ versions


def _recorded(section: StateDict, prefix: str, alone: bool, added: str) -> dict[str, Any]:
    """What the file recorded of modules, by their names as the model has them."""
    found = {}
    for name, entry in section.metadata.items():
        inside = f"{name}.x" if name else "x"
        bare = without(inside, prefix, alone) if isinstance(name, str) else None
        meant = None if bare is None else (added + unwrapped(bare))[:-2]
        if meant is not None and (bare != inside or meant not in found):
            found[meant] = entry
    return found


def _old_norms(model: nn.Module, recorded: dict[str, Any]) -> set[str]:
    """``num_batches_tracked`` of the norms that the file has in a version from before it."""
    return {
        f"{place.name}.{matcher.COUNTER}" if place.name else matcher.COUNTER
        for place in places(model)
        if isinstance(place.module, _NormBase)
        and place.module.track_running_stats
        and not matcher.counts((mapping(recorded.get(place.name)) or {}).get("version"))
    }
