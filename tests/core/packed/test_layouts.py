"""Quantized weights are told for what they were: shapes, parameters, bits, pieces."""

from __future__ import annotations

import json
import math
from collections import Counter
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors import safe_open

import modelctl as mc
from modelctl.inspection.ls import list_tensors

from . import makers
from .makers import LAYOUTS


def bare(folder: Path) -> Path:
    return folder / "model.safetensors"


@pytest.mark.parametrize("layout", LAYOUTS)
def test_weights_are_what_they_were(tmp_path: Path, layout: str) -> None:
    make, label = LAYOUTS[layout]
    shapes = make(tmp_path / "model")
    with mc.open(tmp_path / "model") as ckpt:
        found = {
            (name if layout == "mxfp4" else one.module): one.shape
            for name, one in ckpt.packed.weights.items()
        }
        assert found == shapes
        groups = {one.label for one in ckpt.packed.weights.values()}
        assert label in groups
        assert all(
            one.label.startswith(label.partition(" g")[0]) for one in ckpt.packed.weights.values()
        )
        assert all(one.known_from for one in ckpt.packed.weights.values())


@pytest.mark.parametrize("layout", LAYOUTS)
def test_totals_are_the_models(tmp_path: Path, layout: str) -> None:
    """Parameters as before it was quantized, bytes as they are stored, each piece once."""
    shapes = LAYOUTS[layout][0](tmp_path / "model")
    other = sum(one.numel() for one in makers.plain().values())
    with safe_open(bare(tmp_path / "model"), "pt") as file:
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    biases = sum(one.numel() for name, one in tensors.items() if name.endswith("_bias"))
    logical = sum(map(math.prod, shapes.values()))
    with mc.open(tmp_path / "model") as ckpt:
        report = mc.summarize(ckpt)
    totals = report.totals
    assert totals.params_unique == logical + other + biases
    assert totals.buffers == 0
    assert totals.tensors == len(tensors)
    assert totals.nbytes == sum(one.nbytes for one in tensors.values())
    assert totals.nbytes == totals.param_bytes
    assert totals.quantized is not None
    assert totals.quantized.params == logical
    plain = sum(
        one.nbytes
        for name, one in tensors.items()
        if name in makers.plain() or name.endswith("_bias")
    )
    assert totals.quantized.nbytes == totals.nbytes - plain
    for depth in (1, 2, 3, None):
        with mc.open(tmp_path / "model") as ckpt:
            rows = mc.summarize(ckpt, depth=depth).rows
        assert sum(row.params for row in rows) == totals.params_unique
        assert sum(row.nbytes for row in rows) == totals.nbytes
        assert sum(row.tensors for row in rows) == totals.tensors
        counted: Counter[str] = Counter()
        for row in rows:
            if row.quantized is not None:
                counted.update(row.quantized.schemes)
        assert counted == totals.quantized.schemes


@pytest.mark.parametrize("make", [makers.gptq, makers.awq, makers.pack_quantized])
@pytest.mark.parametrize("bits", [2, 4, 8])
def test_bits_are_told_by_the_names_alone(tmp_path: Path, make: object, bits: int) -> None:
    shapes = make(tmp_path / "model", bits=bits, config=False)  # type: ignore[operator]
    with mc.open(bare(tmp_path / "model")) as ckpt:
        found = ckpt.packed.weights.values()
        assert {one.module: one.shape for one in found} == shapes
        assert {one.layout.bits for one in found} == {bits}
        assert all(one.known_from is None for one in found)
        report = mc.summarize(ckpt)
    assert report.totals.quantized is not None
    assert report.totals.quantized.inferred


