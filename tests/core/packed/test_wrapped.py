"""Tensors of torchao's classes in a pickle, as torch writes any subclass that wraps others."""

from __future__ import annotations

import sys
import types
from pathlib import Path
from typing import Any

import pytest
import torch

import modelctl as mc
from modelctl.inspection.ls import list_tensors


@pytest.fixture
def int4(monkeypatch: pytest.MonkeyPatch) -> Any:
    """A class of this name in a module of that name, which wraps a packed tensor and its scale."""

    class Int4Tensor(torch.Tensor):
        @staticmethod
        def __new__(cls, qdata: Any, scale: Any, block_size: Any, shape: Any) -> Any:
            return torch.Tensor._make_wrapper_subclass(cls, shape, dtype=torch.bfloat16)

        def __init__(self, qdata: Any, scale: Any, block_size: Any, shape: Any) -> None:
            self.qdata, self.scale, self.block_size = qdata, scale, block_size

        @classmethod
        def __torch_dispatch__(
            cls, func: Any, types: Any, args: Any = (), kwargs: Any = None
        ) -> Any:
            return args[0]

    module = types.ModuleType("torchao.quantization.made")
    module.Int4Tensor = Int4Tensor  # type: ignore[attr-defined]
    Int4Tensor.__module__, Int4Tensor.__qualname__ = module.__name__, "Int4Tensor"
    for name in ("torchao", "torchao.quantization"):
        monkeypatch.setitem(sys.modules, name, types.ModuleType(name))
    monkeypatch.setitem(sys.modules, module.__name__, module)
    return Int4Tensor


def test_a_wrapped_weight_counts(tmp_path: Path, int4: Any) -> None:
    qdata = torch.zeros(8, 32, dtype=torch.uint8)
    scale = torch.zeros(2, 8, dtype=torch.bfloat16)
    weight = int4(qdata, scale, [1, 32], (8, 64))
    torch.save({"fc.weight": weight, "fc.bias": torch.zeros(8)}, tmp_path / "model.pt")
    with mc.open(tmp_path / "model.pt") as ckpt:
        (found,) = ckpt.packed.weights.values()
        report = mc.summarize(ckpt)
    assert (found.label, found.shape) == ("int4 torchao g32", (8, 64))
    assert found.known_from == "its class"
    assert found.nbytes == qdata.nbytes + scale.nbytes
    totals = report.totals
    assert (totals.params, totals.buffers, totals.tensors) == (8 * 64 + 8, 0, 2)
    assert totals.nbytes == found.nbytes + 4 * 8
    (row,) = report.rows
    assert (row.params, row.nbytes, row.weight) == (totals.params, totals.nbytes, (8, 64))
    assert row.kind == "linear int4 torchao g32"
    with mc.open(tmp_path / "model.pt") as ckpt:
        listed = {one.name: one for one in list_tensors(ckpt, role="parameter")}
    assert {*listed} == {"fc.weight", "fc.bias"}
    assert listed["fc.weight"].role == "packed"
    assert listed["fc.weight"].nbytes == found.nbytes
    assert not any("totals" in note.text for note in report.warnings)
