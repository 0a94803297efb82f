"""The tar files that torch 0.1 saved: three members, ``storages``, ``tensors`` and ``pickle``
(docs/formats.md#tar). Read only."""

from __future__ import annotations

from typing import Any

from ...core.checkpoint import Checkpoint, Finding, Origin
from ...core.dtypes import BY_STORAGE_CLASS, DType
from ...core.nodes import Global
from ...core.storages import RunStorage, Source
from ...core.tensors import StorageRef, TensorRef
from ...core.tree import brief
from ...errors import UnreadableError
from ...pickles.interpreter import unpickle
from ...pickles.rebuild import view
from ...storage.places import Place
from ..base import Format
from .storage_ids import storage_dtype

_MEMBERS = ("storages", "tensors", "pickle")
_MOST = 1_000_000
_RECORD = 1 << 16


class TorchTar(Format):
    """The tar container of torch 0.1."""

    name = "torch-tar"
    label = "torch tar"

    def sniff(self, place: Place) -> bool:
        # any of its members comes first
        first = place.head[:100].partition(b"\0")[0].removeprefix(b"./").decode("latin-1")
        return place.head[257:262] == b"ustar" and first in _MEMBERS

    def read(self, place: Place) -> Checkpoint:
        source = place.source
        places = _members(source)
        findings: list[Finding] = []

        def next_pickle(member: str, at: int, persistent: Any = None) -> tuple[Any, int]:
            _, end = places[member]
            if at >= end:
                raise UnreadableError("cut off", path=source.name, member=member, offset=at)
            size = _RECORD
            while True:
                data = source.read(at, min(size, end - at))
                try:
                    value, used, found = unpickle(data, persistent_load=persistent)
                except UnreadableError as e:
                    if len(data) < end - at:
                        size *= 8
                        continue
                    raise e.located(source.name, member) from None
                findings.extend(found)
                return value, at + used

        storages = self._storages(source, next_pickle, places)
        tensors = self._tensors(source, next_pickle, places, storages)

        def persistent(pid: Any) -> Any:
            if type(pid) is tuple and pid:  # a container class with its source text beside it
                return pid[0]
            found = tensors.get(_id(pid), storages.get(_id(pid)))
            if found is None:
                raise UnreadableError(f"a persistent id that names nothing: {brief(pid)}")
            return found

        root, _ = next_pickle("pickle", places["pickle"][0], persistent)
        return Checkpoint(
            root,
            Origin(source.name, self.name, self.label, source.size),
            findings=tuple(findings),
        )

    def _storages(self, source: Source, next_pickle: Any, places: Any) -> dict[str, StorageRef]:
        at, end = places["storages"]
        count, at = next_pickle("storages", at)
        found: dict[str, StorageRef] = {}
        for _ in range(_count(count, source, "storages")):
            record, at = next_pickle("storages", at)
            if not isinstance(record, tuple) or len(record) != 3:
                raise UnreadableError("a broken record", path=source.name, member="storages")
            key, location, cls = record
            dtype = storage_dtype(cls)
            itemsize = dtype.itemsize if dtype else 1
            numel = int.from_bytes(source.read(at, 8), "little", signed=True)
            at += 8
            if numel < 0 or at + numel * itemsize > end:
                raise UnreadableError(
                    f"a storage of {numel:,} elements that ends outside its member",
                    path=source.name,
                    member="storages",
                    offset=at,
                )
            where = location if isinstance(location, str) else brief(location)
            made = RunStorage(source, at, numel * itemsize, where)
            found[_id(key)] = StorageRef(made, dtype)
            at += numel * itemsize
        views, _ = next_pickle("storages", at)
        for entry in views if isinstance(views, list) else []:
            if type(entry) is not tuple or len(entry) != 4:
                raise UnreadableError("a broken view", path=source.name, member="storages")
            target, root, offset, _ = entry
            of = found.get(_id(root))
            if of is None or of.dtype is None or type(offset) is not int or offset < 0:
                raise UnreadableError("a broken view", path=source.name, member="storages")
            found[_id(target)] = StorageRef(of.storage, of.dtype, offset * of.dtype.itemsize)
        return found

    def _tensors(
        self, source: Source, next_pickle: Any, places: Any, storages: dict[str, StorageRef]
    ) -> dict[str, TensorRef]:
        at, _ = places["tensors"]
        count, at = next_pickle("tensors", at)
        found: dict[str, TensorRef] = {}
        for _ in range(_count(count, source, "tensors")):
            record, at = next_pickle("tensors", at)
            if not isinstance(record, tuple) or len(record) != 3:
                raise UnreadableError("a broken record", path=source.name, member="tensors")
            key, storage_id, cls = record
            ndim = int.from_bytes(source.read(at, 4), "little", signed=True)
            if not 0 <= ndim <= 64:
                raise UnreadableError(
                    f"a tensor of {ndim} dimensions", path=source.name, member="tensors", offset=at
                )
            raw = source.read(at + 8, 16 * ndim + 8)
            numbers = [
                int.from_bytes(raw[i : i + 8], "little", signed=True) for i in range(0, len(raw), 8)
            ]
            ref = storages.get(_id(storage_id))
            if ref is None:
                raise UnreadableError(
                    f"the storage {brief(storage_id)} is missing",
                    path=source.name,
                    member="tensors",
                )
            size, stride = tuple(numbers[:ndim]), tuple(numbers[ndim : 2 * ndim])
            try:
                found[_id(key)] = view(ref, _dtype(cls), numbers[-1], size, stride, False)
            except UnreadableError as e:
                raise e.located(source.name, "tensors") from None
            at += 8 + 16 * ndim + 8
        return found


