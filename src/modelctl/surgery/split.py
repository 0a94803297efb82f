"""Take a training checkpoint apart into its parts: the inverse of merge."""

from __future__ import annotations

from typing import Any

from ..core.checkpoint import Checkpoint
from ..core.notes import Note, info, warning
from ..core.tensors import TensorRef
from ..core.tree import Path, path_text, set_at, walk
from ..errors import NoMatchError

# In the rest, what stands where a part was.
_PLACE = "modelctl.split: "
PARTS = ("model", "optimizer", "scheduler", "ema")


def split(ckpt: Checkpoint) -> dict[str, Checkpoint]:
    """The parts of a training checkpoint: ``model``, ``optimizer``, ``scheduler``, ``ema`` as far
    as they are there, and ``rest``: the checkpoint with a short text in the place of each, so that
    :func:`~modelctl.merge` can put them back where they were.

    Of several optimizers, schedulers or EMA copies none is a part: they stay in the rest. Where
    there are several models and none is clearly meant, each of them is a part, and so is each
    optimizer and scheduler: under what they are called in the file.

    Raises:
        NoMatchError: it has no parts, or no model.
    """
    sections = ckpt.sections
    if not sections.certain:
        return _each(ckpt)
    model = sections.model()
    if model.path == ():
        raise NoMatchError(f"nothing to split: this is a {sections.kind}, all of it")
    found: dict[str, list[tuple[Path, Any]]] = {
        "model": [(model.path, model.node)],
        "optimizer": list(sections.optimizers),
        "scheduler": list(sections.schedulers),
        "ema": [(copy.path, copy.node) for copy in sections.ema],
    }
    rest = ckpt
    parts: dict[str, Checkpoint] = {}
    for part in PARTS:
        if len(found[part]) == 1:
            ((path, node),) = found[part]
            parts[part] = ckpt.replace(root=node, key=None)
            rest = rest.replace(root=set_at(rest.root, path, _PLACE + part), key=None)
        elif found[part]:
            where = ", ".join(path_text(path) for path, _ in found[part])
            rest = rest.noting(info(f"several of them stay in the rest: {where}"))
    parts["rest"] = rest.noting(*_torn(parts))
    return parts


def _each(ckpt: Checkpoint) -> dict[str, Checkpoint]:
    """The parts of a checkpoint of several models."""
    sections = ckpt.sections
    found = [(model.path, model.node) for model in sections.models]
    found += [*sections.optimizers, *sections.schedulers]
    rest = ckpt
    parts: dict[str, Checkpoint] = {}
    for path, node in found:
        name = path_text(path).replace("/", "_")
        parts[name] = ckpt.replace(root=node, key=None)
        rest = rest.replace(root=set_at(rest.root, path, _PLACE + name), key=None)
    models = ", ".join(path_text(model.path) for model in sections.models)
    told = info(f"several models ({models}): merge puts one back, not all of them")
    parts["rest"] = rest.noting(told, *_torn(parts))
    return parts


def places(rest: Checkpoint) -> dict[str, Path]:
    """Where in what :func:`split` left the parts were."""
    return {
        node.removeprefix(_PLACE): path
        for path, node in walk(rest.root)
        if isinstance(node, str) and node.startswith(_PLACE) and node[len(_PLACE) :] in PARTS
    }


def _torn(parts: dict[str, Checkpoint]) -> list[Note]:
    """A note a pair of parts that share tensors, which two files can't."""
    owner: dict[int, str] = {}
    torn: dict[tuple[str, str], str] = {}
    for part, ckpt in parts.items():
        for path, node in walk(ckpt.root):
            if isinstance(node, TensorRef) and node.storage.nbytes:
                first = owner.setdefault(id(node.storage), part)
                if first != part:
                    torn.setdefault((first, part), path_text(path))
    return [
        warning(f"'{name}' of {part} shares memory with {first}: in two files it does not")
        for (first, part), name in torn.items()
    ]
