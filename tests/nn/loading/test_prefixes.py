"""What is before the names of a file: ``match`` and ``load_into`` say the same of it."""

from __future__ import annotations

import re
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import modelctl.nn as mnn
from modelctl.core.names import unwrapped
from modelctl.errors import AmbiguousError, ModelctlError, RefusedError
from modelctl.inspection.matching.match import match_shapes

Shape = tuple[int, ...]
Shapes = dict[str, Shape]

NET: Shapes = {
    "stem.weight": (4, 3),
    "stem.bias": (4,),
    "body.0.weight": (4, 4),
    "body.1.weight": (5, 4),
    "norm.weight": (5,),
    "norm.bias": (5,),
    "scale": (),
    "fc.weight": (7, 5),
    "fc.bias": (7,),
}
TRUNK = {name: shape for name, shape in NET.items() if not name.startswith("fc")}


def at(prefix: str, shapes: Shapes = NET) -> Shapes:
    return {prefix + name: shape for name, shape in shapes.items()}


def other_head(shapes: Shapes = NET) -> Shapes:
    return {n: (2, *s[1:]) if "fc" in n else s for n, s in shapes.items()}


def built(shapes: Shapes) -> nn.Module:
    """A model whose state_dict has these names and shapes."""
    model = nn.Module()
    for i, (name, shape) in enumerate(shapes.items()):
        *above, last = name.split(".")
        module = model
        for part in above:
            if not hasattr(module, part):
                module.add_module(part, nn.Module())
            module = getattr(module, part)
        module.register_parameter(last, nn.Parameter(torch.full(shape, float(i))))
    return model


class Case(NamedTuple):
    """A file, a model, and what is taken off the file's names: a prefix, or several that would
    do; ``added`` is what the model has before its own, ``weak`` a prefix by which little fits."""

    found: Shapes
    model: Shapes
    prefix: str = ""
    rivals: tuple[str, ...] = ()
    added: str = ""
    weak: str = ""


CASES = {
    "as they are": Case(NET, NET),
    "lightning": Case(at("model."), NET, "model."),
    "two deep": Case(at("a.b."), NET, "a.b."),
    "a wrapped file": Case(at("module."), NET),
    "a wrapped model": Case(NET, at("module.")),
    "both wrapped, otherwise": Case(at("module._orig_mod."), at("module.")),
    "wrapped around lightning": Case(at("module.model."), NET, "model."),
    "compiled in lightning": Case(at("model._orig_mod."), NET, "model."),
    "lightning, into a wrapped model": Case(at("model."), at("module."), "model."),
    "wrapped lightning, into a wrapped model": Case(at("module.model."), at("module."), "model."),
    "lightning, into a compiled model": Case(at("model."), at("_orig_mod."), "model."),
    "a child called module": Case(at("model.module."), NET, "model.module."),
    "another head": Case(at("model.", other_head()), NET, "model."),
    "a copy inside that fits better": Case(at("", other_head()) | at("ema."), NET),
    "a copy inside what has a prefix": Case(at("net.") | at("net.ema."), NET, "net."),
    "one inside that fits better": Case(at("net.", other_head()) | at("net.ema."), NET, "net."),
    "student and teacher": Case(at("student.") | at("teacher."), NET, "", ("student.", "teacher.")),
    "a teacher without its head": Case(at("student.") | at("teacher.", TRUNK), NET, "student."),
    "a teacher with another head": Case(
        at("student.") | at("teacher.", other_head()), NET, "student."
    ),
    "each has something": Case(
        {n: s for n, s in at("a.").items() if n != "a.norm.bias"}
        | {n: s for n, s in at("b.").items() if n[2:] not in ("fc.bias", "scale")},
        NET,
        "",
        ("a.", "b."),
    ),
    "the model has them at both": Case(NET, NET | at("ema."), ""),
    "the model has them at both, the file under the prefix": Case(at("ema."), NET | at("ema.")),
    "what is too little": Case({"x.scale": (), "y.a": (9, 9), "y.b": (8, 8)}, NET, weak="x."),
    "a scalar as of 0.3": Case(at("m.", {**TRUNK, "scale": (1,)}), TRUNK, "m."),
    "scalars as of 0.3": Case(
        {"m.a": (1,), "m.b": (1,), "other": (3,)}, {"a": (), "b": (), "c": (3, 3)}, "m."
    ),
    "an average": Case({"n_averaged": ()} | at("module."), NET),
    "an average of lightning": Case({"n_averaged": ()} | at("module.model."), NET, "model."),
    "a part of the model": Case(NET, at("backbone.") | {"head.weight": (9, 9)}, added="backbone."),
    "one of two parts": Case(NET, at("query.") | at("key."), added="query. key."),
}


