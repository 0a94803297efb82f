"""Scan files for what their pickles would run; nothing of them is run."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence

from ..errors import ModelctlError, UnreadableError
from ..files import PathLike, place_of
from ..formats.distributed.dcp import metadata_among
from ..formats.distributed.metadata import Item, read_metadata
from ..formats.distributed.streams import as_saved
from ..formats.distributed.writing import DATA, items_of
from ..formats.registry import detect
from ..formats.shards.writing import INDEX
from ..storage.far.urls import is_far
from ..storage.places import Place
from .report import Scan, Scanned
from .walk import Problem, Sighting, Walk, inside

_MOST_FILES = 100_000


def scan(paths: PathLike | Sequence[PathLike]) -> Scan:
    """What unpickling files would import, call and build, wherever in them it lies: in torch's
    files of all times, zips, tars and what is compressed, one in another, numpy's arrays, joblib's
    and plain pickles, the parts of DCP folders. A folder is all files in it.

    Nothing is imported, called or written. What is found is a verdict, never a promise: a file
    without a finding has none of what is known to run (docs/safety.md#scan).

    Args:
        paths: files, folders or URLs, one or several.

    Raises:
        ModelctlError: there is no such file.
    """
    found = Scan()
    for path in [paths] if isinstance(paths, str | os.PathLike) else paths:
        found.extend(_scan(path))
    return found


def _scan(path: PathLike) -> Iterator[Scanned]:
    place = place_of(path)
    try:
        if place.is_folder:
            yield from _folder(place)
        else:
            found = _file(place, is_named=True)
            assert found is not None
            yield found
    finally:
        place.close()


def _folder(place: Place) -> Iterator[Scanned]:
    """All files in a folder and in those in it, but links; what is no checkpoint is passed over."""
    for count, inner in enumerate(_below(place)):
        if count >= _MOST_FILES:
            problem = Problem("unscanned", "", f"more than {_MOST_FILES:,} files")
            yield Scanned(place.name, problems=[problem])
            return
        found = _distributed(inner) if inner.is_folder else _file(inner, is_named=False)
        if found is not None:
            yield found
        if inner is not place:
            inner.close()


def _below(place: Place) -> Iterator[Place]:
    """The files in a folder, and folders whose files are one checkpoint."""
    metadata = metadata_among(place.names)
    own = {*metadata, *filter(DATA.fullmatch, place.names)} if metadata else set()
    if metadata:
        yield place
    for name in place.names:
        if name in own:
            continue
        if is_far(place.name):
            yield place.member(name)
            continue
        path = os.path.join(place.name, name)
        if not os.path.islink(path) and os.path.isdir(path):
            yield from _below(Place(path))
        elif not os.path.islink(path) and os.path.isfile(path):
            yield Place(path)


def _file(place: Place, *, is_named: bool) -> Scanned | None:
    """One file; None where it is none that has pickles, and nobody asked for it by name."""
    walk = Walk()
    walk.file(place)
    is_index = is_named or place.head[:1] != b"{" or place.filename.endswith(INDEX)
    # much is JSON, and says a word of an index; joblib's streams are no format of ours
    known = is_index and not walk.arrays and _read(place, walk)
    if not (known or walk.pickles or walk.problems):
        if not (is_named or walk.containers):
            return None
        walk.problem("unscanned", "", "no file of a kind that is known")
    return Scanned(place.name, walk.sightings, walk.problems, walk.pickles)


def _read(place: Place, walk: Walk) -> bool:
    """Whether a format knows it; what reading it as that finds is added."""
    try:
        format = detect(place)
    except ModelctlError:
        return False
    try:
        ckpt = format.read(place)
    except ModelctlError as e:
        walk.refused(e, "")
        return True
    walk.warned(ckpt.warnings)
    known = {one.finding[:4] for one in walk.sightings}
    walk.sightings += [Sighting("", one) for one in ckpt.findings if one[:4] not in known]
    return True


def _distributed(place: Place) -> Scanned:
    """A DCP folder: its metadata, and each item where they say that it lies."""
    walk, metadata = Walk(), metadata_among(place.names)
    items: dict[Item, str] = {}
    for name in metadata:
        walk.file(place.member(name), name)
        try:
            described = read_metadata(place.member(name))
        except UnreadableError as e:
            walk.refused(e, name)
            continue
        for entry, saved in described.entries.items():
            items.update(dict.fromkeys(items_of(saved), entry))
    for item, entry in items.items():
        name = inside(item.file, entry)
        try:
            file = place.member(item.file)
            size = max(min(item.length, file.size - item.offset), 0)
            window = file.window(item.offset, size, name)
            walk.file(as_saved(window, item), name)
        except ModelctlError as e:
            walk.refused(e, name)
    _read(place, walk)
    return Scanned(place.name, walk.sightings, walk.problems, walk.pickles)
