"""A checkpoint as a folder of ``torch.distributed.checkpoint`` (docs/formats.md#dcp): as one rank
would write it, which any number of ranks can load."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator, Mapping
from typing import Any, NamedTuple

from ...core.checkpoint import Checkpoint
from ...core.nodes import Composite, Global, Obj, is_module, mapping
from ...core.notes import Loss, Note, info
from ...core.records import records
from ...core.tensors import TensorRef
from ...core.text import size as size_text
from ...core.tree import Path, containers, most_paths, path_text
from ...errors import RefusedError
from ...pickles.writer import pickle
from ...storage.chunked import ChunkedStorage
from ...storage.layout import FileLayout, Layout, LayoutBuilder
from ...storage.values import ValuesStorage
from ..beside import along
from ..pytorch.zip import TorchZip
from .arranged import Arrangement, entries_of, scatter
from .metadata import METADATA, NAME, NOTED, OF_RANK, RECORDS, Item, Part, Saved

DATA = re.compile(r"__\d+_(\d+)\.distcp")
_MODULE = METADATA.module
_ITEMS = TorchZip()
_VERSION = "1.0.0"  # of the metadata, since torch 2.9


class SavedStorage(ChunkedStorage):
    """The values of a tensor as a folder holds them: its parts can go on being used where they
    lie."""

    __slots__ = ("saved",)

    def __init__(self, saved: Saved, chunks: Any) -> None:
        super().__init__(saved.dtype, saved.shape, chunks)
        self.saved = saved


def leaves(root: Any) -> Iterator[tuple[Path, Any]]:
    """Tensors and objects with their paths, as torch flattens a state_dict
    (torch/distributed/checkpoint/_traverse.py): dicts, and lists that hold tensors or dicts, are
    taken apart; keys are text. An empty dict is an object, where torch forgets it."""
    most = most_paths(containers(root))
    terminal: dict[int, bool] = {}
    todo: list[tuple[Path, Any]] = [((), root)]
    while todo:
        if most < len(todo):
            raise RefusedError("what is shared in it would be spelt out far too often")
        path, node = todo.pop()
        most -= 1
        entries = mapping(node)
        if entries or (entries is not None and not path):
            todo += [((*path, str(key)), value) for key, value in reversed(entries.items())]
        elif type(node) is list and not _is_terminal(node, terminal):
            todo += [((*path, i), node[i]) for i in reversed(range(len(node)))]
        else:
            yield path, node


def _is_terminal(node: Any, known: dict[int, bool]) -> bool:
    """Whether a list is an object by itself: neither tensors nor dicts are in it."""
    if type(node) is not list:
        return not isinstance(node, TensorRef | Composite) and mapping(node) is None
    if id(node) not in known:
        known[id(node)] = True  # one that holds itself
        known[id(node)] = all(_is_terminal(one, known) for one in node)
    return known[id(node)]


def is_own(name: str) -> bool:
    """Whether a file of this name is such a folder's own, even where nothing names it any more."""
    return bool(DATA.fullmatch(name) or OF_RANK.fullmatch(name)) or name == NAME


def entries(ckpt: Checkpoint) -> Iterator[tuple[Path, Any]]:
    """What the folder is to hold, laid out as it was where it was read from one."""
    root, arranged = ckpt.root, _arranged(ckpt)
    for key in _parts(ckpt):
        entries = mapping(root) or {}
        if key in entries:
            root = {name: node for name, node in entries.items() if name != key}
    if arranged is None or mapping(root) is None:
        return leaves(root)
    saved = scatter(root, arranged)
    return entries_of(saved) if arranged.whole else leaves(saved)


def _arranged(ckpt: Checkpoint) -> Arrangement | None:
    found = ckpt.folder.arranged if ckpt.folder is not None else None
    return found if isinstance(found, Arrangement) else None


def _parts(ckpt: Checkpoint) -> Mapping[str, str]:
    """The parts at the top that are files by themselves."""
    if _arranged(ckpt) is None:
        return {}
    assert ckpt.folder is not None
    return {key: name for key, name in ckpt.folder.files.items() if key}


