"""Where a training stands in its data: the position of loaders and samplers, and generators."""

from __future__ import annotations

import gc
import warnings
from collections.abc import Mapping
from contextlib import nullcontext
from typing import Any, cast

import torch
from torch import nn
from torch.utils.data import (
    DataLoader,
    RandomSampler,
    SubsetRandomSampler,
    WeightedRandomSampler,
)
from torch.utils.data.dataloader import _BaseDataLoaderIter

from ...core.nodes import mapping
from ...errors import ModelctlError, RefusedError, UsageError
from ..loading.values import live
from ..optim.several import Label, Several, called, labelled, packed, paired
from .part import Part, Saved
from .rng import gathered, of_rank, random_numbers_kept, rng_state
from .storable import storable

# Each draws its order when an epoch begins, and can't draw it again: torchdata's own can.
_DRAWN = (RandomSampler, SubsetRandomSampler, WeightedRandomSampler)
Generators = Mapping[str, torch.Generator]
_WAY_OUT = (
    "torchdata's StatefulDataLoader keeps its place; or skip them yourself, where the order "
    "follows from the epoch alone (set_epoch, manual_seed(epoch)): "
    "itertools.islice(loader, n, None)"
)


_WITH_STATE = "shuffle=True of torchdata's StatefulDataLoader keeps it"


class LoaderPart(Part):
    """The loaders and the generators. Run right before the global generators are restored: a
    loader's iterator draws from them when it is made."""

    name = "loader"

    def __init__(
        self, saved: Saved, loader: Several[Any], generators: Generators | None, rng: bool
    ) -> None:
        super().__init__(saved)
        self.live, self.generators, self.rng = labelled(loader), _by_name(generators), rng
        _check_given(self.live, self.generators)
        self.pairs: dict[Label, tuple[Any, Any]] = {}
        self.states: dict[str, Any] = {}

    def fit(self) -> None:
        found = self.saved.sections.loader
        if not self._wanted(self.live or self.generators, found) or found is None:
            return
        content = live(found[1], "loader")
        state = of_rank(content, "loaders and generators") if is_kept(content) else content
        if state is None:
            self.missing.append(self.name)
            return
        if not is_kept(state):  # another script's: a loader's own state
            state = {"loaders": {"state": state}}
        if self.live:
            self._fit_loaders(state.get("loaders"))
        self.states = state.get("generators") or {}
        lacking = [name for name in self.generators if name not in self.states]
        self.missing += [f"generator '{name}'" for name in lacking]
        self.unused += [
            f"generator '{name}'" for name in self.states if name not in self.generators
        ]
        for name in self.generators.keys() & self.states.keys():
            _check_generator(self.generators[name], self.states[name], f"generator '{name}'")

    def _fit_loaders(self, saved: Any) -> None:
        if saved is None:
            self.missing.append(self.name)
            return
        states: dict[Label, Any] = {None: saved} if _is_one(saved) else labelled(saved)
        self.pairs = paired(self.name, self.live, states)
        for label, (one, state) in self.pairs.items():
            what = called(self.name, label)
            if not _is_one(state):
                raise _odd(what, "a dict with 'state' is expected")
            workers, here = state.get("workers"), getattr(one, "num_workers", None)
            has_state = hasattr(one, "load_state_dict") and state["state"] is not None
            if has_state and None not in (workers, here) and workers != here:
                raise RefusedError(
                    f"{what} was saved with num_workers={workers}, and has {here}: its place can't "
                    "be found again",
                    hint=f"build it with num_workers={workers} until the epoch is done",
                )
            for name, generator in own_generators(one).items():
                if name in state.get("generators", {}):
                    _check_generator(generator, state["generators"][name], what)

    def run(self) -> None:
        if not (self.pairs or self.states):
            return
        with nullcontext() if self.rng else random_numbers_kept():
            for label, (one, saved) in self.pairs.items():
                self._restore(one, saved, called(self.name, label))
        for one, saved in self.pairs.values():  # after all: to make an iterator draws from them
            for name, generator in own_generators(one).items():
                if name in saved.get("generators", {}):
                    generator.set_state(saved["generators"][name])
        for name in self.generators.keys() & self.states.keys():
            self.generators[name].set_state(self.states[name])
        self.restored = True

    def _restore(self, one: Any, saved: Any, what: str) -> None:
        state, batches = saved["state"], saved.get("batches")
        if state is not None and hasattr(one, "load_state_dict"):
            try:
                one.load_state_dict(state)
                if isinstance(one, DataLoader):
                    cast(
                        Any, one
                    ).state_dict()  # makes the iterator, which the next loop takes as it is
            except (AssertionError, KeyError, TypeError, ValueError, RuntimeError) as e:
                why = f"{type(e).__name__}: {e}"[:200]
                raise _odd(what, why) from e
        elif state is not None:
            self.notes.append(
                f"{what} was saved with its place in the epoch, and a {type(one).__name__} can't "
                "take it: it begins a new epoch; give the StatefulDataLoader that was saved"
            )
        if batches:
            begins = "begins a new one" if state is None else "leaves as many out of another order"
            self.notes.append(
                f"{what} was saved after {batches} batches of an epoch, without its place there: "
                f"it {begins}; {_WAY_OUT if state is None else _WITH_STATE}"
            )


