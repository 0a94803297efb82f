"""DeepSpeed's folders (docs/formats.md#zero): ZeRO 1, 2 and 3, where each rank has a piece of flat
groups of parameters in fp32 and of their moments. As ``zero_to_fp32`` joins them
(deepspeed/utils/zero_to_fp32.py), and the optimizer with them."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from math import prod
from typing import Any, NamedTuple

from ...core.checkpoint import Checkpoint, Origin
from ...core.nodes import Obj, attributes, mapping, with_entries
from ...core.notes import Note, warning
from ...core.tensors import TensorRef
from ...core.text import count, some
from ...errors import ModelctlError, UnreadableError, UnsupportedError
from ...storage.places import Place
from ..base import Format
from ..folders import latest_of
from ..pytorch.zip import TorchZip
from .flat import Flat, check_steps, in_fp32, joined, own, paddings_of, shapes_of

MODEL = re.compile(r"(?:(?:bf16_)?zero_pp_rank_(\d+)_)?mp_rank_(\d+)_model_states\.pt")
_OPTIMIZER = re.compile(r"(?:bf16_|fp16_)?zero_pp_rank_(\d+)_mp_rank_(\d+)_optim_states\.pt")
_ELSEWHERE = re.compile(r"layer_\d+.*[-_]model_states\.pt")
_FILES = TorchZip()
# What a rank says of its own pieces, and what the joined tree has in their place.
OF_RANKS = (
    *("optimizer", "buffer_names", "param_shapes", "frozen_param_shapes"),
    *("frozen_param_fragments", "shared_params", "ds_config"),
)
AGAIN = "copy the folder again, with the files of all ranks"


# DeepSpeed's ZeroStageEnum (deepspeed/runtime/zero/config.py)
_STAGES = {"optimizer_states": 1, "gradients": 2, "weights": 3}


class Zero(Format):
    """A folder that DeepSpeed's ``save_checkpoint`` wrote: a tag's, or the one with ``latest``."""

    name = "zero"
    label = "DeepSpeed"

    def sniff(self, place: Place) -> bool:
        tagged = tagged_of(place)
        return tagged is not None and any(map(MODEL.fullmatch, tagged.names))

    def read(self, place: Place) -> Checkpoint:
        try:
            return Save(followed(place), place.name).checkpoint()
        except UnreadableError as e:
            raise e if e.path else UnreadableError(e.reason, path=place.name, hint=AGAIN) from None

    def explain(self, place: Place) -> ModelctlError | None:
        tag = latest_of(place)
        if not tag or tag in place.names:
            return None
        return UnreadableError(
            f"'latest' names {tag!r:.100}, which is not here",
            path=place.name,
            hint="copy that folder, too, or write the name of another into 'latest'",
        )


def followed(place: Place, latest: str = "latest") -> Place:
    """The same, of a place that has a save.

    Raises:
        ModelctlError: it is a link, which is not followed.
    """
    tagged = tagged_of(place, latest)
    assert tagged is not None
    return tagged if tagged is place else place.inside(tagged.filename)


def tagged_of(place: Place, latest: str = "latest") -> Place | None:
    """The folder that ``latest`` names, or itself; None of what is no folder."""
    if not place.is_folder:
        return None
    tag = latest_of(place, latest)
    inner = place.member(tag) if tag in place.names else place
    return inner if inner.is_folder else place


class _Rank(NamedTuple):
    """What one rank saved of the optimizer.

    Attributes:
        fields: all of it.
        weights: its piece of each flat group, in fp32.
        state: the optimizer's own state_dict, with pieces of the same groups; None where it has
            none that is known.
    """

    fields: Mapping[Any, Any]
    weights: list[Any]
    state: Mapping[Any, Any] | None


class _Slot(NamedTuple):
    """Where a parameter lies: in the pieces of its group one after the other, or (stage 3) so many
    elements in those of each rank.

    Attributes:
        group: the number of its group.
        at: its first element.
        each: elements of each rank; None in stages 1 and 2.
    """

    shape: tuple[int, ...]
    group: int
    at: int
    each: int | None


class _Vectors(NamedTuple):
    """State that is by element."""

    flats: list[Flat]


class Save:
    """The files of one save, of all ranks.

    Raises:
        UnreadableError: a file is missing, of another save, or does not say what is needed.
        UnsupportedError: of several model parallel ranks, pipeline stages or experts.
    """

    def __init__(self, place: Place, name: str, *, whole: bool = False) -> None:
        """
        Args:
            whole: what trains lies elsewhere, joined; only its first model parallel rank is read.
        """
        self.place, self.name, self.whole = place, name, whole
        self.read: list[Checkpoint] = []
        self.warnings: list[Note] = []
        elsewhere = [one for one in place.names if _ELSEWHERE.fullmatch(one)]
        if elsewhere:
            raise self._unknown(f"pipeline stages or experts ({some(elsewhere, 2)})")
        self.models = [mapping(root) or {} for root in self._roots(MODEL)]
        self.model = self.models[0]
        if mapping(self.model.get("module")) is None:
            raise UnreadableError("its model states have no 'module'")
        fields = [
            mapping((mapping(root) or {}).get("optimizer_state_dict")) or {}
            for root in self._roots(_OPTIMIZER)
        ]
        self.stage = self._stage_of(fields[0]) if fields else 0
        self.ranks = [self._rank(one) for one in fields]

    def _unknown(self, what: str) -> UnsupportedError:
        return UnsupportedError(
            f"{self.name}: of {what}: not joined yet",
            hint="DeepSpeed's ds_to_universal.py joins them",
        )

    def _roots(self, pattern: re.Pattern[str]) -> list[Any]:
        """What the files of this kind hold, in the order of their ranks."""
        found: dict[int, str] = {}
        for match in filter(None, map(pattern.fullmatch, self.place.names)):
            if self.whole and int(match[2]):
                continue
            if int(match[2]):
                raise self._unknown(f"several model parallel ranks ({match[0]})")
            other = found.setdefault(int(match[1] or 0), match[0])
            if other != match[0]:
                raise UnreadableError(f"two saves in one folder: {other} and {match[0]}")
        for rank, number in enumerate(sorted(found)):
            if rank != number:
                raise UnreadableError(
                    f"the file of rank {rank} is missing beside {some(sorted(found.values()), 2)}"
                )
        files = [self.place.inside(found[rank]) for rank in sorted(found)]
        parts = self.place.together(_FILES.read, files)
        self.read += parts
        return [part.root for part in parts]

    def _stage_of(self, fields: Mapping[Any, Any]) -> int:
        """1, 2 or 3; bf16's optimizer, which does not say, is laid out as 1."""
        stage = fields.get("zero_stage", 1)
        if isinstance(stage, Obj):  # an Enum's member: Enum(3), or long getattr(Enum, "weights")
            stage = stage.args[-1] if stage.args else None
            stage = _STAGES.get(stage, stage) if isinstance(stage, str) else stage
        if type(stage) is not int or stage not in (1, 2, 3):
            raise UnsupportedError(f"{self.name}: ZeRO of the stage {stage!r:.20}")
        return stage

    def _rank(self, fields: Mapping[Any, Any]) -> _Rank:
        key = "fp32_flat_groups" if self.stage == 3 else "single_partition_of_fp32_groups"
        weights = fields.get(key)
        if not isinstance(weights, list) or not weights:
            raise UnreadableError("its optimizer states have no pieces of flat groups")
        inner = "optimizer_state_dict" if self.stage == 3 else "base_optimizer_state"
        state = mapping(fields.get(inner)) or {}
        sound = isinstance(state.get("param_groups"), list) and (
            mapping(state.get("state")) is not None
        )
        return _Rank(fields, weights, state if sound else None)

    # ------------------------------------------------------------------ what they hold together

    def checkpoint(self) -> Checkpoint:
        root = dict(self.model)
        if self.ranks:
            self._check_ranks()
            groups = self.groups()
            slots = self._slots(groups)
            pieces = [one.weights for one in self.ranks]
            weights = [self._vectors(pieces, index) for index in range(len(groups))]
            self._check_used(slots, weights)
            root["module"] = self.module(
                {name: self._take(name, slot, weights[slot.group]) for name, slot in slots.items()}
            )
            for key in OF_RANKS:
                root.pop(key, None)
            optimizer = self._optimizer(groups, slots)
            if optimizer is not None:
                root = after(root, "module", "optimizer", optimizer)
            scaler = self.ranks[0].fields.get("loss_scaler")
            if isinstance(scaler, Obj):  # plain numbers: nobody needs DeepSpeed to read them
                root["loss_scaler"] = dict(attributes(scaler))
        elif isinstance(self.model.get("param_shapes"), list):
            self._without_ranks()
        return Checkpoint(
            root,
            Origin(
                self.name,
                Zero.name,
                f"DeepSpeed ZeRO-{self.stage}, {count(max(len(self.ranks), 1), 'rank')}",
                sum(one.origin.bytes_on_disk for one in self.read if one.origin),
            ),
            warnings=(*self.warnings, *(w for one in self.read for w in one.warnings)),
            findings=tuple(finding for one in self.read for finding in one.findings),
        )

    def _check_ranks(self) -> None:
        """They are all there, and of one save."""
        counts = self.ranks[0].fields.get("partition_count")
        said = [n for n in (counts if isinstance(counts, list) else [counts]) if type(n) is int]
        world = max(said, default=self.model.get("dp_world_size"))
        here = len(self.ranks)
        if type(world) is int and world != here:
            raise UnreadableError(f"{count(world, 'rank')} saved it, {count(here, 'file')} here")
        if self.stage == 3 and len(self.models) != here:
            raise UnreadableError(
                f"{count(len(self.models), 'file')} of model states beside {here} of the optimizer"
            )
        steps = sorted({f"{one.get('global_steps')!r:.20}" for one in self.models})
        if len(steps) > 1:
            raise UnreadableError(f"files of different saves: global_steps {', '.join(steps)}")

    def _without_ranks(self) -> None:
        """The file of the model alone: what trains in fp32 is in the optimizer's."""
        module = mapping(self.model["module"]) or {}
        named = [name for group in self.groups() for name in group]
        if any(isinstance(ref := module.get(n), TensorRef) and not ref.numel for n in named):
            raise UnreadableError("the files with its weights, …_optim_states.pt, are missing")
        self.warnings.append(
            warning(
                "the files of its optimizer are missing: these are the weights that it trained "
                "with, not those in fp32",
                "copy …_optim_states.pt, too",
            )
        )

    def groups(self) -> list[dict[str, tuple[int, ...]]]:
        """The shape of each parameter that trains, by its group."""
        shapes = self.model.get("param_shapes")
        groups = [mapping(group) for group in shapes] if isinstance(shapes, list) else []
        if not groups:
            raise UnreadableError("its model states do not say which parameters there are")
        return [shapes_of(group) for group in groups]

    def _slots(self, groups: Sequence[Mapping[str, tuple[int, ...]]]) -> dict[str, _Slot]:
        """Where each parameter lies."""
        paddings = self.ranks[0].fields.get("param_alignment_paddings")
        slots: dict[str, _Slot] = {}
        at = 0
        for index, group in enumerate(groups):
            of_group = paddings_of(paddings, index, len(group))
            at = at if self.stage == 3 else 0
            for (name, shape), padding in zip(group.items(), of_group, strict=True):
                each = -(-prod(shape) // len(self.ranks)) if self.stage == 3 else None
                slots[name] = _Slot(shape, index, at, each)
                at += prod(shape) + padding if each is None else each
        return slots

    def _vectors(self, of_ranks: Sequence[Sequence[Any]], group: int) -> list[Flat]:
        """Of the pieces that each rank has of all groups: one group, of all ranks; in stage 3,
        where a group may be several, all of them, of each rank."""
        if self.stage == 3:
            return [Flat(pieces) for pieces in of_ranks]
        if not all(group < len(pieces) for pieces in of_ranks):
            raise UnreadableError(f"a rank has no piece of group {group}")
        return [Flat([pieces[group] for pieces in of_ranks])]

    def _check_used(self, slots: Mapping[str, _Slot], weights: Sequence[Sequence[Flat]]) -> None:
        """The parameters take all of the flat groups, but what fills them up: a multiple of twice
        the ranks in stages 1 and 2."""
        ends = {slot.group: slot.at + (slot.each or prod(slot.shape)) for slot in slots.values()}
        if self.stage == 3:
            ends = {0: max(ends.values(), default=0)}
        for group, end in ends.items():
            for flat in weights[group]:
                left = flat.numel - end
                if left > (0 if self.stage == 3 else 2 * len(self.ranks)):
                    raise UnreadableError(
                        f"{left:,} elements are left over behind the parameters of group {group}: "
                        "files of several saves?"
                    )

    def _take(self, name: str, slot: _Slot, vectors: Sequence[Flat]) -> TensorRef:
        """A parameter, or a moment of it, out of the flat groups that have it."""
        each = prod(slot.shape) if slot.each is None else slot.each
        try:
            pieces = [piece for flat in vectors for piece in flat.cut(slot.at, each)]
            return joined(vectors[0].dtype, slot.shape, pieces, self.name)
        except UnreadableError as e:
            raise UnreadableError(f"{name!r:.200} of {list(slot.shape)}: {e.reason}") from None

    def module(self, trained: Mapping[str, TensorRef]) -> Any:
        """The model's state_dict: what trains in fp32, what is frozen, buffers, and ties."""
        module = mapping(self.model["module"]) or {}
        found: dict[Any, Any] = dict(module)
        frozen = shapes_of(mapping(self.model.get("frozen_param_shapes")) or {})
        for name, ref in module.items():
            if isinstance(ref, TensorRef):  # buffers; in stages 1 and 2 what is frozen, too
                found[name] = in_fp32(ref)
        found |= {name: self._frozen(name, shape) for name, shape in frozen.items()} | {**trained}
        known = {*frozen, *trained}
        for alias, name in (mapping(self.model.get("shared_params")) or {}).items():
            if isinstance(name, str) and name in known:
                found[alias] = found[name]
                known.add(alias)
        buffers = self.model.get("buffer_names")
        for name, ref in found.items():
            held = name in known or (isinstance(buffers, list) and name in buffers)
            if not held and isinstance(ref, TensorRef) and not ref.numel:
                raise UnreadableError(f"the weights of {name!r:.200} are in none of its files")
        return with_entries(self.model["module"], found)

    def _frozen(self, name: str, shape: tuple[int, ...]) -> TensorRef:
        parts = []
        for rank, one in enumerate(self.models):
            ref = (mapping(one.get("frozen_param_fragments")) or {}).get(name)
            if not isinstance(ref, TensorRef):
                raise UnreadableError(f"rank {rank} has no part of the frozen {name!r:.200}")
            parts.append(ref)
        if parts[0].shape == shape and len(parts) == 1:
            return in_fp32(parts[0])
        slot = _Slot(shape, 0, 0, min(parts[0].numel, prod(shape)))
        try:
            return in_fp32(self._take(name, slot, [Flat([part]) for part in parts]))
        except UnreadableError as e:
            raise UnreadableError(f"the frozen {e.reason}") from None

    # ------------------------------------------------------------------ the optimizer

    def _optimizer(
        self, groups: Sequence[Mapping[str, Any]], slots: Mapping[str, _Slot]
    ) -> dict[str, Any] | None:
        """The optimizer as one that was never sharded: a state for each parameter, in the order of
        its groups, with their names."""
        states = [one.state for one in self.ranks if one.state is not None]
        options = [mapping(one) or {} for one in states[0]["param_groups"]] if states else []
        inner = [mapping(one["state"]) or {} for one in states]
        sound = all(
            type(key) is int and mapping(value) is not None
            for one in inner
            for key, value in one.items()
        )
        if len(states) < len(self.ranks) or len(options) != len(groups) or not sound:
            self.warnings.append(
                warning("the optimizer is laid out in a way that is not known: left out")
            )
            return None
        moments = [self._moments(index, inner) for index in range(len(groups))]
        names = [name for group in groups for name in group]
        numbers = {name: number for number, name in enumerate(names)}
        state = {
            numbers[name]: {
                key: self._take(name, slot, value.flats)
                if isinstance(value, _Vectors)
                else own(value)
                for key, value in moments[slot.group].items()
            }
            for name, slot in slots.items()
        }
        return {
            "state": state if any(state.values()) else {},
            "param_groups": [
                {**old, "params": [numbers[name] for name in group], "param_names": [*group]}
                for old, group in zip(options, groups, strict=True)
            ],
        }

    def _moments(self, group: int, states: Sequence[Mapping[Any, Any]]) -> dict[str, Any]:
        """The state of a group: of what is by element its vectors, all else as the first rank
        has it.

        Raises:
            UnreadableError: the ranks did not take as many steps.
        """
        first = 0 if self.stage == 3 else group
        entries = mapping(states[0].get(first)) or {}
        pieces = self.ranks[0].weights[0 if self.stage == 3 else group]
        least = pieces.numel if isinstance(pieces, TensorRef) else 0
        numbers = range(len(self.ranks[0].weights))
        found: dict[str, Any] = {}
        for key, value in entries.items():
            by_element = (
                isinstance(value, TensorRef)
                and len(value.shape) == 1
                and value.numel >= least
                and key != "step"
            )
            if by_element:
                of_ranks = [
                    [(mapping(one.get(at)) or {}).get(key) for at in numbers] for one in states
                ]
                found[key] = _Vectors(self._vectors(of_ranks, group))
                continue
            found[key] = value
            if key == "step":
                check_steps((mapping(one.get(first)) or {}).get(key) for one in states)
        return found


def after(root: dict[Any, Any], key: str, new: str, value: Any) -> dict[Any, Any]:
    """A dict with an entry behind another."""
    made: dict[Any, Any] = {}
    for name, old in root.items():
        made[name] = old
        if name == key:
            made[new] = value
    return made
