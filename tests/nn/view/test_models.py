"""nn.summary on all of torchvision, and golden files of six models.

``UPDATE_GOLDEN=1 pytest tests/nn/view/test_models.py`` writes the golden files anew; read the
diff before it is committed.
"""

from __future__ import annotations

import copy
import os
from functools import cache
from pathlib import Path

import pytest
import torch
from torch import nn

from modelctl.nn import ForwardError, summary

from .test_no_side_effects import unchanged

torchvision = pytest.importorskip("torchvision")
from torchvision import models  # noqa: E402

GOLDEN = Path(__file__).with_name("golden")
NAMES = models.list_models()
DETECTION = {*models.list_models(models.detection)}
SEGMENTATION = {*models.list_models(models.segmentation)}
VIDEO = {*models.list_models(models.video)}
FLOW = {*models.list_models(models.optical_flow)}


@cache
def weights(name):
    return models.get_model_weights(name).DEFAULT


def sides(name):
    """Height and width that the published numbers are for."""
    if name in FLOW:
        return 128, 128
    if name in DETECTION | SEGMENTATION:
        return 96, 96
    crop = weights(name).transforms().crop_size
    return crop[0], crop[-1]


def size_of(name):
    frames = [16] if name in VIDEO else []
    shape = (3, *frames, *sides(name))
    return [shape, shape] if name in FLOW else shape


@cache
def built(name) -> nn.Module:
    options = {}
    if name.removeprefix("quantized_") in ("googlenet", "inception_v3"):
        options["init_weights"] = False
    if name.startswith("vit_"):
        options["image_size"] = sides(name)[0]
    if name in DETECTION | SEGMENTATION:
        options["weights_backbone"] = None
    try:
        with torch.device("meta"):
            return models.get_model(name, **options)
    except NotImplementedError:  # regnets compute their widths with tensors
        accelerate = pytest.importorskip("accelerate")
        with accelerate.init_empty_weights():
            return models.get_model(name, **options)


@pytest.mark.parametrize("name", sorted({*NAMES} - DETECTION))
def test_every_model_of_torchvision(name):
    model = built(name)
    options = {"num_flow_updates": 1} if name in FLOW else {}
    found = unchanged(model, size_of(name), **options)
    assert found.totals.params_unique == sum(p.numel() for p in model.parameters())
    assert sum(row.params for row in found.rows) == found.totals.params_unique
    assert sum(row.macs for row in found.rows) == found.totals.macs
    assert found.uncounted == []
    if name not in SEGMENTATION | FLOW:  # those are published for sizes that are not said
        assert round(found.totals.macs / 1e9, 3) == weights(name).meta["_ops"]
        assert found.output == (1, len(weights(name).meta["categories"]))


@pytest.mark.parametrize("name", sorted(DETECTION))
def test_detection_says_in_one_line_that_it_needs_values(name):
    model = built(name)
    error = unchanged(model, size_of(name), fails=True)
    assert isinstance(error, ForwardError)
    assert "it needs the values of tensors" in str(error)
    assert "\n" not in str(error)
    assert "device='cpu'" in error.hint
    totals = summary(model).totals
    assert totals.params_unique == sum(p.numel() for p in model.parameters())


# -------------------------------------------------------------- against a real forward


def shapes(value):
    if isinstance(value, torch.Tensor):
        return tuple(value.shape)
    if isinstance(value, dict):
        return {name: shapes(one) for name, one in value.items()}
    return {str(i): shapes(one) for i, one in enumerate(value)}


REAL = {
    "alexnet": 64, "densenet121": 64, "efficientnet_b0": 64, "googlenet": 64,
    "mobilenet_v2": 64, "resnet18": 64, "shufflenet_v2_x0_5": 64, "squeezenet1_1": 64,
    "swin_t": 64, "lraspp_mobilenet_v3_large": 64,
}  # fmt: skip


@pytest.mark.parametrize("name", REAL)
def test_every_modules_output_is_that_of_a_real_forward(name):
    model = copy.deepcopy(built(name)).to_empty(device="cpu").eval()
    for tensor in (*model.parameters(), *model.buffers()):
        tensor.data.zero_()
    found = summary(model, (3, REAL[name], REAL[name]), depth="all", fold=False)
    outputs, names = {}, {module: path for path, module in model.named_modules()}

    def note(module, _, out):
        outputs.setdefault(names[module], shapes(out))

    for module in names:
        module.register_forward_hook(note)
    with torch.no_grad():
        out = model(torch.zeros(1, 3, REAL[name], REAL[name]))
    assert found.output == shapes(out)
    assert len(found.rows) > 10
    assert {row.path: row.out_shape for row in found.rows} == {
        row.path: outputs.get(row.path) for row in found.rows
    }


# -------------------------------------------------------------- golden files


def gpt2():
    transformers = pytest.importorskip("transformers")
    with torch.device("meta"):
        return transformers.GPT2LMHeadModel(transformers.GPT2Config(n_layer=2))


class Small(nn.Module):
    """Frozen parts, ties, an auxiliary head, a layer that is never called, one called twice."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 8, 3, stride=2), nn.BatchNorm2d(8), nn.ReLU())
        self.blocks = nn.ModuleList(nn.Conv2d(8, 8, 3, padding=1, bias=False) for _ in range(3))
        self.again = nn.Conv2d(8, 8, (1, 3), padding=(0, 1))
        self.aux = nn.Linear(8, 4)
        self.unused = nn.Linear(8, 8)
        self.fc = nn.Linear(8, 4)
        self.blocks[2].weight = self.blocks[0].weight
        self.stem.requires_grad_(False)

    def forward(self, x):
        x = self.stem(x)
        for block in self.blocks:
            x = block(x)
        x = torch.fft.rfft2(self.again(self.again(x))).real.mean((2, 3))
        return {"out": self.fc(x), "aux": self.aux(x)} if self.training else {"out": self.fc(x)}


CASES = {
    "summary-resnet18": lambda: summary(built("resnet18"), (3, 224, 224)),
    "summary-mobilenet_v3_small": lambda: summary(built("mobilenet_v3_small"), (3, 224, 224)),
    "summary-vit_b_32": lambda: summary(built("vit_b_32"), (3, 224, 224)),
    "summary-densenet121": lambda: summary(built("densenet121"), (3, 224, 224)),
    "summary-gpt2": lambda: summary(gpt2(), (8,), dtypes=torch.long),
    "summary-small": lambda: summary(Small(), (3, 32, 32), mode="train", batch_size=4),
    "summary-small-depth": lambda: summary(Small(), (3, 32, 32), depth=1),
    "summary-small-alone": lambda: summary(Small()),
}


@pytest.mark.parametrize("name", CASES)
def test_golden(name):
    text = f"{CASES[name]()}\n"
    path = GOLDEN / f"{name}.txt"
    if os.environ.get("UPDATE_GOLDEN"):
        path.write_text(text, "utf-8")
    assert text == path.read_text("utf-8")


def test_no_golden_file_is_left_over():
    assert {path.stem for path in GOLDEN.glob("summary-*")} == {*CASES}
