"""torch.export archives (``.pt2``), both layouts: read only, the program is not run
(docs/formats.md#compiled-programs).

The current layout lists tensors in ``data/weights/*_weights_config.json`` and
``data/constants/*_constants_config.json``; older exports hold whole ``torch.save`` files in
``serialized_state_dict.*`` and ``serialized_constants.*``.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

from ...core.checkpoint import Checkpoint, Origin
from ...core.dtypes import BY_NAME, DType
from ...core.nodes import mapping, ordered_dict
from ...core.storages import RunStorage
from ...core.tensors import StorageRef, TensorRef
from ...errors import UnreadableError
from ...pickles.rebuild import view
from ...storage.containers.zipdir import STORED, Member, ZipDirectory
from ...storage.places import Place
from ..base import Format
from ..pytorch.zip import TorchZip
from .export_program import ExportedProgram

MAX_JSON = 256 << 20

# torch/_export/serde/schema.py, class ScalarType.
_DTYPES = {
    1: "uint8",
    2: "int8",
    3: "int16",
    4: "int32",
    5: "int64",
    6: "float16",
    7: "float32",
    8: "float64",
    9: "complex32",
    10: "complex64",
    11: "complex128",
    12: "bool",
    13: "bfloat16",
    28: "uint16",
    29: "float8_e4m3fn",
    30: "float8_e5m2",
    31: "float8_e4m3fnuz",
    32: "float8_e5m2fnuz",
    33: "float8_e8m0fnu",
    34: "uint32",
    35: "uint64",
}


class TorchExport(Format):
    """An archive of ``torch.export.save``, of either layout."""

    name = "torch-export"
    label = "torch.export"

    def sniff(self, place: Place) -> bool:
        names = place.zip.members if place.zip is not None else {}
        return any(name.rpartition("/")[2] == "archive_format" for name in names) or (
            "serialized_exported_program.json" in names
        )

    def read(self, place: Place) -> Checkpoint:
        """The archive's parameters and buffers as a state_dict, and its constants."""
        assert place.zip is not None
        weights: dict[str, TensorRef] = {}
        constants: dict[str, TensorRef] = {}
        parts: list[Checkpoint] = []
        for name, member in place.zip.members.items():
            last = name.rpartition("/")[2]
            if last.endswith("_weights_config.json"):
                weights.update(_listed(place, place.zip, name))
            elif last.endswith("_constants_config.json"):
                constants.update(_listed(place, place.zip, name))
            elif last.startswith(("serialized_state_dict.", "serialized_constants.")):
                part = _saved(place, member)
                parts.append(part)
                found = {
                    key: ref
                    for key, ref in (mapping(part.root) or {}).items()
                    if isinstance(ref, TensorRef)
                }
                (weights if "state_dict" in last else constants).update(found)
        if parts and any(ref.role == "parameter" for ref in weights.values()):
            # torch.export keeps a program's parameters as Parameters: what is none is a buffer
            weights = {key: ref.replace(role=ref.role or "buffer") for key, ref in weights.items()}
        return Checkpoint(
            ordered_dict(weights),
            Origin(place.name, self.name, self.label, place.size),
            constants=ordered_dict(constants),
            outside="the exported program",
            program=ExportedProgram(place.zip),
            warnings=tuple(place.zip.warnings) + tuple(w for part in parts for w in part.warnings),
            findings=tuple(finding for part in parts for finding in part.findings),
        )


def _saved(place: Place, member: Member) -> Checkpoint:
    """A member that is a whole ``torch.save`` file."""
    inner = place.zipped(member)
    if inner.zip is None:
        raise UnreadableError("not what torch.save writes", path=place.name, member=member.name)
    return TorchZip().read(inner)


def _listed(place: Place, directory: ZipDirectory, name: str) -> dict[str, TensorRef]:
    """The tensors of one config, each a member beside it."""

    def broken(message: str) -> UnreadableError:
        return UnreadableError(message, path=directory.source.name, member=name)

    try:
        config = json.loads(directory.read(name, MAX_JSON))["config"]
        items = list(config.items())
    except (ValueError, RecursionError, KeyError, TypeError, AttributeError):
        raise broken("not the JSON that torch.export writes") from None
    folder = name.rpartition("/")[0]
    storages: dict[str, RunStorage] = {}
    found: dict[str, TensorRef] = {}
    for tensor, info in items:
        try:
            path, is_param = f"{folder}/{info['path_name']}", info["is_param"] is True
            member = directory.members[path]
            if info["use_pickle"]:
                root = _saved(place, member).root
                if isinstance(root, TensorRef):
                    found[tensor] = root
                continue
            meta = info["tensor_meta"]
            dtype = BY_NAME[_DTYPES[meta["dtype"]]]
            sizes = tuple(size["as_int"] for size in meta["sizes"])
            strides = tuple(size["as_int"] for size in meta["strides"])
            offset = meta["storage_offset"]["as_int"]
        except (KeyError, TypeError):
            raise broken(f"the tensor {tensor!r:.200} is not described as torch does") from None
        if member.method != STORED:
            raise broken(f"{path} is compressed")
        storage = storages.setdefault(
            path,
            RunStorage(directory.source, member.offset, member.size, crc32=directory.crc32(member)),
        )
        found[tensor] = _checked(storage, dtype, offset, sizes, strides, broken).replace(
            role="parameter" if is_param else "buffer",
            requires_grad=meta.get("requires_grad") is True if is_param else None,
        )
    return found


def _checked(
    storage: RunStorage,
    dtype: DType,
    offset: Any,
    sizes: tuple[Any, ...],
    strides: tuple[Any, ...],
    broken: Callable[[str], UnreadableError],
) -> TensorRef:
    try:
        return view(StorageRef(storage, dtype), dtype, offset, sizes, strides, False)
    except UnreadableError as e:
        raise broken(e.reason) from None
