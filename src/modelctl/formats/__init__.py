"""The formats that modelctl reads and writes, and how it tells them apart: by content."""

from __future__ import annotations

from collections.abc import Sequence

from ..errors import UnreadableError, UnsupportedError, UsageError
from ..storage.source import FileSource
from .base import HEAD, Format, WritableFormat
from .legacy import TorchLegacy
from .safetensors import Safetensors
from .sharded import Sharded
from .tar_gz import TarGz
from .torch_tar import TorchTar
from .torch_zip import TorchZip

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


def for_writing(name: str | None, path: str) -> WritableFormat:
    """The format to write: by its name (``--to``), else by the suffix of ``path``.

    Raises:
        UsageError: no such format, or a suffix that says nothing.
    """
    writable = [known for known in REGISTRY if isinstance(known, WritableFormat)]
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
