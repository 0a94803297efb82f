"""What a format is."""

from __future__ import annotations

from typing import Protocol, runtime_checkable

from ..core.checkpoint import Checkpoint
from ..storage.source import FileSource
from ..storage.staging import Sink

HEAD = 4096


class Format(Protocol):
    """One kind of file: how it is recognised and read.

    ``name`` is what ``--to`` takes and JSON shows, ``label`` what people read.
    """

    name: str
    label: str

    def sniff(self, head: bytes) -> bool:
        """Whether a file that begins with ``head`` (up to 4 KiB) is of this format."""
        ...

    def read(self, source: FileSource) -> Checkpoint:
        """The structure of an open file. Raises UnreadableError."""
        ...


@runtime_checkable
class WritableFormat(Format, Protocol):
    """A format that can be written, too; ``suffixes`` are those that choose it for an output."""

    suffixes: tuple[str, ...]

    def losses(self, ckpt: Checkpoint) -> list[str]:
        """What of ``ckpt`` this format can't hold, a line each."""
        ...

    def size(self, ckpt: Checkpoint) -> int:
        """About how many bytes the output takes."""
        ...

    def write(self, ckpt: Checkpoint, sink: Sink, name: str) -> None:
        """Write the checkpoint; ``name`` is the file name of the output."""
        ...
