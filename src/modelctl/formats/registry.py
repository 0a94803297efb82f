"""The formats that modelctl knows, and how it tells them apart: by content."""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from functools import cache
from shlex import quote

from ..core.checkpoint import Checkpoint
from ..core.nodes import Composite
from ..core.notes import Note
from ..core.tree import first
from ..errors import ModelctlError, SeveralError, UnreadableError, UnsupportedError, UsageError
from ..storage.places import Place
from .archives import PlainTar, TarGz, ZipOfCheckpoints
from .arrays import PickledArrays
from .base import Format, Writable
from .folders import SHARD, SUFFIXES, Folder, latest_of
from .guests import Broken, third_party
from .shards.reading import Sharded
from .shards.writing import INDEX
from .single import SINGLE, check_not_empty, guest_of, known_to

# Those whose checkpoints are files, or are named by one.
_FILES: Sequence[Format] = (
    *(*SINGLE, Sharded(), ZipOfCheckpoints(), TarGz(), PlainTar(), PickledArrays()),
)
# nodes of a tree
_LOOKED_AT = 64
# A folder has at most so many names that are looked at.
_MOST_INSIDE = 10_000
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
    (b"GGUF", "a GGUF file, which modelctl does not read", "read it with the package gguf"),
    (
        b"\x89HDF",
        "an HDF5 file (Keras?), which modelctl does not read",
        "its model is loaded by keras, its arrays are read by h5py",
    ),
    (
        b"\x93NUMPY",
        "one numpy array, no checkpoint",
        "torch.save({'name': torch.from_numpy(numpy.load(path))}, new)",
    ),
)

# Zips of others, by a member that each has.
_ZIPS = (
    (
        "MAR-INF/MANIFEST.json",
        "a TorchServe archive (.mar), which modelctl does not read",
        "unpack it, and name the checkpoint inside",
    ),
    (
        "model.weights.h5",
        "a Keras model, which modelctl does not read",
        "load it with keras, which runs on torch, too, and torch.save its weights",
    ),
    (
        ".npy",
        "a numpy .npz, which modelctl does not read by itself",
        "torch.save({k: torch.from_numpy(v) for k, v in numpy.load(path).items()}, new)",
    ),
)


def _files() -> Sequence[Format]:
    return _FILES


@cache
def _folders() -> Sequence[Format]:
    """Those whose checkpoints are folders: loaded where there is one, or one is to be written."""
    from .distributed.dcp import DistributedCheckpoint
    from .distributed.hf_shards import PartsInSafetensors
    from .distributed.ranks import RankFiles
    from .distributed.universal import UniversalZero
    from .distributed.zero import Zero
    from .pipelines import Pipeline

    return (
        *(DistributedCheckpoint(), PartsInSafetensors(), UniversalZero(), Zero(), RankFiles()),
        *(Pipeline(), Folder()),
    )


def built_in() -> Sequence[Format]:
    """All formats of ours."""
    return (*_FILES, *_folders())


def salvage(place: Place) -> Checkpoint | None:
    """What is whole of a file whose end is missing; None where no format knows how to tell.

    Raises:
        UnreadableError: it is cut off in its structure.
    """
    if place.is_folder or not place.size:
        return None
    return next((found for one in _FILES if (found := one.salvage(place)) is not None), None)


def detect(place: Place) -> Format:
    """The format of a place, by what is in it. Ours come first; those of other packages are only
    loaded for what none of ours knows.

    Raises:
        UnreadableError: no format knows it; says what it looks like.
        UnsupportedError: a part of a folder, which says nothing by itself.
        ModelctlError: it can't be opened.
    """
    check_not_empty(place)
    if not place.is_folder and place.filename.endswith((".distcp", ".metadata")):
        raise UnsupportedError(
            f"{place.name}: one file of a torch.distributed.checkpoint folder",
            hint=f"name the folder: {quote(os.path.dirname(os.path.abspath(place.name)))}",
        )
    ours = _folders() if place.is_folder else _FILES
    found = known_to(ours, place) or guest_of(place)
    if found is None:
        raise _unknown(place)
    return found


def about_ranks(place: Place, ckpt: Checkpoint) -> list[Note]:
    """What there is to say of a file that is one of several ranks'. Most have no wrapped tensor
    among their first nodes, where a rank's state_dict has its parameters."""
    for node in first(ckpt.root, _LOOKED_AT):
        if isinstance(node, Composite):
            from .distributed.ranks import of_one_rank

            note = of_one_rank(place, node)
            if note is not None:
                return [note]
    return []