def place_and_rng(
    model: nn.Module, loader: Several[Any], generators: Generators | None, rng: bool | str
) -> tuple[dict[str, Any] | None, dict[str, Any] | None]:
    """The sections ``loader`` and ``rng`` of a checkpoint; with ``"all"`` rank 0 has those of every
    rank in them, and every rank has to call this.

    Raises:
        UsageError, RefusedError: as :func:`loader_state`; on rank 0 what another one was refused.
    """
    position, failed = None, None
    try:  # first: one that has not begun draws its order now
        position = loader_state(loader, generators)
    except ModelctlError as e:
        if rng != "all":
            raise
        failed = e  # the others wait for this rank
    drawn = rng_state(model) if rng else None
    if drawn is not None and rng == "all":
        refused = None if failed is None else failed.message
        whole = gathered({"rng": drawn, "loader": position, "refused": refused})
        if failed is not None:
            raise failed
        others = whole.get("others", [])
        for number, one in enumerate(others, 1):
            if one["refused"] is not None:
                raise RefusedError(f"rank {number}: {one['refused']}")
        if others:
            drawn["others"] = [one["rng"] for one in others]
            places = [one["loader"] for one in others]
            if position is not None or any(places):
                position = {**(position or {"generators": {}}), "others": places}
    return position, drawn


def loader_state(loader: Several[Any], generators: Generators | None) -> dict[str, Any] | None:
    """The section of a checkpoint for loaders and generators; None where none are given.

    A loader is ``{"state", "workers", "batches", "generators"}``: its ``state_dict()``, or None of
    a plain ``DataLoader``; ``batches`` are those that such a one has given, where it is in the
    middle of an epoch, of which a warning is given.

    Raises:
        UsageError: a loader that has nothing to save; no generator.
        RefusedError: a state that ``weights_only`` would refuse; names its key.
    """
    given, own = labelled(loader), _by_name(generators)
    _check_given(given, own)
    if not given and not own:
        return None
    section: dict[str, Any] = {}
    if given:
        section["loaders"] = packed(
            {k: _state(one, called("loader", k)) for k, one in given.items()}
        )
    if own:
        section["generators"] = {name: one.get_state() for name, one in own.items()}
    return section


