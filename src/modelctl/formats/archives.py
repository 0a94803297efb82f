"""Archives with checkpoints in them: zips (stable-baselines3) and gzipped tars (AllenNLP's
``model.tar.gz``). Read only.

What lies compressed can't be read in place: a checkpoint in a ``.tar.gz`` is inflated into a
nameless temporary file, which is gone when it is closed.
"""

from __future__ import annotations

import gzip
import json
import os
import tempfile
import zlib
from collections.abc import Mapping
from shlex import quote
from typing import IO, Any

from ..core.checkpoint import Checkpoint, Origin
from ..core.notes import Note
from ..errors import UnreadableError
from ..storage.places import Place
from ..storage.source import OpenFile
from .base import Format
from .single import read_single

_ZIPPED = (".pt", ".pth", ".th")
_SUFFIXES = (".th", ".pt", ".pth", ".ckpt", ".bin", ".safetensors")
_PIECE = 1 << 20
# deflate can't make more than 1,032 bytes of one; weights don't compress like that
_RATIO, _ALLOWED = 100, 64 << 20
_MOST_CONFIG = 16 << 20
_MOST_MEMBERS = 10_000


class ZipOfCheckpoints(Format):
    """A zip that is no checkpoint itself and has some as members: a tree with an entry for each."""

    name = "archive"
    label = "zip of checkpoints"

    def sniff(self, place: Place) -> bool:
        if place.zip is None:
            return False
        names = place.zip.members
        return any(name.endswith(_ZIPPED) for name in names) and not any(
            name.rpartition("/")[2] == "data.pkl" for name in names
        )

    def read(self, place: Place) -> Checkpoint:
        assert place.zip is not None
        parts = {
            name: read_single(place.zipped(member))
            for name, member in place.zip.members.items()
            if name.endswith(_ZIPPED)
        }
        return _tree(
            {name: part.root for name, part in parts.items()},
            Origin(place.name, self.name, f"zip of {len(parts)} checkpoints", place.size),
            parts,
            "the archive around its checkpoints",
            tuple(place.zip.warnings),
        )


class TarGz(Format):
    """A ``.tar.gz`` that holds one checkpoint, and maybe a ``config.json``."""

    name = "tar-gz"
    label = "tar.gz"

    def sniff(self, place: Place) -> bool:
        return place.head[:3] == b"\x1f\x8b\x08"

    def read(self, place: Place) -> Checkpoint:
        found, config = _unpacked(place)
        if not found:
            raise UnreadableError(
                "a gzipped tar without a checkpoint in it",
                path=place.name,
                hint=f"looked for {' '.join(_SUFFIXES)}",
            )
        parts = {name: read_single(inner) for name, inner in found.items()}
        root: dict[str, Any] = {name: part.root for name, part in parts.items()}
        if config is not None:
            root["config"] = config
        inside = ", ".join(part.origin.label for part in parts.values() if part.origin)
        return _tree(
            root,
            Origin(place.name, self.name, f"tar.gz of {inside}", place.size),
            parts,
            "the archive around its checkpoint",
        )


class PlainTar(Format):
    """A tar that is not compressed, with checkpoints in it (NeMo's ``.nemo``): read in place."""

    name = "tar"
    label = "tar"

    def sniff(self, place: Place) -> bool:
        return place.head[257:262] == b"ustar"

    def read(self, place: Place) -> Checkpoint:
        import tarfile

        from ..storage.containers.tarheaders import BoundedTarInfo

        members: dict[str, tuple[int, int]] = {}
        try:
            with (
                place.source.stream() as file,
                tarfile.open(fileobj=file, mode="r:", tarinfo=BoundedTarInfo) as tar,
            ):
                for count, member in enumerate(tar):
                    if count > _MOST_MEMBERS or member.size < 0:
                        what = "too many members" if member.size >= 0 else "a size below 0"
                        raise UnreadableError(what, path=place.name)
                    if member.isreg() and not member.issparse() and member.name in members:
                        raise UnreadableError(
                            "two members of one name", path=place.name, member=member.name
                        )
                    if member.isreg() and not member.issparse():
                        members[member.name] = member.offset_data, member.size
        except (tarfile.TarError, ValueError) as e:
            raise UnreadableError(f"not a tar that can be read: {e}", path=place.name) from None
        parts = {
            name.removeprefix("./"): read_single(place.window(*where, name))
            for name, where in members.items()
            if name.endswith(_SUFFIXES)
        }
        if not parts:
            raise UnreadableError(
                "a tar without a checkpoint in it",
                path=place.name,
                hint=f"looked for {' '.join(_SUFFIXES)}",
            )
        inside = ", ".join(part.origin.label for part in parts.values() if part.origin)
        return _tree(
            {name: part.root for name, part in parts.items()},
            Origin(place.name, self.name, f"tar of {inside}", place.size),
            parts,
            "the archive around its checkpoint",
        )


