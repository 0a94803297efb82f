"""The formats that modelctl reads and writes, and how it tells them apart: by content."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import NamedTuple

from ..errors import UnreadableError, UnsupportedError, UsageError
from ..storage.source import FileSource
from .archives import TarGz
from .base import HEAD, Format, WritableFormat
from .pytorch.legacy import TorchLegacy
from .pytorch.tar import TorchTar
from .pytorch.zip import TorchZip
from .safetensors import Safetensors
from .shards.reading import Sharded

_SHARDS = (TorchZip(), TorchLegacy(), Safetensors())
REGISTRY: Sequence[Format] = (
    *_SHARDS,
    Sharded(_SHARDS),
    TorchTar(),
    TarGz(lambda source: detect(source).read(source)),
)

# What is often found under a checkpoint's name, and what it says to its owner.
_LOOKALIKES = (
    (
        b"version https://git-lfs",
        "a Git LFS pointer, not the file itself",
        "fetch the real file with 'git lfs pull'",
    ),
    (b"<!DOCTYPE", "a web page, not a checkpoint", "the download link gave a page: get the file"),
    (b"<html", "a web page, not a checkpoint", "the download link gave a page: get the file"),
    (b"7z\xbc\xaf'\x1c", "a 7z archive", "unpack it first"),
    (b"GGUF", "a GGUF file, which modelctl does not read", None),
    (b"\x89HDF", "an HDF5 file (Keras?), which modelctl does not read", None),
)


def detect(source: FileSource) -> Format:
    """The format of an open file, by its first bytes.

    Raises:
        UnreadableError: no format knows it; says what it looks like.
    """
    if source.size == 0:
        raise UnreadableError(
            "an empty file", path=source.name, hint="the download or the save failed: do it again"
        )
    head = source.read(0, min(HEAD, source.size))
    for known in REGISTRY:
        if known.sniff(head):
            return known
    for start, what, hint in _LOOKALIKES:
        if head.lstrip()[: len(start)].lower() == start.lower():
            raise UnreadableError(what, path=source.name, hint=hint)
    if head[:1] == b"\x80" and len(head) > 2 and head[1] <= 5:
        raise UnsupportedError(
            f"{source.name}: a plain pickle, not one that torch.save wrote",
            hint="save it with torch.save(obj, path)",
        )
    raise UnreadableError(
        f"not a checkpoint: begins with {head[:8].hex(' ')}",
        path=source.name,
        hint="modelctl reads " + ", ".join(known.label for known in REGISTRY),
    )


class Destination(NamedTuple):
    """Where an output goes: a file of a format, or a folder of shards of that format."""

    format: WritableFormat
    path: str
    # of the shards' names, stem and suffix (``model``, ``.safetensors``); None: one file
    shards: tuple[str, str] | None = None


_INDEX = ".index.json"
# What Hugging Face calls the shards of a format.
_SHARD_NAMES = {"safetensors": ("model", ".safetensors"), "torch": ("pytorch_model", ".bin")}


def destination(path: str, to: str | None = None, sharded: bool = False) -> Destination:
    """What ``path`` names as an output, by its suffix: a file, a folder for shards (one that is
    there, or ends with a slash, or with ``sharded`` has no suffix), or the index of shards.

    ``to`` is the name of the format where the suffix is not to say it.

    Raises:
        UsageError: no such format, or a name that does not say what is meant.
    """
    folder, name = os.path.split(path)
    if name.endswith(_INDEX):
        stem, suffix = os.path.splitext(name.removesuffix(_INDEX))
        fmt = for_writing(None, suffix) if suffix else for_writing(to or "safetensors", path)
        if to not in (None, fmt.name):
            raise UsageError(f"{path}: an index of {fmt.name} files, not of {to}")
        return Destination(fmt, folder or ".", (stem or "model", suffix or fmt.suffixes[0]))
    plain = not any(path.endswith(known.suffixes) for known in _writable())
    if not name or os.path.isdir(path) or (sharded and plain):
        fmt = for_writing(to or "safetensors", path)
        return Destination(fmt, path.rstrip("/" + os.sep) or path, _SHARD_NAMES[fmt.name])
    if sharded:
        raise UsageError(
            f"{path}: one file has no shards",
            hint=f"-o {os.path.join(folder, name.partition('.')[0])}/ writes a folder of them",
        )
    return Destination(for_writing(to, path), path)


def _writable() -> list[WritableFormat]:
    return [known for known in REGISTRY if isinstance(known, WritableFormat)]


def for_writing(name: str | None, path: str) -> WritableFormat:
    """The format to write: by its name (``--to``), else by the suffix of ``path``.

    Raises:
        UsageError: no such format, or a suffix that says nothing.
    """
    writable = _writable()
    names = ", ".join(known.name for known in writable)
    if name is not None:
        for known in writable:
            if known.name == name:
                return known
        raise UsageError(f"there is no format '{name}' to write", hint=f"--to takes {names}")
    for known in writable:
        if path.endswith(known.suffixes):
            return known
    suffixes = " ".join(suffix for known in writable for suffix in known.suffixes)
    raise UsageError(
        f"{path}: the suffix does not say which format to write",
        hint=f"use one of {suffixes}, or --to {names}",
    )
