"""torch zip files: what ``torch.save`` writes since 1.6 (FORMATS section 1)."""

from __future__ import annotations

import struct
import zlib
from typing import Any

from ...core.checkpoint import Checkpoint, Finding, Origin
from ...core.tensors import Storage, StorageRef, SwappedStorage, TensorRef
from ...core.tree import walk
from ...errors import UnreadableError, UnsupportedError
from ...pickles.interpreter import MAX_SIZE, unpickle
from ...storage.source import FileSource, FileStorage, InflatedStorage, Window
from ...storage.staging import Sink
from ...storage.zipdir import DEFLATED, STORED, Member, ZipDirectory
from .storage_ids import StorageId, storage_table

_ALIGNMENT = 64
_MAX16, _MAX32 = 0xFFFF, 0xFFFFFFFF


class TorchZip:
    """The zip container of ``torch.save``: one pickle, and a member a storage."""

    name = "torch"
    label = "torch zip"
    suffixes: tuple[str, ...] = (".pt", ".pth", ".bin", ".ckpt")

    def sniff(self, head: bytes) -> bool:
        return head[:4] == b"PK\3\4"

    # ------------------------------------------------------------------ reading

    def read(self, source: FileSource) -> Checkpoint:
        directory = ZipDirectory(source)
        if _is_export(directory):
            from ..programs.export import read_export

            return read_export(source, directory, lambda member: self._inner(source, member))
        inner = _checkpoints_inside(directory)
        if inner:
            return self._archive(source, directory, inner)
        return self._saved(source, directory)

    def _inner(self, source: FileSource, member: Member) -> Checkpoint:
        """A whole ``torch.save`` file that is a member of another zip."""
        if member.method != STORED:
            raise UnsupportedError(
                f"{source.name}, {member.name}: compressed, so it can't be read in place",
                hint=f"unpack it: unzip '{source.name}' '{member.name}'",
            )
        window = Window(source, member.offset, member.size, member.name)
        return self._saved(window, ZipDirectory(window))

    def _archive(
        self, source: FileSource, directory: ZipDirectory, inner: list[Member]
    ) -> Checkpoint:
        """A zip of checkpoints (stable-baselines3): a tree with an entry for each."""
        parts = {member.name: self._inner(source, member) for member in inner}
        return Checkpoint(
            {name: part.root for name, part in parts.items()},
            Origin(source.name, "archive", f"zip of {len(parts)} checkpoints", source.size),
            warnings=(*directory.warnings, *(w for part in parts.values() for w in part.warnings)),
            findings=tuple(found for part in parts.values() for found in part.findings),
            outside="the archive around its checkpoints",
            resources=(source,),
        )

    def _saved(self, source: FileSource, directory: ZipDirectory) -> Checkpoint:
        saved = _Saved(source, directory)
        root = saved.unpickle("data.pkl", "data")
        name, label, constants, outside = self.name, self.label, None, None
        if f"{saved.folder}/constants.pkl" in directory.members:
            from ..programs.torchscript import as_modules

            root = as_modules(root, directory, saved.folder)
            constants = saved.unpickle("constants.pkl", "constants")
            saved.findings = [f for f in saved.findings if not f.name.startswith("__torch__")]
            name, label, outside = "torchscript", "TorchScript", "the TorchScript program"
        return Checkpoint(
            root,
            Origin(source.name, name, label, source.size),
            constants=constants,
            outside=outside,
            warnings=tuple(saved.warnings),
            findings=tuple(saved.findings),
            resources=(source,),
        )

    # ------------------------------------------------------------------ writing

    def losses(self, ckpt: Checkpoint) -> list[str]:
        return []

    def size(self, ckpt: Checkpoint) -> int:
        storages: dict[int, int] = {}
        names = 0
        for path, node in walk(ckpt.root):
            if isinstance(node, TensorRef | StorageRef):
                storages[id(node.storage)] = node.storage.nbytes
                names += 512 + len(str(path[-1:]))
        return sum(storages.values()) + names

    def write(self, ckpt: Checkpoint, sink: Sink, name: str) -> None:
        """Write as torch 2.13 does, record for record, so that ``calculate_storage_offsets`` and
        ``mmap`` work on it; storages are numbered in the order in which the pickle names them.
        """
        from ...pickles.writer import pickle

        order: dict[int, tuple[str, Storage]] = {}

        def key(storage: Storage) -> str:
            return order.setdefault(id(storage), (str(len(order)), storage))[0]

        data = pickle(ckpt.root, key)
        records = _Records(sink, _prefix(name))
        records.add("data.pkl", data)
        records.add(".format_version", b"1")
        records.add(".storage_alignment", str(_ALIGNMENT).encode())
        records.add("byteorder", b"little")
        for number, storage in order.values():
            records.add(f"data/{number}", storage)
        records.add("version", b"3\n")
        records.add(".data/serialization_id", records.serialization_id())
        records.finish()


