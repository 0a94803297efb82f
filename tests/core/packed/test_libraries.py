"""What the libraries themselves write is told for what it was."""

from __future__ import annotations

import json
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

import modelctl as mc

SHAPES = {"0": (32, 64), "1": (8, 32)}


def model() -> nn.Sequential:
    return nn.Sequential(nn.Linear(64, 32), nn.Linear(32, 8)).to(torch.bfloat16)


@pytest.mark.parametrize(
    ("config", "labels"),
    [
        ("int8", {"int8 torchao"}),
        ("float8", {"fp8 torchao"}),
        ("int4 in int8", {"int4 torchao g32", "int4 torchao"}),
    ],
)
@pytest.mark.parametrize("pickled", [True, False])
def test_torchao(tmp_path: Path, config: str, labels: set[str], pickled: bool) -> None:
    """Pickled, or in its layout in safetensors: the same weights, parameters and bytes."""
    pytest.importorskip("torchao", reason="torchao is not installed")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        import torchao.quantization as ao
        from torchao.prototype.safetensors.safetensors_support import flatten_tensor_state_dict

        made = {
            "int8": lambda: ao.Int8WeightOnlyConfig(version=2),
            "float8": lambda: ao.Float8WeightOnlyConfig(),
            "int4 in int8": lambda: ao.IntxWeightOnlyConfig(
                weight_dtype=torch.int4, granularity=ao.PerGroup(32)
            ),
        }[config]()
        net = model()
        ao.quantize_(net, made)
        tensors, metadata = flatten_tensor_state_dict(net.state_dict())
        if pickled:
            torch.save(net.state_dict(), tmp_path / "model.pt")
        else:
            save_file(tensors, tmp_path / "model.safetensors", metadata)
    path = tmp_path / ("model.pt" if pickled else "model.safetensors")
    with mc.open(path) as ckpt:
        found = ckpt.packed.weights
        report = mc.summarize(ckpt)
    assert {one.module: one.shape for one in found.values()} == SHAPES
    assert {one.label for one in found.values()} <= labels
    assert all(one.known_from for one in found.values())
    totals = report.totals
    assert totals.params == sum(p.numel() for p in model().parameters())
    assert totals.nbytes == sum(one.nbytes for one in tensors.values())
    assert not any("totals" in note.text for note in report.warnings)
    assert sum(row.nbytes for row in report.rows) == totals.nbytes


@pytest.mark.parametrize("pack", ["pack-quantized", "nvfp4-pack-quantized", "int-quantized"])
@pytest.mark.parametrize("width", [64, 80])
def test_compressed_tensors(tmp_path: Path, pack: str, width: int) -> None:
    pytest.importorskip("compressed_tensors", reason="compressed-tensors is not installed")
    from compressed_tensors.compressors import BaseCompressor
    from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme

    args: Any = {
        "pack-quantized": {"num_bits": 3, "type": "int", "strategy": "channel"},
        "nvfp4-pack-quantized": {
            "num_bits": 4,
            "type": "float",
            "strategy": "tensor_group",
            "group_size": 16,
        },
        "int-quantized": {"num_bits": 8, "type": "int", "strategy": "channel"},
    }[pack]
    weights = QuantizationArgs(**args)
    scheme = QuantizationScheme(targets=["Linear"], weights=weights, format=pack)
    groups = width // 16 if pack.startswith("nvfp4") else 1
    state = {"weight": torch.randn(48, width), "weight_scale": torch.ones(48, groups)}
    if pack.startswith("nvfp4"):
        state["weight_global_scale"] = torch.ones(1)
    packed = BaseCompressor.get_value_from_registry(pack).compress(state, scheme)
    named = {f"up_proj.{name}": one.contiguous() for name, one in packed.items()}
    save_file(named, tmp_path / "model.safetensors")
    said = json.loads(scheme.model_dump_json())
    quantization = {"quant_method": "compressed-tensors", "config_groups": {"group_0": said}}
    config = {"quantization_config": {**quantization, "format": pack}}
    (tmp_path / "config.json").write_text(json.dumps(config))
    with mc.open(tmp_path) as ckpt:
        (found,) = ckpt.packed.weights.values()
        totals = mc.summarize(ckpt).totals
    assert found.shape == (48, width)
    assert found.layout.bits == args["num_bits"]
    assert found.known_from == "config.json"
    assert {*found.pieces} == {*named}
    assert totals.params == 48 * width
    assert totals.buffers == 0
