"""Folders that ``torch.distributed.checkpoint`` writes with its Hugging Face writer
(docs/formats.md#dcp): safetensors files with parts of tensors, each of which says where its part
begins."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Sequence

from ...core.checkpoint import Checkpoint, Origin
from ...core.nodes import mapping
from ...core.notes import Note, info, warning
from ...core.tensors import TensorRef
from ...core.text import count, some
from ...errors import UnreadableError
from ...storage.chunked import Chunk, ChunkedStorage, placed
from ...storage.places import Place
from ..base import Format
from ..safetensors import Safetensors
from ..shards.writing import INDEX
from .metadata import torch_size

_INFO, _VERSION = "DCP_SHARDING_INFO", "DCP_VERSION"
_FILES = Safetensors()
# of a rank, from 1 on, and of a number of files that the names of tensors are shared out to
_FILE = re.compile(r"shard-(\d{5,9})-model-(\d{5,9})-of-(\d{5,9})\.safetensors")
_AGAIN = "copy the folder again, with the files of all ranks"


class PartsInSafetensors(Format):
    """Safetensors files with parts of tensors, without an index."""

    name = "dcp-safetensors"
    label = "DCP safetensors"

    def sniff(self, place: Place) -> bool:
        names = _names(place)
        return bool(names) and _INFO.encode() in place.member(names[0]).head

    def read(self, place: Place) -> Checkpoint:
        names = _names(place)
        notes = tuple(_missing(place.name, names))
        chunks: dict[str, list[Chunk]] = {}
        whole: dict[str, TensorRef] = {}
        metadata: dict[str, str] = {}
        size = 0
        files = place.together(_FILES.read, [place.member(name) for name in names])
        for name, one in zip(names, files, strict=True):
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
                    hint=_AGAIN,
                ) from None
            root[key] = TensorRef(dtype, shape, ChunkedStorage(dtype, shape, inside))
        label = f"{self.label}, {count(len(names), 'file')}"
        origin = Origin(place.name, self.name, label, size)
        return Checkpoint(root, origin, metadata=metadata, warnings=notes)


def _names(place: Place) -> list[str]:
    if any(name.endswith(INDEX) for name in place.names):
        return []
    return [name for name in place.names if name.endswith(".safetensors")]


def _missing(folder: str, names: Sequence[str]) -> Iterator[Note]:
    """What the names of the files tell of others that should be there.

    Raises:
        UnreadableError: some tensors are in none of them.
    """
    found = [match.groups() for match in map(_FILE.fullmatch, names) if match]
    if len(found) < len(names):
        return
    ranks, indices, totals = ({int(one[i]) for one in found} for i in range(3))
    if len(totals) > 1:
        raise UnreadableError(f"files of several saves: {some(names, 3)}", path=folder, hint=_AGAIN)
    (total,) = totals
    if len(indices) < total:
        lost = next(i for i in range(1, total + 1) if i not in indices)
        raise UnreadableError(
            f"model-{lost:05}-of-{total:05} is missing, of every rank", path=folder, hint=_AGAIN
        )
    if len(ranks) < max(ranks):
        lost = next(i for i in range(1, max(ranks)) if i not in ranks)
        yield warning(
            f"no file shard-{lost:05}-…: what that rank alone held is not here",
            "a rank that holds nothing writes none",
        )
    yield info(
        f"the files of {count(len(ranks), 'rank')} are here, and none says how many saved it: "
        "without those of the last, tensors end before they should",
        "'modelctl match' compares the shapes with the model's",
    )


def _starts(place: Place, name: str, text: str | None) -> dict[str, tuple[int, ...]]:
    """Where each part of a file begins in its tensor."""
    try:
        info = {} if text is None else json.loads(text)
        return {key: torch_size(one["saved_offsets"]) for key, one in info.items()}
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError, UnreadableError):
        raise UnreadableError(
            f"its {_INFO} does not say where its parts begin", path=f"{place.name}/{name}"
        ) from None
