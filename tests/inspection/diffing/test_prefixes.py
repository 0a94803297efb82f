"""--ignore-prefix: names that differ by what wrappers put before them, or by any one prefix."""

from __future__ import annotations

import time
from pathlib import Path

import pytest
import torch

import modelctl as mc
from modelctl.inspection.diffing.names import Under, likely_prefix, likest
from modelctl.inspection.diffing.report import Diff

A = {"conv.weight": torch.ones(3), "conv.bias": torch.zeros(3), "fc.weight": torch.ones(2)}


def files(tmp_path: Path, a: object, b: object, ignore_prefix: bool = True) -> Diff:
    torch.save(a, tmp_path / "a.pt")
    torch.save(b, tmp_path / "b.pt")
    return mc.diff(tmp_path / "a.pt", tmp_path / "b.pt", ignore_prefix=ignore_prefix)


def under(prefix: str, state: dict[str, torch.Tensor] = A) -> dict[str, torch.Tensor]:
    return {prefix + name: tensor for name, tensor in state.items()}


@pytest.mark.parametrize("prefix", ["module.", "_orig_mod.module.", "model.", "net.backbone."])
@pytest.mark.parametrize("turned", [False, True])
def test_the_names_meet(tmp_path: Path, prefix: str, turned: bool) -> None:
    pair = (under(prefix), A) if turned else (A, under(prefix))
    found = files(tmp_path, *pair)
    assert (found.differs, found.same, found.added, found.removed) == (False, 3, [], [])
    assert files(tmp_path, *pair, ignore_prefix=False).differs


def test_wrappers_on_both_sides(tmp_path: Path) -> None:
    compiled = {"model.layer._orig_mod.weight": torch.ones(1), "model.fc.weight": torch.ones(2)}
    plain = {"model.layer.weight": torch.ones(1), "model.fc.weight": torch.ones(2)}
    assert not files(tmp_path, under("module.", plain), compiled).differs
    assert not files(tmp_path, under("module."), under("_orig_mod.")).differs


def test_what_is_under_it_and_more(tmp_path: Path) -> None:
    other = {**under("backbone."), "head.weight": torch.ones(1)}
    other["backbone.conv.bias"] = torch.full((3,), 0.5)
    found = files(tmp_path, A, other)
    assert (found.added, found.removed, found.same) == (["head.weight"], [], 2)
    assert [(one.name, one.max_abs) for one in found.changed] == [("conv.bias", 0.5)]
    assert found.under == Under("b", "backbone.")
    assert "compared without 'backbone.'" in str(found)


def test_two_of_one_name_stay_two(tmp_path: Path) -> None:
    both = {"module.x": torch.ones(1), "x": torch.zeros(1)}
    found = files(tmp_path, both, both)
    assert (found.differs, found.same) == (False, 2)


def test_a_training_checkpoint(tmp_path: Path) -> None:
    one = {"model": A, "epoch": 1, "ema": A}
    other = {"model": under("module."), "epoch": 1, "ema": A}
    assert not files(tmp_path, one, other).differs


def test_the_way_out_is_said(tmp_path: Path) -> None:
    other = {**under("model."), "head.weight": torch.ones(1)}
    text = str(files(tmp_path, A, other, ignore_prefix=False))
    assert "hint: 3 names of B would meet the other's without 'model.': --ignore-prefix" in text
    other = {"conv.weights": A["conv.weight"], "conv.bias": A["conv.bias"]}
    text = str(
        files(tmp_path, {**other, "old.x": A["fc.weight"]}, {**other, "old.x2": A["fc.weight"]})
    )
    assert "hint: names that look alike: 'old.x' in A, 'old.x2' in B" in text
    assert "hint" not in str(files(tmp_path, A, {**A, "conv.weights": A["conv.bias"]}))


def test_likely_prefix() -> None:
    assert likely_prefix(["a.x", "a.y"], ["x", "y"]) == (Under("a", "a."), 2)
    assert likely_prefix(["x", "q"], ["m.x", "n.o.q"]) == (Under("b", "m."), 1)
    assert likely_prefix(["x"], ["y"]) is None
    assert likely_prefix(["x"], ["x"]) is None
    assert likely_prefix([], []) is None


def test_many_names_take_no_time() -> None:
    names = [f"block.{i}.layer.{j}.weight" for i in range(1000) for j in range(20)]
    start = time.process_time()
    assert likely_prefix(names, [f"module.{name}" for name in names]) == (
        Under("b", "module."),
        20_000,
    )
    assert likest(names, names) == []
    assert time.process_time() - start < 5
