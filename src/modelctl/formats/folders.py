"""A folder with one checkpoint in it: a model as Hugging Face lays it out, alone or with what a
training keeps beside it (docs/formats.md#folders)."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Callable, Collection, Mapping
from shlex import quote
from typing import Any

from ..core.checkpoint import Checkpoint, Origin
from ..core.checkpoint import Folder as Parts
from ..core.nodes import mapping
from ..core.notes import Loss
from ..core.storages import Storage
from ..core.text import some
from ..errors import ModelctlError, UnreadableError
from ..storage.layout import FileLayout, Layout, LayoutBuilder
from ..storage.places import Place
from .base import WritableFolder, WritableFormat
from .beside import along, others
from .pytorch.zip import TorchZip
from .safetensors import Safetensors
from .shards.reading import Sharded
from .shards.writing import INDEX, MAX_SHARD_SIZE, ShardNames, parse_size, shards_layout
from .single import read_single

# In the order in which transformers, peft and diffusers look for them.
_MODELS = tuple(
    stem + suffix + end
    for stem, suffixes in (
        ("model", (".safetensors",)),
        ("pytorch_model", (".bin",)),
        ("adapter_model", (".safetensors", ".bin")),
        ("diffusion_pytorch_model", (".safetensors", ".bin")),
    )
    for suffix in suffixes
    for end in ("", INDEX)
)
# What transformers' Trainer and accelerate keep beside a model, by the key that it has here.
_PARTS = {
    "optimizer": ("optimizer.pt", "optimizer.bin"),
    "scheduler": ("scheduler.pt", "scheduler.bin"),
    "scaler": ("scaler.pt",),
    "trainer_state": ("trainer_state.json",),
}
SUFFIXES = (".safetensors", ".pt", ".pth", ".bin", ".ckpt")
SHARD = re.compile(r"-\d{5}-of-\d{5}\.\w+$")
# The weights in a format of others.
_OF_OTHERS = re.compile(r"(tf_model|flax_model|rust_model|.*\.onnx|.*\.gguf|.*\.mlmodel)", re.I)
_MOST_JSON = 256 << 20
_WRITERS: tuple[WritableFormat, ...] = (Safetensors(), TorchZip())


class Folder(WritableFolder):
    """An index and its shards, or a file; the optimizer, scheduler and progress of a training where
    they stand beside it. What else is there goes along into a new folder."""

    name = "folder"
    label = "a folder of shards"
    by_name = False  # nothing becomes such a folder but what was read from one
    whole_storages = True
    string_metadata = True
    keeps_records = True

    # ------------------------------------------------------------------ reading

    def sniff(self, place: Place) -> bool:
        return _stands_for(place) is not None

    def read(self, place: Place) -> Checkpoint:
        found = _stands_for(place)
        assert found is not None
        inner, sharded = place.member(found), Sharded()
        model = sharded.read(inner) if sharded.sniff(inner) else read_single(inner)
        parts = {
            key: next((name for name in names if name in place.names), None)
            for key, names in _PARTS.items()
        }
        files = {key: name for key, name in parts.items() if name is not None}
        weights = _weights(place, inner, found)
        if not files and found not in _MODELS:
            return model
        beside, left = _beside(place, {*weights, *files.values()})
        if not files:
            return model.replace(folder=Parts({"": found}, beside, left))
        root: dict[str, Any] = {"model": model.root}
        read = [model]
        size = model.origin.bytes_on_disk if model.origin else 0
        for key, name in files.items():
            one = place.member(name)
            if name.endswith(".json"):
                root[key] = _json(one)
                size += one.size
                continue
            read.append(read_single(one))
            root[key] = read[-1].root
            size += one.size
        labels = dict.fromkeys(one.origin.label for one in read if one.origin)
        label = f"training folder: {', '.join(labels)}"
        return Checkpoint(
            root,
            Origin(place.name, self.name, label, size),
            metadata=model.metadata,
            warnings=tuple(w for one in read for w in one.warnings),
            findings=tuple(f for one in read for f in one.findings),
            folder=Parts({"model": found, **files}, beside, left),
        )

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
        if found and all(map(SHARD.search, found)) and not indices:
            return UnreadableError(
                f"a folder with shards, but without their index: {', '.join(found[:3])}",
                path=place.name,
                hint="get the .index.json that belongs to them",
            )
        return UnreadableError("a folder without a checkpoint in it", path=place.name)

    # ------------------------------------------------------------------ writing

    def losses(self, ckpt: Checkpoint) -> list[Loss]:
        if ckpt.folder is None:
            return [Loss("it was not read from a folder", "name a file, or a format with --to")]
        parts = _roots(ckpt)
        lost = [
            Loss(
                f"'{key}' has no file in the folder ({some(list(ckpt.folder.files.values()))})",
                "name a file: -o NAME.pt takes all of it",
            )
            for key in parts
            if key not in ckpt.folder.files
        ]
        for key, node in parts.items():
            writer = _writer(ckpt.folder.files.get(key, ".json"))
            if writer is not None:
                lost += writer.losses(ckpt.replace(root=node))
        return lost

    def occupied(self, there: Collection[str]) -> list[str]:
        known = {name for names in _PARTS.values() for name in names} | {*_MODELS}
        return [name for name in there if name in known]

    def layout(self, ckpt: Checkpoint, there: Collection[str], *, in_place: bool) -> Layout:
        """The files that changed, or in a new folder all, with what stands beside them."""
        folder = ckpt.folder
        assert folder is not None
        roots = _roots(ckpt)
        before = _roots(ckpt.replace(root=ckpt.read)) if ckpt.read is not None else {}
        files, notes = ([], []) if in_place else along(folder)
        stale: list[str] = []
        last: list[FileLayout] = []
        for key, name in folder.files.items():
            if key not in roots:
                stale += [name] if in_place else []
            elif not in_place or roots[key] is not before.get(key):
                part = ckpt.replace(root=roots[key])
                if name.endswith(INDEX):
                    made = _sharded(part, name, there)
                    last += made.files
                    stale += made.superseded
                else:
                    (last if key in ("", "model") else files).append(_one(part, name))
        return Layout([*files, *last], stale, notes)


def _roots(ckpt: Checkpoint) -> Mapping[str, Any]:
    """The tree of each part; the model alone, where nothing else is left."""
    assert ckpt.folder is not None
    if "" in ckpt.folder.files:
        return {"": ckpt.root}
    entries = mapping(ckpt.root) or {}
    if "model" not in entries or ckpt.sections.kind == "state_dict":
        return {"model": ckpt.root}
    return {str(key): node for key, node in entries.items()}


def _writer(name: str) -> WritableFormat | None:
    """What writes a file of that name; None for JSON."""
    if name.endswith(INDEX):
        name = name.removesuffix(INDEX)
    if name.endswith(".json"):
        return None
    return next((one for one in _WRITERS if name.endswith(one.suffixes)), _WRITERS[-1])


def _one(part: Checkpoint, name: str) -> FileLayout:
    writer = _writer(name)
    if writer is not None:
        return writer.layout(part, name)
    out = LayoutBuilder()
    out.add((json.dumps(part.root, indent=2, ensure_ascii=False) + "\n").encode())
    return out.file(name)


def _sharded(part: Checkpoint, index: str, there: Collection[str]) -> Layout:
    """Shards about as large as they were."""
    writer = _writer(index)
    assert writer is not None
    in_file: dict[str, dict[int, int]] = {}
    for ref in part.tensors().values():
        for run in (ref.storage.runs() or ())[:1]:
            in_file.setdefault(run.source.name, {})[id(ref.storage)] = ref.storage.nbytes
    limit = max((sum(sizes.values()) for sizes in in_file.values()), default=0)
    names = ShardNames(*os.path.splitext(index.removesuffix(INDEX)))
    old = [name for name in there if name == index or names.includes(name)]
    limit = limit or parse_size(MAX_SHARD_SIZE)
    return shards_layout(part, writer, names, limit, taken=there, old=old)


# ---------------------------------------------------------------------- what is in a folder


def is_part(name: str) -> bool:
    """Whether a folder takes a file of this name along as a part of its checkpoint."""
    return any(name in names for names in _PARTS.values())


def _weights(place: Place, inner: Place, found: str) -> set[str]:
    """The files that hold the model: its own, or an index and its shards."""
    if not found.endswith(".json"):
        return {found}
    index = _json(inner)
    shards = index.get("weight_map") if isinstance(index, dict) else None
    names = shards.values() if isinstance(shards, dict) else ()
    return {found, *(name for name in names if isinstance(name, str))}


def _beside(
    place: Place, own: Collection[str]
) -> tuple[dict[str, Callable[[], Storage]], list[str]]:
    """What else is in a folder: what goes along with it, and what does not."""
    found, many = others(place, own)
    left = [name for name in found if _is_weights(name)]
    return {name: opened for name, opened in found.items() if name not in left}, [*many, *left]


def _is_weights(name: str) -> bool:
    """Whether it is the weights once more, as they were."""
    return name in _MODELS or bool(SHARD.search(name) or _OF_OTHERS.match(name))


def _json(place: Place) -> Any:
    if place.size > _MOST_JSON:
        raise UnreadableError(f"{place.size:,} bytes of JSON", path=place.name)
    try:
        return json.loads(place.source.read(0, place.size))
    except (ValueError, RecursionError) as e:
        raise UnreadableError(f"no JSON: {e}"[:200], path=place.name) from None


def _stands_for(place: Place) -> str | None:
    """The file that stands for a folder: its index, else its only checkpoint; None where there is
    none, or several and none is the usual one."""
    for name in _MODELS:
        if name in place.names:
            return name
    indices, found = _candidates(place)
    if len(indices) == 1:
        return indices[0]
    return found[0] if len(found) == 1 and not indices and not SHARD.search(found[0]) else None


def _candidates(place: Place) -> tuple[list[str], list[str]]:
    """The indices and the files in a folder that are called like checkpoints."""
    names = place.names
    return (
        [name for name in names if name.endswith(INDEX)],
        [name for name in names if name.endswith(SUFFIXES)],
    )


def latest_of(place: Place, name: str = "latest") -> str:
    """What the file ``latest`` in a folder says, which is the name of another there; nothing where
    there is none, or it is no such file."""
    if name not in place.names:
        return ""
    latest = place.member(name)  # of others it may be a link, to whatever
    try:
        if latest.is_folder or latest.size > 1024:
            return ""
    except ModelctlError:
        return ""
    return latest.head.decode("utf-8", "replace").strip()