def bare(text: str) -> str:
    """``module.model.*`` is ``model.``, ``*`` is ''."""
    name = text.removesuffix("*")
    name = name if not name or name.endswith(".") else name + "."
    return unwrapped(name + "x")[:-1]


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_match_and_load_into_agree(case: Case, tmp_path: Path) -> None:
    result = match_shapes(case.found, case.model)
    path = tmp_path / "a.pt"
    torch.save({n: torch.full(s, 100.0 + i) for i, (n, s) in enumerate(case.found.items())}, path)
    model = built(case.model)

    if case.rivals or " " in case.added:
        assert result.maps == []
        (unclear,) = result.unclear
        assert (unclear.found, unclear.expected) == (
            (case.rivals, ("",)) if case.rivals else (("",), tuple(case.added.split()))
        )
    else:
        first = result.maps[0] if result.maps else None
        prefixes = [bare(one) for one in first.map.split("=")] if first else ["", ""]
        assert prefixes == [case.prefix, case.added]
        assert first is None or first.why == ("prefix",)
        if case.prefix or case.added:
            assert result.after.problems < result.before.problems

    if case.rivals:
        shown = ", ".join(f"'{one}'" for one in case.rivals)
        with pytest.raises(AmbiguousError, match=re.escape(f"the prefix {shown}")) as e:
            mnn.load_into(model, path, on_mismatch="skip")
        assert f"prefix='{case.rivals[0]}'" in (e.value.hint or "")
        return
    if " " in case.added:
        with pytest.raises(RefusedError) as e:
            mnn.load_into(model, path)
        for part in case.added.split():
            assert f"model.get_submodule('{part[:-1]}')" in (e.value.hint or "")
        assert "modelctl match" in (e.value.hint or "")
        return
    if case.weak:
        with pytest.raises(RefusedError) as e:
            mnn.load_into(model, path, on_mismatch="skip")
        assert f"on_mismatch='skip', prefix='{case.weak}')" in (e.value.hint or "")
        assert mnn.load_into(model, path, on_mismatch="skip", prefix=case.weak).loaded
        return
    report = mnn.load_into(model, path, on_mismatch="skip")
    assert (report.prefix, report.added) == (case.prefix, case.added)
    # what load_into takes is what fits after the maps
    assert len(report.loaded) == result.after.matched
    assert {*report.missing} == {unwrapped(name) for name in result.after.missing}


# ------------------------------------------------------------------ a part of the model


@pytest.mark.parametrize("wrapped", ["", "module."])
def test_a_bare_model_goes_into_one_with_a_head(tmp_path: Path, wrapped: str) -> None:
    """The head that the file lacks is missing, as ever; the freeze record goes along."""
    path = tmp_path / "a.pt"
    bare_net = built(NET)
    mnn.freeze(bare_net, "stem")
    mnn.save_checkpoint(path, model=bare_net)
    if wrapped:
        whole = torch.load(path, weights_only=True)
        whole["model"] = {wrapped + name: value for name, value in whole["model"].items()}
        torch.save(whole, path)
    shapes = at("bert.") | {"classifier.weight": (2, 7), "classifier.bias": (2,)}
    model = built(shapes)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with pytest.raises(RefusedError, match=r"missing in the file: classifier\.weight") as e:
        mnn.load_into(model, path)
    assert "on_mismatch='skip'" in (e.value.hint or "")
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
    report = mnn.load_into(model, path, on_mismatch="skip")
    assert report.missing == ("classifier.weight", "classifier.bias")
    assert report.unexpected == ()
    assert report.added == "bert."
    assert "with 'bert.' before them" in str(report)
    for name, value in bare_net.state_dict().items():
        assert torch.equal(model.state_dict()[f"bert.{name}"], value)
    if not wrapped:  # _metadata, and the record in it, are gone
        assert mnn.trainable(model).frozen == ("bert.stem.weight", "bert.stem.bias")