def known(name: str) -> Format | None:
    """The format of that name, as a checkpoint's origin has it; None where there is none."""
    for formats in (_files, _folders, third_party):  # each loaded where none before it is meant
        for one in formats():
            if one.name == name:
                return one
    return None


def checkpoints_in(place: Place) -> list[str]:
    """The names of the checkpoints in a folder that is none itself, files and folders, the newest
    last: as the numbers in their names say, unless a file or a link ``latest`` does."""
    if not place.is_folder:
        return []
    found = [name for name in place.names[:_MOST_INSIDE] if _is_one(place, name)]
    if all(map(SHARD.search, found)) and not any(name.endswith(INDEX) for name in found):
        return []  # of one that lacks its index
    found.sort(key=lambda name: [int(n) for n in re.findall(r"\d+", name)] or [-1])
    links = {name: place.leads_to(name) for name in found}
    said = links.get("latest") or latest_of(place)
    others = [name for name in found if links[name] not in links]
    return sorted(others, key=lambda name: name == said)


def _is_one(place: Place, name: str) -> bool:
    inner = place.member(name)
    if inner.is_folder:
        return known_to(_folders(), inner) is not None
    return name.endswith((*SUFFIXES, INDEX))


def _unknown(place: Place) -> ModelctlError:
    if place.zip is not None:
        for has, what, hint in _ZIPS:
            if any(name.endswith(has) for name in place.zip.members):
                return UnreadableError(what, path=place.name, hint=hint)
    guests = [one for one in third_party() if not isinstance(one, Broken)]
    several = checkpoints_in(place)
    if len(several) > 1 or (several and place.member(several[0]).is_folder):
        paths = [place.member(name).name for name in several]
        newest = f"the newest: {quote(paths[-1])}"
        if len(paths) > 1:
            newest += f"; 'modelctl summary {quote(place.name)}' lists them"
        return SeveralError(place.name, paths, newest)
    for one in (*built_in(), *guests):
        why = one.explain(place)
        if why is not None:
            return why
    head = place.head
    if head[:1] == b"\x08" and (b"pytorch" in head or b"onnx" in head or b"tf2onnx" in head):
        return UnreadableError(
            "an ONNX graph, which modelctl does not read",
            path=place.name,
            hint="look at it with the package onnx; the weights are in what it was exported from",
        )
    for start, what, hint in _LOOKALIKES:
        if head.lstrip()[: len(start)].lower() == start.lower():
            return UnreadableError(what, path=place.name, hint=hint)
    if head[:1] == b"\x80" and len(head) > 2 and head[1] <= 5:
        return UnsupportedError(
            f"{place.name}: a plain pickle, not one that torch.save wrote",
            hint="save it with torch.save(obj, path)",
        )
    return UnreadableError(
        f"not a checkpoint: begins with {head[:8].hex(' ')}",
        path=place.name,
        hint="modelctl reads " + ", ".join(one.label for one in (*built_in(), *guests)),
    )


def writable(*, all: bool = False) -> list[Writable]:
    """The formats that can be written: ours, or with ``all`` those of other packages, too."""
    known = (*built_in(), *third_party()) if all else built_in()
    return [one for one in known if isinstance(one, Writable) and one.by_name]


def of_suffix(path: str) -> Writable | None:
    """The format to write that the suffix of a path says; those of other packages are only asked
    where none of ours does."""
    for formats in (_files, third_party):
        for one in formats():
            if isinstance(one, Writable) and path.endswith(one.suffixes):
                return one
    return None


def for_writing(name: str | None, path: str) -> Writable:
    """The format to write: by its name (``--to``), else by the suffix of ``path``.

    Raises:
        UsageError: no such format, or a suffix that says nothing.
        ModelctlError: it is another package's, and can't be loaded.
    """
    if name is None:
        found = of_suffix(path)
    else:
        there = known(name)
        found = there if isinstance(there, Writable) else None
    if found is not None:
        return found
    broken = [one for one in third_party() if isinstance(one, Broken)]
    for one in broken:
        if one.name == name:
            raise one.error
    every = writable(all=True)
    names = ", ".join(one.name for one in every)
    if name is not None:
        raise UsageError(f"there is no format '{name}' to write", hint=f"--to takes {names}")
    suffixes = " ".join(suffix for one in every for suffix in one.suffixes)
    unknown = "".join(f" ({one.error})" for one in broken)
    raise UsageError(
        f"{path}: the suffix does not say which format to write{unknown}",
        hint=f"use one of {suffixes}, or --to {names}",
    )
