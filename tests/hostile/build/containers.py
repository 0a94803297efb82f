"""Containers whose every field can lie: zips (PKWARE APPNOTE 4.3), torch's legacy and tar files,
safetensors."""

from __future__ import annotations

import io
import json
import struct
import tarfile
import zlib
from collections.abc import Mapping
from typing import Any, NamedTuple

from .pickles import number, program, sequence, tensor, text
from .pickles import ordered as ordered_dict

WEIGHT = struct.pack("<16f", *range(16))
BIAS = struct.pack("<4f", 1, 2, 3, 4)
STORAGES = {"0": WEIGHT, "1": BIAS}
# A state_dict over those two.
STATE_DICT = ordered_dict({"weight": tensor("0", (4, 4)), "bias": tensor("1", (4,))})
CLEAN = program(STATE_DICT)

# ------------------------------------------------------------------ zip


class Entry(NamedTuple):
    """A member of a zip. ``lies`` go into both of its headers, ``local`` and ``central`` into one:
    ``name``, ``flags``, ``method``, ``crc``, ``packed``, ``size``, ``extra``, ``at``, ``mode``,
    ``dos``."""

    name: str | bytes
    data: bytes = b""
    lies: Mapping[str, Any] = {}
    local: Mapping[str, Any] = {}
    central: Mapping[str, Any] = {}
    listed: bool = True
    deflated: bool = False

    def fields(self, at: int, which: str) -> tuple[dict[str, Any], bytes]:
        stored = self.data
        if self.deflated:
            engine = zlib.compressobj(9, zlib.DEFLATED, -15)
            stored = engine.compress(self.data) + engine.flush()
        own = {
            "name": self.name.encode() if isinstance(self.name, str) else self.name,
            "flags": 0,
            "method": 8 if self.deflated else 0,
            "crc": zlib.crc32(self.data),
            "packed": len(stored),
            "size": len(self.data),
            "extra": b"",
            "at": at,
            "mode": 0,
            "dos": 0,
        }
        return {**own, **self.lies, **getattr(self, which)}, stored


def zipped(
    *members: Entry,
    before: bytes = b"",
    after: bytes = b"",
    wide: bytes = b"",
    end: Mapping[str, int] | None = None,
) -> bytes:
    """A zip: ``before`` its first entry, ``wide`` between directory and end record, ``after``
    all; ``end`` lies in the end record (``disk``, ``here``, ``count``, ``length``, ``start``)."""
    out, directory, listed = bytearray(before), bytearray(), 0
    for member in members:
        here, stored = member.fields(len(out), "local")
        there, _ = member.fields(len(out), "central")
        out += struct.pack(
            "<4s5H3I2H",
            *(b"PK\3\4", 20, here["flags"], here["method"], 0, 33, here["crc"]),
            *(here["packed"], here["size"], len(here["name"]), len(here["extra"])),
        )
        out += here["name"] + here["extra"] + stored
        if member.listed:
            listed += 1
            directory += struct.pack(
                "<4s6H3I5H2I",
                *(b"PK\1\2", 20, 20, there["flags"], there["method"], 0, 33, there["crc"]),
                *(there["packed"], there["size"], len(there["name"]), len(there["extra"])),
                *(0, 0, 0, there["mode"] << 16 | there["dos"], there["at"]),
            )
            directory += there["name"] + there["extra"]
    last = {"disk": 0, "here": listed, "count": listed, "length": len(directory)}
    last = {**last, "start": len(out), **(end or {})}
    record = struct.pack(
        "<4s4H2IH",
        *(b"PK\5\6", last["disk"], 0, last["here"], last["count"], last["length"]),
        *(last["start"], 0),
    )
    return bytes(out) + bytes(directory) + wide + record + after


def torch_members(
    data: bytes = CLEAN,
    storages: Mapping[str, bytes] = STORAGES,
    root: str = "a",
    **changes: Mapping[str, Any] | None,
) -> list[Entry]:
    """What ``torch.save`` puts into a zip. ``changes`` are fields of the entries ``data_pkl``,
    ``data_0``, …; with None an entry is left out."""
    found = {
        "data_pkl": Entry(f"{root}/data.pkl", data),
        "byteorder": Entry(f"{root}/byteorder", b"little"),
        **{f"data_{key}": Entry(f"{root}/data/{key}", raw) for key, raw in storages.items()},
        "version": Entry(f"{root}/version", b"3\n"),
    }
    for key, fields in changes.items():
        if fields is None:
            del found[key]
        else:
            found[key] = found[key]._replace(**fields)
    return list(found.values())


