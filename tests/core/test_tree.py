"""The tree: walk, get, set_at and rebuild, against naive copies."""

from __future__ import annotations

import tracemalloc
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from modelctl.core.dtypes import BY_NAME
from modelctl.core.nodes import Global, Obj, children, is_module, mapping, ordered_dict
from modelctl.core.storages import MemoryStorage
from modelctl.core.tensors import TensorRef
from modelctl.core.tree import containers, get, is_deeper, rebuild, set_at, walk


def tensor() -> TensorRef:
    return TensorRef(BY_NAME["float32"], (2,), MemoryStorage(bytes(8)))


@st.composite
def trees(draw: st.DrawFn) -> tuple[Any, list[Any]]:
    """A tree whose parts may be shared, and the containers in it."""
    made: list[Any] = []

    def node(depth: int) -> Any:
        kind = draw(st.integers(0, 6 if depth < 4 else 1))
        if kind == 0:
            return draw(st.integers() | st.text(max_size=3) | st.none())
        if kind == 1:
            return draw(st.sampled_from(made)) if made else tensor()
        inner = [node(depth + 1) for _ in range(draw(st.integers(0, 3)))]
        named = {f"k{i}": child for i, child in enumerate(inner)}
        if kind == 2:
            new: Any = inner
        elif kind == 3:
            new = (*inner, depth)  # never the empty tuple, which is one object everywhere
        elif kind == 4:
            new = named
        elif kind == 5:
            new = ordered_dict(named)
        else:
            new = Obj(Global("a", "B"), tuple(inner), state=named or 1, items=inner[:1])
        made.append(new)
        return new

    root = [node(0), node(0)]
    return root, [root, *made]


def naive(node: Any, changes: dict[int, Any]) -> Any:
    """A copy by recursion, as comparable values: every container is copied."""
    if id(node) in changes:
        return changes[id(node)]
    if isinstance(node, dict):
        return {key: naive(value, changes) for key, value in node.items()}
    if isinstance(node, list | tuple) and not isinstance(node, TensorRef):
        return type(node)(naive(value, changes) for value in node)
    if isinstance(node, Obj):
        parts = (node.args, node.state, node.items, node.entries)
        return ("Obj", node.func, node.how, *(naive(part, changes) for part in parts))
    return node


@given(data=st.data(), made=trees())
def test_rebuild_is_the_naive_copy(data: st.DataObject, made: tuple[Any, list[Any]]) -> None:
    root, parts = made
    victim = data.draw(st.sampled_from(parts))
    before = naive(root, {})
    changed = rebuild(root, {id(victim): "changed"})
    assert naive(changed, {}) == naive(root, {id(victim): "changed"})
    assert naive(root, {}) == before  # what was there is as it was


@given(made=trees())
def test_rebuild_without_a_change_is_the_same_tree(made: tuple[Any, list[Any]]) -> None:
    root, _ = made
    assert rebuild(root, {}) is root
    assert rebuild(root, {id(object()): 1}) is root


@given(data=st.data(), made=trees())
def test_rebuild_copies_only_what_is_above_a_change(
    data: st.DataObject, made: tuple[Any, list[Any]]
) -> None:
    root, parts = made
    victim = data.draw(st.sampled_from(parts))
    kept = {id(node) for node, _ in containers(root).values()}
    changed = rebuild(root, {id(victim): "changed"})
    for node, inner in containers(changed).values():
        if id(node) not in kept:  # a new one: a change is below it
            assert any(id(child) not in kept or child == "changed" for child in inner)


@given(data=st.data(), made=trees())
def test_what_is_at_a_path_is_what_walk_says(
    data: st.DataObject, made: tuple[Any, list[Any]]
) -> None:
    root, _ = made
    seen = dict(walk(root))
    assert next(iter(seen)) == ()
    for path, node in seen.items():
        at = root
        for label in path:
            # an object's arguments and items may have one label: the first is found by get()
            at = next(child for name, child in children(at) if name == label)
        if not any(isinstance(part, Obj) and part.args for part in containers(root) if part):
            assert at is node or at == node
        assert get(root, path) is at


@given(data=st.data(), made=trees())
def test_walk_names_every_tensor_on_every_path(
    data: st.DataObject, made: tuple[Any, list[Any]]
) -> None:
    root, _ = made

    def paths(node: Any, path: tuple[Any, ...]) -> list[tuple[Any, ...]]:
        if isinstance(node, TensorRef):
            return [path]
        inner = list(children(node)) if isinstance(node, dict | list | tuple | Obj) else []
        return [found for label, child in inner for found in paths(child, (*path, label))]

    assert [p for p, node in walk(root) if isinstance(node, TensorRef)] == paths(root, ())


