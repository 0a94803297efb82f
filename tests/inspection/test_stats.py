"""Statistics of values, against torch."""

from __future__ import annotations

import math
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
import torch

import modelctl as mc
from modelctl.cli import run
from modelctl.core.dtypes import BY_NAME
from modelctl.core.storages import MemoryStorage
from modelctl.core.tensors import TensorRef
from modelctl.inspection.stats import tensor_stats

DTYPES = [torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.int64, torch.uint8]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(7, 11), (300_001,), (), (0,)], ids=str)
def test_they_are_torchs(tmp_path: Path, dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    torch.manual_seed(0)
    values = (torch.randn(shape) * 20 + 40).to(dtype)
    torch.save({"w": values.t() if values.dim() == 2 else values}, tmp_path / "w.pt")
    with mc.open(tmp_path / "w.pt") as ckpt:
        found = tensor_stats(ckpt.state_dict()["w"])
    assert found is not None
    assert found.numel == values.numel()
    if not values.numel():
        assert found[:4] == (None, None, None, None)
        return
    wide = values.double()
    assert (found.min, found.max) == (wide.min().item(), wide.max().item())
    assert found.mean == pytest.approx(wide.mean().item())
    assert found.std == pytest.approx(wide.std(correction=0).item(), rel=1e-6, abs=1e-6)
    assert found.zeros == int((wide == 0).sum())
    assert (found.nan, found.inf) == (0, 0)


def test_what_is_not_finite_is_counted_and_is_a_finding(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    values = torch.tensor([1.0, float("nan"), float("inf"), -float("inf"), 3.0])
    torch.save({"bad": values, "good": torch.ones(2)}, tmp_path / "bad.pt")
    with mc.open(tmp_path / "bad.pt") as ckpt:
        found = tensor_stats(ckpt.state_dict()["bad"])
    assert found is not None
    assert (found.nan, found.inf, found.min, found.max, found.mean) == (1, 2, 1.0, 3.0, 2.0)
    assert run(["summary", str(tmp_path / "bad.pt")]) == 0
    assert run(["summary", str(tmp_path / "bad.pt"), "--stats"]) == 1
    assert run(["summary", str(tmp_path / "bad.pt"), "--stats", "--format", "json"]) == 1
    torch.save({"good": torch.ones(2), "flag": torch.tensor(True)}, tmp_path / "good.pt")
    assert run(["summary", str(tmp_path / "good.pt"), "--stats"]) == 0
    capsys.readouterr()


def test_rows_are_sorted(tmp_path: Path) -> None:
    state = {f"l{i}.weight": torch.ones(n, 2) for i, n in ((10, 3), (2, 9), (1, 1))}
    torch.save(state, tmp_path / "m.pt")
    with mc.open(tmp_path / "m.pt") as ckpt:
        orders = {
            sort: [row.path for row in mc.summarize(ckpt, sort=sort).rows]
            for sort in ("file", "name", "params", "size")
        }
    assert orders == {
        "file": ["l10", "l2", "l1"],
        "name": ["l1", "l2", "l10"],
        "params": ["l2", "l10", "l1"],
        "size": ["l2", "l10", "l1"],
    }


@pytest.mark.parametrize(
    "values",
    [
        [1.7e308] * 3,
        [1.7e308, -1.7e308],
        [1e200, 2e200, 5e200],
        [1e-200, 2e-200, 5e-200],
        [5e-324, 1e-310, 0.0],
        [1e8 + 1, 1e8 - 1] * 4,
        [1e-300] * 200_000 + [1e300] * 200_000 + [1.0] * 7,  # in several pieces
        [1.0] * 200_000 + [-1e290] * 3,
    ],
    ids=range(8),
)
def test_values_whose_sum_or_square_is_no_double(values: list[float]) -> None:
    """Against exact arithmetic."""
    n = len(values)
    exact = [Fraction(value) for value in values]
    mean = sum(exact) / n
    variance = sum((value - mean) ** 2 for value in exact) / n
    # the root of a fraction beyond a double's range: of one that is scaled
    scale = max(map(abs, exact))
    std = scale * Fraction(math.sqrt(variance / scale**2))
    raw = np.array(values).tobytes()
    found = tensor_stats(TensorRef(BY_NAME["float64"], (n,), MemoryStorage(raw)))
    assert found is not None
    assert found.mean == pytest.approx(float(mean), rel=1e-12, abs=float(scale) * 1e-14)
    assert found.std == pytest.approx(float(std), rel=1e-9, abs=float(scale) * 1e-14)