@settings(
    max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(bits=st.integers(1, 8), width=st.integers(1, 200), by_config=st.booleans())
def test_words_that_are_not_full(tmp_path: Path, bits: int, width: int, by_config: bool) -> None:
    """What fills up the last word of a row is no parameter."""
    shapes = makers.pack_quantized(tmp_path / "model", bits, None, width)
    path = tmp_path / "model" if by_config else bare(tmp_path / "model")
    with mc.open(path) as ckpt:
        found = {one.module: one.shape for one in ckpt.packed.weights.values()}
    assert found == shapes


def test_a_file_beside_says_it(tmp_path: Path) -> None:
    """AutoGPTQ's own file, a config that is nested, one that can't be read."""
    nested = {"text_config": {"quantization_config": {"quant_method": "gptq"}}}
    for name, text, known in (
        ("quantize_config.json", {"bits": 4, "group_size": 32}, "quantize_config.json"),
        ("config.json", nested, "config.json"),
        ("config.json", "{", None),
        ("config.json", {"quantization_config": {"quant_method": 4}}, None),
        ("config.json", {"quantization_config": [1]}, None),
    ):  # fmt: skip
        makers.gptq(tmp_path / "model", config=False)
        said = tmp_path / "model" / name
        said.write_text(text if isinstance(text, str) else json.dumps(text))
        with mc.open(tmp_path / "model") as ckpt:
            assert {one.known_from for one in ckpt.packed.weights.values()} == {known}
        said.unlink()


def test_what_is_ignored_stays_what_it_is(tmp_path: Path) -> None:
    shapes = makers.int8(tmp_path / "model")
    config = tmp_path / "model" / "config.json"
    said = json.loads(config.read_text())
    said["quantization_config"]["ignore"] = ["re:.*up_proj", "model.layers.0.self_attn"]
    config.write_text(json.dumps(said))
    with mc.open(tmp_path / "model") as ckpt:
        found = {one.module for one in ckpt.packed.weights.values()}
    assert found == {
        name for name in shapes if "up_proj" not in name and "layers.0.self_attn" not in name
    }


def test_each_group_says_it_of_its_modules(tmp_path: Path) -> None:
    """Mixed precision: 8 bits for what is named, 4 for every other linear layer."""
    makers.pack_quantized(tmp_path / "model", 4, 32)
    eight = makers.pack_quantized(tmp_path / "eight", 8, 32)
    from safetensors.torch import load_file, save_file

    tensors = load_file(bare(tmp_path / "model"))
    others = load_file(bare(tmp_path / "eight"))
    tensors.update({name: one for name, one in others.items() if "down_proj" in name})
    for name in list(tensors):
        if name.endswith("weight_shape"):  # what would tell it, too
            del tensors[name]
    save_file(tensors, bare(tmp_path / "model"))
    config = tmp_path / "model" / "config.json"
    said = json.loads(config.read_text())
    said["quantization_config"]["config_groups"]["group_1"] = {
        "targets": ["re:.*down_proj$"],
        "weights": {"num_bits": 8, "type": "int", "strategy": "group", "group_size": 32},
    }
    config.write_text(json.dumps(said))
    with mc.open(tmp_path / "model") as ckpt:
        found = {one.module: one for one in ckpt.packed.weights.values()}
    assert {name: one.shape for name, one in found.items()} == eight
    assert {name for name, one in found.items() if one.layout.bits == 8} == {
        name for name in eight if "down_proj" in name
    }


def test_what_is_called_alike_is_no_piece(tmp_path: Path) -> None:
    """A float weight with a scale of its own, a scale of nothing, a scalar."""
    import torch

    tensors = {
        "a.weight": torch.ones(4, 4),
        "a.weight_scale": torch.ones(1),
        "logit_scale": torch.ones(()),
        "b.scales": torch.ones(3),
        "c.qweight": torch.ones(4, 4),
        "c.scales": torch.ones(()),
    }
    makers.written(tmp_path / "model", tensors, None)
    with mc.open(tmp_path / "model") as ckpt:
        assert not ckpt.packed
        report = mc.summarize(ckpt)
    assert report.totals.quantized is None
    assert report.totals.params == 16 + 1 + 1 + 3 + 16 + 1 + sum(
        one.numel() for one in makers.plain().values()
    )  # fmt: skip


def test_roles_are_listed(tmp_path: Path) -> None:
    makers.gptq(tmp_path / "model")
    with mc.open(tmp_path / "model") as ckpt:
        rows = {row.name: row for row in mc.ls(ckpt, "model.layers.0.mlp.up_proj")}
    roles = {name.rpartition(".")[2]: (row.role, row.inferred) for name, row in rows.items()}
    assert roles == {
        "qweight": ("packed", False),
        "qzeros": ("zero_point", False),
        "scales": ("scale", False),
        "g_idx": ("group index", False),
    }
    with mc.open(bare(tmp_path / "model")) as ckpt:
        assert all(row.inferred for row in mc.ls(ckpt, "model.layers.0.mlp.up_proj"))


def test_params_are_listed_with_what_they_are_packed_in(tmp_path: Path) -> None:
    shapes = makers.gptq(tmp_path / "model")
    with mc.open(tmp_path / "model") as ckpt:
        rows = list_tensors(ckpt, role="parameter")
    assert {row.name for row in rows} == {
        *(f"{name}.qweight" for name in shapes),
        *makers.plain(),
    }


def test_the_config_says_how_large_a_block_is(tmp_path: Path) -> None:
    """Where it is no power of two, which shapes would be taken for."""
    import torch

    tensors = {
        "fc.weight": torch.zeros(96, 100).to(makers.E4M3),
        "fc.weight_scale_inv": torch.zeros(2, 3),
    }
    said = {"quant_method": "fp8", "weight_block_size": [48, 40]}
    makers.written(tmp_path / "model", tensors, {"quantization_config": said})
    for path, block in ((tmp_path / "model", (48, 40)), (bare(tmp_path / "model"), (64, 64))):
        with mc.open(path) as ckpt:
            (found,) = ckpt.packed.weights.values()
        assert found.layout.group == block


def test_json_has_it(tmp_path: Path) -> None:
    makers.awq(tmp_path / "model")
    with mc.open(tmp_path / "model") as ckpt:
        found = mc.summarize(ckpt, depth=None).as_dict()
    said = found["totals"]["quantization"]
    params = 2 * sum(map(math.prod, makers.LINEAR.values()))
    groups = params // 32
    nbytes = params // 2 + groups * 2 + groups // 2
    assert said == {
        "schemes": {"int4 awq g32": 6},
        "weights": 6,
        "params": params,
        "bytes": nbytes,
        "bits_per_weight": 8 * nbytes / params,
        "known_from": ["config.json"],
        "inferred": False,
        "pieces": {"zero_point": groups // 8, "scale": groups},
    }
    rows = {row["path"]: row["quantization"] for row in found["rows"]}
    assert rows["model.norm"] is None
    assert rows["model.layers.1.mlp.up_proj"]["schemes"] == {"int4 awq g32": 1}