def torch_zip(
    data: bytes = CLEAN,
    storages: Mapping[str, bytes] = STORAGES,
    **changes: Mapping[str, Any] | None,
) -> bytes:
    return zipped(*torch_members(data, storages, **changes))


# ------------------------------------------------------------------ legacy, tar

MAGIC = program(number(0x1950A86A20F9469CFC6C))
VERSION = program(number(1001))
SYSTEM = program(b"}" + text("little_endian") + b"\x88s")
_NO_VIEW = b"N"


def legacy_tensor(key: str, *shape: int) -> bytes:
    from .pickles import storage_id

    numel = 1
    for size in shape:
        numel *= size
    return tensor(key, shape, storage=storage_id(key, numel, None, "cpu", _NO_VIEW))


LEGACY = program(ordered_dict({"weight": legacy_tensor("0", 4, 4), "bias": legacy_tensor("1", 4)}))


def legacy(
    data: bytes = LEGACY,
    keys: bytes = program(sequence(text("0"), text("1"))),
    storages: Mapping[str, bytes] = STORAGES,
    *,
    magic: bytes = MAGIC,
    version: bytes = VERSION,
    system: bytes = SYSTEM,
    numel: Mapping[str, int] | None = None,
) -> bytes:
    """What ``torch.save`` wrote before 1.6: five pickles, then each storage's length and bytes."""
    out = magic + version + system + data + keys
    for key, raw in storages.items():
        out += struct.pack("<q", (numel or {}).get(key, len(raw) // 4)) + raw
    return out


def tar(members: Mapping[str, bytes], mode: str = "w", **lies: Any) -> bytes:
    """A tar (``mode="w:gz"``: gzipped); ``lies`` are attributes of every member's header."""
    buffer = io.BytesIO()
    fast = {"compresslevel": 1} if mode == "w:gz" else {}
    with tarfile.open(fileobj=buffer, mode=mode, format=tarfile.USTAR_FORMAT, **fast) as made:
        for path, data in members.items():
            member = tarfile.TarInfo(path)
            member.size = len(data)
            for field, value in lies.items():
                setattr(member, field, value)
            made.addfile(member, io.BytesIO(data))
    return buffer.getvalue()


def tar_members(
    *,
    storage: bytes | None = None,
    tensors: bytes | None = None,
    tree: bytes | None = None,
    numel: int = 4,
    count: int = 1,
    dims: int = 1,
    sizes: bytes = struct.pack("<3q", 4, 1, 0),
) -> dict[str, bytes]:
    """The three members of a tar of torch 0.1, with one tensor of four floats in it."""
    from .pickles import group, name

    record = program(group(number(7), text("cpu"), name("torch", "FloatStorage")))
    listed = program(group(number(1), number(7), name("torch", "FloatTensor")))
    stored = program(number(count)) + record + struct.pack("<q", numel) + BIAS
    return {
        "storages": stored + program(b"]") if storage is None else storage,
        "tensors": program(number(count)) + listed + struct.pack("<i4x", dims) + sizes
        if tensors is None
        else tensors,
        "pickle": program(ordered_dict({"bias": number(1) + b"Q"})) if tree is None else tree,
    }


# ------------------------------------------------------------------ safetensors


def described(dtype: str = "F32", shape: Any = (4,), begin: Any = 0, end: Any = 16) -> Any:
    """A tensor in a header."""
    return {"dtype": dtype, "shape": shape, "data_offsets": [begin, end]}


def safetensors(header: Any, data: bytes = BIAS, length: int | None = None) -> bytes:
    """A file: ``header`` as JSON (bytes as they are), padded; ``length`` is what it claims."""
    raw = header if isinstance(header, bytes) else json.dumps(header).encode()
    raw += b" " * (-len(raw) % 8)
    return struct.pack("<Q", len(raw) if length is None else length) + raw + data
