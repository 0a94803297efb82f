"""Walk, search and rebuild the tree of a checkpoint (its nodes: :mod:`modelctl.core.nodes`).

Everything here is iterative, so that a deep tree can't exhaust the stack, and visits a shared
node once.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import islice
from typing import Any

from ..errors import UnreadableError
from .nodes import (
    Absent,
    Composite,
    Global,
    Obj,
    attributes,
    children,
    mapping,
    with_attributes,
    with_entries,
)
from .tensors import StorageRef, TensorRef

Path = tuple[Any, ...]

_LEAVES = (str, int, float, bytes, type(None), TensorRef, StorageRef, Global, Absent)
_LEAF_TYPES = frozenset((*_LEAVES, bool))  # nearly all of them, told apart faster
# A few shared lists can spell out more paths than there are atoms: there are at most so many times
# as many as things in the tree, or so many in a small one.
PATHS_EACH, PATHS_ANYHOW = 16, 100_000

# The containers of a tree by identity, with their children.
Containers = dict[int, tuple[Any, Sequence[Any]]]


def is_leaf(node: Any) -> bool:
    """Whether nothing is inside of it: a value, a tensor, a name."""
    return type(node) in _LEAF_TYPES or isinstance(node, _LEAVES)


# What holds no more than so many is looked at again wherever it is met: there may be millions.
_FEW = 16


def is_small(node: Any) -> bool:
    """Whether it is a short list, tuple or dict of leaves alone, as a data set has millions of."""
    kind = type(node)
    if kind is dict:
        return len(node) <= _FEW and _LEAF_TYPES.issuperset(map(type, node.values()))
    if kind is list or kind is tuple:
        return len(node) <= _FEW and _LEAF_TYPES.issuperset(map(type, node))
    return False


def walk(root: Any) -> Iterator[tuple[Path, Any]]:
    """Every node with its path, parents first, in order.

    A container that is reached a second time is yielded but not entered again, unless it
    holds tensors: those have a name under each path.
    """
    yield (), root
    if is_leaf(root):
        return
    found = containers(root)
    holds = _holding_tensors(found)
    most = most_paths(found)
    seen, inside = {id(root)}, {id(root)}
    levels: list[tuple[Path, Iterator[tuple[Any, Any]], int]] = [((), children(root), id(root))]
    count = 1
    while levels:
        path, rest, key = levels[-1]
        for label, node in rest:
            count += 1
            if count > most:
                raise UnreadableError(
                    f"what is shared in it would be spelt out on more than {most:,} paths: a bomb?"
                )
            below = (*path, label)
            yield below, node
            if is_leaf(node):
                continue
            at = id(node)
            if at not in inside and (at not in seen or at in holds):
                seen.add(at)
                inside.add(at)
                levels.append((below, children(node), at))
                break
        else:
            levels.pop()
            inside.discard(key)


def first(root: Any, most: int) -> Iterator[Any]:
    """The first few nodes, the upper ones before those inside of them, what is shared once: in the
    time of as many, however large the tree is."""
    waiting, seen = [root], {id(root)}
    for node in waiting:
        yield node
        if is_leaf(node):
            continue
        for _, child in islice(children(node), most - len(waiting)):
            if id(child) not in seen:
                seen.add(id(child))
                waiting.append(child)


def most_paths(found: Containers) -> int:
    """How many paths a tree may have before what is shared in it is meant to burst."""
    return PATHS_ANYHOW + PATHS_EACH * sum(len(inner) for _, inner in found.values())


def containers(root: Any) -> Containers:
    """Every container once, with its children, by identity; parents before children."""
    found: Containers = {}
    todo = [root]
    while todo:
        node = todo.pop()
        if id(node) in found or is_leaf(node):
            continue
        inner = _inner(node)
        found[id(node)] = (node, inner)
        todo += [child for child in reversed(inner) if type(child) not in _LEAF_TYPES]
    return found


def _inner(node: Any) -> Sequence[Any]:
    kind = type(node)
    if kind is dict:
        return [*_tensor_keys(node), *node.values()]
    if kind is list or kind is tuple:
        return node  # type: ignore[no-any-return]
    inner = [child for _, child in children(node)]
    if isinstance(node, Obj):
        # rebuild() must also see what children() leaves out or shows under other names
        inner += [node.func, node.state, node.args, *_tensor_keys(node.entries)]
    return inner


def _tensor_keys(entries: Mapping[Any, Any]) -> Sequence[TensorRef]:
    """The keys of a mapping by tensors: the state of a pickled optimizer."""
    if not isinstance(next(iter(entries), None), TensorRef):
        return ()
    return [key for key in entries if isinstance(key, TensorRef)]


def holds_tensors(root: Any, most: int = 100_000) -> bool:
    """Whether there is a tensor in it; taken for granted where more than ``most`` containers have
    none."""
    todo, seen = [root], {id(root)}
    while todo and len(seen) <= most:
        node = todo.pop()
        if isinstance(node, TensorRef | Composite):
            return True
        if is_leaf(node):
            continue
        for child in reversed(_inner(node)):
            if type(child) is TensorRef:
                return True
            if type(child) not in _LEAF_TYPES and id(child) not in seen:
                seen.add(id(child))
                todo.append(child)
    return bool(todo)


def is_deeper(root: Any, most: int) -> bool:
    """Whether containers are nested more than ``most`` deep; what holds itself adds nothing."""
    if is_leaf(root):
        return False
    heights = {id(root): 0}  # 0 while we are in it
    levels = [(id(root), _containers_in(root))]
    tall = [1]  # how high each of the levels is, as far as was seen
    while levels:
        key, rest = levels[-1]
        if not rest:
            levels.pop()
            heights[key] = height = tall.pop()
            if height > most:
                return True
            tall[-1:] = [max(below, height + 1) for below in tall[-1:]]
            continue
        node = rest.pop()
        if id(node) in heights:
            tall[-1] = max(tall[-1], heights[id(node)] + 1)
        elif is_small(node):
            tall[-1] = max(tall[-1], 2)
        elif len(levels) == most:
            return True
        else:
            heights[id(node)] = 0
            levels.append((id(node), _containers_in(node)))
            tall.append(1)
    return False


def _containers_in(node: Any) -> list[Any]:
    return [child for child in _inner(node) if not is_leaf(child)]


def _above(found: Containers, holds: Callable[[Sequence[Any]], bool]) -> set[int]:
    """Ids of the containers that reach children for which ``holds`` is true."""
    parents: dict[int, list[int]] = {}
    todo: list[int] = []
    for key, (_, inner) in found.items():
        for child in inner:
            if type(child) not in _LEAF_TYPES and id(child) in found:
                parents.setdefault(id(child), []).append(key)
        if holds(inner):
            todo.append(key)
    reached: set[int] = set()
    while todo:
        key = todo.pop()
        if key not in reached:
            reached.add(key)
            todo.extend(parents.get(key, ()))
    return reached


def _holding_tensors(found: Containers) -> set[int]:
    return _above(
        found,
        lambda inner: any(isinstance(child, TensorRef | Composite) for child in inner),
    )


def rebuild(root: Any, changes: Mapping[int, Any]) -> Any:
    """A copy of the tree in which each node whose ``id`` is in ``changes`` is replaced.

    Only the containers above a change are copied, and what was shared stays shared. A
    replacement is taken as it is: changes inside it are not followed.
    """
    if id(root) in changes:
        return changes[id(root)]
    found = containers(root)
    touched = _above(found, lambda inner: not changes.keys().isdisjoint(map(id, inner)))
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

    def of_key(key: Any) -> Any:
        return of(key) if type(key) is TensorRef else key

    waiting = [node for node in reversed(order) if isinstance(node, tuple)]
    while waiting:  # a tuple needs the new tuples inside it first
        node = waiting[-1]
        if id(node) in new:
            waiting.pop()
            continue
        inside = [
            child
            for child in node
            if isinstance(child, tuple) and id(child) in touched and id(child) not in new
        ]
        if inside:
            waiting += inside
        else:
            new[id(node)] = tuple(map(of, node))
            waiting.pop()
    for node in order:
        shell = new[id(node)]
        if isinstance(node, dict):
            shell.update((of_key(key), of(value)) for key, value in node.items())
        elif isinstance(node, list):
            shell.extend(of(value) for value in node)
        elif isinstance(node, Obj):
            shell.func, shell.how, shell.kwargs = of(node.func), node.how, of(node.kwargs)
            shell.args, shell.state = of(node.args), of(node.state)
            shell.items = [of(value) for value in node.items]
            shell.entries = {of_key(key): of(value) for key, value in node.entries.items()}
    return new[id(root)]


def get(root: Any, path: Path) -> Any:
    """The node at ``path``. Raises KeyError with the first label that is not there."""
    node = root
    for label in path:
        if type(node) is dict and type(label) is str and label in node:
            node = node[label]
            continue
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
    elif type(parent) is tuple:
        changed = (*parent[: path[-1]], value, *parent[path[-1] + 1 :])
    elif isinstance(parent, Obj) and path[-1] in attributes(parent):
        changed = with_attributes(parent, {path[-1]: value})
    else:
        raise KeyError(path[-1])
    return rebuild(root, {id(parent): changed})


def brief(node: Any) -> str:
    """A node in a few words, for messages: bounded, whatever it holds."""
    if isinstance(node, int) and node.bit_length() > 256:  # Python spells out no absurd ones
        return f"an integer of {node.bit_length():,} bits"
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
    return ".".join(map(str, path)) if path else "<root>"