def _members(source: Source) -> dict[str, tuple[int, int]]:
    """Where each member's bytes lie in the file: (start, end)."""
    import tarfile

    from ...storage.containers.tarheaders import BoundedTarInfo

    places: dict[str, tuple[int, int]] = {}
    try:
        with (
            source.stream() as file,
            tarfile.open(fileobj=file, mode="r:", tarinfo=BoundedTarInfo) as tar,
        ):
            for member in tar:
                if member.isreg() and member.name in _MEMBERS:
                    if member.name in places:
                        raise UnreadableError(
                            "two members of one name", path=source.name, member=member.name
                        )
                    places[member.name] = (member.offset_data, member.offset_data + member.size)
    except (tarfile.TarError, ValueError) as e:
        raise UnreadableError(f"not a tar file that can be read: {e}", path=source.name) from None
    missing = [name for name in _MEMBERS if name not in places]
    if missing:
        raise UnreadableError(
            f"a tar file without {' and '.join(missing)}: not one that torch saved",
            path=source.name,
            hint="unpack it, and name the checkpoint inside",
        )
    return places


def _count(count: Any, source: Source, member: str) -> int:
    if type(count) is not int or not 0 <= count <= _MOST:
        raise UnreadableError(f"{brief(count)} records", path=source.name, member=member)
    return count


def _id(node: Any) -> str:
    """What a storage or tensor is called: a number, or a text.

    Raises:
        UnreadableError: something else.
    """
    if type(node) is not int and not isinstance(node, str):
        raise UnreadableError(f"{brief(node)} is no id")
    return str(node) if isinstance(node, str) or node.bit_length() < 128 else brief(node)


def _dtype(cls: Any) -> DType:
    """The dtype of a tensor class (``torch.FloatTensor``, ``torch.cuda.FloatTensor``)."""
    if isinstance(cls, Global) and cls.module in ("torch", "torch.cuda"):
        found = BY_STORAGE_CLASS.get(cls.name.replace("Tensor", "Storage"))
        if found is not None:
            return found
    raise UnreadableError(f"a tensor of the class {brief(cls)}")
