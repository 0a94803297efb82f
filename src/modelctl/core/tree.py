"""Walk, search and rebuild the tree of a checkpoint (its nodes: :mod:`modelctl.core.nodes`).

Everything here is iterative, so that a deep tree can't exhaust the stack, and visits a shared
node once.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any

from ..errors import UnreadableError
from .nodes import Absent, Composite, Global, Obj, children, mapping, with_entries
from .tensors import StorageRef, TensorRef

Path = tuple[Any, ...]

_LEAVES = (str, int, float, bytes, type(None), TensorRef, StorageRef, Global, Absent)
# A few shared lists can spell out more paths than there are atoms: stop before that.
_MOST_PATHS = 5_000_000


def walk(root: Any) -> Iterator[tuple[Path, Any]]:
    """Every node with its path, parents first, in order.

    A container that is reached a second time is yielded but not entered again, unless it
    holds tensors: those have a name under each path.
    """
    holds = _holding_tensors(root)
    seen: set[int] = set()
    stack: list[tuple[Path, Any, tuple[int, ...]]] = [((), root, ())]
    count = 0
    while stack:
        path, node, above = stack.pop()
        count += 1
        if count > _MOST_PATHS:
            raise UnreadableError(f"more than {_MOST_PATHS:,} paths: a decompression bomb?")
        yield path, node
        if isinstance(node, _LEAVES):
            continue
        key = id(node)
        if key in above or (key in seen and key not in holds):
            continue
        seen.add(key)
        below = (*above, key) if holds else above
        inner = [((*path, label), child, below) for label, child in children(node)]
        stack.extend(reversed(inner))


def containers(root: Any) -> dict[int, tuple[Any, list[Any]]]:
    """Every container once, with its children, by identity; parents before children."""
    found: dict[int, tuple[Any, list[Any]]] = {}
    todo = [root]
    while todo:
        node = todo.pop()
        if isinstance(node, _LEAVES) or id(node) in found:
            continue
        inner = [child for _, child in children(node)]
        if isinstance(node, Obj):
            # rebuild() must also see what children() leaves out or shows under other names
            inner += [node.func, node.state, node.args]
        found[id(node)] = (node, inner)
        todo.extend(reversed(inner))
    return found


def _above(found: dict[int, tuple[Any, list[Any]]], start: Callable[[Any], bool]) -> set[int]:
    """Ids of the containers that reach a child for which ``start`` is true."""
    parents: dict[int, list[int]] = {}
    todo: list[int] = []
    for key, (_, inner) in found.items():
        for child in inner:
            if id(child) in found:
                parents.setdefault(id(child), []).append(key)
            if start(child):
                todo.append(key)
    reached: set[int] = set()
    while todo:
        key = todo.pop()
        if key not in reached:
            reached.add(key)
            todo.extend(parents.get(key, ()))
    return reached


def _holding_tensors(root: Any) -> set[int]:
    return _above(containers(root), lambda child: isinstance(child, TensorRef | Composite))


def rebuild(root: Any, changes: Mapping[int, Any]) -> Any:
    """A copy of the tree in which each node whose ``id`` is in ``changes`` is replaced.

    Only the containers above a change are copied, and what was shared stays shared. A
    replacement is taken as it is: changes inside it are not followed.
    """
    if id(root) in changes:
        return changes[id(root)]
    found = containers(root)
    touched = _above(found, lambda child: id(child) in changes)
    if id(root) not in touched:
        return root
    new: dict[int, Any] = dict(changes)
    order = [found[key][0] for key in found if key in touched and key not in changes]
    for node in order:  # mutable shells first: they may be reached from below, in a cycle
        if isinstance(node, dict):
            new[id(node)] = {}
        elif isinstance(node, list):
            new[id(node)] = []
        elif isinstance(node, Obj):
            new[id(node)] = node.replace()

    def of(node: Any) -> Any:
        return new.get(id(node), node)

    waiting = [node for node in order if isinstance(node, tuple)]
    while waiting:  # a tuple needs the new tuples inside it first
        later = []
        for node in waiting:
            if any(
                isinstance(child, tuple) and id(child) in touched and id(child) not in new
                for child in node
            ):
                later.append(node)
            else:
                new[id(node)] = tuple(of(child) for child in node)
        waiting = later
    for node in order:
        shell = new[id(node)]
        if isinstance(node, dict):
            shell.update((key, of(value)) for key, value in node.items())
        elif isinstance(node, list):
            shell.extend(of(value) for value in node)
        elif isinstance(node, Obj):
            shell.func, shell.how, shell.kwargs = of(node.func), node.how, of(node.kwargs)
            shell.args, shell.state = of(node.args), of(node.state)
            shell.items = [of(value) for value in node.items]
            shell.entries = {key: of(value) for key, value in node.entries.items()}
    return new[id(root)]


def get(root: Any, path: Path) -> Any:
    """The node at ``path``. Raises KeyError with the first label that is not there."""
    node = root
    for label in path:
        for found, child in children(node):
            if found == label and type(found) is type(label):
                node = child
                break
        else:
            raise KeyError(label)
    return node


def find_path(root: Any, text: str) -> Path | None:
    """The path that :func:`path_text` writes as ``text``, or None; labels may hold dots, too."""
    todo: list[tuple[Path, Any, str]] = [((), root, text)]
    while todo:
        path, node, rest = todo.pop()
        if isinstance(node, _LEAVES):
            continue
        inner = []
        for label, child in children(node):
            name = str(label)
            if rest == name:
                return (*path, label)
            if name and rest.startswith(name + "."):
                inner.append(((*path, label), child, rest[len(name) + 1 :]))
        todo.extend(reversed(inner))
    return None


def set_at(root: Any, path: Path, value: Any) -> Any:
    """A copy of the tree with the entry at ``path`` set; the last label may be a new key."""
    if not path:
        return value
    parent = get(root, path[:-1])
    entries = mapping(parent)
    if entries is not None:
        changed = with_entries(parent, {**entries, path[-1]: value})
    elif isinstance(parent, list):
        changed = [*parent[: path[-1]], value, *parent[path[-1] + 1 :]]
    else:
        raise KeyError(path[-1])
    return rebuild(root, {id(parent): changed})


def brief(node: Any) -> str:
    """A node in a few words, for messages: bounded, whatever it holds."""
    if node is None or isinstance(node, bool | int | float):
        return repr(node)[:80]
    if isinstance(node, str | bytes):
        return repr(node[:80])
    if isinstance(node, Global):
        return repr(str(node)[:200])
    if isinstance(node, TensorRef):
        return "a tensor"
    if isinstance(node, Obj):
        return "an object"
    return f"a {type(node).__name__}"


def path_text(path: Path) -> str:
    """A path as users write it: labels joined with dots; the root is ``<root>``."""
    return ".".join(str(label) for label in path) if path else "<root>"