class _Saved:
    """What ``torch.save`` put into a zip: its pickles, and the storages that they name."""

    def __init__(self, source: FileSource, directory: ZipDirectory) -> None:
        self.source, self.directory = source, directory
        self.folder = _root(directory)
        self.big_endian = _is_big_endian(directory, self.folder)
        self.warnings = list(directory.warnings)
        self.findings: list[Finding] = []

    def unpickle(self, member: str, storages: str) -> Any:
        """The tree of a pickle whose storages are members of the folder ``storages``."""
        name = f"{self.folder}/{member}"
        data = self.directory.read(name, MAX_SIZE)
        load = storage_table(lambda found: self.storage(f"{self.folder}/{storages}", found))
        try:
            value, end, findings = unpickle(data, persistent_load=load)
        except UnreadableError as e:
            raise e.located(self.source.name, name) from None
        self.findings += findings
        if end != len(data):
            self.warnings.append(f"{len(data) - end:,} bytes after the pickle in {name}")
        return value

    def storage(self, folder: str, found: StorageId) -> Storage:
        name = f"{folder}/{found.key}"
        member = self.directory.members.get(name)

        def broken(message: str, offset: int | None = None) -> UnreadableError:
            return UnreadableError(message, path=self.source.name, member=name, offset=offset)

        if member is None:
            raise broken(f"the storage '{found.key}' is missing")
        if member.size < found.nbytes:
            sizes = f"{found.nbytes:,} bytes are declared, the member has {member.size:,}"
            raise broken(sizes, member.offset)
        if member.size > found.nbytes and member.method == DEFLATED:
            sizes = f"{found.nbytes:,} bytes are declared, it inflates to {member.size:,}"
            raise broken(sizes, member.offset)
        if member.size > found.nbytes:
            self.warnings.append(f"{name} is {member.size - found.nbytes:,} bytes too long")
        # a checksum is that of the whole member
        crc = member.crc32 if member.size == found.nbytes else None
        made: Storage
        if member.method == DEFLATED:
            made = InflatedStorage(
                self.source, member.offset, member.compressed, member.size, found.location, crc
            )
        else:
            made = FileStorage(self.source, member.offset, found.nbytes, found.location, crc)
        if not self.big_endian:
            return made
        if found.dtype is None:
            raise UnsupportedError(f"{self.source.name}: big-endian storages without a dtype")
        if found.dtype.itemsize == 1:
            return made
        part = 2 if found.dtype.kind == "complex" else 1
        return SwappedStorage(made, found.dtype.itemsize // part)


def _is_export(directory: ZipDirectory) -> bool:
    """True for an archive of torch.export, of either layout."""
    names = directory.members
    return any(name.rpartition("/")[2] == "archive_format" for name in names) or (
        "serialized_exported_program.json" in names
    )


def _checkpoints_inside(directory: ZipDirectory) -> list[Member]:
    """The members that are checkpoints themselves, where the zip is none."""
    members = directory.members
    if any(name.rpartition("/")[2] == "data.pkl" for name in members):
        return []
    return [member for name, member in members.items() if name.endswith((".pt", ".pth", ".th"))]


def _root(directory: ZipDirectory) -> str:
    """The one folder of a ``torch.save`` zip that holds its ``data.pkl``."""
    names = directory.members
    source = directory.source.name
    folders = {name.partition("/")[0] for name in names if "/" in name}
    pickles = [name for name in names if name.rpartition("/")[2] == "data.pkl"]
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


def _prefix(name: str) -> str:
    """The folder in the zip, as torch names it after the file."""
    if not name.isascii():
        return "archive"
    return name.rsplit(".", 1)[0] if "." in name[1:] else name


class _Records:
    """A zip as torch's own writer (miniz, PyTorchStreamWriter) lays it out, byte for byte."""

    def __init__(self, sink: Sink, prefix: str) -> None:
        self.sink, self.prefix = sink, prefix
        self.central = bytearray()
        self.count = 0
        self.names_crc = self.bytes_crc = 0

    def add(self, name: str, data: bytes | Storage) -> None:
        sink = self.sink
        raw = f"{self.prefix}/{name}".encode()
        header = sink.position
        size = data.nbytes if isinstance(data, Storage) else len(data)
        wide = size >= _MAX32
        extra = b""
        if wide or header >= _MAX32:
            sizes = struct.pack("<QQ", size, 0) if wide else b""
            place = struct.pack("<Q", header) if header >= _MAX32 else b""
            extra = struct.pack("<HH", 1, len(sizes) + len(place)) + sizes + place
        begin = header + 30 + len(raw) + len(extra) + 4
        pad = -begin % _ALIGNMENT
        extra += b"FB" + struct.pack("<H", pad) + b"Z" * pad
        flags = 0x0808 if size else 0x0800
        sink.write(
            struct.pack("<4s5H3I2H", b"PK\3\4", 0, flags, 0, 0, 0, 0, 0, 0, len(raw), len(extra))
            + raw
            + extra
        )
        if isinstance(data, Storage):
            crc = sink.copy_with_crc(data)
        else:
            sink.write(data)
            crc = zlib.crc32(data)
        if size:
            sink.write(struct.pack("<4sIQQ" if wide else "<4sIII", b"PK\7\x08", crc, size, size))
        fields = [size, size, header]
        full = b"".join(struct.pack("<Q", value) for value in fields if value >= _MAX32)
        extra = struct.pack("<HH", 1, len(full)) + full if full else b""
        narrow = [min(value, _MAX32) for value in fields]
        self.central += struct.pack(
            "<4s6H3I5H2I",
            *(b"PK\1\2", 0, 0, flags, 0, 0, 0, crc, narrow[0], narrow[1]),
            *(len(raw), len(extra), 0, 0, 0, 0, narrow[2]),
        )
        self.central += raw + extra
        self.count += 1
        self.names_crc = zlib.crc32(name.encode(), self.names_crc)
        self.bytes_crc = zlib.crc32(struct.pack("<I", crc), self.bytes_crc)

    def serialization_id(self) -> bytes:
        """40 digits that depend on the records' names and contents, as torch's do."""
        return f"{self.names_crc:020d}{self.bytes_crc:020d}".encode()

    def finish(self) -> None:
        sink = self.sink
        start = sink.position
        length = len(self.central)
        end = start + length
        counts = min(self.count, _MAX16)
        sink.write(bytes(self.central))
        sink.write(
            struct.pack(
                "<4sQ2H2I4Q",
                *(b"PK\6\6", 44, 0x031E, 45, 0, 0, self.count, self.count, length, start),
            )
            + struct.pack("<4sIQI", b"PK\6\7", 0, end, 1)
            + struct.pack(
                "<4s4H2IH",
                *(b"PK\5\6", 0, 0, counts, counts, min(length, _MAX32), min(start, _MAX32), 0),
            )
        )
