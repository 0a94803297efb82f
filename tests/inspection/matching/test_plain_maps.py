"""Plain maps of one module's name, the shortest that do it; and that ``rename`` makes of each
proposal just what was promised."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from modelctl.inspection.matching.match import match_shapes

from .test_match import Shapes, renamed


def layer(name: str, *shape: int) -> Shapes:
    return {f"{name}.weight": shape, f"{name}.bias": shape[:1]}


CASES: dict[str, tuple[Shapes, Shapes, list[str]]] = {
    "all there is": (layer("layer1", 3, 2), layer("block1.layer1", 3, 2), ["layer1=block1.layer1"]),
    "all there is, one tensor": ({"w": (3, 2)}, {"block1.w": (3, 2)}, ["w=block1.w"]),
    "under a wrapper": (layer("fc", 3, 2), layer("module.fc", 3, 2), ["*=module.*"]),
    "beside another": (
        {**layer("layer1", 3, 2), "o.weight": (2, 3)},
        {**layer("block1.layer1", 3, 2), "o.weight": (2, 3)},
        ["layer1=block1.layer1"],
    ),
    "beside one of the same name": (
        {**layer("layer1", 3, 2), **layer("layer2", 2, 3)},
        {**layer("block1.layer1", 3, 2), **layer("layer2", 2, 3)},
        ["layer1=block1.layer1"],
    ),
    "out of it": (
        {**layer("block1.layer1", 3, 2), **layer("layer2", 2, 3)},
        {**layer("layer1", 3, 2), **layer("layer2", 2, 3)},
        ["block1.layer1=layer1"],
    ),
    "into each its own": (
        {**layer("layer1", 3, 2), **layer("layer2", 2, 3), **layer("layer3", 5, 5)},
        {**layer("block1.layer1", 3, 2), **layer("block2.layer2", 2, 3), **layer("layer3", 5, 5)},
        ["layer1=block1.layer1", "layer2=block2.layer2"],
    ),
    "of the same shape": (
        {**layer("enc.fc", 4, 4), **layer("dec.fc", 4, 4), **layer("out", 2, 4)},
        {**layer("net.enc.fc", 4, 4), **layer("dec.fc", 4, 4), **layer("out", 2, 4)},
        ["enc=net.enc"],
    ),
    "with a number that is the same by chance": (
        {**layer("conv1", 3, 2), **layer("conv2", 3, 3), **layer("fc", 9, 9)},
        {**layer("stem1.conv1", 3, 2), **layer("conv2", 3, 3), **layer("fc", 9, 9)},
        ["conv1=stem1.conv1"],
    ),
    "a part of a module": (
        {**layer("body.a", 3, 2), **layer("body.b", 4, 2), **layer("body.c", 5, 2)},
        {**layer("body.a", 3, 2), **layer("body.b", 4, 2), **layer("body.neck.c", 5, 2)},
        ["body.c=body.neck.c"],
    ),
    "a tensor out of its module": (
        {"a.weight": (3, 2), "a.scale": (7, 5), "b.weight": (4, 2)},
        {"a.weight": (3, 2), "a.norm.scale": (7, 5), "b.weight": (4, 2)},
        ["a.scale=a.norm.scale"],
    ),
    "all blocks at once": (
        {k: s for i in range(4) for k, s in layer(f"blocks.{i}.mlp.fc1", 3, 2).items()},
        {k: s for i in range(4) for k, s in layer(f"blocks.{i}.ffn.up", 3, 2).items()},
        ["blocks.*.mlp.fc1.*=blocks.*.ffn.up.*"],
    ),
    "in several places at once": (
        {"norm.gamma": (4,), "body.norm.gamma": (4,), "fc.weight": (4, 4), "o.weight": (5, 4)},
        {"norm.weight": (4,), "body.norm.weight": (4,), "fc.weight": (4, 4), "o.weight": (5, 4)},
        ["*.gamma=*.weight"],
    ),
}


@pytest.mark.parametrize("name", CASES)
def test_the_plain_map(name: str) -> None:
    found, expected, maps = CASES[name]
    result = match_shapes(found, expected)
    assert [one.map for one in result.maps] == maps
    assert result.after.fits
    assert result.more == 0
    assert renamed(found, result).keys() == expected.keys()


# ---------------------------------------------------------------------- whatever the modules


WORDS = ("enc", "dec", "layer", "conv1", "conv2", "norm", "fc", "0", "1", "2", "attn")


def paths(*words: str) -> st.SearchStrategy[str]:
    return st.lists(st.sampled_from(words), min_size=1, max_size=3).map(".".join)


PATHS, WRAPPED = paths(*WORDS), paths(*WORDS, "module")
TENSORS = st.dictionaries(
    st.sampled_from(("weight", "bias", "gamma", "running_mean", "num_batches_tracked")),
    st.sampled_from(((4,), (8,), (4, 4), (8, 4), (3, 5), ())),
    min_size=1,
    max_size=3,
)


@st.composite
def models(draw: st.DrawFn, of: st.SearchStrategy[str] = PATHS) -> Shapes:
    modules = draw(st.dictionaries(of, TENSORS, min_size=1, max_size=8))
    return {f"{path}.{last}": s for path, own in modules.items() for last, s in own.items()}


@st.composite
def moved(draw: st.DrawFn, model: Shapes) -> Shapes:
    """The same tensors, with modules renamed, moved into others or out of them."""
    names = dict(zip(model, model, strict=True))
    for _ in range(draw(st.integers(1, 3))):
        parts = draw(st.sampled_from([*names.values()])).split(".")
        cut = draw(st.integers(1, len(parts)))
        old, new = ".".join(parts[:cut]), draw(WRAPPED)
        how = draw(st.sampled_from(("rename", "insert", "out")))
        if how == "insert":
            new = f"{new}.{parts[cut - 1]}"
        elif how == "out" and cut > 1:
            new = ".".join(parts[1:cut])
        after = {
            name: new + now[len(old) :] if now == old or now.startswith(old + ".") else now
            for name, now in names.items()
        }
        if len({*after.values()}) == len(after):
            names = after
    return {names[name]: shape for name, shape in model.items()}


@settings(max_examples=200, deadline=None)
@given(st.data())
def test_rename_makes_what_was_promised(data: st.DataObject) -> None:
    model = data.draw(models(WRAPPED))
    found = data.draw(moved(model))
    result = match_shapes(found, model)
    new = renamed(found, result)
    again = match_shapes(new, model).before
    promised = result.after
    assert [again.missing, again.unexpected] == [promised.missing, promised.unexpected]
    assert {*again.mismatched} == {*promised.mismatched}
    assert promised.problems <= result.before.problems
    if result.maps:
        assert promised.problems < result.before.problems
    for old, now in zip(found, new, strict=True):  # what fitted is not moved away
        if old != now and old in model and found[old] == model[old]:
            assert now in model
            assert found[old] == model[now]


@settings(max_examples=200, deadline=None)
@given(models(), PATHS, st.data())
def test_one_module_moved_is_one_plain_map(model: Shapes, into: str, data: st.DataObject) -> None:
    """Where each tensor has a shape of its own there is no doubt."""
    model = {name: (i + 2, 3) for i, name in enumerate(n for n in model if "num_b" not in n)}
    if not model:
        return
    parts = data.draw(st.sampled_from([*model])).split(".")
    at = data.draw(st.integers(1, len(parts) - 1))
    old = ".".join(parts[:at])
    new = ".".join([*parts[: at - 1], into, parts[at - 1]])
    found = {
        new + name[len(old) :] if name.startswith(old + ".") else name: shape
        for name, shape in model.items()
    }
    if len(found) < len(model) or found.keys() & model.keys() != {
        n for n in model if not n.startswith(old + ".")
    }:
        return  # two names would be one, or one would be another's
    if any(name.startswith(new + ".") for name in model):
        return  # what is there already stays: not the whole module moves
    for a, b in ((found, model), (model, found)):
        result = match_shapes(a, b)
        assert result.after.fits, result
        assert len(result.maps) == 1, result.maps
        assert renamed(a, result).keys() == b.keys()
