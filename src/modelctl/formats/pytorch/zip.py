"""torch zip files: what ``torch.save`` writes since 1.6 (docs/formats.md#torch-zip)."""

from __future__ import annotations

from functools import partial
from typing import Any

from ...core.checkpoint import Checkpoint, Finding, Origin
from ...core.cutting import PartStorage, wasted
from ...core.dtypes import DType
from ...core.nodes import ORDERED_DICT, Global, Obj
from ...core.notes import Loss, Note, warning
from ...core.storages import RunStorage, Storage
from ...core.tensors import SwappedStorage, TensorRef
from ...core.text import some
from ...core.tree import Path, path_text, walk
from ...errors import ModelctlError, UnreadableError, UnsupportedError
from ...pickles.arrays import is_array
from ...pickles.interpreter import most_bytes, unpickle
from ...storage.containers.deflate import InflatedStorage
from ...storage.containers.zipdir import DEFLATED, Member, ZipDirectory
from ...storage.layout import FileLayout
from ...storage.places import Place
from ..base import WritableFormat
from .storage_ids import storage_table

_ALIGNMENT = 64
_NEWEST = 10  # version of the format
# Objects that torch.load makes with weights_only.
_PLAIN = (ORDERED_DICT, Global("torch", "Size"), Global("torch", "device"))

# What torch writes beside the storages.
_RECORDS = frozenset(
    (
        *("data.pkl", "byteorder", "version", ".format_version", ".storage_alignment"),
        ".data/serialization_id",
    )
)


class TorchZip(WritableFormat):
    """The zip container of ``torch.save``: one pickle, and a member a storage."""

    name = "torch"
    label = "torch zip"
    suffixes = (".pt", ".pth", ".bin", ".ckpt")
    shard_names = ("pytorch_model", ".bin")
    whole_storages = True
    keeps_records = True
    keeps_devices = True

    def sniff(self, place: Place) -> bool:
        return place.zip is not None and any(map(_is_pickle, place.zip.members))

    def explain(self, place: Place) -> ModelctlError | None:
        if place.zip is None:
            return None
        try:
            root_folder(place.zip)
        except ModelctlError as e:
            return e
        return None

    def read(self, place: Place) -> Checkpoint:
        assert place.zip is not None
        return self._read(place, place.zip)

    def salvage(self, place: Place) -> Checkpoint | None:
        from .torn import torn_directory

        directory = torn_directory(place)
        return None if directory is None else self._read(place, directory)

    def _read(self, place: Place, directory: ZipDirectory) -> Checkpoint:
        saved = SavedZip(place, directory)
        root = saved.unpickle("data.pkl", "data")
        saved.warnings += _strays(saved)
        return Checkpoint(
            root,
            Origin(place.name, self.name, self.label, place.size),
            warnings=tuple(saved.warnings),
            findings=tuple(saved.findings),
        )

    def losses(self, ckpt: Checkpoint) -> list[Loss]:
        return [
            Loss(f"'{path_text(path)}' is {node.dtype.name}, which torch does not have")
            for path, node in walk(ckpt.root)
            if isinstance(node, TensorRef) and not node.dtype.is_in_torch
        ]

    def remarks(self, ckpt: Checkpoint) -> list[Note]:
        """As every format's; and what of storages goes along that no tensor shows."""
        models = ckpt.sections.models
        return [*super().remarks(ckpt), *(wasted(models[0].tensors()) if models else ())]

    def layout(self, ckpt: Checkpoint, name: str) -> FileLayout:
        """As torch 2.13 writes it, record for record, so that ``calculate_storage_offsets`` and
        ``mmap`` work on it; storages are numbered in the order in which the pickle names them.
        """
        from ...pickles.writer import pickle
        from .records import Records

        order: dict[int, tuple[str, Storage]] = {}

        def key(storage: Storage) -> str:
            return order.setdefault(id(storage), (str(len(order)), storage))[0]

        data = pickle(ckpt.root, key, ckpt.device)
        records = Records(_prefix(name))
        records.add("data.pkl", *data)
        records.add(".format_version", b"1")
        records.add(".storage_alignment", str(_ALIGNMENT).encode())
        records.add("byteorder", b"little")
        for number, storage in order.values():
            records.add(f"data/{number}", storage)
        records.add("version", b"3\n")
        records.finish(".data/serialization_id")
        return records.out.file(name)

    def record_by_hand(self, ckpt: Checkpoint, path: str, section: Path, record: str) -> str | None:
        where = "".join(f"[{label!r}]" for label in section)
        how = f"map_location='cpu', weights_only={not _has_objects(ckpt.root)}"
        return f"torch.load({path!r}, {how}){where}._metadata[''][{record!r}]"


def _has_objects(root: Any) -> bool:
    """Whether there is more in a tree than torch.load takes with weights_only."""
    for _, node in walk(root):
        if isinstance(node, Obj) and node.func not in _PLAIN:
            return True
        if is_array(node):
            return True
        if isinstance(node, Global) and node.module != "torch":
            return True
    return False


