"""A state_dict as shards and an index, the Hugging Face way (docs/formats.md#shards).

The plan is that of huggingface_hub: greedy in the order of the keys, a tensor that is bigger than
a shard has one to itself, tensors with one storage stay together. One shard needs no index.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Collection, Iterable
from typing import Any, NamedTuple

from ...core.checkpoint import Checkpoint
from ...core.nodes import Composite, Obj, attributes, mapping, ordered_dict, with_attributes
from ...core.records import without_records
from ...core.tensors import TensorRef
from ...errors import UsageError, WriteError
from ...storage.layout import Layout, LayoutBuilder
from ...storage.outputs import OutPlace
from ..base import WritableFormat

MAX_SHARD_SIZE = "5GB"
INDEX = ".index.json"
# The most digits of a size: a file system counts with 19.
_DIGITS = 30
_UNITS = {"": 1, **{unit: 1000**i for i, unit in enumerate(("K", "M", "G", "T"), 1)}}


def parse_size(size: int | str) -> int:
    """Bytes: a number, or one with a decimal unit (``5GB``, ``200 MB``) or a binary one (``4GiB``).

    Raises:
        UsageError: no size, or none above zero.
    """
    from fractions import Fraction

    number = rf"\d{{1,{_DIGITS}}}(?:\.\d{{1,{_DIGITS}}})?"
    found = re.fullmatch(rf"({number})\s*([KMGT]?)(I?)B?", str(size).strip().upper(), re.ASCII)
    if found is None or (found[3] and not found[2]):
        raise UsageError(f"'{size!s:.40}' is no size", hint="5GB, 200MB and 4GiB are")
    unit = _UNITS[found[2]]
    if found[3]:
        unit = 1024 ** [*_UNITS].index(found[2])
    nbytes = int(Fraction(found[1]) * unit)
    if nbytes < 1:
        raise UsageError(f"a shard of {size} holds nothing")
    return nbytes


class ShardNames(NamedTuple):
    """What shards and their index are called.

    Attributes:
        stem, suffix: of the files (``model``, ``.safetensors``).
        index_name: what the index is called where that is not the usual name.
    """

    stem: str
    suffix: str
    index_name: str = ""

    @property
    def index_file(self) -> str:
        return self.index_name or self.stem + self.suffix + INDEX

    @property
    def single(self) -> str:
        """The file where all fits into one."""
        return self.stem + self.suffix

    def includes(self, name: str) -> bool:
        """Whether a file is called like a shard of this name."""
        found = _NUMBERED.fullmatch(name)
        return found is not None and (found[1], found[2]) == (self.stem, self.suffix)


# A shard as it is called here and on the hub, the stem without the number of an edit in place.
_NUMBERED = re.compile(r"(.+?)(?:\.\d+)?-\d{5}-of-\d{5}((?:\.\w+)+)")


def shards_in(index: str | os.PathLike[str] | OutPlace) -> dict[str, str] | None:
    """Which shard each tensor is in, as an index that stands there says; None where it is none."""
    try:
        place = index if isinstance(index, OutPlace) else OutPlace(index)
        found = json.loads(place.read())["weight_map"]
        return {str(name): str(shard) for name, shard in found.items()}
    except (OSError, ValueError, KeyError, AttributeError, TypeError, RecursionError):
        return None


def names_by_index(index: OutPlace) -> ShardNames | None:
    """What new shards of an index that stands there are called, so that it keeps its own name: as
    those that it names, else after itself. None where it is no index."""
    shards = list(dict.fromkeys((shards_in(index) or {}).values()))
    if not shards:
        return None
    name = index.filename
    numbered = {found.groups() for found in map(_NUMBERED.fullmatch, shards) if found}
    if len(numbered) == 1:
        stem, suffix = numbered.pop()
        return ShardNames(stem, suffix, name)
    suffix = os.path.splitext(shards[0])[1]
    stem = name.removesuffix(".json").removesuffix(".index").removesuffix(suffix)
    return ShardNames(stem, suffix, name)


def plan_shards(ckpt: Checkpoint, limit: int, *, by_storage: bool) -> list[list[str]]:
    """The names in each shard of at most ``limit`` bytes.

    ``by_storage``: what is written are whole storages, so views of one count once.
    """
    shards: list[list[str]] = []
    current: list[str] = []
    size = 0
    place: dict[Any, list[str]] = {}
    for name, value in (mapping(ckpt.root) or {}).items():
        key, nbytes = _unit(value, by_storage)
        if key in place:
            place[key].append(name)
            continue
        if nbytes > limit:
            shards.append([name])
            place[key] = shards[-1]
            continue
        if size + nbytes > limit:
            shards.append(current)
            current, size = [], 0
        current.append(name)
        place[key] = current
        size += nbytes
    return [*shards, current] if current else shards


def _unit(value: Any, by_storage: bool) -> tuple[Any, int]:
    """What is written once, and its bytes."""
    if isinstance(value, TensorRef):
        if by_storage:
            return id(value.storage), value.storage.nbytes
        return value.identity, value.nbytes
    return id(value), value.nbytes if isinstance(value, Composite) else 0


def shards_layout(
    ckpt: Checkpoint,
    fmt: WritableFormat,
    names: ShardNames,
    limit: int,
    *,
    taken: Iterable[str] = (),
    old: Iterable[str] = (),
) -> Layout:
    """The shards and, behind them, their index; or one file where all fits into one.

    A shard never takes the name of a file that is there: until the index is replaced, the old
    one and its shards are what they were.

    Args:
        names: what the files are called.
        limit: the most bytes in a shard.
        taken: names that are there.
        old: those of them that the new files supersede.
    """
    shards = plan_shards(ckpt, limit, by_storage=fmt.whole_storages)
    if len(shards) <= 1:
        name = names.single
        return Layout([fmt.layout(ckpt, name)], [one for one in old if one != name])
    shard_names = _free_names({*taken}, names, len(shards))
    entries = mapping(ckpt.root) or {}
    weight_map: dict[str, str] = {}
    seen: set[Any] = set()
    total = 0
    files = []
    for i, (name, inside) in enumerate(zip(shard_names, shards, strict=True)):
        part = {key: entries[key] for key in inside}
        files.append(fmt.layout(ckpt.replace(root=_shard(ckpt.root, part, first=i == 0)), name))
        for key in inside:
            unit, size = _unit(part[key], False)
            # where tied tensors are kept once, under the first name, readers find no other
            if unit not in seen or fmt.whole_storages:
                weight_map[key] = name
            total += 0 if unit in seen else size
            seen.add(unit)
    weight_map = {key: weight_map[key] for key in entries if key in weight_map}
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    out = LayoutBuilder()
    text = json.dumps(index, indent=2, ensure_ascii=False) + "\n"
    out.add(text.encode("utf-8", "surrogatepass"))
    files.append(out.file(names.index_file))
    new = {file.name for file in files}
    return Layout(files, [one for one in old if one not in new])


def _shard(root: Any, entries: dict[str, Any], first: bool) -> Any:
    """A state_dict of a part of the entries; our records are in the first one alone."""
    if not isinstance(root, Obj):
        return entries
    found = mapping(attributes(root).get("_metadata"))
    node = ordered_dict(entries, root.state)
    if first or found is None:
        return node
    plain = {**found, "": without_records(found.get(""))} if "" in found else found
    return with_attributes(node, {"_metadata": ordered_dict(dict(plain))})


def _free_names(taken: Collection[str], wanted: ShardNames, count: int) -> list[str]:
    """``model-00001-of-00007.safetensors`` …, or with another stem where one of them is taken."""
    stem, suffix, _ = wanted
    for again in range(1, 1000):
        base = stem if again == 1 else f"{stem}.{again}"
        names = [f"{base}-{i:05d}-of-{count:05d}{suffix}" for i in range(1, count + 1)]
        if not any(name in taken for name in names):
            return names
    raise WriteError(f"no free names for the shards of {stem}{suffix}")


def superseded(folder: OutPlace, names: ShardNames) -> list[str]:
    """The files in a folder that a new checkpoint of this name takes the place of: the single
    file, the index, and the shards that the index names."""
    there = {*folder.names}
    found = [name for name in (names.single, names.index_file) if name in there]
    if names.index_file in found:
        shards = dict.fromkeys((shards_in(folder.member(names.index_file)) or {}).values())
        # an index may name any file: only what is called like a shard of ours goes
        found += [name for name in shards if names.includes(name)]
    return found
