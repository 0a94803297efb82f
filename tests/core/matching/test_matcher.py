"""Names and shapes: what means what, and what is before them."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from modelctl.core.matching.matcher import (
    Names,
    Prefixes,
    as_written,
    counts,
    find_prefixes,
    fits,
    given_prefix,
    match_names,
    without,
)
from modelctl.core.names import unwrapped
from modelctl.errors import CollisionError, NoMatchError


def test_what_fits() -> None:
    assert fits((3, 4), (3, 4))
    assert fits((1,), ())  # before torch 0.4 there were no scalars
    assert not fits((), (1,))
    assert not fits((4, 3), (3, 4))
    assert fits((4, 3), None)  # a parameter that has no shape yet
    assert not fits(None, (3, 4))


@pytest.mark.parametrize(
    ("version", "has"), [(2, True), (3, True), (1, False), (None, False), ("2", False)]
)
def test_since_when_norms_count(version: object, has: bool) -> None:
    assert counts(version) is has


# ---------------------------------------------------------------------- names


@pytest.mark.parametrize(
    ("name", "meant"),
    [
        ("fc.weight", "fc.weight"),
        ("module.fc.weight", "fc.weight"),
        ("module._orig_mod.fc.weight", "fc.weight"),
        ("fc._orig_mod.weight", "fc.weight"),
        ("module.own.weight", "module.own.weight"),  # a child that is really called so
        ("module.module.own.weight", "module.own.weight"),
        ("own.weight", "module.own.weight"),
        ("layer.weight", "layer._orig_mod.weight"),
        ("fc", None),
        ("xmodule.fc.weight", None),
    ],
)
def test_what_a_name_means(name: str, meant: str | None) -> None:
    names = ("fc.weight", "module.own.weight", "layer._orig_mod.weight")
    assert Names(names).meant(name) == meant
    assert Names(dict.fromkeys(names)).meant(name) == meant
    assert match_names([name], names) == ({} if meant is None else {name: meant})


def test_the_nearest_comes_first() -> None:
    names = Names(["x", "module.x"])
    assert [names.meant(name) for name in ("x", "module.x", "module.module.x")] == [
        "x",
        "module.x",
        "module.x",
    ]


def test_two_that_mean_one_are_refused() -> None:
    with pytest.raises(CollisionError, match=r"'x' and 'module\.x' both mean the model's 'x'"):
        match_names(["x", "module.x"], ["x"])


# ---------------------------------------------------------------------- prefixes


def test_counters_and_extra_state_say_nothing() -> None:
    bn = {f"bn{i}.num_batches_tracked": () for i in range(9)}
    found = {f"m.{name}": shape for name, shape in bn.items()} | {"weight": (3,)}
    assert find_prefixes(found, {**bn, "weight": (3,)}) == Prefixes(tensors=1)
    state = {"a._extra_state": None, "b._extra_state": None}
    assert find_prefixes({f"m.{n}": None for n in state}, state) == Prefixes()


def test_what_has_no_shape_yet_goes_by_its_name() -> None:
    assert find_prefixes({"m.fc.weight": (3, 4)}, {"fc.weight": None}).found == "m."


@pytest.mark.parametrize(("fitting", "prefix"), [(5, ""), (4, "m.")])
def test_names_as_they_are_count_where_half_fit(fitting: int, prefix: str) -> None:
    model = {f"w{i}": (3, i) for i in range(10)}
    plain = {name: (3, i) if i < fitting else (9,) for i, name in enumerate(model)}
    found = plain | {f"m.{name}": shape for name, shape in model.items()}
    assert find_prefixes(found, model) == Prefixes(prefix, tensors=10 if prefix else fitting)


@pytest.mark.parametrize(("fitting", "prefix"), [(3, "m."), (2, "")])
def test_a_prefix_counts_where_half_of_the_smaller_fits(fitting: int, prefix: str) -> None:
    model = {f"w{i}": (3, i) for i in range(10)}
    found = {f"m.w{i}": (3, i) if i < fitting else (9,) for i in range(6)}
    assert find_prefixes(found, model).found == prefix


@pytest.mark.parametrize(
    ("lacks", "likely"),
    [
        ({3}, ("a.", "b.")),  # b. has something that a. lacks, and is nearly as good
        ({3, 4, 5, 6, 7}, ("b.",)),  # a. is less than half as good
        (set(), ("a.",)),  # whatever b. has, a. has, too
    ],
)
def test_which_is_a_rival(lacks: set[int], likely: tuple[str, ...]) -> None:
    model = {f"w{i}": (3, i) for i in range(8)}
    found = {f"a.w{i}": (3, i) for i in range(8) if i not in lacks}
    found |= {f"b.w{i}": (3, i) for i in range(2, 8)}
    result = find_prefixes(found, model)
    assert (result.rivals or (result.found,)) == likely


def test_of_two_that_fit_as_much_the_outer_one_counts() -> None:
    model = {f"w{i}": (3, i) for i in range(10)}
    found = {f"net.ema.w{i}": (3, i) for i in range(3)} | {f"net.w{i}": (3, i) for i in range(3)}
    assert find_prefixes(found, model) == Prefixes("net.", tensors=3)


def test_hostile_names_are_bounded() -> None:
    deep = "a." * 2000 + "b"
    found = {f"{deep}{i}": (i,) for i in range(200)} | {".": (1,), "..": (2,), "": (3,)}
    assert find_prefixes(found, {f"b{i}": (i,) for i in range(200)}) == Prefixes()


@pytest.mark.parametrize(
    ("names", "prefix", "written"),
    [
        (["module.model.x", "module.model.y.z"], "model.", "module.model."),
        (["model._orig_mod.x"], "model.", "model._orig_mod."),
        (["x", "module.y", "module.z"], "", "module."),
        (["a.b._orig_mod.x", "a.y"], "a.", "a."),
        ([], "a.", "a."),
    ],
)
def test_prefixes_as_they_are_written(names: list[str], prefix: str, written: str) -> None:
    assert as_written(names, prefix) == written


NAMES = st.lists(st.sampled_from(["a", "b", "module", "_orig_mod"]), min_size=1).map(".".join)


@given(NAMES, NAMES)
def test_what_was_put_before_is_taken_off(prefix: str, name: str) -> None:
    start = given_prefix([f"{prefix}.{name}"], prefix)
    bare = without(f"{prefix}.{name}", start, alone=True)
    assert bare is not None
    assert unwrapped(bare) == unwrapped(name)


def test_without() -> None:
    assert without("module.model.x", "model.") == "x"
    assert without("model.x", "") == "model.x"
    assert without("other.x", "model.") == "other.x"
    assert without("other.x", "model.", alone=True) is None
    with pytest.raises(NoMatchError, match=r"begins with 'net\.'") as e:
        given_prefix(["module.model.x", "head.y"], "net")
    assert e.value.hint == "they begin with model., head."
