"""What is left out of a pickle that is written: members of Enums and the like, small values that
would be made by calling something that is not known to be harmless."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from ..core.nodes import ABSENT, Global, Obj
from ..core.notes import Note, warning
from ..core.text import some
from ..core.tree import containers, path_text, rebuild, walk
from .names import is_of_libraries
from .policy import judge

_PLAIN = (str, int, float, bytes, type(None))
_GETATTR = Global("builtins", "getattr")
_SETS = (Global("builtins", "set"), Global("builtins", "frozenset"))


def without_calls(root: Any) -> tuple[Any, Sequence[Note]]:
    """A tree without the values that are calls of somebody's own classes on plain values, and what
    there is to say of it. A mapping, an object and a set are without them; in a list and a tuple
    None takes their place, so that nothing else moves.

    A call in a place where it can't be left out, of a library, or on more than plain values stays,
    for the writer to refuse.
    """
    found = containers(root)
    calls = {key: node for key, (node, _) in found.items() if _is_small_call(node)}
    for node, _ in found.values() if calls else ():
        if isinstance(node, Obj):
            for one in _needed(node):
                calls.pop(id(one), None)
    calls.pop(id(root), None)
    if not calls:
        return root, ()
    what = some(list(dict.fromkeys(str(_called(node)) for node in calls.values())))
    notes = [
        warning(f"{words} {some(names, 6)}: unpickling that would call {what}")
        for words, names in zip(_WORDS, _places(root, calls), strict=True)
        if names
    ]
    return _without_absent(rebuild(root, dict.fromkeys(calls, ABSENT))), notes


_WORDS = ("left out:", "None in the place of")


def _needed(node: Obj) -> Iterator[Any]:
    """What an object can't be without: what it is made of, down to the lists in it."""
    kwargs = node.kwargs.values() if isinstance(node.kwargs, dict) else ()
    todo = [node.func, node.state, *kwargs, *(() if _is_set(node) else node.args)]
    seen: set[int] = set()
    while todo:
        one = todo.pop()
        yield one
        if isinstance(one, list | tuple) and id(one) not in seen:
            seen.add(id(one))
            todo += one


def _is_set(node: Any) -> bool:
    is_one = isinstance(node, Obj) and node.func in _SETS and node.how == "reduce"
    return is_one and len(node.args) == 1 and isinstance(node.args[0], list)


def _places(root: Any, calls: Mapping[int, Obj]) -> tuple[list[str], list[str]]:
    """The names of what is left out, and of what None takes the place of."""
    without: list[str] = []
    instead: list[str] = []
    above: list[Any] = []  # what is on the way to a node
    for path, node in walk(root):
        above[len(path) :] = [node]
        if id(node) not in calls:
            continue
        parent = above[-2]
        if isinstance(parent, list) and len(above) > 2 and _is_set(above[-3]):
            without.append(path_text(path[:-2]))
        elif isinstance(parent, list | tuple) or (
            isinstance(parent, Obj) and any(one is node for one in parent.items)
        ):
            instead.append(path_text(path))
        else:
            without.append(path_text(path))
    return list(dict.fromkeys(without)), list(dict.fromkeys(instead))


def _without_absent(root: Any) -> Any:
    """A tree that was rebuilt with ABSENT where something is left out, without that: what holds it
    is a copy, and is changed."""
    for node, inner in containers(root).values():  # a set before the list in it
        if not any(one is ABSENT for one in (*inner, *_listed(node))):
            continue
        if isinstance(node, Obj):
            if _is_set(node):
                node.args[0][:] = [one for one in node.args[0] if one is not ABSENT]
            node.items = list(map(_or_none, node.items))
        entries = node if isinstance(node, dict) else node.entries if isinstance(node, Obj) else {}
        for key in [key for key, value in entries.items() if value is ABSENT]:
            del entries[key]
        if isinstance(node, list):
            node[:] = map(_or_none, node)
    while tuples := {  # of those in each other, the outer ones first
        id(node): tuple(map(_or_none, node))
        for node, inner in containers(root).values()
        if isinstance(node, tuple) and any(one is ABSENT for one in inner)
    }:
        root = rebuild(root, tuples)
    return root


def _listed(node: Any) -> Sequence[Any]:
    return node.args[0] if _is_set(node) else ()


def _or_none(value: Any) -> Any:
    return None if value is ABSENT else value


def _is_small_call(node: Any) -> bool:
    if not isinstance(node, Obj) or not isinstance(node.func, Global) or node.how != "reduce":
        return False
    finding = judge(node.func, node.args, "REDUCE", 0)
    func = _called(node)
    args = node.args if func is node.func else node.args[1:]
    plain = all(isinstance(one, _PLAIN) for one in args) and node.state is ABSENT
    dangerous = finding is not None and finding.level == "dangerous"
    return dangerous and plain and not is_of_libraries(func)


def _called(node: Obj) -> Global:
    """What is called; of ``getattr(cls, name)``, as the first Pythons 3.11 wrote members of Enums,
    the class."""
    if node.func == _GETATTR and len(node.args) == 2 and isinstance(node.args[0], Global):
        return node.args[0]
    assert isinstance(node.func, Global)
    return node.func