def losses(ckpt: Checkpoint) -> list[Loss]:
    """What of a checkpoint has no place in such a folder."""
    if mapping(ckpt.root) is None:
        kind = ckpt.sections.kind
        way_out = "'modelctl convert --weights-only' keeps the model's tensors alone, or write .pt"
        return [Loss(f"it holds a dict by names, this is a {kind}", way_out)]
    lost = []
    taken: set[str] = set()
    for path, node in entries(ckpt):
        name = path_text(path)
        if name in taken:
            lost.append(Loss(f"two entries would be called '{name}' there"))
        taken.add(name)
        if isinstance(node, Composite):
            lost.append(Loss(f"'{name}' is a {node.layout} tensor"))
        elif is_module(node):
            lost.append(Loss(f"'{name}' is a whole module", "write it as .pt"))
        elif isinstance(node, TensorRef) and not node.dtype.is_in_torch:
            lost.append(Loss(f"'{name}' is {node.dtype.name}, which torch does not have"))
    return lost


class _Entry(NamedTuple):
    path: Path
    entry: Saved | Item


def layout(ckpt: Checkpoint, there: Collection[str], *, in_place: bool) -> Layout:
    """The files of the folder: one with all that is new, and the metadata.

    In place, tensors that were not changed stay in the files where they are.
    """
    numbers = [int(match[1]) for match in map(DATA.fullmatch, there) if match]
    data = f"__0_{max(numbers, default=-1) + 1}.distcp"
    out = LayoutBuilder()
    known: dict[Any, Saved] = {}  # tied tensors are written once, and named twice
    found: list[_Entry] = []
    for path, node in entries(ckpt):
        if not isinstance(node, TensorRef):
            found.append(_Entry(path, _add(out, data, ckpt, node)))
            continue
        saved = known.get(node.identity)
        if saved is None:
            kept = _in_files(node) if in_place else None
            saved = known[node.identity] = kept or _tensor(out, data, ckpt, node)
        found.append(_Entry(path, saved))
    files = [out.file(data)] if out.position else []
    head = LayoutBuilder()
    for piece in pickle(_metadata(ckpt, found), _no_storage):
        head.add(piece)
    used = {item.file for _, entry in found for item in items_of(entry)}
    stale = [name for name in there if DATA.fullmatch(name) and name not in used]
    stale += [name for name in there if OF_RANK.fullmatch(name)]
    parts, gone = _by_themselves(ckpt, in_place=in_place)
    notes = _unused(ckpt, used) if in_place else []
    if _arranged(ckpt) is not None and not in_place:
        assert ckpt.folder is not None
        copies, notes = along(ckpt.folder, {*gone, *(one.name for one in parts)})
        files += copies
    return Layout([*files, *parts, head.file(NAME)], [*stale, *gone] if in_place else stale, notes)


def _by_themselves(ckpt: Checkpoint, *, in_place: bool) -> tuple[list[FileLayout], list[str]]:
    """The parts that are files by themselves and were changed, or are not to be had as they were;
    and those that are no longer."""
    beside = ckpt.folder.beside if ckpt.folder is not None else ()
    before = mapping(ckpt.read) or {}
    now = mapping(ckpt.root) or {}
    files, gone = [], []
    for key, name in _parts(ckpt).items():
        if key not in now:
            gone.append(name)
        elif now[key] is not before.get(key) or not (in_place or name in beside):
            files.append(_ITEMS.layout(ckpt.replace(root=now[key]), name))
    return files, gone


def items_of(entry: Saved | Item) -> list[Item]:
    """Where the parts of an entry lie."""
    return [entry] if isinstance(entry, Item) else [part.item for part in entry.parts]


def _no_storage(_: Any) -> str:
    raise AssertionError("no tensor is in the metadata")


def _in_files(ref: TensorRef) -> Saved | None:
    """The parts of a tensor in the files that it was read from; None where it is another."""
    storage = ref.storage
    if not isinstance(storage, SavedStorage) or ref.bits:
        return None
    same = ref.is_whole and ref.is_contiguous and (ref.dtype, ref.shape) == storage.saved[:2]
    return storage.saved if same else None


def _tensor(out: LayoutBuilder, file: str, ckpt: Checkpoint, ref: TensorRef) -> Saved:
    storage = ref.storage
    if not (ref.is_whole and ref.is_contiguous) or ref.bits:
        storage = ValuesStorage(ref)
    item = _add(out, file, ckpt, TensorRef(ref.dtype, ref.shape, storage))
    was = ref.storage.saved if isinstance(ref.storage, SavedStorage) else None
    noted = was.noted if was is not None and was.shape == ref.shape else None
    return Saved(ref.dtype, ref.shape, [Part((0,) * len(ref.shape), ref.shape, item)], noted)