def _tree(
    root: dict[str, Any],
    origin: Origin,
    parts: Mapping[str, Checkpoint],
    outside: str,
    warnings: tuple[Note, ...] = (),
) -> Checkpoint:
    return Checkpoint(
        root,
        origin,
        outside=outside,
        warnings=(*warnings, *(w for part in parts.values() for w in part.warnings)),
        findings=tuple(finding for part in parts.values() for finding in part.findings),
    )


def _unpacked(place: Place) -> tuple[dict[str, Place], Any]:
    """The checkpoints in a gzipped tar, unpacked, and its config."""
    import tarfile

    from ..storage.containers.tarheaders import BoundedTarInfo

    limit = max(_ALLOWED, _RATIO * place.size)
    found: dict[str, Place] = {}
    config: Any = None
    try:
        with (
            place.source.stream() as raw,
            gzip.open(raw) as plain,
            tarfile.open(fileobj=plain, mode="r|", tarinfo=BoundedTarInfo) as tar,
        ):
            for count, member in enumerate(tar):
                if member.size < 0:
                    raise UnreadableError("a size below 0", path=place.name)
                if count > _MOST_MEMBERS or member.offset_data + member.size > limit:
                    raise UnreadableError("inflates to far more than it holds", path=place.name)
                file = tar.extractfile(member) if member.isreg() else None
                if file is None:
                    continue
                if member.name.endswith(_SUFFIXES):
                    found[member.name] = _inflated(file, place, member.name, member.size)
                elif member.name.endswith("config.json") and member.size <= _MOST_CONFIG:
                    config = json.loads(file.read())
            while plain.read(_PIECE):  # to its end, where the checksum of all of it stands
                if plain.tell() > limit:
                    raise UnreadableError("inflates to far more than it holds", path=place.name)
    except (tarfile.TarError, EOFError, zlib.error, gzip.BadGzipFile) as e:
        if not found and _is_one_file(place):
            raise UnreadableError(
                "one file, gzipped: what is in it can't be read in place",
                path=place.name,
                hint=f"gunzip -k {quote(place.name)}",
            ) from None
        raise UnreadableError(
            f"not a gzipped tar: {e}", path=place.name, hint="get the file again"
        ) from None
    except (ValueError, RecursionError) as e:
        raise UnreadableError(
            f"its config is no JSON: {e}"[:200], path=place.name, member="config.json"
        ) from None
    return found, config


def _is_one_file(place: Place) -> bool:
    """Whether a gzip holds something else than a tar, from its first bytes."""
    try:
        with place.source.stream() as raw, gzip.open(raw) as plain:
            head = plain.read(512)
    except (OSError, EOFError, zlib.error):
        return False
    return head[257:262] != b"ustar" and any(head)


def _inflated(file: IO[bytes], place: Place, member: str, size: int) -> Place:
    with tempfile.TemporaryFile() as temporary:
        left = size
        while left:
            piece = file.read(min(_PIECE, left))
            if not piece:
                raise UnreadableError("cut off", path=place.name, member=member)
            temporary.write(piece)
            left -= len(piece)
        temporary.flush()
        inner = OpenFile(os.dup(temporary.fileno()), f"{place.name}, {member}")
    place.sources.append(inner)
    return place.holding(inner)
