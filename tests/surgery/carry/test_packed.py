"""The pieces of a quantized weight stay together, or it is said that they don't."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import modelctl as mc
from modelctl.core.checkpoint import Checkpoint
from modelctl.errors import NoMatchError

from ...core.packed import makers
from ...core.packed.makers import LAYOUTS

WHOLE: dict[str, Callable[[Checkpoint], Checkpoint]] = {
    "drop": lambda ckpt: mc.drop(ckpt, "model.layers.0"),
    "keep": lambda ckpt: mc.keep(ckpt, "model.layers.0"),
    "rename": lambda ckpt: mc.rename(ckpt, "model.layers.*=encoder.blocks.*"),
    "prefix": lambda ckpt: mc.add_prefix(ckpt, "net."),
    "head": lambda ckpt: mc.strip_head(ckpt),
}


def said(ckpt: Checkpoint) -> list[str]:
    return [note.text for note in ckpt.notes if note.level == "warning"]


@pytest.mark.parametrize("edit", WHOLE)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_modules_go_whole(tmp_path: Path, layout: str, edit: str) -> None:
    """As many weights as are not removed are found again in what was written, as they were."""
    LAYOUTS[layout][0](tmp_path / "model")
    with mc.open(tmp_path / "model") as ckpt:
        before = ckpt.packed.weights
        edited = WHOLE[edit](ckpt)
        assert said(edited) == []
        mc.save(edited, tmp_path / "out")
    with mc.open(tmp_path / "out") as ckpt:
        after = ckpt.packed.weights
    here = {
        "drop": [one for name, one in before.items() if ".layers.0." not in name],
        "keep": [one for name, one in before.items() if ".layers.0." in name],
    }.get(edit, [*before.values()])
    assert [(one.label, one.shape, one.known_from) for one in after.values()] == [
        (one.label, one.shape, one.known_from) for one in here
    ]
    if edit == "rename":
        assert all(name.startswith("encoder.blocks.") for name in after)


@pytest.mark.parametrize(
    ("edit", "text"),
    [
        (lambda ckpt: mc.drop(ckpt, "*.scales"), "keeps qweight, qzeros, g_idx and loses scales"),
        (lambda ckpt: mc.keep(ckpt, "*.qweight"), "keeps qweight and loses scales, qzeros, g_idx"),
        (
            lambda ckpt: mc.rename(ckpt, r"(layers.0.*)qweight=\1packed", regex=True),
            "its pieces become model.layers.0.mlp.down_proj.packed, ",
        ),
        (lambda ckpt: mc.rename(ckpt, "*.up_proj.scales=*.gate.scales"), "its pieces become "),
    ],
)  # fmt: skip
def test_a_weight_that_comes_apart_is_named(tmp_path: Path, edit: Any, text: str) -> None:
    makers.gptq(tmp_path / "model")
    with mc.open(tmp_path / "model") as ckpt:
        edited = edit(ckpt)
        (note,) = (note for note in edited.notes if note.level == "warning")
        torn = note.text.partition("'")[2].partition("'")[0]
        assert torn in ckpt.packed.weights
    assert text in note.text
    assert note.way_out == f"take all of a module: '{torn.removesuffix('.weight')}'"


def test_torchao_finds_its_tensors_by_their_new_names(tmp_path: Path) -> None:
    makers.torchao(tmp_path / "model")
    with mc.open(tmp_path / "model") as ckpt:
        edited = mc.strip_head(mc.rename(ckpt, "model.*=*"))
        assert said(edited) == []
        names = json.loads(edited.metadata["tensor_names"])
    with mc.open(tmp_path / "model") as ckpt:
        before = json.loads(ckpt.metadata["tensor_names"])
    assert names == [name.removeprefix("model.") for name in before if name != "lm_head.weight"]
    assert {*names} <= edited.metadata.keys()
    assert "lm_head.weight" not in edited.metadata
    assert not any(name.startswith("model.") for name in edited.metadata)


def test_a_quantized_head_is_one_layer(tmp_path: Path) -> None:
    """Its pieces have other shapes than a head; all of them go, and all are recorded."""
    import torch

    head = {
        "lm_head.qweight": torch.zeros(8, makers.WORDS, dtype=torch.int32),
        "lm_head.qzeros": torch.zeros(2, makers.WORDS // 8, dtype=torch.int32),
        "lm_head.scales": torch.zeros(2, makers.WORDS, dtype=torch.float16),
        "lm_head.g_idx": torch.zeros(makers.HIDDEN, dtype=torch.int32),
    }
    makers.gptq(tmp_path / "model")
    path = tmp_path / "model" / "model.safetensors"
    from safetensors.torch import load_file, save_file

    tensors = load_file(path)
    del tensors["lm_head.weight"]
    save_file({**tensors, **head}, path)
    with mc.open(tmp_path / "model") as ckpt:
        found = mc.find_head(ckpt)
        assert found.modules == ("lm_head",)
        assert {*found.names} == {*head}
        assert found.evidence.startswith(f"named like a head, {makers.WORDS} outputs")
        assert {*ckpt.state_dict()} - {*mc.strip_head(ckpt).state_dict()} == {*head}


@pytest.mark.parametrize("layout", ["gptq", "nvfp4", "fp8 blocks", "bnb 4-bit", "torchao"])
def test_a_weight_is_frozen_as_one(tmp_path: Path, layout: str) -> None:
    shapes = LAYOUTS[layout][0](tmp_path / "model")
    with mc.open(tmp_path / "model") as ckpt:
        packed = {one.packed for one in ckpt.packed.weights.values()}
        edited = mc.freeze(ckpt, "*")
        frozen = {row.name for row in mc.ls(edited) if row.requires_grad is False}
        count = f"{len(shapes) + len(makers.plain())} of {len(shapes) + len(makers.plain())}"
        assert f"frozen: {count} parameters" in [note.text for note in edited.notes]
        assert frozen == packed | {*makers.plain()}
        totals = mc.summarize(edited).totals
        assert totals.frozen == totals.params
        with pytest.raises(NoMatchError):
            mc.freeze(ckpt, "*scale*" if layout != "bnb 4-bit" else "*absmax")
        one = mc.freeze(ckpt, "model.layers.0.mlp.up_proj")
        assert "frozen: 1 of" in one.notes[0].text


def test_identify_sees_the_model_behind_it(tmp_path: Path) -> None:
    """Of a vision model whose head is quantized: the names and shapes that it had."""
    import torch
    from safetensors.torch import save_file

    torchvision = pytest.importorskip("torchvision")
    with torch.device("meta"):
        model = torchvision.models.resnet18()
    tensors = {name: torch.zeros(t.shape, dtype=t.dtype) for name, t in model.state_dict().items()}
    tensors["fc.weight"] = tensors["fc.weight"].to(torch.int8)
    tensors["fc.SCB"] = torch.zeros(1000)
    tensors["fc.weight_format"] = torch.zeros((), dtype=torch.uint8)
    (tmp_path / "model").mkdir()
    save_file(tensors, tmp_path / "model" / "model.safetensors")
    with mc.open(tmp_path / "model") as ckpt:
        best = mc.identify(ckpt)[0]
    assert "torchvision:resnet18" in best.names
    assert best.score == 1.0
    assert not best.differences
