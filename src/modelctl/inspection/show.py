"""The tree with its non-tensor values: the data behind ``modelctl show``."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from ..core.checkpoint import Checkpoint
from ..core.modules import class_of, hyperparameters, is_training
from ..core.names import nearest
from ..core.nodes import Composite, Global, Obj, attributes, children, is_module, mapping
from ..core.numbers import only_value, plain_number
from ..core.pages import Column, Line, Page, Table
from ..core.sections import is_state_dict
from ..core.tensors import StorageRef, TensorRef
from ..core.text import count, shape
from ..core.tree import Path, containers, find_path, get, most_paths, path_text
from ..errors import NoMatchError, UnsupportedError
from .printed import Printed

_MOST_INLINE = 72
_WIDEST = 40  # of the labels, for people
# What Megatron calls one of the objects that it keeps under a key, by its place among them.
_OBJECT_SHARD = re.compile(r"(.+)/shard_(\d{1,9}(?:\.\d{1,9})*)_(\d{1,9}(?:\.\d{1,9})*)")


class Branch(NamedTuple):
    """A node of the tree: how deep, its label, and what it is or holds, in a few words."""

    depth: int
    label: str
    text: str


@dataclass(frozen=True)
class Shown(Printed):
    """The report of ``show``: what is at ``path`` of a checkpoint, or (None) all that is in it."""

    node: Any
    path: str | None = None
    metadata: Mapping[str, str] = field(default_factory=dict)

    def as_dict(self) -> dict[str, Any]:
        value = as_json(self.node)
        if self.path is None:
            return {"metadata": dict(self.metadata), "value": value}
        return {"path": self.path, "value": value}

    def page(self) -> Page:
        """The tree, indented; a value by itself bare, for scripts."""
        node = _joined(self.node) if self.path is None else self.node
        bare = None if self.path is None else _bare(node)
        if bare is not None:
            return Page([Line(bare)], _values([(self.path, bare)]))
        about = [(f"metadata.{name}", text) for name, text in self.metadata.items()]
        values = _values([*_flat(node, self.path), *about])
        return Page(_indented(node, self.path, about), values)


def show(ckpt: Checkpoint, path: str | None = None) -> Shown:
    """What is in a checkpoint, with every value that is no tensor; with ``path`` what is there.

    Raises:
        NoMatchError: nothing is at ``path``.
    """
    if path is None:
        return Shown(ckpt.root, None, ckpt.metadata)
    try:
        return Shown(find(ckpt, path), path)
    except NoMatchError:
        joined = _joined(ckpt.root)
        where = find_path(joined, path)
        if where is not None:
            return Shown(get(joined, where), path)
        if path == "metadata" and ckpt.metadata:
            return Shown(dict(ckpt.metadata), path)
        name = path if path in ckpt.metadata else path.removeprefix("metadata.")
        if name not in ckpt.metadata:
            raise
        return Shown(ckpt.metadata[name], path)


def _bare(node: Any) -> str | None:
    """A value by itself: a text as it is, the one number of a tensor, what Python would write."""
    if isinstance(node, str):
        return node
    return item(node) if isinstance(node, TensorRef) else literal(node)


def _indented(node: Any, at: str | None, about: Iterable[tuple[str, str]]) -> Iterator[Line]:
    """The tree under a node; its root only where it is all there is."""
    branches = list(outline(node, at))
    if len(branches) > 1:
        branches = [one._replace(depth=one.depth - 1) for one in branches[1:]]
    width = min(max(2 * one.depth + len(one.label) for one in branches), _WIDEST)
    for one in branches:
        label = f"{'  ' * one.depth}{one.label}".ljust(width)
        yield Line(f"{label}  {one.text}".rstrip() if one.label else one.text)
    for name, text in about:
        yield Line(f"{name.ljust(width)}  {text}")


def _flat(node: Any, path: str | None) -> Iterator[tuple[str, str]]:
    """The values under a node, each with its path."""
    above: list[str] = []
    for one in outline(node, path):
        above[max(one.depth - 1, 0) :] = [one.label] if one.depth else []
        if one.text:
            yield ".".join([*([path] if path else []), *above]) or "<root>", one.text


def _values(rows: Iterable[tuple[str | None, str]]) -> Table:
    return Table([Column("path", "name"), Column("value")], list(rows))


def find(ckpt: Checkpoint, path: str) -> Any:
    """The node at a dotted path, as :func:`~modelctl.core.tree.path_text` writes it.

    Raises:
        NoMatchError: nothing is there.
    """
    if path in ("", "<root>"):
        return ckpt.root
    where = find_path(ckpt.root, path)
    if where is None:
        known = [path_text(where) for where, _ in _some(ckpt.root)]
        near = nearest(path, known) or known[1:6]
        raise NoMatchError(
            f"there is nothing at '{path}'", hint=f"nearest: {', '.join(near)}" if near else None
        )
    return get(ckpt.root, where)


def _some(root: Any) -> Iterator[tuple[Path, Any]]:
    level: list[tuple[Path, Any]] = [((), root)]
    for _ in range(3):
        yield from level
        level = [
            ((*path, label), child)
            for path, node in level
            if not isinstance(node, TensorRef) and not is_state_dict(node)
            for label, child in children(node)
        ]


def outline(node: Any, at: str | None = None) -> Iterator[Branch]:
    """The tree under ``node``, a line a value; state_dicts and optimizer state in one line each,
    and what stands in several places in the first of them. ``at`` is where ``node`` stands."""
    start: Path = (at,) if at else ()
    stack: list[tuple[Path, Any, frozenset[int]]] = [(start, node, frozenset())]
    places: dict[int, Path] = {}
    while stack:
        path, node, above = stack.pop()
        text, open_ = _describe(node)
        if open_ and id(node) in above:
            text, open_ = "(refers to itself)", False
        elif open_ and places.setdefault(id(node), path) is not path:
            text, open_ = f"(the same as '{path_text(places[id(node)])}')", False
        depth = len(path) - len(start)
        yield Branch(depth, str(path[-1]) if depth else "", text)
        if open_:
            inside = above | {id(node)}
            inner = [((*path, name), child, inside) for name, child in _shown(node)]
            stack.extend(reversed(inner))


def _shown(node: Any) -> Iterator[tuple[Any, Any]]:
    entries = mapping(node)
    if is_module(node):
        yield from ((name, child) for name, child in children(node) if isinstance(child, TensorRef))
        yield from hyperparameters(node).items()
        yield from ((name, child) for name, child in children(node) if is_module(child))
    elif entries is not None and not (isinstance(node, Obj) and node.args):
        yield from entries.items()
    else:
        yield from children(node)


def _joined(root: Any) -> Any:
    """A tree as people read it: of Megatron's objects, ``key/shard_<offset>_<shape>``, one that is
    whole is called by its key, and several are in a dict there, by where each is."""
    if type(root) is not dict:
        return root
    found: dict[Any, Any] = {}
    parts: dict[str, dict[Any, Any]] = {}
    for name, node in root.items():
        match = _OBJECT_SHARD.fullmatch(name) if isinstance(name, str) else None
        key = match[1] if match is not None else name
        if match is None or key in root or (key in found) != (key in parts):
            found[name] = node
        elif not match[3].strip("1."):
            found[key if key not in found else name] = node
        else:
            place = int(match[2]) if match[2].isdecimal() else match[2]
            found[key] = parts.setdefault(key, {})
            found[key][place] = node
    return found


def _describe(node: Any) -> tuple[str, bool]:
    """A node in a few words, and whether its children get lines of their own."""
    if isinstance(node, TensorRef):
        return f"tensor {node.dtype.short} {shape(node.shape)}", False
    if isinstance(node, Composite):
        return f"{node.layout} tensor {node.dtype.short} {shape(node.shape)}", False
    if isinstance(node, StorageRef):
        return f"storage of {node.storage.nbytes:,} bytes", False
    node = plain_number(node)
    entries = mapping(node)
    if is_state_dict(node):
        tensors = [ref for ref in (entries or {}).values() if isinstance(ref, TensorRef)]
        nbytes = sum(ref.nbytes for ref in tensors)
        kinds = count(len(tensors), "tensor")
        others = sum(isinstance(node, Composite) for node in (entries or {}).values())
        if others:
            kinds += f" and {others} of other kinds"
        return f"state_dict of {kinds}, {nbytes:,} bytes", False
    if entries is not None:
        if entries and all(isinstance(key, int) for key in entries) and len(entries) > 4:
            return f"{len(entries)} entries: {', '.join(map(str, list(entries)[:3]))}, …", False
        return ("", True) if entries else ("{}", False)
    inline = literal(node)
    if inline is not None and len(inline) <= _MOST_INLINE:
        return inline, False
    if isinstance(node, list | tuple):
        plain = all(isinstance(value, int | float | str | None) for value in node)
        if plain:
            first = [_cut(repr(value), 32) for value in node[:3]]
            rest = ["…"] if len(node) > len(first) else []
            return f"{type(node).__name__} of {len(node)}: {', '.join(first + rest)}", False
        return f"{type(node).__name__} of {len(node)}", True
    if is_module(node):
        mode = {True: ", train", False: ", eval", None: ""}[is_training(node)]
        return f"{class_of(node)}{mode}", True
    if isinstance(node, Obj):
        inner = bool(attributes(node) or node.args or node.items or node.entries)
        return f"{node.func} object", inner
    return _cut(inline or repr(node), _MOST_INLINE), False


def _cut(text: str, most: int) -> str:
    """What Python would write, cut: a text keeps its closing quote."""
    if len(text) <= most:
        return text
    quote = text[-1] if text[-1] in "'\"" else ""
    return f"{text[:most]}…{quote}"


def literal(node: Any) -> str | None:
    """A plain value as Python would write it; None for what is no plain value."""
    node = plain_number(node)
    if isinstance(node, Global):
        return str(node)
    if node is None or isinstance(node, bool | int | float | str | bytes):
        return repr(node)
    if isinstance(node, list | tuple) and not isinstance(node, StorageRef) and len(node) <= 32:
        parts = [literal(part) if not isinstance(part, list | tuple) else None for part in node]
        if any(part is None for part in parts):
            return None
        inner = ", ".join(part for part in parts if part is not None)
        if isinstance(node, list):
            return f"[{inner}]"
        return f"({inner},)" if len(parts) == 1 else f"({inner})"
    return None


def item(ref: TensorRef) -> str | None:
    """The one value of a tensor that has one (``step`` of Adam), as Python would write it."""
    value = only_value(ref)
    return None if value is None else repr(value)


def as_json(node: Any) -> Any:
    """A node as JSON: tensors as dtype and shape, inert objects by class and state, numbers that
    JSON lacks (NaN, infinities) and bytes as text.

    Raises:
        UnsupportedError: more values than anybody can use: what is shared is spelt out each time.
    """
    return _spelt_out(node, iter(range(most_paths(containers(node)))))


def _spelt_out(node: Any, left: Iterator[int]) -> Any:
    if next(left, None) is None:
        raise UnsupportedError(
            "what is shared in it would be spelt out too often: a bomb?",
            hint="without --format json each is shown once",
        )
    node = plain_number(node)
    if node is None or isinstance(node, bool | int | str):
        return node
    if isinstance(node, float):
        return node if math.isfinite(node) else repr(node)
    if isinstance(node, bytes):
        return node.decode("latin-1")
    if isinstance(node, TensorRef):
        return {"tensor": {"dtype": node.dtype.name, "shape": list(node.shape)}}
    if isinstance(node, Composite):
        dims = list(node.shape)
        return {"tensor": {"dtype": node.dtype.name, "shape": dims, "layout": node.layout}}
    if isinstance(node, StorageRef):
        return {"storage": {"bytes": node.storage.nbytes}}
    if isinstance(node, Global):
        return {"global": str(node)}
    entries = mapping(node)
    if entries is not None:
        return {str(key): _spelt_out(value, left) for key, value in entries.items()}
    if isinstance(node, list | tuple):
        return [_spelt_out(value, left) for value in node]
    if isinstance(node, Obj):
        out: dict[str, Any] = {"class": str(class_of(node))}
        out.update((str(label), _spelt_out(child, left)) for label, child in children(node))
        return out
    return str(node)
