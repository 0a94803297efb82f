"""What is left out of a pickle that is written: members of Enums and the like, small values that
would be made by calling something that is not known to be harmless."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from ..core.nodes import ABSENT, Global, Obj
from ..core.notes import Note, warning
from ..core.text import some
from ..core.tree import containers, path_text, rebuild, walk
from .policy import is_of_libraries, judge

_PLAIN = (str, int, float, bytes, type(None))
_GETATTR = Global("builtins", "getattr")


def without_calls(root: Any) -> tuple[Any, Sequence[Note]]:
    """A tree without the entries that are calls of somebody's own classes on plain values, and what
    there is to say of it.

    A call in a place where it can't be left out, of a library, or on more than plain values stays,
    for the writer to refuse.
    """
    found = containers(root)
    calls = {key: node for key, (node, _) in found.items() if _is_small_call(node)}
    for node, _ in found.values() if calls else ():
        for child in _in_fixed_places(node):
            calls.pop(id(child), None)
    calls.pop(id(root), None)
    if not calls:
        return root, ()
    names = [path_text(path) for path, node in walk(root) if id(node) in calls]
    what = some(list(dict.fromkeys(str(_called(node)) for node in calls.values())))
    new = rebuild(root, dict.fromkeys(calls, ABSENT))
    for node, _ in containers(new).values():
        entries = node if isinstance(node, dict) else node.entries if isinstance(node, Obj) else {}
        for key in [key for key, value in entries.items() if value is ABSENT]:
            del entries[key]  # of a copy: rebuild made it for this
    return new, [warning(f"left out: {some(names, 6)}: unpickling that would call {what}")]


def _in_fixed_places(node: Any) -> Sequence[Any]:
    """What a container holds that it can't be without: all but the entries of a mapping."""
    if isinstance(node, Obj):
        return [node.func, node.state, node.kwargs, *node.items]
    return node if isinstance(node, list | tuple) else ()


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
