"""NumPy's ``.npz`` as a format of modelctl: a zip with an ``.npy`` file for each array.

Everything that a format needs is here: :meth:`Npz.sniff` knows it by what is in it,
:meth:`Npz.read` gives references to where the bytes lie. Nothing is unpickled: arrays of objects
are refused.
"""

from __future__ import annotations

from io import BytesIO
from tokenize import TokenError
from typing import Any

from modelctl.core.checkpoint import Checkpoint, Origin
from modelctl.core.dtypes import BY_NAME
from modelctl.core.nodes import ordered_dict
from modelctl.core.storages import RunStorage, Storage
from modelctl.core.tensors import SwappedStorage, TensorRef
from modelctl.errors import UnreadableError, UnsupportedError
from modelctl.formats.base import Format
from modelctl.storage.containers.deflate import InflatedStorage, inflate
from modelctl.storage.containers.zipdir import STORED, Member
from modelctl.storage.places import Place

_MOST_HEADER = 1 << 16


class Npz(Format):
    """What ``numpy.savez`` and ``numpy.savez_compressed`` write."""

    name = "npz"
    label = "npz"

    def sniff(self, place: Place) -> bool:
        names = list(place.zip.members) if place.zip is not None else []
        return bool(names) and all(name.endswith(".npy") for name in names)

    def read(self, place: Place) -> Checkpoint:
        assert place.zip is not None
        arrays = {
            name.removesuffix(".npy"): _array(place, member)
            for name, member in place.zip.members.items()
        }
        return Checkpoint(
            ordered_dict(arrays),
            Origin(place.name, self.name, self.label, place.size),
            warnings=tuple(place.zip.warnings),
        )


def _array(place: Place, member: Member) -> TensorRef:
    """One array: its header is read, its values are not."""
    dtype, shape, fortran, start = _header(place, member)
    native = BY_NAME.get(dtype.name)
    if native is None:
        raise UnsupportedError(f"{place.name}, {member.name}: an array of {dtype}, no numbers")
    nbytes = native.itemsize
    for n in shape:
        nbytes *= n
    if start + nbytes != member.size:
        raise UnreadableError(
            f"its header says {nbytes:,} bytes of values, it has {member.size - start:,}",
            path=place.name,
            member=member.name,
        )
    storage: Storage
    if member.method == STORED:
        storage, base = RunStorage(place.source, member.offset + start, nbytes), 0
    else:  # inflated as a whole, its header too
        where = place.source, member.offset, member.compressed, member.size
        storage, base = InflatedStorage(*where), start
    if dtype.byteorder == ">" and native.itemsize > 1:
        if base:
            raise UnsupportedError(f"{place.name}, {member.name}: big-endian and compressed")
        storage = SwappedStorage(storage, native.itemsize // (2 if native.kind == "complex" else 1))
    stride = _column_major(shape) if fortran else None
    return TensorRef(native, shape, storage, stride=stride, base=base)


def _header(place: Place, member: Member) -> tuple[Any, tuple[int, ...], bool, int]:
    """(dtype, shape, whether it is column-major, how long the header is), by numpy's own reader,
    which takes nothing but a literal."""
    from numpy.lib import format as npy

    size = min(_MOST_HEADER, member.size)
    if member.method == STORED:
        head = place.source.read(member.offset, size)
    else:
        head = next(inflate(place.source, member.offset, member.compressed, member.size), b"")
    file = BytesIO(head[:_MOST_HEADER])
    try:
        version = npy.read_magic(file)
        read = {(1, 0): npy.read_array_header_1_0, (2, 0): npy.read_array_header_2_0}[version]
        shape, fortran, dtype = read(file)
    except (ValueError, KeyError, EOFError, TypeError, SyntaxError, TokenError) as e:
        raise UnreadableError(
            f"not an .npy file that can be read: {e}"[:200], path=place.name, member=member.name
        ) from None
    if not all(type(n) is int and n >= 0 for n in shape) or len(shape) > 64:
        raise UnreadableError(f"the shape {shape!r:.80}", path=place.name, member=member.name)
    return dtype, shape, fortran, file.tell()


def _column_major(shape: tuple[int, ...]) -> tuple[int, ...]:
    stride, step = [], 1
    for n in shape:
        stride.append(step)
        step *= max(n, 1)
    return tuple(stride)
