"""Manifests: the hash of each tensor of a checkpoint, a line each, as ``hash --tensors`` prints."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping

from ..core.text import count, some
from ..errors import UnreadableError
from ..files import PathLike, place_of
from .hashing import unwritten
from .sections import Fault

_LINE = re.compile(r"(sha256:[0-9a-f]{64})  (.+)")
_MOST = 1 << 30


def read_manifest(path: PathLike) -> dict[str, str]:
    """The hash of each tensor, by its name.

    Raises:
        UnreadableError: no manifest; says which line is none of one.
        ModelctlError: it can't be read.
    """
    place = place_of(path)
    try:
        if place.size > _MOST:
            raise UnreadableError(f"{place.size:,} bytes, too much for a manifest", path=place.name)
        text = place.source.read(0, place.size).decode("utf-8")
    except UnicodeDecodeError:
        raise _none(place.name, "no text in UTF-8") from None
    finally:
        place.close()
    found: dict[str, str] = {}
    for number, line in enumerate(text.split("\n"), 1):
        if not line:
            continue
        match = _LINE.fullmatch(line.removesuffix("\r"))
        name = unwritten(match[2]) if match else None
        if match is None or name is None:
            raise _none(place.name, f"line {number:,} is no hash and a name: {line!r:.80}")
        if found.setdefault(name, match[1]) != match[1]:
            raise _none(place.name, f"line {number:,} names {name!r:.80} once more, with another")
    if not found:
        raise _none(place.name, "nothing is in it")
    return found


def _none(path: str, why: str) -> UnreadableError:
    return UnreadableError(
        f"no manifest: {why}", path=path, hint="modelctl hash --tensors SRC writes one"
    )


def compared(
    manifest: Mapping[str, str], hashes: Mapping[str, str], sections: Mapping[str, str | None]
) -> Iterator[Fault | str]:
    """What of a checkpoint is not as its manifest says; and, as text, which sections of it the
    manifest says nothing of.

    Args:
        hashes: those of the checkpoint's tensors that could be read.
        sections: the section of each of its tensors.
    """
    for name, wanted in manifest.items():
        if name not in sections:
            yield Fault("manifest", name, "is in the manifest, and not in the file")
        elif name not in hashes:
            yield Fault("manifest", name, "can't be read, so it was not compared")
        elif hashes[name] != wanted:
            yield Fault("manifest", name, "its content is not that of the manifest")
    known = {sections[name] for name in manifest if name in sections}
    beside: dict[str, list[str]] = {}
    for name, section in sections.items():
        if name in manifest:
            continue
        if section in known or not known:
            yield Fault("manifest", name, "is in the file, and not in the manifest")
        else:
            beside.setdefault(section or "what is in no section", []).append(name)
    for section, names in beside.items():
        yield (
            f"the manifest has nothing of {section}: {count(len(names), 'tensor')} not compared "
            f"({some(names, 2)})"
        )
