"""A state_dict as shards and an index, the Hugging Face way (docs/formats.md#shards).

The plan is that of huggingface_hub: greedy in the order of the keys, a tensor that is bigger than
a shard has one to itself, tensors with one storage stay together. One shard needs no index.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Collection, Iterable
from pathlib import Path
from typing import Any

from ...core.checkpoint import Checkpoint
from ...core.nodes import Composite, Obj, attributes, mapping, ordered_dict, with_attributes
from ...core.records import without_records
from ...core.tensors import TensorRef
from ...errors import UsageError, WriteError
from ...storage.layout import Layout, LayoutBuilder
from ..base import WritableFormat

MAX_SHARD_SIZE = "5GB"
INDEX = ".index.json"
_UNITS = {"": 1, **{unit: 1000**i for i, unit in enumerate(("K", "M", "G", "T"), 1)}}


def parse_size(size: int | str) -> int:
    """Bytes: a number, or one with a decimal unit (``5GB``, ``200 MB``) or a binary one (``4GiB``).

    Raises:
        UsageError: no size, or none above zero.
    """
    found = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([KMGT]?)(I?)B?", str(size).strip().upper())
    if found is None or (found[3] and not found[2]):
        raise UsageError(f"'{size}' is no size", hint="5GB, 200MB and 4GiB are")
    unit = _UNITS[found[2]]
    if found[3]:
        unit = 1024 ** [*_UNITS].index(found[2])
    nbytes = int(float(found[1]) * unit)
    if nbytes < 1:
        raise UsageError(f"a shard of {size} holds nothing")
    return nbytes


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
    names: tuple[str, str],
    limit: int,
    *,
    taken: Iterable[str] = (),
    old: Iterable[str] = (),
) -> Layout:
    """The shards and, behind them, their index; or one file where all fits into one.

    A shard never takes the name of a file that is there: until the index is replaced, the old
    one and its shards are what they were.

    Args:
        names: stem and suffix of the files (``model``, ``.safetensors``).
        limit: the most bytes in a shard.
        taken: names that are there.
        old: those of them that the new files supersede.
    """
    stem, suffix = names
    shards = plan_shards(ckpt, limit, by_storage=fmt.whole_storages)
    if len(shards) <= 1:
        name = stem + suffix
        return Layout([fmt.layout(ckpt, name)], [one for one in old if one != name])
    shard_names = _free_names({*taken}, stem, suffix, len(shards))
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
    files.append(out.file(stem + suffix + INDEX))
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


def _free_names(taken: Collection[str], stem: str, suffix: str, count: int) -> list[str]:
    """``model-00001-of-00007.safetensors`` …, or with another stem where one of them is taken."""
    for again in range(1, 1000):
        base = stem if again == 1 else f"{stem}.{again}"
        names = [f"{base}-{i:05d}-of-{count:05d}{suffix}" for i in range(1, count + 1)]
        if not any(name in taken for name in names):
            return names
    raise WriteError(f"no free names for the shards of {stem}{suffix}")


def superseded(folder: str | os.PathLike[str], stem: str, suffix: str) -> list[str]:
    """The files in a folder that a new checkpoint of this name takes the place of: the single
    file, the index, and the shards that the index names."""
    folder = Path(folder)
    found = [name for name in (stem + suffix, stem + suffix + INDEX) if (folder / name).exists()]
    if stem + suffix + INDEX in found:
        try:
            index = json.loads((folder / (stem + suffix + INDEX)).read_bytes())
            shards = dict.fromkeys(map(str, index["weight_map"].values()))
        except (OSError, ValueError, KeyError, AttributeError, TypeError, RecursionError):
            return found
        # an index may name any file: only what is called like a shard of ours goes
        ours = re.compile(rf"{re.escape(stem)}(\.\d+)?-\d{{5}}-of-\d{{5}}{re.escape(suffix)}")
        found += [name for name in shards if ours.fullmatch(name)]
    return found
