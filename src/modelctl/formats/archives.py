"""Gzipped tars with a checkpoint in them (AllenNLP's ``model.tar.gz``): read only.

What lies compressed can't be read in place: the checkpoint is inflated into a nameless temporary
file, which is gone when it is closed.
"""

from __future__ import annotations

import gzip
import json
import tempfile
import zlib
from collections.abc import Callable
from typing import IO, Any

from ..core.checkpoint import Checkpoint, Origin
from ..errors import UnreadableError
from ..storage.source import FileSource

_SUFFIXES = (".th", ".pt", ".pth", ".ckpt", ".bin", ".safetensors")
_PIECE = 1 << 20
# deflate can't make more than 1,032 bytes of one; weights don't compress like that
_RATIO, _ALLOWED = 100, 64 << 20
_MOST_CONFIG = 16 << 20
_MOST_MEMBERS = 10_000


class TarGz:
    """A ``.tar.gz`` that holds one checkpoint, and maybe a ``config.json``."""

    name = "tar-gz"
    label = "tar.gz"

    def __init__(self, read_inner: Callable[[FileSource], Checkpoint]) -> None:
        self.read_inner = read_inner

    def sniff(self, head: bytes) -> bool:
        return head[:3] == b"\x1f\x8b\x08"

    def read(self, source: FileSource) -> Checkpoint:
        import tarfile

        limit = max(_ALLOWED, _RATIO * source.size)
        found: dict[str, FileSource] = {}
        config: Any = None
        try:
            with (
                open(source.path, "rb") as raw,
                gzip.open(raw) as plain,
                tarfile.open(fileobj=plain, mode="r|") as tar,
            ):
                for count, member in enumerate(tar):
                    if count > _MOST_MEMBERS or member.offset_data + member.size > limit:
                        raise UnreadableError(
                            "inflates to far more than it holds", path=source.name
                        )
                    if not member.isreg():
                        continue
                    file = tar.extractfile(member)
                    if file is None:
                        continue
                    if member.name.endswith(_SUFFIXES):
                        found[member.name] = _inflated(file, source, member.name, member.size)
                    elif member.name.endswith("config.json") and member.size <= _MOST_CONFIG:
                        config = json.loads(file.read())
            return self._assemble(source, found, config)
        except (tarfile.TarError, EOFError, zlib.error, gzip.BadGzipFile) as e:
            _close(found)
            raise UnreadableError(
                f"not a gzipped tar: {e}", path=source.name, hint="get the file again"
            ) from None
        except (ValueError, RecursionError) as e:
            _close(found)
            raise UnreadableError(
                f"its config is no JSON: {e}"[:200], path=source.name, member="config.json"
            ) from None
        except BaseException:
            _close(found)
            raise

    def _assemble(
        self, source: FileSource, found: dict[str, FileSource], config: Any
    ) -> Checkpoint:
        if not found:
            raise UnreadableError(
                "a gzipped tar without a checkpoint in it",
                path=source.name,
                hint=f"looked for {' '.join(_SUFFIXES)}",
            )
        parts = {name: self.read_inner(inner) for name, inner in found.items()}
        root: dict[str, Any] = {name: part.root for name, part in parts.items()}
        if config is not None:
            root["config"] = config
        inside = ", ".join(part.origin.label for part in parts.values() if part.origin)
        return Checkpoint(
            root,
            Origin(source.name, self.name, f"tar.gz of {inside}", source.size),
            warnings=tuple(w for part in parts.values() for w in part.warnings),
            findings=tuple(finding for part in parts.values() for finding in part.findings),
            outside="the archive around its checkpoint",
            resources=(source, *found.values()),
        )


def _inflated(file: IO[bytes], source: FileSource, member: str, size: int) -> FileSource:
    with tempfile.TemporaryFile() as temporary:
        left = size
        while left:
            piece = file.read(min(_PIECE, left))
            if not piece:
                raise UnreadableError("cut off", path=source.name, member=member)
            temporary.write(piece)
            left -= len(piece)
        temporary.flush()
        return FileSource.of(temporary.fileno(), source, member)


def _close(found: dict[str, FileSource]) -> None:
    for inner in found.values():
        inner.close()
