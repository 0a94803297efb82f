"""Sharded checkpoints, the Hugging Face way: an index file says which tensor lies in which shard
(FORMATS section 5; SAFETY: "Shard index")."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Collection
from pathlib import Path
from typing import Any

from ...core.checkpoint import Checkpoint, Origin
from ...core.nodes import ABSENT, mapping, ordered_dict
from ...core.tensors import TensorRef
from ...errors import UnreadableError
from ...storage.source import FileSource
from ..base import Format

MAX_INDEX = 256 << 20
# In the order in which transformers looks for them.
_USUAL_NAMES = (
    *("model.safetensors", "model.safetensors.index.json"),
    *("pytorch_model.bin", "pytorch_model.bin.index.json"),
)
_SHARD = re.compile(r"-\d{5}-of-\d{5}\.\w+$")


def find_in_folder(folder: str | os.PathLike[str]) -> Path:
    """The file that stands for a folder: its index, else its only checkpoint.

    Raises:
        UnreadableError: there is none, or several and none is the usual one.
    """
    folder = Path(folder)
    names = sorted(os.listdir(folder))
    indices = [name for name in names if name.endswith(".index.json")]
    for name in _USUAL_NAMES:
        if name in names:
            return folder / name
    if len(indices) == 1:
        return folder / indices[0]
    suffixes = (".safetensors", ".pt", ".pth", ".bin", ".ckpt")
    found = [name for name in names if name.endswith(suffixes)]
    if len(found) == 1 and not indices and not _SHARD.search(found[0]):
        return folder / found[0]
    if ".metadata" in names:
        raise UnreadableError(
            "a torch.distributed.checkpoint folder, which modelctl does not read yet", path=folder
        )
    if found and all(_SHARD.search(name) for name in found) and not indices:
        raise UnreadableError(
            f"a folder with shards, but without their index: {', '.join(found[:3])}",
            path=folder,
            hint="get the .index.json that belongs to them",
        )
    if found or indices:
        raise UnreadableError(
            f"a folder with several checkpoints: {', '.join((indices + found)[:6])}",
            path=folder,
            hint=f"name one: {folder / (indices + found)[0]}",
        )
    raise UnreadableError("a folder without a checkpoint in it", path=folder)


class Sharded:
    """An index file and its shards, which may be of any format that holds one state_dict."""

    name = "sharded"
    label = "sharded"

    def __init__(self, shard_formats: tuple[Format, ...]) -> None:
        self.shard_formats = shard_formats

    def sniff(self, head: bytes) -> bool:
        return head.lstrip()[:1] == b"{" and (b'"weight_map"' in head or b'"metadata"' in head)

    def read(self, source: FileSource) -> Checkpoint:
        index = _index(source)
        by_shard: dict[str, list[str]] = {}
        for name, shard in index["weight_map"].items():
            _check_name(shard, source)
            by_shard.setdefault(shard, []).append(name)
        opened = [source]
        try:
            return self._assemble(source, index, by_shard, opened)
        except BaseException:
            for shard_source in opened[1:]:
                shard_source.close()
            raise

    def _assemble(
        self,
        source: FileSource,
        index: dict[str, Any],
        by_shard: dict[str, list[str]],
        opened: list[FileSource],
    ) -> Checkpoint:
        found: dict[str, Any] = {}
        tied: dict[str, TensorRef] = {}
        warnings: list[str] = []
        parts: list[Checkpoint] = []
        labels: dict[str, None] = {}
        for shard, names in by_shard.items():
            shard_source = FileSource(source.path.parent / shard, follow=source.follow_links)
            opened.append(shard_source)
            part = self._read_shard(shard_source)
            parts.append(part)
            labels[part.origin.label if part.origin else "?"] = None
            entries = mapping(part.root) or {}
            for name in names:
                if name not in entries:
                    raise UnreadableError(
                        f"the index puts {name!r:.200} into {shard}, which does not hold it",
                        path=source.name,
                        hint="download the shards again, all of one version",
                    )
                found[name] = entries[name]
            unlisted = [name for name in entries if index["weight_map"].get(name) != shard]
            # safetensors keeps tied tensors once: the index has the name of that one alone
            known = {ref.identity for ref in found.values() if isinstance(ref, TensorRef)}
            tied |= {
                n: entries[n]
                for n in unlisted
                if n not in index["weight_map"] and _is_tied(entries[n], known)
            }
            unlisted = [name for name in unlisted if name not in tied]
            if unlisted:
                warnings.append(
                    f"{shard} holds {len(unlisted)} tensors that the index does not put there: "
                    f"{', '.join(map(str, unlisted[:3]))}"
                )
            warnings += part.warnings
        entries_in_order = {name: found[name] for name in index["weight_map"]} | tied
        total = (index.get("metadata") or {}).get("total_size")
        refs = [ref for ref in entries_in_order.values() if isinstance(ref, TensorRef)]
        unique = sum({ref.identity: ref.nbytes for ref in refs}.values())
        if type(total) is int and total != unique:
            warnings.append(f"the index says {total:,} bytes in all, its tensors have {unique:,}")
        metadata: dict[str, str] = {}
        state: Any = ABSENT
        for part in parts:
            metadata.update(part.metadata)
        first = parts[0].root if parts else None
        if first is not None and hasattr(first, "state"):
            state = first.state
        return Checkpoint(
            ordered_dict(entries_in_order, state),
            Origin(
                source.name,
                self.name,
                f"{len(parts)} shards of {', '.join(labels) or 'nothing'}",
                source.size + sum(shard_source.size for shard_source in opened[1:]),
            ),
            metadata=metadata,
            warnings=tuple(warnings),
            findings=tuple(finding for part in parts for finding in part.findings),
            resources=tuple(opened),
        )

    def _read_shard(self, source: FileSource) -> Checkpoint:
        head = source.read(0, min(4096, source.size))
        for known in self.shard_formats:
            if known.sniff(head):
                return known.read(source)
        raise UnreadableError("a shard that is no checkpoint", path=source.name)


def _is_tied(value: Any, known: Collection[Any]) -> bool:
    return isinstance(value, TensorRef) and value.identity in known


def _index(source: FileSource) -> dict[str, Any]:
    def broken(message: str) -> UnreadableError:
        return UnreadableError(f"the index {message}", path=source.name)

    if source.size > MAX_INDEX:
        raise broken(f"has {source.size:,} bytes, more than the limit of {MAX_INDEX:,}")

    def pairs(items: list[tuple[str, Any]]) -> dict[str, Any]:
        made = dict(items)
        if len(made) != len(items):
            raise broken("has a key twice")
        return made

    try:
        index = json.loads(source.read(0, source.size), object_pairs_hook=pairs)
    except (ValueError, RecursionError) as e:
        raise broken(f"is no JSON: {e}"[:200]) from None
    if not isinstance(index, dict) or not isinstance(index.get("weight_map"), dict):
        raise broken("has no weight_map of names to shards")
    if not isinstance(index.get("metadata", {}), dict):
        raise broken("has metadata that are no mapping")
    return index


def _check_name(shard: Any, source: FileSource) -> None:
    plain = (
        isinstance(shard, str)
        and shard not in ("", ".", "..")
        and not any(c in shard for c in "/\\\0")
    )
    if not plain or shard == source.path.name:
        raise UnreadableError(
            f"the index names {shard!r:.200} as a shard: not a plain file name beside it",
            path=source.name,
        )
