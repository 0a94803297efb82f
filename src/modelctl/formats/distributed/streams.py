"""What lies compressed in the files of ranks: ``stream.zstd/1``, the one transform that torch has
(torch/distributed/checkpoint/_extension.py). Inflated into a nameless temporary file."""

from __future__ import annotations

import io
import os
import tempfile
from importlib import import_module
from typing import Any

from ...errors import UnreadableError, UnsupportedError
from ...storage.places import Place
from ...storage.source import OpenFile
from .metadata import Item

_PIECE = 1 << 20
# As for archives: weights don't compress like that.
_RATIO, _ALLOWED = 1000, 64 << 20


def as_saved(place: Place, item: Item) -> Place:
    """The bytes of an item as they were before they were transformed.

    Raises:
        UnsupportedError: a transform that is not known, or a library is missing.
        UnreadableError: they are damaged.
    """
    for transform in reversed(item.transforms):
        if transform != "stream.zstd/1":
            raise UnsupportedError(
                f"{place.name}: its bytes went through {transform!r:.100}, which is not known",
                hint="load it with the extension that wrote it, and save it without",
            )
        place = _inflated(place)
    return place


def _inflated(place: Place) -> Place:
    limit = max(_ALLOWED, _RATIO * place.size)
    with tempfile.TemporaryFile() as temporary, place.source.stream() as packed:
        try:
            with _zstd(packed, place.name) as plain:
                size = 0
                while piece := plain.read(_PIECE):
                    size += len(piece)
                    if size > limit:
                        raise UnreadableError("inflates to far more than it holds", path=place.name)
                    temporary.write(piece)
        except (ValueError, EOFError) as e:
            raise UnreadableError(f"damaged: {e}", path=place.name) from None
        temporary.flush()
        inner = OpenFile(os.dup(temporary.fileno()), place.name)
    place.sources.append(inner)
    return place.holding(inner)


def _zstd(packed: io.BufferedIOBase | Any, name: str) -> Any:
    """A file object that inflates; its errors are ValueError."""
    try:
        library = import_module("zstandard")
    except ImportError:
        raise UnsupportedError(
            f"{name}: compressed with zstd, which needs the library zstandard",
            hint="pip install zstandard",
        ) from None

    class Reader(io.RawIOBase):
        def __init__(self) -> None:
            self.inner = library.ZstdDecompressor().stream_reader(packed, read_across_frames=True)

        def read(self, size: int = -1) -> bytes:
            try:
                return bytes(self.inner.read(size))
            except library.ZstdError as e:
                raise ValueError(str(e)) from None

    return Reader()
