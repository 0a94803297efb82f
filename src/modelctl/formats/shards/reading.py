"""Sharded checkpoints, the Hugging Face way: an index file says which tensor lies in which shard
(docs/formats.md#shards, docs/safety.md#shards)."""

from __future__ import annotations

import json
from functools import partial
from typing import Any

from ...core.checkpoint import Checkpoint, Origin
from ...core.nodes import ABSENT, Obj, mapping, ordered_dict
from ...core.notes import Note, warning
from ...core.tensors import TensorRef
from ...errors import UnreadableError
from ...storage.places import Place
from ..base import Format
from ..single import SHARDS, read_single

MAX_INDEX = 256 << 20


class Sharded(Format):
    """An index file and its shards, which may be of any format that holds one state_dict."""

    name = "sharded"
    label = "sharded"
    in_shards = True

    def sniff(self, place: Place) -> bool:
        head = place.head
        return head.lstrip()[:1] == b"{" and (b'"weight_map"' in head or b'"metadata"' in head)

    def read(self, place: Place) -> Checkpoint:
        index = _index(place)
        weight_map: dict[str, str] = index["weight_map"]
        shards: dict[str, Place] = {}
        for shard in weight_map.values():
            if not isinstance(shard, str) or shard not in shards:
                shards[shard] = _shard(place, shard)
        read = place.together(partial(read_single, among=SHARDS), [*shards.values()])
        parts = dict(zip(shards, read, strict=True))
        entries, warnings = _entries(place, weight_map, parts)
        refs = [ref for ref in entries.values() if isinstance(ref, TensorRef)]
        total = (index.get("metadata") or {}).get("total_size")
        unique = sum({ref.identity: ref.nbytes for ref in refs}.values())
        if type(total) is int and total != unique:
            says = f"the index says {total:,} bytes in all, its tensors have {unique:,}"
            warnings.append(warning(says))
        metadata: dict[str, str] = {}
        labels: dict[str, None] = {}
        for part in parts.values():
            metadata.update(part.metadata)
            labels[part.origin.label if part.origin else "?"] = None
        first = next((part.root for part in parts.values()), None)
        return Checkpoint(
            ordered_dict(entries, first.state if isinstance(first, Obj) else ABSENT),
            Origin(
                place.name,
                self.name,
                f"{len(parts)} shards of {', '.join(labels) or 'nothing'}",
                place.size + sum(one.size for one in shards.values()),
            ),
            metadata=metadata,
            warnings=tuple(warnings),
            findings=tuple(finding for part in parts.values() for finding in part.findings),
        )


def _shard(place: Place, name: Any) -> Place:
    if not isinstance(name, str):
        raise _broken(place, f"names {name!r:.200}: not a plain file name beside it")
    try:
        return place.beside(name)
    except UnreadableError as e:
        raise _broken(place, e.reason, e.hint) from None


def _entries(
    place: Place, weight_map: dict[str, str], parts: dict[str, Checkpoint]
) -> tuple[dict[str, Any], list[Note]]:
    """The tensors in the order of the index, then those that are tied to them; what is odd."""
    by_shard: dict[str, list[str]] = {}
    for name, shard in weight_map.items():
        by_shard.setdefault(shard, []).append(name)
    found: dict[str, Any] = {}
    tied: dict[str, TensorRef] = {}
    known: set[Any] = set()
    warnings: list[Note] = []
    for shard, names in by_shard.items():
        entries = mapping(parts[shard].root) or {}
        for name in names:
            if name not in entries:
                raise UnreadableError(
                    f"the index puts {name!r:.200} into {shard}, which does not hold it",
                    path=place.name,
                    hint="download the shards again, all of one version",
                )
            found[name] = entries[name]
            if isinstance(entries[name], TensorRef):
                known.add(entries[name].identity)
        unlisted = [name for name in entries if weight_map.get(name) != shard]
        # safetensors keeps tied tensors once: the index has the name of that one alone
        for name in unlisted:
            value = entries[name]
            if name not in weight_map and isinstance(value, TensorRef) and value.identity in known:
                tied[name] = value
        unlisted = [name for name in unlisted if name not in tied]
        if unlisted:
            first = ", ".join(map(str, unlisted[:3]))
            says = f"{len(unlisted)} tensors that the index does not put there: {first}"
            warnings.append(warning(f"{shard} holds {says}"))
        warnings += parts[shard].warnings
    return {name: found[name] for name in weight_map} | tied, warnings


def _broken(place: Place, message: str, hint: str | None = None) -> UnreadableError:
    return UnreadableError(f"the index {message}", path=place.name, hint=hint)


def _index(place: Place) -> dict[str, Any]:
    if place.size > MAX_INDEX:
        raise _broken(place, f"has {place.size:,} bytes, more than the limit of {MAX_INDEX:,}")

    def pairs(items: list[tuple[str, Any]]) -> dict[str, Any]:
        made = dict(items)
        if len(made) != len(items):
            raise _broken(place, "has a key twice")
        return made

    try:
        index = json.loads(place.source.read(0, place.size), object_pairs_hook=pairs)
    except (ValueError, RecursionError) as e:
        raise _broken(place, f"is no JSON: {e}"[:200]) from None
    if not isinstance(index, dict) or not isinstance(index.get("weight_map"), dict):
        raise _broken(place, "has no weight_map of names to shards")
    if not isinstance(index.get("metadata", {}), dict):
        raise _broken(place, "has metadata that are no mapping")
    return index