class SavedZip:
    """What ``torch.save`` put into a zip: its pickles, and the storages that they name."""

    def __init__(self, place: Place, directory: ZipDirectory) -> None:
        self.source, self.directory = place.source, directory
        self.folder = root_folder(directory)
        self.big_endian = _is_big_endian(directory, self.folder)
        _check_version(directory, self.folder)
        self.warnings = list(directory.warnings)
        self.findings: list[Finding] = []

    def unpickle(self, member: str, storages: str) -> Any:
        """The tree of a pickle whose storages are members of the folder ``storages``."""
        name = f"{self.folder}/{member}"
        data = self.directory.read(name, most_bytes(self.source.size))
        load = storage_table(partial(self.storage, f"{self.folder}/{storages}"))
        try:
            on_disk = self.directory.members[name].compressed
            value, end, findings = unpickle(data, persistent_load=load, on_disk=on_disk)
        except UnreadableError as e:
            raise e.located(self.source.name, name) from None
        self.findings += findings
        if end != len(data):
            self.warnings.append(warning(f"{len(data) - end:,} bytes after the pickle in {name}"))
        return value

    def storage(
        self, folder: str, key: str, location: str, nbytes: int, dtype: DType | None
    ) -> Storage:
        name = f"{folder}/{key}"
        member = self.directory.members.get(name)
        if member is None:
            raise self._broken(name, f"the storage '{key}' is missing")
        crc = self.directory.crc32(member)
        if member.size != nbytes:
            self._check_size(member, nbytes)
        made: Storage
        size = member.size  # one integer for both: there can be a million of them
        if member.method == DEFLATED:
            made = InflatedStorage(
                self.source, member.offset, member.compressed, size, location, crc
            )
        else:
            made = RunStorage(self.source, member.offset, size, location, crc)
        if size != nbytes:  # a checksum is that of the whole member
            made = PartStorage(made, 0, nbytes)
        return self._swapped(made, dtype) if self.big_endian else made

    def _check_size(self, member: Member, nbytes: int) -> None:
        """A member that is not as long as its storage: refused, or flagged."""
        if member.size < nbytes:
            sizes = f"{nbytes:,} bytes are declared, the member has {member.size:,}"
            raise self._broken(member.name, sizes, member.offset)
        if member.method == DEFLATED:
            sizes = f"{nbytes:,} bytes are declared, it inflates to {member.size:,}"
            raise self._broken(member.name, sizes, member.offset)
        self.warnings.append(warning(f"{member.name} is {member.size - nbytes:,} bytes too long"))

    def _swapped(self, storage: Storage, dtype: DType | None) -> Storage:
        if dtype is None:
            raise UnsupportedError(f"{self.source.name}: big-endian storages without a dtype")
        if dtype.itemsize == 1:
            return storage
        return SwappedStorage(storage, dtype.itemsize // (2 if dtype.kind == "complex" else 1))

    def _broken(self, member: str, message: str, offset: int | None = None) -> UnreadableError:
        return UnreadableError(message, path=self.source.name, member=member, offset=offset)


def _strays(saved: SavedZip) -> list[Note]:
    """A warning of entries that are neither torch's own records nor storages."""
    own, storages = len(saved.folder) + 1, f"{saved.folder}/data/"
    strays = [
        name
        for name in saved.directory.members
        if not name.startswith(storages) and name[own:] not in _RECORDS and name[-1] != "/"
    ]
    if not strays:
        return []
    what = "entry" if len(strays) == 1 else "entries"
    names = some([name[:60] for name in strays], 3)
    return [warning(f"{len(strays):,} {what} beside what torch.save writes: {names}")]


def _is_pickle(name: str) -> bool:
    return name.endswith("/data.pkl") or name == "data.pkl"


def root_folder(directory: ZipDirectory) -> str:
    """The one folder of a ``torch.save`` zip that holds its ``data.pkl``.

    Raises:
        UnreadableError, UnsupportedError: there is none; says what the zip may be instead.
    """
    names = directory.members
    source = directory.source.name
    folders = {name.partition("/")[0] for name in names if "/" in name}
    pickles = list(filter(_is_pickle, names))
    if any(name.endswith(".data/extern_modules") for name in names):
        raise UnsupportedError(f"{source}: a torch.package archive: not read yet")
    if not pickles:
        raise UnreadableError(
            "a zip without data.pkl: no checkpoint, or one whose save failed halfway",
            path=source,
            hint="save it again; an object that can't be pickled leaves such a file behind",
        )
    if len(pickles) > 1 or len(folders) > 1 or pickles[0].count("/") != 1:
        raise UnreadableError(
            "not one folder with one data.pkl, as torch.save writes it",
            path=source,
            member=pickles[-1],
        )
    return pickles[0].partition("/")[0]


def _is_big_endian(directory: ZipDirectory, root: str) -> bool:
    name = f"{root}/byteorder"
    if name not in directory.members:
        return False
    order = directory.read(name, 64).strip()
    if order not in (b"little", b"big"):
        raise UnreadableError(f"the byte order {order!r}", path=directory.source.name, member=name)
    return order == b"big"


def _check_version(directory: ZipDirectory, root: str) -> None:
    """That the format is one that torch reads (caffe2/serialize/versions.h), where it is said."""
    for name in (f"{root}/.data/version", f"{root}/version"):  # the order in which torch looks
        if name in directory.members:
            text = directory.read(name, 64).strip()
            if not text.isdigit() or not int(text):
                raise UnreadableError(
                    f"the version {text!r}", path=directory.source.name, member=name
                )
            if int(text) > _NEWEST:
                raise UnsupportedError(
                    f"{directory.source.name}, {name}: version {int(text)} of the format; "
                    f"known are those up to {_NEWEST}",
                    hint="a newer torch wrote it, or the file is damaged",
                )
            return


def _prefix(name: str) -> str:
    """The folder in the zip, as torch names it after the file, or where it has none."""
    if not name or not name.isascii():
        return "archive"
    return name.rsplit(".", 1)[0] if "." in name[1:] else name
