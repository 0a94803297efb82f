"""Folders that ``torch.distributed.checkpoint`` writes with its Hugging Face writer
(docs/formats.md#dcp): safetensors files with parts of tensors, each of which says where its part
begins."""

from __future__ import annotations

import json

from ...core.checkpoint import Checkpoint, Origin
from ...core.nodes import mapping
from ...core.tensors import TensorRef
from ...core.text import count
from ...errors import UnreadableError
from ...storage.chunked import Chunk, ChunkedStorage, placed
from ...storage.places import Place
from ..base import Format
from ..safetensors import Safetensors
from ..shards.writing import INDEX
from .metadata import torch_size

_INFO, _VERSION = "DCP_SHARDING_INFO", "DCP_VERSION"
_FILES = Safetensors()


class PartsInSafetensors(Format):
    """Safetensors files with parts of tensors, without an index."""

    name = "dcp-safetensors"
    label = "DCP safetensors"

    def sniff(self, place: Place) -> bool:
        names = _names(place)
        return bool(names) and _INFO.encode() in place.member(names[0]).head

    def read(self, place: Place) -> Checkpoint:
        names = _names(place)
        chunks: dict[str, list[Chunk]] = {}
        whole: dict[str, TensorRef] = {}
        metadata: dict[str, str] = {}
        size = 0
        for name in names:
            one = _FILES.read(place.member(name))
            size += one.origin.bytes_on_disk if one.origin else 0
            metadata.update(one.metadata)
            starts = _starts(place, name, metadata.pop(_INFO, None))
            for key, ref in (mapping(one.root) or {}).items():
                offsets = starts.get(key, (0,) * len(ref.shape))
                whole.setdefault(key, ref)
                sides = {len(offsets), len(ref.shape), len(whole[key].shape)}
                if len(sides) > 1 or ref.dtype != whole[key].dtype:
                    raise UnreadableError(
                        f"the parts of {key!r:.200} do not go together", path=f"{place.name}/{name}"
                    )
                chunks.setdefault(key, []).append(Chunk.of(offsets, ref, name))
        metadata.pop(_VERSION, None)
        root = {}
        for key, parts in chunks.items():
            ends = [[at + n for at, n in zip(c.offsets, c.sizes, strict=True)] for c in parts]
            shape = tuple(map(max, zip(*ends, strict=True)))
            dtype = whole[key].dtype
            try:
                inside = placed(shape, parts)
            except UnreadableError as e:
                raise UnreadableError(
                    f"{key!r:.200}: {e.reason}",
                    path=place.name,
                    hint="copy the folder again, with the files of all ranks",
                ) from None
            root[key] = TensorRef(dtype, shape, ChunkedStorage(dtype, shape, inside))
        label = f"{self.label}, {count(len(names), 'file')}"
        return Checkpoint(root, Origin(place.name, self.name, label, size), metadata=metadata)


def _names(place: Place) -> list[str]:
    if any(name.endswith(INDEX) for name in place.names):
        return []
    return [name for name in place.names if name.endswith(".safetensors")]


def _starts(place: Place, name: str, text: str | None) -> dict[str, tuple[int, ...]]:
    """Where each part of a file begins in its tensor."""
    try:
        info = {} if text is None else json.loads(text)
        return {key: torch_size(one["saved_offsets"]) for key, one in info.items()}
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError, UnreadableError):
        raise UnreadableError(
            f"its {_INFO} does not say where its parts begin", path=f"{place.name}/{name}"
        ) from None
