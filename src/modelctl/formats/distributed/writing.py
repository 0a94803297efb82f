"""A checkpoint as a folder of ``torch.distributed.checkpoint`` (docs/formats.md#dcp): as one rank
would write it, which any number of ranks can load."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator
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
from ...storage.layout import Layout, LayoutBuilder
from ...storage.values import ValuesStorage
from ..pytorch.zip import TorchZip
from .metadata import METADATA, NAME, OF_RANK, RECORDS, Item, Part, Saved

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


def losses(ckpt: Checkpoint) -> list[Loss]:
    """What of a checkpoint has no place in such a folder."""
    if mapping(ckpt.root) is None:
        kind = ckpt.sections.kind
        way_out = "'modelctl convert --weights-only' keeps the model's tensors alone, or write .pt"
        return [Loss(f"it holds a dict by names, this is a {kind}", way_out)]
    lost = []
    taken: set[str] = set()
    for path, node in leaves(ckpt.root):
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
    entries: list[_Entry] = []
    for path, node in leaves(ckpt.root):
        if not isinstance(node, TensorRef):
            entries.append(_Entry(path, _add(out, data, ckpt, node)))
            continue
        saved = known.get(node.identity)
        if saved is None:
            kept = _in_files(node) if in_place else None
            saved = known[node.identity] = kept or _tensor(out, data, ckpt, node)
        entries.append(_Entry(path, saved))
    files = [out.file(data)] if out.position else []
    head = LayoutBuilder()
    for piece in pickle(_metadata(ckpt, entries), _no_storage):
        head.add(piece)
    used = {item.file for _, entry in entries for item in items_of(entry)}
    stale = [name for name in there if DATA.fullmatch(name) and name not in used]
    stale += [name for name in there if OF_RANK.fullmatch(name)]
    return Layout([*files, head.file(NAME)], stale, _unused(ckpt, used) if in_place else ())


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
    return Saved(ref.dtype, ref.shape, [Part((0,) * len(ref.shape), ref.shape, item)])


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
    for path, entry in entries:
        name = path_text(path)
        planned[name] = path
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
    state = {
        "state_dict_metadata": tensors,
        "planner_data": planned,
        "storage_data": stored,
        "storage_meta": None,
        "version": _VERSION,
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
