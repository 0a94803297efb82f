"""DeepSpeed's folders (docs/formats.md#zero): ZeRO 1, 2 and 3, where each rank has a piece of flat
groups of parameters in fp32 and of their moments. As ``zero_to_fp32`` joins them
(deepspeed/utils/zero_to_fp32.py), and the optimizer with them."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from math import prod
from typing import Any, NamedTuple

from ...core.checkpoint import Checkpoint, Origin
from ...core.dtypes import BY_NAME, DType
from ...core.nodes import Obj, attributes, mapping, with_entries
from ...core.notes import Note, warning
from ...core.tensors import TensorRef, ValuesStorage, Widened
from ...core.text import count, some
from ...errors import UnreadableError, UnsupportedError
from ...storage.chunked import Chunk, ChunkedStorage
from ...storage.places import Place
from ..base import Format
from ..pytorch.zip import TorchZip

_MODEL = re.compile(r"(?:(?:bf16_)?zero_pp_rank_(\d+)_)?mp_rank_(\d+)_model_states\.pt")
_OPTIMIZER = re.compile(r"(?:bf16_|fp16_)?zero_pp_rank_(\d+)_mp_rank_(\d+)_optim_states\.pt")
_ELSEWHERE = re.compile(r"layer_\d+.*_model_states\.pt")
_FILES = TorchZip()
# What a rank says of its own pieces, and what the joined tree has in their place.
_OF_RANKS = (
    *("module", "optimizer", "buffer_names", "param_shapes", "frozen_param_shapes"),
    *("frozen_param_fragments", "shared_params", "ds_config"),
)


class Zero(Format):
    """A folder that DeepSpeed's ``save_checkpoint`` wrote: a tag's, or the one with ``latest``."""

    name = "zero"
    label = "DeepSpeed"

    def sniff(self, place: Place) -> bool:
        tagged = _tagged(place)
        return tagged is not None and any(map(_MODEL.fullmatch, tagged.names))

    def read(self, place: Place) -> Checkpoint:
        tagged = _tagged(place)
        assert tagged is not None
        return _Save(tagged, place.name).checkpoint()


def _tagged(place: Place) -> Place | None:
    """The folder that ``latest`` names, or itself."""
    if "latest" not in place.names:
        return place if place.is_folder else None
    latest = place.member("latest")
    tag = latest.head.decode("utf-8", "replace").strip() if latest.size < 1024 else ""
    if tag not in place.names:
        return place
    return place.member(tag)


class _Rank(NamedTuple):
    """What one rank saved of the optimizer.

    Attributes:
        weights: its piece of each flat group, in fp32.
        state: the optimizer's own state_dict, with pieces of the same groups; None where it has
            none that is known.
    """

    fields: Mapping[Any, Any]
    weights: list[TensorRef]
    state: Mapping[Any, Any] | None


class _Save:
    """The files of one save, of all ranks."""

    def __init__(self, place: Place, name: str) -> None:
        self.place, self.name = place, name
        self.read: list[Checkpoint] = []
        elsewhere = [one for one in place.names if _ELSEWHERE.fullmatch(one)]
        if elsewhere:
            raise UnsupportedError(
                f"{name}: pipeline stages or experts in files of their own ({some(elsewhere, 2)}): "
                "not joined yet",
                hint="DeepSpeed's ds_to_universal.py writes a folder that can be read",
            )
        self.models = [mapping(root) or {} for root in self._roots(_MODEL)]
        self.model = self.models[0]
        ranks = [self._rank(root) for root in self._roots(_OPTIMIZER)]
        self.ranks = [one for one in ranks if one is not None]
        self.warnings: list[Note] = []

    def _roots(self, pattern: re.Pattern[str]) -> list[Any]:
        """What the files of this kind hold, in the order of their ranks.

        Raises:
            UnsupportedError: of several model parallel ranks.
            UnreadableError: a rank is missing.
        """
        found: dict[int, str] = {}
        for match in filter(None, map(pattern.fullmatch, self.place.names)):
            if int(match[2]):
                raise UnsupportedError(
                    f"{self.name}: of several model parallel ranks ({match[0]}): not joined yet",
                    hint="DeepSpeed's ds_to_universal.py writes a folder that can be read",
                )
            found[int(match[1] or 0)] = match[0]
        for rank in range(max(found, default=-1) + 1):
            if rank not in found:
                raise self._broken(
                    f"the file of rank {rank} is missing beside {some(sorted(found.values()), 2)}"
                )
        parts = [_FILES.read(self.place.member(found[rank])) for rank in sorted(found)]
        self.read += parts
        return [part.root for part in parts]

    def _broken(self, what: str) -> UnreadableError:
        return UnreadableError(
            what, path=self.name, hint="copy the folder again, with the files of all ranks"
        )

    def _rank(self, root: Any) -> _Rank | None:
        fields = mapping((mapping(root) or {}).get("optimizer_state_dict")) or {}
        stage = _stage(fields)
        key = "fp32_flat_groups" if stage == 3 else "single_partition_of_fp32_groups"
        weights = fields.get(key)
        if not isinstance(weights, list) or not all(isinstance(w, TensorRef) for w in weights):
            raise self._broken("its optimizer states have no parts of flat groups")
        state = mapping(
            fields.get("optimizer_state_dict" if stage == 3 else "base_optimizer_state")
        )
        known = state is not None and mapping(state.get("state")) is not None
        return _Rank(fields, weights, state if known else None)

    # ------------------------------------------------------------------ what they hold together

    def checkpoint(self) -> Checkpoint:
        root = dict(self.model)
        if self.ranks:
            self._check_ranks()
            root["module"] = self._module()
            optimizer = self._optimizer()
            for key in _OF_RANKS:
                if key != "module":
                    root.pop(key, None)
            if optimizer is not None:
                root = _after(root, "module", "optimizer", optimizer)
            scaler = self.ranks[0].fields.get("loss_scaler")
            if isinstance(scaler, Obj):  # plain numbers: nobody needs DeepSpeed to read them
                root["loss_scaler"] = dict(attributes(scaler))
        stage = _stage(self.ranks[0].fields) if self.ranks else 0
        return Checkpoint(
            root,
            Origin(
                self.name,
                Zero.name,
                f"DeepSpeed ZeRO-{stage}, {count(max(len(self.ranks), 1), 'rank')}",
                sum(one.origin.bytes_on_disk for one in self.read if one.origin),
            ),
            warnings=(*self.warnings, *(w for one in self.read for w in one.warnings)),
            findings=tuple(finding for one in self.read for finding in one.findings),
        )

    def _check_ranks(self) -> None:
        """They are all there, and of one save."""
        counts = self.ranks[0].fields.get("partition_count")
        world = max(counts, default=0) if isinstance(counts, list) else counts
        world = world or self.model.get("dp_world_size")
        if type(world) is int and world != len(self.ranks):
            raise self._broken(f"{count(world, 'rank')} saved it, {len(self.ranks)} files are here")
        steps = {one.get("global_steps") for one in self.models}
        if len(steps) > 1:
            raise self._broken(f"files of different saves: global_steps {sorted(map(str, steps))}")

    def _module(self) -> Any:
        """The model's state_dict: what trains in fp32, what is frozen, buffers, and ties."""
        module = mapping(self.model.get("module"))
        if module is None:
            raise self._broken("its model states have no 'module'")
        found: dict[str, TensorRef] = {}
        frozen = mapping(self.model.get("frozen_param_shapes")) or {}
        for name, shape in frozen.items():
            found[name] = self._frozen(name, _shape(shape))
        for name, (pieces, shape) in self._flat().items():
            ref = pieces(self._weights)
            assert ref is not None
            found[name] = ref.replace(shape=shape)
        buffers = self.model.get("buffer_names")
        for name in buffers if isinstance(buffers, list) else ():
            ref = module.get(name)
            if isinstance(ref, TensorRef):
                found[name] = _in_fp32(ref)
        for alias, name in (mapping(self.model.get("shared_params")) or {}).items():
            if name in found:
                found[alias] = found[name]
        missing = [name for name in module if name not in found]
        for name in missing:
            ref = module[name]
            if isinstance(ref, TensorRef) and not ref.numel:
                raise self._broken(f"the weights of {name!r:.200} are in none of its files")
            if isinstance(ref, TensorRef):
                found[name] = _in_fp32(ref)  # frozen, in stages 1 and 2
        entries = {name: found.get(name, value) for name, value in module.items()}
        return with_entries(self.model["module"], {**entries, **found})

    def _weights(self, rank: int) -> list[TensorRef]:
        return self.ranks[rank].weights

    def _frozen(self, name: str, shape: tuple[int, ...]) -> TensorRef:
        parts = []
        for one in self.models:
            ref = (mapping(one.get("frozen_param_fragments")) or {}).get(name)
            if not isinstance(ref, TensorRef):
                raise self._broken(f"a rank has no part of the frozen {name!r:.200}")
            parts.append(ref)
        if parts[0].numel == prod(shape):
            return parts[0].replace(shape=shape, stride=None)
        return _joined(self, name, [[part] for part in parts], shape)

    def _flat(self) -> dict[str, tuple[Any, tuple[int, ...]]]:
        """How each trained parameter is taken out of the pieces of the ranks, and its shape."""
        shapes = self.model.get("param_shapes")
        groups = [mapping(group) or {} for group in shapes] if isinstance(shapes, list) else []
        if not groups:
            raise self._broken("its model states do not say which parameters there are")
        if _stage(self.ranks[0].fields) == 3:
            return dict(self._in_slices(groups))
        return dict(self._in_groups(groups))

    def _in_groups(
        self, groups: Sequence[Mapping[Any, Any]]
    ) -> Iterator[tuple[str, tuple[Any, tuple[int, ...]]]]:
        """Stages 1 and 2: a group is the ranks' pieces one after the other."""
        paddings = self.ranks[0].fields.get("param_alignment_paddings")
        for index, group in enumerate(groups):
            at = 0
            for i, (name, size) in enumerate(group.items()):
                shape = _shape(size)

                def pieces(
                    of: Any,
                    index: int = index,
                    at: int = at,
                    name: str = name,
                    shape: tuple[int, ...] = shape,
                ) -> TensorRef:
                    parts = [of(rank)[index] for rank in range(len(self.ranks))]
                    return _joined(self, name, [_cut(parts, at, prod(shape))], shape)

                yield name, (pieces, shape)
                at += prod(shape)
                if isinstance(paddings, list):
                    at += paddings[index][i]

    def _in_slices(
        self, groups: Sequence[Mapping[Any, Any]]
    ) -> Iterator[tuple[str, tuple[Any, tuple[int, ...]]]]:
        """Stage 3: each rank has an equal part of each parameter, the last ones padded."""
        at = 0
        for group in groups:
            for name, size in group.items():
                shape = _shape(size)
                each = -(-prod(shape) // len(self.ranks))

                def pieces(
                    of: Any,
                    at: int = at,
                    each: int = each,
                    name: str = name,
                    shape: tuple[int, ...] = shape,
                ) -> TensorRef:
                    parts = [_cut(of(rank), at, each) for rank in range(len(self.ranks))]
                    return _joined(self, name, parts, shape)

                yield name, (pieces, shape)
                at += each

    # ------------------------------------------------------------------ the optimizer

    def _optimizer(self) -> dict[str, Any] | None:
        """The optimizer as one that was never sharded: a state for each parameter, in the order of
        its groups, with their names."""
        states = [one.state for one in self.ranks if one.state is not None]
        if len(states) < len(self.ranks):
            self.warnings.append(
                warning("the optimizer is laid out in a way that is not known: left out")
            )
            return None
        first = states[0]
        old = first.get("param_groups")
        if not isinstance(old, list):
            return None
        flat = self._flat()
        shapes = [mapping(group) or {} for group in self.model["param_shapes"]]
        inner = [mapping(one["state"]) or {} for one in states]
        state: dict[int, dict[str, Any]] = {}
        groups: list[dict[Any, Any]] = []
        for index, names in enumerate(shapes):
            numbers = range(len(state), len(state) + len(names))
            for number, name in zip(numbers, names, strict=True):
                state[number] = self._state_of(index, flat[name], inner)
            options = mapping(old[index]) if index < len(old) else None
            groups.append({**(options or {}), "params": list(numbers), "param_names": list(names)})
        if not any(state.values()):
            state = {}
        return {"state": state, "param_groups": groups}

    def _state_of(
        self, group: int, flat: tuple[Any, tuple[int, ...]], states: Sequence[Mapping[Any, Any]]
    ) -> dict[str, Any]:
        """The state of one parameter, of the pieces of its group."""
        pieces, shape = flat
        if _stage(self.ranks[0].fields) == 3:
            keys, of_group = sorted(states[0]), None
        else:
            keys, of_group = [group] if group in states[0] else [], group
        found: dict[str, Any] = {}
        entries = mapping(states[0][keys[0]]) if keys else None
        for key, value in (entries or {}).items():
            if isinstance(value, TensorRef) and value.numel > 1 and len(value.shape) == 1:

                def of(rank: int, key: Any = key) -> list[Any]:
                    every = states[rank]
                    return [
                        (mapping(every[at]) or {})[key]
                        for at in (sorted(every) if of_group is None else range(of_group + 1))
                        if at in every
                    ]

                found[key] = pieces(of).replace(shape=shape)
            elif isinstance(value, TensorRef):  # one each: they are counted on by themselves
                found[key] = value.replace(storage=ValuesStorage(value), offset=0, base=0)
            else:
                found[key] = value
        return found


def _after(root: dict[Any, Any], key: str, new: str, value: Any) -> dict[Any, Any]:
    """A dict with an entry behind another."""
    made: dict[Any, Any] = {}
    for name, old in root.items():
        made[name] = old
        if name == key:
            made[new] = value
    return made


def _stage(fields: Mapping[Any, Any]) -> int:
    """1, 2 or 3; bf16's optimizer, which does not say, is laid out as 1."""
    stage = fields.get("zero_stage", 1)
    if isinstance(stage, Obj):  # an Enum's member
        stage = stage.args[0] if stage.args else None
    if stage not in (1, 2, 3):
        raise UnsupportedError(f"ZeRO of the stage {stage!r:.20}")
    return int(stage)


def _shape(node: Any) -> tuple[int, ...]:
    if isinstance(node, Obj) and len(node.args) == 1:
        node = node.args[0]
    if not isinstance(node, tuple | list) or not all(type(n) is int and n >= 0 for n in node):
        raise UnreadableError("a shape of a parameter that is none")
    return tuple(node)


def _cut(parts: Sequence[TensorRef], start: int, size: int) -> list[TensorRef]:
    """``size`` elements from ``start`` on, of vectors one after the other: views of them."""
    found = []
    for part in parts:
        if not isinstance(part, TensorRef) or len(part.shape) != 1:
            raise UnreadableError("a flat group that is no vector")
        n = min(part.numel - start, size) if start < part.numel else 0
        if n > 0:
            step = part.stride[0]
            view = part.replace(shape=(n,), offset=part.offset + start * step, stride=(step,))
            found.append(view)
            size -= n
        start = max(start - part.numel, 0)
    if size:
        raise UnreadableError(f"{size:,} elements are missing at its end")
    return found


def _joined(
    save: _Save, name: str, parts: Sequence[Sequence[TensorRef]], shape: tuple[int, ...]
) -> TensorRef:
    """A tensor of vectors one after the other, without what is too much at their end."""
    numel, at = prod(shape), 0
    chunks = []
    dtype: DType | None = None
    for part in (one for several in parts for one in several):
        n = min(part.numel, numel - at)
        dtype = dtype or part.dtype
        if n > 0 or not numel:
            view = part if n == part.numel else part.replace(shape=(n,))
            chunks.append(Chunk((at,), (n,), lambda view=view: view, save.name))  # type: ignore[misc]
            at += n
    if at != numel or dtype is None:
        raise save._broken(f"{numel - at:,} of {numel:,} elements of {name!r:.200} are missing")
    return TensorRef(dtype, shape, ChunkedStorage(dtype, (numel,), chunks))


def _in_fp32(ref: TensorRef) -> TensorRef:
    """A buffer as ``zero_to_fp32`` has it: what was saved in half precision, in fp32."""
    if ref.dtype.name not in ("bfloat16", "float16"):
        return ref
    return TensorRef(BY_NAME["float32"], ref.shape, Widened(ref))
