"""What ``torch.distributed.checkpoint`` writes beside its data (docs/formats.md#dcp): which tensors
and objects there are, and in which range of which file each part of them lies."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from ...core.checkpoint import Finding
from ...core.dtypes import BY_NAME, DType
from ...core.nodes import Global, Obj, attributes, mapping
from ...core.records import PREFIX
from ...core.tree import Path, brief
from ...errors import UnreadableError
from ...pickles.interpreter import unpickle
from ...storage.places import Place

NAME = ".metadata"
OF_RANK = re.compile(r"__(\d+)\.metadata")  # where ranks write alone, since torch 2.9
# What modelctl records of the model (docs/records.md): an attribute that torch does not look at,
# or, where torch itself writes, an entry among its planner's data.
RECORDS = "modelctl.records"
NOTED = "mcore_data"  # Megatron's own field, for each tensor that it flattened
_MODULE = "torch.distributed.checkpoint.metadata"
METADATA = Global(_MODULE, "Metadata")
_TENSOR = Global(_MODULE, "TensorStorageMetadata")
_BYTES = Global(_MODULE, "BytesStorageMetadata")
_MOST_DIMS = 64


class Item(NamedTuple):
    """A range of a file in which one part of a tensor, or an object, was saved; ``transforms`` says
    how its bytes were changed on their way there."""

    file: str
    offset: int
    length: int
    transforms: tuple[str, ...] = ()


class Part(NamedTuple):
    """A box of a tensor, and where it was saved."""

    offsets: tuple[int, ...]
    sizes: tuple[int, ...]
    item: Item


class Saved(NamedTuple):
    """A tensor as a whole, and its parts; ``noted`` is what Megatron notes of it (the shape that
    it had before it was flattened)."""

    dtype: DType
    shape: tuple[int, ...]
    parts: list[Part]
    noted: Any = None


@dataclass
class Described:
    """What a checkpoint holds, by the names that ranks agreed on.

    Attributes:
        entries: a tensor, or the item of an object, by its flattened name.
        paths: where in the tree an entry belongs; the name itself where nothing is said.
        findings: what unpickling the metadata would run.
        records: what modelctl recorded of the model.
    """

    entries: dict[str, Saved | Item] = field(default_factory=dict)
    paths: dict[str, Path] = field(default_factory=dict)
    findings: list[Finding] = field(default_factory=list)
    records: dict[str, Any] = field(default_factory=dict)

    def path(self, name: str) -> Path:
        return self.paths.get(name, (name,))

    @property
    def whole(self) -> bool:
        """Whether no entry was taken apart before it was saved: nothing says where one belongs."""
        return not self.paths

    def add(self, other: Described) -> None:
        """What another rank says of its own parts.

        Raises:
            UnreadableError: it says something else of a tensor.
        """
        for name, entry in other.entries.items():
            mine = self.entries.setdefault(name, entry)
            if mine is entry or isinstance(mine, Item):
                continue
            if not isinstance(entry, Saved) or entry[:2] != mine[:2]:
                raise UnreadableError(
                    f"two ranks say different things of {name!r:.200}: of two saves?"
                )
            mine.parts.extend(entry.parts)
        self.paths.update(other.paths)
        self.findings += other.findings
        self.records.update(other.records)


def read_metadata(place: Place) -> Described:
    """The metadata in a file; nothing of it is run.

    Raises:
        UnreadableError: it is none, or contradicts itself; says where.
    """
    try:
        root, _, findings = unpickle(place.source.read(0, place.size), on_disk=place.size)
        described = _described(root)
    except UnreadableError as e:
        raise e.located(place.name) from None
    described.findings = findings
    return described


def _described(root: Any) -> Described:
    # Megatron's own is a subclass of it
    if not isinstance(root, Obj) or not isinstance(root.func, Global):
        raise UnreadableError("not the metadata of torch.distributed.checkpoint")
    fields = attributes(root)
    tensors = mapping(fields.get("state_dict_metadata"))
    stored = mapping(fields.get("storage_data"))
    if tensors is None or stored is None:
        raise UnreadableError("not the metadata of torch.distributed.checkpoint")
    items = _items(stored)
    noted = mapping(fields.get(NOTED)) or {}
    found = Described()
    for name, entry in tensors.items():
        if not isinstance(name, str) or not isinstance(entry, Obj):
            raise UnreadableError(f"an entry that is none: {brief(name)}")
        if entry.func == _BYTES:
            item = items.get((name, None))
            if item is None:
                raise UnreadableError(f"it does not say where the object {name!r:.200} lies")
            found.entries[name] = item
        elif entry.func == _TENSOR:
            found.entries[name] = _tensor(name, attributes(entry), items, noted.get(name))
        else:
            raise UnreadableError(f"{name!r:.200} is neither a tensor nor an object")
    planned = mapping(fields.get("planner_data")) or {}
    ours = mapping(fields.get(RECORDS, planned.get(RECORDS))) or {}
    found.records = {k: v for k, v in ours.items() if isinstance(k, str) and k.startswith(PREFIX)}
    for name, path in planned.items():
        if isinstance(name, str) and _is_path(path):
            found.paths[name] = path
    return found


def _is_path(path: Any) -> bool:
    return (
        isinstance(path, tuple)
        and 0 < len(path) <= _MOST_DIMS
        and all(type(key) is str or (type(key) is int and 0 <= key < 1 << 20) for key in path)
    )


def _items(stored: Mapping[Any, Any]) -> dict[tuple[str, tuple[int, ...] | None], Item]:
    """Where each part lies, by the name and where in the tensor it begins (None for an object)."""
    found = {}
    for key, value in stored.items():
        index = attributes(key) if isinstance(key, Obj) else {}
        name = index.get("fqn")
        info = attributes(value) if isinstance(value, Obj) else {}
        file, offset, length = (info.get(k) for k in ("relative_path", "offset", "length"))
        if not isinstance(name, str) or not isinstance(file, str):
            raise UnreadableError("it has a part without a name or a file")
        if type(offset) is not int or type(length) is not int or offset < 0 or length < 0:
            raise UnreadableError(f"a part of {name!r:.200} lies nowhere")
        if file in ("", ".", "..") or any(sign in file for sign in "/\\\0"):
            raise UnreadableError(
                f"it puts a part of {name!r:.200} into {file!r:.200}: not a plain file name in its "
                "folder"
            )
        transforms = info.get("transform_descriptors") or ()
        if not isinstance(transforms, list | tuple) or not all(
            isinstance(one, str) for one in transforms
        ):
            raise UnreadableError(f"a part of {name!r:.200} was changed in ways unknown")
        begin = index.get("offset")
        at = None if begin is None else torch_size(begin)
        found[name, at] = Item(file, offset, length, tuple(transforms))
    return found


def _tensor(
    name: str,
    fields: Mapping[Any, Any],
    items: Mapping[tuple[str, tuple[int, ...] | None], Item],
    noted: Any,
) -> Saved:
    chunks = fields.get("chunks")
    if not isinstance(chunks, list):
        raise UnreadableError(f"the tensor {name!r:.200} has no parts")
    parts = []
    for chunk in chunks:
        box = attributes(chunk) if isinstance(chunk, Obj) else {}
        offsets, sizes = torch_size(box.get("offsets")), torch_size(box.get("sizes"))
        item = items.get((name, offsets))
        if item is None and not any(offsets):  # long ago without a place
            item = items.get((name, None))
        if item is None:
            raise UnreadableError(
                f"it does not say where the part at {list(offsets)} of {name!r:.200} lies"
            )
        parts.append(Part(offsets, sizes, item))
    dtype = _dtype(name, fields.get("properties"))
    return Saved(dtype, torch_size(fields.get("size")), parts, noted)


def _dtype(name: str, properties: Any) -> DType:
    """The dtype in a TensorProperties: the first of its state, or (up to 2.2) an attribute."""
    state = properties.state if isinstance(properties, Obj) else None
    node = state[0] if isinstance(state, tuple) and state else None
    if isinstance(properties, Obj) and node is None:
        node = attributes(properties).get("dtype")
    found = BY_NAME.get(node.name) if isinstance(node, Global) and node.module == "torch" else None
    if found is None:
        raise UnreadableError(f"the tensor {name!r:.200} has the dtype {brief(node)}")
    return found


def torch_size(node: Any) -> tuple[int, ...]:
    """The integers of a torch.Size."""
    if isinstance(node, Obj) and node.func == Global("torch", "Size") and len(node.args) == 1:
        node = node.args[0]
    if not isinstance(node, tuple | list) or len(node) > _MOST_DIMS:
        raise UnreadableError(f"a size that is none: {brief(node)}")
    if not all(type(n) is int and 0 <= n < 1 << 60 for n in node):
        raise UnreadableError("a size that is none")
    return tuple(node)
