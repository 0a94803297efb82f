"""Pipelines of diffusers: a folder with a folder for each model, and ``model_index.json`` that
names them (docs/formats.md#folders). Read only: each folder is edited by itself."""

from __future__ import annotations

import json
from typing import Any

from ..core.checkpoint import Checkpoint, Origin
from ..core.text import count
from ..errors import UnreadableError
from ..storage.places import Place
from .base import Format
from .folders import Folder

_INDEX = "model_index.json"
_MOST_JSON = 16 << 20


class Pipeline(Format):
    """A tree with an entry for each model of a pipeline."""

    name = "pipeline"
    label = "pipeline"

    def sniff(self, place: Place) -> bool:
        return _INDEX in place.names and bool(_components(place))

    def read(self, place: Place) -> Checkpoint:
        folder = Folder()
        parts = {name: folder.read(place.member(name)) for name in _components(place)}
        return Checkpoint(
            {name: part.root for name, part in parts.items()},
            Origin(
                place.name,
                self.name,
                f"{_class(place)} of {count(len(parts), 'model')}",
                sum(part.origin.bytes_on_disk for part in parts.values() if part.origin),
            ),
            outside="the folders of its models, each with its own config,",
            warnings=tuple(warning for part in parts.values() for warning in part.warnings),
            findings=tuple(finding for part in parts.values() for finding in part.findings),
        )


def _components(place: Place) -> list[str]:
    """The folders that hold a model."""
    folder = Folder()
    inside = ((name, place.member(name)) for name in place.names)
    return [name for name, one in inside if one.is_folder and folder.sniff(one)]


def _class(place: Place) -> str:
    """What the pipeline is called."""
    index = place.member(_INDEX)
    if index.size > _MOST_JSON:
        raise UnreadableError(f"{index.size:,} bytes of JSON", path=index.name)
    try:
        found: Any = json.loads(index.source.read(0, index.size))
    except (ValueError, RecursionError) as e:
        raise UnreadableError(f"no JSON: {e}"[:200], path=index.name) from None
    name = found.get("_class_name") if isinstance(found, dict) else None
    return name[:60] if isinstance(name, str) and name.isidentifier() else "pipeline"
