"""diff: every kind of change, across formats; tolerances as torch.allclose has them."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file

import modelctl as mc
from modelctl.core.checkpoint import Checkpoint
from modelctl.core.dtypes import BY_NAME
from modelctl.core.nodes import ordered_dict
from modelctl.core.storages import MemoryStorage
from modelctl.core.tensors import TensorRef
from modelctl.errors import NoMatchError
from modelctl.inspection.diffing.report import Diff


def in_memory(tensors: dict[str, torch.Tensor]) -> Checkpoint:
    entries = {}
    for name, tensor in tensors.items():
        data = bytes(tensor.flatten().view(torch.uint8).tolist())
        dtype = BY_NAME[str(tensor.dtype).removeprefix("torch.")]
        entries[name] = TensorRef(dtype, tuple(tensor.shape), MemoryStorage(data))
    return Checkpoint(ordered_dict(entries))


def compare(a: torch.Tensor, b: torch.Tensor, **options: Any) -> Diff:
    return mc.diff(in_memory({"x": a}), in_memory({"x": b}), **options)


def files(tmp_path: Path, a: Any, b: Any, **options: Any) -> Diff:
    torch.save(a, tmp_path / "a.pt")
    torch.save(b, tmp_path / "b.pt")
    with mc.open(tmp_path / "a.pt") as left, mc.open(tmp_path / "b.pt") as right:
        return mc.diff(left, right, **options)


A = {"w": torch.arange(6.0).reshape(2, 3), "b": torch.zeros(3), "n": torch.tensor(7)}


def test_the_same(tmp_path: Path) -> None:
    found = files(tmp_path, A, {name: tensor.clone() for name, tensor in A.items()})
    assert not found.differs
    assert found.same == 3


def test_each_kind_of_change(tmp_path: Path) -> None:
    other = {
        "w": A["w"] + torch.tensor([[0, 0, 0.5], [0, -2, 0]]),
        "b": torch.zeros(4),
        "n": torch.tensor(7, dtype=torch.int32),
        "new": torch.ones(1),
    }
    found = files(tmp_path, {**A, "old": torch.ones(1)}, other)
    assert (found.added, found.removed, found.same) == (["new"], ["old"], 0)
    w, b, n = found.changed
    assert (w.name, w.what, w.elements, w.numel, w.max_abs) == ("w", "values", 2, 6, 2.0)
    assert (b.name, b.what, b.before, b.after) == ("b", "shape", "3", "4")
    assert (n.name, n.what, n.before, n.after) == ("n", "dtype", "int64", "int32")
    assert (b.elements, b.max_abs) == (None, None)
    assert (n.elements, n.numel, n.max_abs) == (0, 1, 0)  # compared by value
    assert found.differs


def test_other_values(tmp_path: Path) -> None:
    a = {"model": A, "epoch": 1, "lr": 0.1, "args": {"x": [1, 2]}, "gone": None}
    b = {"model": A, "epoch": 2, "lr": 0.1, "args": {"x": [1, 3]}, "flag": True}
    found = files(tmp_path, a, b)
    assert [tuple(change) for change in found.values] == [
        ("epoch", "1", "2"),
        ("args.x", "[1, 2]", "[1, 3]"),
        ("gone", "None", None),
        ("flag", None, "True"),
    ]
    assert found.differs
    assert not files(tmp_path, a, b, pattern="*").differs
    assert files(tmp_path, {"model": A, "x": 1}, {"model": A, "x": True}).differs
    assert files(tmp_path, {"model": A, "x": 1}, {"model": A, "x": 1.0}).differs
    assert not files(tmp_path, {"model": A, "x": math.nan}, {"model": A, "x": math.nan}).differs


def test_across_formats_and_layouts(tmp_path: Path) -> None:
    torch.save({"state_dict": A, "epoch": 1}, tmp_path / "a.pt")
    save_file(A, tmp_path / "b.safetensors")
    torch.save(A, tmp_path / "c.pth", _use_new_zipfile_serialization=False)
    with (
        mc.open(tmp_path / "a.pt") as a,
        mc.open(tmp_path / "b.safetensors") as b,
        mc.open(tmp_path / "c.pth") as c,
    ):
        assert not mc.diff(b, c).differs
        found = mc.diff(a, b)
        assert found.same == 3
        assert [change.path for change in found.values] == ["epoch"]
        assert not mc.diff(a, b, pattern="*").differs
        assert mc.diff(a, b, pattern=["w", "n"]).same == 2
        assert mc.diff(a, b, pattern="^[wb]$", regex=True).same == 2
        with pytest.raises(NoMatchError):
            mc.diff(a, b, pattern="zzz")


def test_a_pattern_may_match_in_either(tmp_path: Path) -> None:
    found = files(tmp_path, {"w": A["w"]}, {"v": A["w"]}, pattern="v")
    assert (found.added, found.removed) == (["v"], [])


def test_the_optimizer_is_compared_by_path(tmp_path: Path) -> None:
    def saved(x: float) -> Any:
        return {
            "model": A,
            "optimizer": {"state": {0: {"m": torch.full((2,), x)}}, "param_groups": []},
        }

    found = files(tmp_path, saved(1), saved(3))
    assert [(change.name, change.max_abs) for change in found.changed] == [
        ("optimizer.state.0.m", 2)
    ]


def test_our_own_records_are_not_compared(tmp_path: Path) -> None:
    torch.save(A, tmp_path / "a.pt")
    with mc.open(tmp_path / "a.pt") as a:
        mc.save(mc.freeze(a, "w"), tmp_path / "b.pt", history=["freeze --pattern w"])
        with mc.open(tmp_path / "b.pt") as b:
            assert not mc.diff(a, b).differs


def test_strides_do_not_matter(tmp_path: Path) -> None:
    assert not files(tmp_path, {"w": A["w"].t().contiguous().t()}, {"w": A["w"]}).differs


# ---------------------------------------------------------------------- values

SPECIAL = [0.0, -0.0, 1.0, 1.0 + 2**-20, -3.5, 1e-8, 65504.0, math.inf, -math.inf, math.nan]
floats = st.sampled_from(SPECIAL) | st.floats(-1e3, 1e3, width=32)
FLOATING = [torch.float64, torch.float32, torch.float16, torch.bfloat16]
tolerances = st.sampled_from([0.0, 1e-5, 0.1, 1.0, 2.0])


@settings(max_examples=300, deadline=None)
@given(
    st.lists(st.tuples(floats, floats), min_size=1, max_size=5),
    st.sampled_from(FLOATING),
    tolerances,
    tolerances,
)
def test_tolerance_is_that_of_allclose(
    pairs: list[tuple[float, float]], dtype: torch.dtype, rtol: float, atol: float
) -> None:
    a, b = (
        torch.tensor(values, dtype=torch.float64).to(dtype) for values in zip(*pairs, strict=True)
    )
    if not (rtol or atol):
        rtol = 1e-300
    wide = [tensor.double() for tensor in (a, b)]
    assert compare(a, b, rtol=rtol, atol=atol).differs is not torch.allclose(
        *wide, rtol=rtol, atol=atol, equal_nan=True
    )


@settings(max_examples=200, deadline=None)
@given(st.lists(st.tuples(floats, floats), min_size=1, max_size=5), st.sampled_from(FLOATING))
def test_without_tolerance_bits_decide(
    pairs: list[tuple[float, float]], dtype: torch.dtype
) -> None:
    a, b = (
        torch.tensor(values, dtype=torch.float64).to(dtype) for values in zip(*pairs, strict=True)
    )
    bits = {8: torch.int64, 4: torch.int32, 2: torch.int16}[a.element_size()]
    differ = int((a.view(bits) != b.view(bits)).sum())
    found = compare(a, b)
    assert found.differs is bool(differ)
    if differ:
        (change,) = found.changed
        assert (change.elements, change.numel) == (differ, len(pairs))
        gap = (a.double() - b.double()).abs()
        gap[(a == b) | (a.isnan() & b.isnan())] = 0
        assert change.max_abs is not None
        if gap.isnan().any():
            assert math.isnan(change.max_abs)
        else:
            assert change.max_abs == gap.max().item()


INTEGERS = {
    torch.int8: (-(2**7), 2**7 - 1),
    torch.uint8: (0, 2**8 - 1),
    torch.int32: (-(2**31), 2**31 - 1),
    torch.int64: (-(2**63), 2**63 - 1),
}


@settings(max_examples=200, deadline=None)
@given(st.data(), st.sampled_from(list(INTEGERS)))
def test_integers_are_exact(data: st.DataObject, dtype: torch.dtype) -> None:
    low, high = INTEGERS[dtype]
    near = st.sampled_from([low, low + 1, high - 1, high, 0 if low else 1])
    values = st.tuples(near | st.integers(low, high), near | st.integers(low, high))
    pairs = data.draw(st.lists(values, min_size=1, max_size=4))
    a, b = (torch.tensor(values, dtype=dtype) for values in zip(*pairs, strict=True))
    gaps = [abs(x - y) for x, y in pairs]
    found = compare(a, b)
    assert found.differs is any(gaps)
    if any(gaps):
        assert found.changed[0].elements == sum(gap > 0 for gap in gaps)
        assert found.changed[0].max_abs == float(max(gaps))
    assert compare(a, b, atol=0.5).differs is any(gaps)
    assert not compare(a, b, atol=float(max(gaps)) + 2.0**11).differs


def test_big_integers_one_apart() -> None:
    found = compare(torch.tensor([2**53]), torch.tensor([2**53 + 1]))
    assert found.changed[0].max_abs == 1
    assert compare(torch.tensor([2**53]), torch.tensor([2**53 + 1]), atol=0.5).differs


def test_an_infinity_is_close_to_nothing_else() -> None:
    five, infinite = torch.tensor([5.0]), torch.tensor([math.inf])
    assert compare(five, infinite, rtol=0.5).differs
    assert compare(infinite, five, rtol=0.5).differs
    assert compare(-infinite, infinite, rtol=0.5, atol=1).differs
    assert not compare(infinite, infinite.clone(), rtol=0.5).differs


@pytest.mark.parametrize(
    ("a", "b", "most"),
    [
        (torch.tensor([True, False]), torch.tensor([True, True]), 1.0),
        (torch.tensor([3 + 4j]), torch.tensor([0j]), 5.0),
        (
            torch.tensor([3 + 4j], dtype=torch.complex128),
            torch.tensor([0j]).to(torch.complex128),
            5.0,
        ),
        (torch.tensor([1.5]).to(torch.bfloat16), torch.tensor([1.0]).to(torch.bfloat16), 0.5),
        (
            torch.tensor([1.0]).to(torch.float8_e4m3fn),
            torch.tensor([2.0]).to(torch.float8_e4m3fn),
            1.0,
        ),
    ],
)
def test_other_dtypes(a: torch.Tensor, b: torch.Tensor, most: float) -> None:
    found = compare(a, b)
    assert (found.changed[0].elements, found.changed[0].max_abs) == (1, most)
    assert not compare(a, a.clone()).differs
    assert compare(a, b, atol=0.1).differs
    assert not compare(a, b, atol=most).differs


def test_a_nan_stays_seen_in_a_long_tensor() -> None:
    a = torch.zeros(600_000)
    b = a.clone()
    b[0], b[-1] = math.nan, 3.0  # pieces of 1 MiB: the first has the NaN, the last the 3
    (change,) = compare(a, b).changed
    assert change.elements == 2
    assert math.isnan(change.max_abs)
    b[0], b[-1] = 3.0, math.nan
    assert math.isnan(compare(a, b).changed[0].max_abs)
    b[0], b[-1] = 2.0, 3.0
    assert compare(a, b).changed[0].max_abs == 3.0


def test_two_nans_are_the_same_beside_what_is_close() -> None:
    a, b = torch.tensor([math.nan, 1.0]), torch.tensor([math.nan, 1.0 + 1e-6])
    assert not compare(a, b, atol=1e-3).differs
    assert compare(a, b).changed[0].max_abs == pytest.approx(1e-6, rel=0.1)


def test_empty_and_scalar() -> None:
    assert not compare(torch.zeros(0, 3), torch.zeros(0, 3)).differs
    assert compare(torch.zeros(0, 3), torch.zeros(3, 0)).changed[0].what == "shape"
    assert compare(torch.tensor(1.0), torch.tensor(2.0)).changed[0].before == "scalar"


def test_its_page_and_its_dict(tmp_path: Path) -> None:
    other = {"module." + name: tensor for name, tensor in A.items()}
    found = files(tmp_path, A, other)
    assert (found.a, found.b) == (str(tmp_path / "a.pt"), str(tmp_path / "b.pt"))
    page = found.page()
    assert [note.level for note in page.notes] == ["hint", "hint", "hint"]
    assert "all of B's names start with 'module.': --ignore-prefix" in page.notes[0].text
    assert "--prefix module. -o NEW.pt" in page.notes[1].text
    (note,) = files(tmp_path, {**A, "x": A["n"]}, {**other, "x": A["n"]}).page().notes
    assert note.text == ("3 names of B would meet the other's without 'module.': --ignore-prefix")
    assert page.data.rows[0][:4] == ("-", "w", "only in A", "")
    assert found.as_dict()["removed"] == list(A)
    nan = compare(torch.zeros(1), torch.tensor([math.nan]))
    assert nan.as_dict()["changed"][0]["max_abs"] == "nan"
    assert nan.changed[0].text == "1 of 1, 1 NaN only in B"


# ---------------------------------------------------------------------- what people read


def test_names_under_a_prefix_are_one_line_and_the_way_out(tmp_path: Path) -> None:
    under = {f"module.{name}": tensor for name, tensor in A.items()}
    for a, b, which in ((A, under, "B"), (under, A, "A")):
        found = files(tmp_path, a, b)
        assert (found.differs, found.same, found.under) == (True, 3, (which.lower(), "module."))
        assert (found.removed, found.added) == (list(a), list(b))
        text = str(found).splitlines()
        assert text[0] == (
            f"the names of {which} are the other's under 'module.'; 3 tensors bit-equal"
        )
        assert text[1].startswith(f"hint: all of {which}'s names start with 'module.': ")
        assert text[2].startswith("hint: modelctl strip-prefix ")
        assert text[3].startswith("hint: or modelctl add-prefix ")
        assert len(text) == 4
    optimizer = {"state": {0: {"m": torch.ones(1)}}, "param_groups": []}
    text = str(files(tmp_path, {"model": A, "optimizer": optimizer}, {"model": under}))
    assert "-  optimizer.state.0.m     only in A" in text
    assert "'module.', 1 tensor only in A" in text
    changed = files(tmp_path, A, {**under, "module.w": A["w"] + 1})
    assert [change.name for change in changed.changed] == ["w"]
    other = {f"module.{name}": tensor for name, tensor in A.items() if name != "n"}
    assert files(tmp_path, A, {**other, "module.m": A["n"]}).under is None
    assert files(tmp_path, A, {**other}).under is None


def test_the_largest_relative_change_first(tmp_path: Path) -> None:
    a = {"large": torch.tensor([1000.0]), "small": torch.tensor([0.1]), "nan": torch.ones(2)}
    b = {"large": a["large"] + 1, "small": a["small"] * 2, "nan": torch.tensor([1.0, math.nan])}
    found = files(tmp_path, {**a, "shape": torch.ones(2)}, {**b, "shape": torch.ones(3)})
    shown = [line.split()[1] for line in str(found).splitlines() if line.startswith("~")]
    assert shown == ["shape", "nan", "small", "large"]
    assert {c.name: c.relative for c in found.changed}["large"] == pytest.approx(0.001)


def test_many_differences_are_a_row_a_module(tmp_path: Path) -> None:
    a = {f"net.layer{i}.{j}.{k}": torch.ones(2) for i in range(5) for j in range(4) for k in "wb"}
    b = {name: tensor + (1 if "layer3.2" in name else 0.5) for name, tensor in a.items()}
    del b["net.layer1.0.w"]
    found = files(tmp_path, a, b)
    rows = [line for line in str(found).splitlines() if line.startswith(("-", "~"))]
    assert len(rows) <= 20
    assert rows[0].split()[:2] == ["-", "net.layer1"]
    assert rows[1].split()[:2] == ["~", "net.layer3"]
    assert "8 tensors: 16 of 16, at most 1" in rows[1]
    assert "--pattern or --format json shows each" in str(found)
    each = files(tmp_path, a, b, pattern="*")
    assert len([line for line in str(each).splitlines() if line.startswith(("-", "~"))]) == 40


def test_a_whole_module_against_its_state_dict(tmp_path: Path) -> None:
    model = torch.nn.Sequential(torch.nn.Linear(2, 2), torch.nn.BatchNorm1d(2))
    found = files(tmp_path, model, model.state_dict())
    assert (found.differs, found.same) == (False, 7)
    state = model.state_dict()
    found = files(tmp_path, {**state, "0.bias": state["0.bias"] + 1}, model)
    assert [change.name for change in found.changed] == ["0.bias"]


def test_quantized_values_are_compared(tmp_path: Path) -> None:
    one, other = (
        torch.quantize_per_tensor(torch.full((4,), x), 0.5, 0, torch.qint8) for x in (1.0, 2.0)
    )
    assert not files(tmp_path, {"w": one, "b": A["b"]}, {"w": one, "b": A["b"]}).differs
    found = files(tmp_path, {"w": one, "b": A["b"]}, {"w": other, "b": A["b"]})
    assert [(change.name, change.elements) for change in found.changed] == [("w.storage", 4)]