def _state(one: Any, what: str) -> dict[str, Any]:
    found: dict[str, Any] = {"state": None}
    stateful = hasattr(one, "state_dict")
    if stateful:
        found["state"] = storable(one.state_dict(), what)
    sampler = getattr(one, "sampler", None)
    if not stateful or (isinstance(sampler, _DRAWN) and not hasattr(sampler, "state_dict")):
        batches = _given_batches(one)
        if batches:
            found["batches"] = batches
            who, way = (sampler, _WITH_STATE) if stateful else (one, _WAY_OUT)
            warnings.warn(
                f"{what} is in the middle of an epoch, after {batches} batches, and a "
                f"{type(who).__name__} can't say where: resume() gets another order; {way}",
                stacklevel=6,
            )
    if isinstance(one, DataLoader):
        found["workers"] = one.num_workers
    drawn = {name: each.get_state() for name, each in own_generators(one).items()}
    if drawn:
        found["generators"] = drawn
    return found


def is_kept(section: Any) -> bool:
    """Whether it is a section as :func:`loader_state` makes it; else a loader's own state."""
    return not {"loaders", "generators"}.isdisjoint(mapping(section) or ())


def own_generators(one: Any) -> dict[str, torch.Generator]:
    """The generators that a loader or a sampler draws its order from, by where it has them; one
    that is in several places is there once."""
    sampler, batches = getattr(one, "sampler", None), getattr(one, "batch_sampler", None)
    places = {
        "generator": one,
        "sampler.generator": sampler,
        "batch_sampler.generator": batches,
        "batch_sampler.sampler.generator": getattr(batches, "sampler", None),
    }
    found: dict[str, torch.Generator] = {}
    for name, owner in places.items():
        generator = getattr(owner, "generator", None)
        if isinstance(generator, torch.Generator) and all(
            generator is not other for other in found.values()
        ):
            found[name] = generator
    return found


def _given_batches(loader: DataLoader[Any]) -> int:
    """How many batches a plain loader's iterator has given, where one is at work: a loop that goes
    on holds it, one that is through has let go of it."""
    own = loader.sampler if loader.batch_sampler is None else loader.batch_sampler
    most = 0
    for one in gc.get_objects():
        if issubclass(type(one), _BaseDataLoaderIter) and one._dataset is loader.dataset:
            given = int(getattr(one, "_num_yielded", 0))
            if one._index_sampler is own and not _is_through(loader, one, given):
                most = max(most, given)
    return most


def _is_through(loader: DataLoader[Any], iterator: Any, given: int) -> bool:
    try:
        return given >= len(loader)
    except TypeError:  # an iterable dataset; workers that persist are at the end, too
        return not any(getattr(iterator, "_workers_status", [True]))


def _by_name(generators: Generators | None) -> dict[str, torch.Generator]:
    if not isinstance(generators, Mapping | None):
        raise UsageError(
            f"generators takes a dict of names, not {type(generators).__name__}",
            hint="generators={'noise': generator}",
        )
    return dict(generators or {})


def _check_given(loaders: Mapping[Label, Any], generators: Mapping[str, Any]) -> None:
    for label, one in loaders.items():
        stateful = hasattr(one, "state_dict") and hasattr(one, "load_state_dict")
        if not stateful and not isinstance(one, DataLoader):
            raise UsageError(
                f"{called('loader', label)} is a {type(one).__name__}, which has no state_dict() "
                "and load_state_dict(), and is no DataLoader",
                hint="generators={'name': generator} is for generators",
            )
    for name, generator in generators.items():
        if not isinstance(name, str) or not isinstance(generator, torch.Generator):
            raise UsageError(
                f"generators: {name!r} is a {type(generator).__name__}, no torch.Generator by name"
            )


def _check_generator(generator: torch.Generator, state: Any, what: str) -> None:
    """Raises RefusedError where a generator can't take a saved state; it stays as it is."""
    try:
        torch.Generator(generator.device).set_state(state)
    except (TypeError, RuntimeError) as e:
        raise _odd(what, str(e)[:200]) from None


def _is_one(state: Any) -> bool:
    return isinstance(state, dict) and "state" in state


def _odd(what: str, why: str) -> RefusedError:
    return RefusedError(
        f"the checkpoint's {what} is not one that this one can take: {why}",
        hint="resume without it: it begins a new epoch",
    )
