"""What an output is called, and which format it is of, where nobody says so."""

from __future__ import annotations

from pathlib import Path

from ..core.checkpoint import Checkpoint
from ..errors import UsageError
from ..formats.base import Writable, WritableFolder, WritableFormat
from ..formats.registry import for_writing, known, of_suffix, writable
from ..storage.far.urls import is_far, shown
from ..storage.source import FileSource
from ..storage.streams import STREAM, is_stream

_USUAL = "torch"


def is_sharded(ckpt: Checkpoint) -> bool:
    """Whether it was read from shards and their index."""
    found = known(ckpt.origin.format) if ckpt.origin is not None else None
    return found is not None and found.in_shards


def is_written_folder(ckpt: Checkpoint) -> bool:
    """Whether it was read from a folder of a format that is written, too."""
    found = known(ckpt.origin.format) if ckpt.origin is not None else None
    return isinstance(found, WritableFolder)


def opened(ckpt: Checkpoint) -> list[FileSource]:
    """The files that hold a checkpoint, without those that only stand beside them."""
    beside = () if ckpt.folder is None else ckpt.folder.beside
    files = (one for one in ckpt.resources if isinstance(one, FileSource))
    return [one for one in files if one.path.name not in beside]


def same_format(ckpt: Checkpoint) -> str:
    """What writes a file of the format that it was read from; torch's where nothing does."""
    found = known(ckpt.origin.format) if ckpt.origin is not None else None
    return found.name if isinstance(found, Writable) else _USUAL


def format_of_stream(ckpt: Checkpoint) -> str:
    """What goes to stdout where nobody says it: what it was read from.

    Raises:
        UsageError: that is not written.
    """
    origin = ckpt.origin
    if origin is None or not isinstance(known(origin.format), WritableFormat):
        names = " or ".join(one.name for one in writable(all=True))
        said = f" {origin.label} is not written" if origin is not None else ""
        raise UsageError(f"{STREAM}: which format?{said}", hint=f"--to {names}")
    return origin.format


def usual_suffix(format: str) -> str:
    """The suffix of a file of a format; none of a folder.

    Raises:
        UsageError: there is no such format.
    """
    return (*for_writing(format, "").suffixes, "")[0]


def has_known_suffix(path: str) -> bool:
    """Whether the name of a file says of which format it is."""
    return of_suffix(path) is not None


def suffix_lies(path: str, format: str) -> bool:
    """Whether the name of a file says that it is of another format."""
    says = of_suffix(path)
    return says is not None and says.name != format


def filename(source: str) -> str:
    """The last part of a source's name, here or far."""
    if not is_far(source):
        return Path(source).name
    from urllib.parse import unquote

    return unquote(shown(source)).rstrip("/").rpartition("/")[2]


def name_in_folder(source: str, to: str | None) -> str:
    """The name of a source's output in a folder.

    Raises:
        UsageError: it came in on stdin.
    """
    if is_stream(source):
        raise UsageError("stdin has no name for a file in a folder", hint="-o FOLDER/NAME.pt")
    name = filename(source)
    if to is not None:
        return Path(name).stem + usual_suffix(to)
    return name if has_known_suffix(name) else name + usual_suffix(_USUAL)