def _add(out: LayoutBuilder, file: str, ckpt: Checkpoint, node: Any) -> Item:
    """A tensor or an object behind the others, as a file of ``torch.save`` by itself."""
    start = out.position
    out.append(_ITEMS.layout(Checkpoint(node, ckpt.origin, device="cpu"), "archive"))
    return Item(file, start, out.position - start)


def _unused(ckpt: Checkpoint, used: Collection[str]) -> list[Note]:
    """What stays in files that are still used, though nothing names it any more."""
    before = {id(ref.storage): ref for ref in Checkpoint(ckpt.read).tensors().values()}
    after = {id(ref.storage) for ref in ckpt.tensors().values()}
    dead = sum(
        part.item.length
        for key, ref in before.items()
        if key not in after and isinstance(ref.storage, SavedStorage)
        for part in ref.storage.saved.parts
        if part.item.file in used
    )
    if not dead:
        return []
    return [
        info(
            f"{size_text(dead)} of what was removed stay in the files: only the metadata are new",
            "'modelctl convert --to dcp -o NEW/' leaves them out",
        )
    ]


# ---------------------------------------------------------------------- the metadata, as torch's


def _made(name: str, state: Any, module: str = _MODULE) -> Obj:
    return Obj(Global(module, name), (), "newobj", state=state)


def _torch_size(numbers: tuple[int, ...]) -> Obj:
    return Obj(Global("torch", "Size"), (tuple(numbers),))


def _metadata(ckpt: Checkpoint, entries: list[_Entry]) -> Obj:
    layout_ = Obj(Global("torch.serialization", "_get_layout"), ("torch.strided",))
    order = Obj(Global(_MODULE, "_MEM_FORMAT_ENCODING"), (0,))
    tensors: dict[str, Obj] = {}
    stored: dict[Obj, Obj] = {}
    planned: dict[str, Path] = {}
    noted: dict[str, Any] = {}
    for path, entry in entries:
        name = path_text(path)
        planned[name] = path
        if isinstance(entry, Saved) and entry.noted is not None:
            noted[name] = entry.noted
        if isinstance(entry, Item):
            tensors[name] = Obj(Global(_MODULE, "BytesStorageMetadata"), (), "newobj")
            stored[_index(name, None, None)] = _stored(entry)
            continue
        chunks = []
        for i, part in enumerate(entry.parts):
            box = {"offsets": _torch_size(part.offsets), "sizes": _torch_size(part.sizes)}
            chunks.append(_made("ChunkStorageMetadata", box))
            stored[_index(name, part.offsets, i)] = _stored(part.item)
        dtype = Global("torch", entry.dtype.name)
        tensors[name] = _made(
            "TensorStorageMetadata",
            {
                "properties": _made("TensorProperties", (dtype, layout_, False, order, False)),
                "size": _torch_size(entry.shape),
                "chunks": chunks,
            },
        )
    ours = records(ckpt.sections.models[0].node) if ckpt.sections.models else {}
    arranged = _arranged(ckpt)
    state = {
        "state_dict_metadata": tensors,
        "planner_data": None if arranged is not None and arranged.whole else planned,
        "storage_data": stored,
        "storage_meta": None,
        "version": _VERSION,
        **({NOTED: noted} if noted else {}),
        **({RECORDS: ours} if ours else {}),
    }
    return Obj(METADATA, (), "newobj", state=state)


def _index(name: str, offsets: tuple[int, ...] | None, index: int | None) -> Obj:
    state: dict[str, Any] = {"fqn": name, "index": index}
    if offsets is not None:
        state["offset"] = _torch_size(offsets)
    return _made("MetadataIndex", state)


def _stored(item: Item) -> Obj:
    state: dict[str, Any] = {
        "relative_path": item.file,
        "offset": item.offset,
        "length": item.length,
    }
    if item.transforms:
        state["transform_descriptors"] = list(item.transforms)
    return _made("_StorageInfo", state, "torch.distributed.checkpoint.filesystem")
