"""A folder that stands for the one checkpoint in it."""

from __future__ import annotations

import os
import re
from shlex import quote

from ..core.checkpoint import Checkpoint
from ..errors import ModelctlError, UnreadableError
from ..storage.places import Place
from .base import Format
from .shards.reading import Sharded
from .shards.writing import INDEX
from .single import read_single

# In the order in which transformers looks for them.
_USUAL_NAMES = (
    *("model.safetensors", "model.safetensors" + INDEX),
    *("pytorch_model.bin", "pytorch_model.bin" + INDEX),
)
_SUFFIXES = (".safetensors", ".pt", ".pth", ".bin", ".ckpt")
_SHARD = re.compile(r"-\d{5}-of-\d{5}\.\w+$")


class Folder(Format):
    """A folder with one checkpoint in it: an index and its shards, or a file."""

    name = "folder"
    label = "a folder of shards"

    def sniff(self, place: Place) -> bool:
        return _stands_for(place) is not None

    def read(self, place: Place) -> Checkpoint:
        found = _stands_for(place)
        assert found is not None
        inner, sharded = place.member(found), Sharded()
        return sharded.read(inner) if sharded.sniff(inner) else read_single(inner)

    def explain(self, place: Place) -> ModelctlError | None:
        if not place.is_folder:
            return None
        indices, found = _candidates(place)
        if "data.pkl" in place.names and "data" in place.names:
            folder, name = os.path.split(os.path.abspath(place.name))
            return UnreadableError(
                "a file of torch.save, unpacked: its data.pkl and its storages",
                path=place.name,
                hint=f"pack it again: cd {quote(folder)} && zip -0 -r {quote(name + '.pt')} "
                f"{quote(name)}",
            )
        if found and all(map(_SHARD.search, found)) and not indices:
            return UnreadableError(
                f"a folder with shards, but without their index: {', '.join(found[:3])}",
                path=place.name,
                hint="get the .index.json that belongs to them",
            )
        if found or indices:
            return UnreadableError(
                f"a folder with several checkpoints: {', '.join((indices + found)[:6])}",
                path=place.name,
                hint=f"name one: {quote(place.member((indices + found)[0]).name)}",
            )
        return UnreadableError("a folder without a checkpoint in it", path=place.name)


def _stands_for(place: Place) -> str | None:
    """The file that stands for a folder: its index, else its only checkpoint; None where there is
    none, or several and none is the usual one."""
    for name in _USUAL_NAMES:
        if name in place.names:
            return name
    indices, found = _candidates(place)
    if len(indices) == 1:
        return indices[0]
    return found[0] if len(found) == 1 and not indices and not _SHARD.search(found[0]) else None


def _candidates(place: Place) -> tuple[list[str], list[str]]:
    """The indices and the files in a folder that are called like checkpoints."""
    names = place.names
    return (
        [name for name in names if name.endswith(INDEX)],
        [name for name in names if name.endswith(_SUFFIXES)],
    )
