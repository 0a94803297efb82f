"""Folders of ``torch.distributed.checkpoint`` (docs/formats.md#dcp): ``.metadata``, and files of
many ranks that hold the parts of tensors, each as a file of ``torch.save`` by itself.

A part is looked at when its bytes are asked for: of the structure, the metadata are all that is
read, and the objects, which are small.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable
from functools import partial
from typing import Any

from ...core.checkpoint import Checkpoint, Finding, Folder, Origin
from ...core.notes import Loss, Note
from ...core.records import write_records
from ...core.tensors import TensorRef
from ...core.text import count, some
from ...core.tree import Path
from ...errors import UnreadableError, UnsupportedError
from ...storage.chunked import Chunk, placed
from ...storage.layout import Layout
from ...storage.places import Place
from ..base import WritableFolder
from ..beside import others
from ..pytorch.zip import TorchZip
from ..single import read_single
from . import writing
from .arranged import gather
from .metadata import NAME, OF_RANK, Described, Item, Saved, read_metadata
from .ranks import not_read
from .streams import as_saved

_ITEMS = TorchZip()
COMMON = "common"
_COMMON_FILE = "common.pt"
_MEGATRON = "metadata.json"


class DistributedCheckpoint(WritableFolder):
    """A folder that ``torch.distributed.checkpoint.save`` wrote, under any number of ranks."""

    name = "dcp"
    label = "DCP"
    keeps_records = True

    def sniff(self, place: Place) -> bool:
        # by its data alone, too: what stands beside them is not the checkpoint
        return bool(metadata_among(place.names)) or any(map(writing.DATA.fullmatch, place.names))

    def read(self, place: Place) -> Checkpoint:
        found = metadata_among(place.names)
        if not found:
            raise UnreadableError(
                f"the parts of a DCP folder, without its {NAME}",
                path=place.name,
                hint="the save did not end, or a copy left out what begins with a dot: "
                "cp -r FOLDER, not FOLDER/*",
            )
        described = Described()
        for name in found:
            described.add(read_metadata(place.member(name)))
        files = _Files(place, described)
        saved: dict[str, Any] = {}
        for name, entry in described.entries.items():
            try:
                value = files.object(entry) if isinstance(entry, Item) else files.tensor(entry)
            except UnreadableError as e:
                raise UnreadableError(
                    f"{name!r:.200}: {e.reason}",
                    path=e.path or place.name,
                    member=e.member,
                    offset=e.offset,
                    hint=e.hint,
                ) from None
            put(saved, described.path(name), value)
        root, arranged = gather(saved, whole=described.whole)
        common = files.common(surely=bool(arranged.megatron)) if COMMON not in root else None
        if common is not None:
            root[COMMON] = common.root
            files.size += common.origin.bytes_on_disk if common.origin else 0
        parts = {"": NAME} if common is None else {"": NAME, COMMON: _COMMON_FILE}
        own = {*found, *files.names, *(name for name in place.names if writing.is_own(name))}
        beside, left = others(place, own)
        unread = [name for name in beside if name not in parts.values()]
        ckpt = Checkpoint(
            root,
            Origin(place.name, self.name, f"DCP, {files.text}", files.size),
            warnings=(
                *files.warnings,
                *not_read(unread),
            ),
            findings=(*described.findings, *files.findings),
            folder=Folder(parts, beside, left, arranged),
        )
        if described.records and ckpt.sections.models:
            return write_records(ckpt, described.records)
        return ckpt

    def losses(self, ckpt: Checkpoint) -> list[Loss]:
        return writing.losses(ckpt)

    def layout(self, ckpt: Checkpoint, there: Collection[str], *, in_place: bool) -> Layout:
        return writing.layout(ckpt, there, in_place=in_place)

    def occupied(self, there: Collection[str]) -> list[str]:
        return metadata_among(there)


def metadata_among(names: Collection[str]) -> list[str]:
    """The metadata in a folder: one for all, else one of each rank."""
    if NAME in names:
        return [NAME]
    found = [(int(match[1]), match[0]) for match in map(OF_RANK.fullmatch, names) if match]
    return [name for _, name in sorted(found)]


class _Files:
    """The files that the metadata name, and what lies in them."""

    def __init__(self, place: Place, described: Described) -> None:
        self.place = place
        self.findings: list[Finding] = []
        self.warnings: list[Note] = []
        self._tensors: dict[Any, TensorRef] = {}
        self._places = {
            name: place.member(name) for name in dict.fromkeys(i.file for i in _items(described))
        }
        missing = [name for name in self._places if name not in set(place.names)]
        if missing:
            lost = [
                name
                for name, entry in described.entries.items()
                if any(item.file in missing for item in writing.items_of(entry))
            ]
            raise UnreadableError(
                f"{len(missing)} of {len(self._places)} files missing ({some(missing, 3)}), "
                f"with parts of {some(lost, 2)}",
                path=place.name,
                hint="copy the folder again, with the files of all ranks",
            )
        metadata = [place.member(name) for name in metadata_among(place.names)]
        self.size = sum(one.size for one in (*self._places.values(), *metadata))
        self.text = count(len(self._places), "file")

    @property
    def names(self) -> Collection[str]:
        return self._places.keys()

    def common(self, *, surely: bool) -> Checkpoint | None:
        """What all ranks of Megatron have in common, in a file of its own; None where there is
        none, or neither this is ``surely`` Megatron's nor what it writes beside says so."""
        there = {*self.place.names}
        if _COMMON_FILE not in there or not (surely or _MEGATRON in there):
            return None
        read = read_single(self.place.member(_COMMON_FILE))
        self.findings += read.findings
        self.warnings += read.warnings
        return read

    def tensor(self, saved: Saved) -> TensorRef:
        """A tensor over its parts, none of which is looked at yet; tied ones lie in the same."""
        key = saved.dtype, saved.shape, tuple(saved.parts)
        if key in self._tensors:
            return self._tensors[key]
        chunks = [
            Chunk(
                part.offsets, part.sizes, partial(self._part, part.item), self._checked(part.item)
            )
            for part in saved.parts
        ]
        if saved.dtype.kind in ("quantized", "bits"):
            raise UnsupportedError(f"{self.place.name}: a tensor of {saved.dtype.name} in parts")
        storage = writing.SavedStorage(saved, placed(saved.shape, chunks))
        ref = self._tensors[key] = TensorRef(saved.dtype, saved.shape, storage)
        return ref

    def object(self, item: Item) -> Any:
        """An object: whatever is no tensor."""
        self._checked(item)
        read = self._read(item)
        self.findings += read.findings
        self.warnings += read.warnings
        return read.root

    def _checked(self, item: Item) -> str:
        """What errors call an item; raises UnreadableError where its file ends before it."""
        place = self._places[item.file]
        if item.offset + item.length > place.size:
            raise UnreadableError(
                f"cut off: {item.length:,} bytes are expected here, the file ends at "
                f"{place.size:,}",
                path=place.name,
                offset=item.offset,
                hint="copy the folder again",
            )
        return f"{item.file} at byte {item.offset:,}"

    def _part(self, item: Item) -> TensorRef:
        root = self._read(item).root
        if not isinstance(root, TensorRef):
            raise UnreadableError(
                "no tensor, which the metadata say",
                path=self._places[item.file].name,
                offset=item.offset,
            )
        return root

    def _read(self, item: Item) -> Checkpoint:
        place = self._places[item.file]
        inner = as_saved(place.window(item.offset, item.length, f"at {item.offset:,}"), item)
        if inner.zip is None:
            raise UnreadableError(
                "not what torch.save writes",
                path=place.name,
                offset=item.offset,
                hint="the files are of another save than the metadata, or damaged",
            )
        return _ITEMS.read(inner)


def _items(described: Described) -> Iterable[Item]:
    return (item for entry in described.entries.values() for item in writing.items_of(entry))


def put(root: dict[str, Any], path: Path, value: Any) -> None:
    """Put a value where it belongs in a tree of dicts and lists, which are made on the way: as
    torch's ``set_element`` (torch/distributed/checkpoint/_traverse.py).

    Raises:
        UnreadableError: something else is there.
    """
    inner: Any = root
    for i, key in enumerate(path):
        if isinstance(key, int) != isinstance(inner, list) or not isinstance(inner, dict | list):
            raise UnreadableError(f"two entries at {'.'.join(map(str, path[: i + 1]))!r:.200}")
        last = i == len(path) - 1
        if isinstance(inner, list):
            inner.extend([None] * (key + 1 - len(inner)))
            there = inner[key] is not None
        else:
            there = key in inner
        if last:
            if there:
                raise UnreadableError(f"two entries at {'.'.join(map(str, path))!r:.200}")
            inner[key] = value
        elif there:
            inner = inner[key]
        else:
            inner[key] = inner = [] if isinstance(path[i + 1], int) else {}