def test_versions_of_modules_go_by_the_models_names(tmp_path: Path) -> None:
    """A BatchNorm of a version without a counter does not miss it."""
    body = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4))
    state = body.state_dict()
    del state["1.num_batches_tracked"]
    state._metadata["1"]["version"] = 1
    torch.save(state, tmp_path / "a.pt")
    model = nn.ModuleDict({"body": nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4))})
    report = mnn.load_into(model, tmp_path / "a.pt")
    assert report.missing == ()
    assert report.added == "body."


# ------------------------------------------------------------------ whatever the names

SEGMENTS = st.sampled_from(["a", "b", "net", "0", "1", "model", "encoder"])
WRAPPED = st.sampled_from(["", "module.", "_orig_mod.", "module._orig_mod.", "module.module."])


@st.composite
def models(draw: st.DrawFn) -> Shapes:
    paths = draw(st.lists(st.lists(SEGMENTS, max_size=2), min_size=1, max_size=5))
    shapes: Shapes = {}
    for i, path in enumerate(paths):
        at_ = "".join(f"{part}." for part in path)
        for last in draw(st.sets(st.sampled_from(["weight", "bias"]), min_size=1)):
            shapes[f"{at_}{last}{i}"] = (draw(st.integers(1, 3)), 2)[: draw(st.integers(0, 2))]
    return shapes


@settings(max_examples=80, deadline=None)
@given(models(), st.lists(SEGMENTS, max_size=2), WRAPPED, WRAPPED)
def test_a_prefix_that_was_put_before_is_found(
    tmp_path_factory: pytest.TempPathFactory, shapes: Shapes, prefix: list[str], one: str, two: str
) -> None:
    """By both, in the names of either side's wrappers; or it is said that it is not clear."""
    before = "".join(f"{part}." for part in prefix)
    found, model = at(one + before, shapes), at(two, shapes)
    result = match_shapes(found, model)
    path = tmp_path_factory.mktemp("a") / "a.pt"
    torch.save({name: torch.full(shape, 7.0) for name, shape in found.items()}, path)
    live = built(model)
    report = mnn.load_into(live, path)
    assert report.prefix == before
    assert all(bool((value == 7).all()) for value in live.state_dict().values())
    assert result.after.fits
    assert len(result.maps) == (one + before != two)


@settings(max_examples=80, deadline=None)
@given(models(), models(), WRAPPED, st.data())
def test_match_and_load_into_agree_whatever_the_names(
    tmp_path_factory: pytest.TempPathFactory,
    first: Shapes,
    second: Shapes,
    wrapped: str,
    data: st.DataObject,
) -> None:
    """Parts of two models under prefixes, into one of them."""
    prefixes = data.draw(st.lists(SEGMENTS, min_size=2, max_size=2))
    some_of = {n: s for n, s in second.items() if data.draw(st.booleans())}
    found = at(f"{wrapped}{prefixes[0]}.", first) | at(f"{prefixes[1]}.", some_of) | some_of
    result = match_shapes(found, first)
    path = tmp_path_factory.mktemp("a") / "a.pt"
    torch.save({name: torch.zeros(shape) for name, shape in found.items()}, path)
    try:
        report = mnn.load_into(built(first), path, on_mismatch="skip")
    except AmbiguousError:
        assert result.unclear
        assert result.unclear[0].expected == ("",)
        return
    except ModelctlError:
        return  # two names of the file are one, or nothing fits
    if not any(one.why == ("prefix",) for one in result.maps):
        return  # the map for it would move what is right, or give two tensors one name
    assert bare(result.maps[0].map.partition("=")[0]) == report.prefix