def test_set_at_makes_a_copy_and_takes_new_keys() -> None:
    inner = {"lr": 0.1, "params": [0, 1]}
    root = {"optimizer": ordered_dict({"param_groups": [inner]}), "epoch": 1}
    path = ("optimizer", "param_groups", 0)
    new = set_at(root, (*path, "lr"), 0.5)
    assert get(new, (*path, "lr")) == 0.5
    assert inner["lr"] == 0.1
    assert get(new, (*path, "params")) is inner["params"]
    assert get(set_at(root, (*path, "momentum"), 0.9), path)["momentum"] == 0.9
    assert get(set_at(root, path, None), path) is None
    pair = {"both": (1, {"lr": 0.1}), "run": Obj(Global("my", "Run"), state={"epoch": 1})}
    assert set_at(pair, ("both", 1, "lr"), 0.5)["both"] == (1, {"lr": 0.5})
    assert set_at(pair, ("both", 0), 2)["both"] == (2, {"lr": 0.1})
    assert get(set_at(pair, ("run", "epoch"), 2), ("run", "epoch")) == 2
    with pytest.raises(KeyError):
        set_at(pair, ("run", "step"), 2)
    assert set_at(root, (), 7) == 7
    assert isinstance(new["optimizer"], Obj)


@pytest.mark.parametrize("path", [("nothing",), ("epoch", 1), ("optimizer", "a", 1), (0,)])
def test_a_path_that_is_not_there(path: tuple[Any, ...]) -> None:
    root = {"optimizer": {"a": [1]}, "epoch": 1, "0": "text"}
    with pytest.raises(KeyError):
        get(root, path)


def test_true_is_not_the_key_1() -> None:
    root = {True: "true"}
    with pytest.raises(KeyError):
        get(root, (1,))
    assert get(root, (True,)) == "true"


def test_what_was_shared_stays_shared() -> None:
    ref = tensor()
    shared = {"weight": ref}
    root = {"a": shared, "b": [shared, shared], "c": (shared, 1), "d": {"x": 1}}
    new = rebuild(root, {id(ref): "changed"})
    assert new["a"] == {"weight": "changed"}
    assert new["a"] is new["b"][0] is new["b"][1] is new["c"][0]
    assert new["d"] is root["d"]


@pytest.mark.parametrize("kind", ["dict", "list", "object"])
def test_cycles_are_kept(kind: str) -> None:
    ref = tensor()
    if kind == "dict":
        node: Any = {"weight": ref}
        node["self"] = node
    elif kind == "list":
        node = [ref]
        node.append((node,))
    else:
        node = Obj(Global("a", "B"), (), "newobj", state={"weight": ref})
        node.state["self"] = node
    root = {"first": node, "again": node}
    assert sum(child is ref for _, child in walk(root)) == 2
    new = rebuild(root, {id(ref): "changed"})
    made = new["first"]
    assert made is new["again"]
    assert made is not node
    if kind == "dict":
        assert made["self"] is made
    elif kind == "list":
        assert made[1][0] is made
    else:
        assert made.state["self"] is made


def test_a_deep_tree_is_no_matter_for_the_stack() -> None:
    deep: Any = [tensor()]
    for _ in range(3000):
        deep = [deep] if id(deep) % 2 else {"k": deep}
    found = [path for path, node in walk(deep) if isinstance(node, TensorRef)]
    assert len(found[0]) == 3001
    assert rebuild(deep, {id(get(deep, found[0])): 1}) is not deep


def test_what_is_called_may_be_anything() -> None:
    """A pickle can call a dict or a list, which have no hash."""
    for func in ({}, [], ({},), 1, None, tensor()):
        node = Obj(func, ())
        assert mapping(node) is None
        assert not is_module(node)
        assert [child for _, child in walk({"a": node})] == [{"a": node}, node]


@pytest.mark.parametrize("kind", [list, tuple, dict])
def test_walking_keeps_no_more_than_where_it_is(kind: Any) -> None:
    """A container of many values doesn't become as many paths before the first is looked at."""
    numbers = [float(i) for i in range(20_000)]
    root = {"many": dict.fromkeys(numbers) if kind is dict else kind(numbers), "last": 1}
    tracemalloc.start()
    assert sum(1 for _ in walk(root)) == 20_003
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 20_000 * 24


def height(node: Any) -> int:
    """How deep containers are nested, by recursion."""
    if isinstance(node, TensorRef) or not isinstance(node, dict | list | tuple | Obj):
        return 0
    inner = list(node.values()) if isinstance(node, dict) else node
    if isinstance(node, Obj):
        inner = [*node.args, node.args, node.state, *node.items, *node.entries.values()]
    return 1 + max((height(child) for child in inner), default=0)


@given(made=trees())
def test_how_deep_a_tree_is(made: tuple[Any, list[Any]]) -> None:
    root, _ = made
    deep = height(root)
    assert not is_deeper(root, deep)
    assert is_deeper(root, deep - 1)


def test_what_holds_itself_is_not_endlessly_deep() -> None:
    loop: list[Any] = [[1]]
    loop.append({"again": (loop,)})
    assert not is_deeper(loop, 3)
    assert is_deeper(loop, 2)
    assert not is_deeper(1, 0)


def test_nested_tuples_are_rebuilt_once_each() -> None:
    ref = tensor()
    shared: Any = (ref,)
    for _ in range(200):  # 2 ** 200 of them, spelled out
        shared = (shared, shared)
    found = rebuild({"a": (shared,), "b": (shared, 1)}, {id(ref): "changed"})
    new = found["a"][0]
    assert new is found["b"][0]
    for _ in range(200):
        assert new[0] is new[1]
        new = new[0]
    assert new == ("changed",)
