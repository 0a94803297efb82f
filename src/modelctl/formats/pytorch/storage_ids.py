"""What torch's zip and legacy files share: persistent ids, and pickles of unknown length."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from ...core.dtypes import BY_STORAGE_CLASS, DType
from ...core.nodes import Global
from ...core.storages import Storage
from ...core.tensors import StorageRef
from ...core.tree import brief
from ...errors import UnreadableError

_UNTYPED = {Global("torch.storage", "UntypedStorage"), Global("torch", "UntypedStorage")}


# Makes a storage of its key, location, bytes and dtype (None where it is untyped).
MakeStorage = Callable[[str, str, int, DType | None], Storage]


def storage_dtype(cls: Any) -> DType | None:
    """The dtype of a storage class; None for an untyped one.

    Raises:
        UnreadableError: not a storage class of torch.
    """
    if isinstance(cls, Global):
        known = BY_STORAGE_CLASS.get(cls.name)
        if known is not None and cls.module in ("torch", "torch.cuda"):
            return known
        if cls in _UNTYPED:
            return None
    raise UnreadableError(f"a storage of the class {brief(cls)}")


def storage_table(
    make: MakeStorage, table: dict[str, StorageRef] | None = None
) -> Callable[[Any], StorageRef]:
    """A ``persistent_load`` that makes each storage once, and keeps it in ``table`` by its key.

    It takes ids as torch writes them: ``("storage", class, key, location, numel[, view])``. Where
    a key comes with two classes, the first one counts, as in ``torch.load``, which makes those
    without bytes anew each time. It raises UnreadableError for anything else: a reader would
    import or call what it names.
    """
    table = {} if table is None else table

    def load(pid: Any) -> StorageRef:
        if type(pid) is not tuple or len(pid) not in (5, 6) or pid[0] != "storage":
            raise UnreadableError(f"a persistent id that is no storage: {brief(pid)}")
        _, cls, key, location, numel = pid[:5]
        dtype = storage_dtype(cls)
        if type(key) is int:
            key = str(key)
        if type(key) is not str or type(location) is not str:
            raise UnreadableError("a storage whose key or location is not text")
        if type(numel) is not int or not 0 <= numel < 1 << 60:
            raise UnreadableError(f"a storage of {brief(numel)} elements")
        ref = table.get(key)
        if ref is None:
            nbytes = numel if dtype is None else numel * dtype.itemsize
            ref = table[key] = StorageRef(make(key, location, nbytes, dtype), dtype)
        elif not ref.storage.nbytes:
            ref = StorageRef(ref.storage, dtype)
        return ref if len(pid) == 5 or pid[5] is None else _part(ref, pid[5], dtype)

    return load


def _part(ref: StorageRef, view: Any, dtype: DType | None) -> StorageRef:
    """What a view of old torch says: ``(key, offset, size)``."""
    if not (isinstance(view, tuple) and len(view) == 3):
        raise UnreadableError("a storage view that is not (key, offset, size)")
    _, offset, size = view
    itemsize = dtype.itemsize if dtype else 1
    if type(offset) is not int or type(size) is not int or offset < 0 or size < 0:
        raise UnreadableError("a storage view of negative offset or size")
    if (offset + size) * itemsize > ref.storage.nbytes:
        raise UnreadableError("a storage view that reaches outside its storage")
    return StorageRef(ref.storage, ref.dtype, offset * itemsize)
