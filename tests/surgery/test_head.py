"""strip_head: the right head of real architectures, and refusals where it would be wrong."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn

import modelctl as mc
from modelctl.core.checkpoint import Checkpoint
from modelctl.errors import (
    AmbiguousError,
    CollisionError,
    ModelctlError,
    NoMatchError,
    RefusedError,
    UsageError,
)

from .nets import HEAD, Net, in_memory, load, names, opened, same_tensors

torchvision = pytest.importorskip("torchvision")

HEADS = {
    "resnet18": ("fc",),
    "densenet121": ("classifier",),
    "vgg11": ("classifier.6",),
    "mobilenet_v3_small": ("classifier.3",),
    "efficientnet_b0": ("classifier.1",),
    "swin_t": ("head",),
    "vit_b_16": ("heads.head",),
    "convnext_tiny": ("classifier.2",),
    "googlenet": ("aux1.fc2", "aux2.fc2", "fc"),
    "inception_v3": ("AuxLogits.fc", "fc"),
    "squeezenet1_0": ("classifier.1",),
    "mnasnet0_5": ("classifier.1",),
    "alexnet": ("classifier.6",),
    "shufflenet_v2_x0_5": ("fc",),
    "maxvit_t": ("classifier.5",),
}


def meta(name: str, **options: object) -> Checkpoint:
    with torch.device("meta"):
        if name in ("googlenet", "inception_v3"):
            options["init_weights"] = False
        model = torchvision.models.get_model(name, weights=None, **options)
    return in_memory(model.state_dict())


@pytest.mark.parametrize("name", HEADS)
def test_torchvision_classifiers(name: str) -> None:
    ckpt = meta(name)
    for prefix in ("", "module."):
        wrapped = in_memory({prefix + key: ref.shape for key, ref in ckpt.state_dict().items()})
        head = mc.find_head(wrapped)
        assert set(head.modules) == {prefix + module for module in HEADS[name]}
    assert "1000 outputs" in mc.find_head(ckpt).evidence
    stripped = mc.strip_head(ckpt)
    gone = [key for key in names(ckpt) if key.startswith(tuple(m + "." for m in HEADS[name]))]
    assert gone
    assert [key for key in names(ckpt) if key not in gone] == names(stripped)


@pytest.mark.parametrize(
    ("name", "width"),
    [("resnet18", 512), ("vgg11", 4096), ("mobilenet_v3_small", 1024), ("densenet121", 1024)],
)
def test_a_hidden_width_equal_to_the_number_of_classes(name: str, width: int) -> None:
    with torch.device("meta"):
        model = torchvision.models.get_model(name, weights=None, num_classes=width)
    assert mc.find_head(in_memory(model.state_dict())).modules == HEADS[name]


def test_the_wrong_places() -> None:
    # every layer makes as many features as there are classes
    class Same(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.blocks = nn.Sequential(*(nn.Linear(8, 8) for _ in range(3)))
            self.proj = nn.Linear(8, 8)
            self.fc = nn.Linear(8, 8)

    assert mc.find_head(in_memory(Same().state_dict())).modules == ("fc",)


@pytest.mark.parametrize(
    "name",
    ["fasterrcnn_resnet50_fpn", "maskrcnn_resnet50_fpn", "retinanet_resnet50_fpn", "ssd300_vgg16"],
)
def test_detection_models_refuse(name: str) -> None:
    with torch.device("meta"):
        model = torchvision.models.get_model(name, weights=None, weights_backbone=None)
    ckpt = in_memory(model.state_dict())
    with pytest.raises(RefusedError, match="detection model") as e:
        mc.strip_head(ckpt)
    assert "--head" in (e.value.hint or "")
    if name.startswith("fasterrcnn"):
        stripped = mc.strip_head(ckpt, head="roi_heads.box_predictor")
        assert len(names(ckpt)) - len(names(stripped)) == 4


@pytest.mark.parametrize("name", ["fcn_resnet50", "deeplabv3_resnet50"])
def test_segmentation(name: str) -> None:
    with torch.device("meta"):
        model = torchvision.models.get_model(
            name, weights=None, weights_backbone=None, aux_loss=True
        )
    ckpt = in_memory(model.state_dict())
    head = mc.find_head(ckpt)
    last = {key for key in names(ckpt) if ckpt.state_dict()[key].shape[:1] == (21,)}
    assert set(head.names) == last


def test_a_tied_head_refuses(tmp_path: Path) -> None:
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed = nn.Embedding(7, 4)
            self.body = nn.Linear(4, 4)
            self.lm_head = nn.Linear(4, 7, bias=False)
            self.lm_head.weight = self.embed.weight

    net = Tied()
    optimizer = torch.optim.AdamW(net.parameters())
    for parameter in net.parameters():
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    saved = {"model": net.state_dict(), "optimizer": optimizer.state_dict()}
    with opened(tmp_path / "in.pt", saved) as ckpt:
        with pytest.raises(RefusedError, match=r"'lm_head\.weight' is tied to 'embed\.weight'"):
            mc.strip_head(ckpt)
        out = load(mc.strip_head(ckpt, head="lm_head"), tmp_path / "out.pt")
        assert list(out["model"]) == ["embed.weight", "body.weight", "body.bias"]
        assert len(out["optimizer"]["state"]) == 3  # the embedding's state is still needed


def test_a_tied_parameter_keeps_its_state_under_its_other_name(tmp_path: Path) -> None:
    weight = nn.Parameter(torch.randn(7, 4))
    bias = nn.Parameter(torch.randn(4))
    for named in (True, False):
        given = [("head.weight", weight), ("body.bias", bias)]
        optimizer = torch.optim.SGD(given if named else [weight, bias], lr=0.1, momentum=0.9)
        weight.grad, bias.grad = torch.ones_like(weight), torch.ones_like(bias)
        optimizer.step()
        model = {"head.weight": weight.data, "embed.weight": weight.data, "body.bias": bias.data}
        saved = {"model": model, "optimizer": optimizer.state_dict()}
        with opened(tmp_path / "in.pt", saved) as ckpt:
            out = load(mc.strip_head(ckpt, head="head"), tmp_path / "out.pt")
        assert list(out["model"]) == ["embed.weight", "body.bias"]
        assert list(out["optimizer"]["state"]) == [0, 1]
        if named:
            recorded = out["optimizer"]["param_groups"][0]["param_names"]
            assert recorded == ["embed.weight", "body.bias"]


def test_headless_models_refuse() -> None:
    stripped = mc.strip_head(meta("resnet18"))
    with pytest.raises(NoMatchError, match="removed already: fc"):
        mc.strip_head(stripped)
    backbone = {n: r.shape for n, r in stripped.state_dict().items()}
    with pytest.raises(NoMatchError, match="no head is found"):  # without its record
        mc.strip_head(in_memory(backbone))
    with pytest.raises(NoMatchError, match="one of several alike"):
        mc.strip_head(
            in_memory({"layer1.conv.weight": (8, 8, 3, 3), "layer2.conv.weight": (8, 8, 3, 3)})
        )
    with pytest.raises(AmbiguousError, match="several heads"):
        mc.strip_head(
            in_memory({"body.weight": (8, 8), "pi.weight": (2, 8), "value.weight": (1, 8)})
        )
    with pytest.raises(NoMatchError):
        mc.strip_head(in_memory({"blocks.0.weight": (4, 4), "blocks.1.weight": (4, 4)}))
    with pytest.raises(NoMatchError):
        mc.strip_head(in_memory({"norm.weight": (4,), "norm.bias": (4,)}))


def test_two_that_could_be_it_refuse() -> None:
    ckpt = in_memory({"fc.weight": (3, 4), "score.weight": (5, 4), "tail.weight": (4, 4)})
    with pytest.raises(AmbiguousError, match="several layers could be the head") as e:
        mc.strip_head(ckpt)
    assert "--head" in (e.value.hint or "")


def test_a_named_head(tmp_path: Path) -> None:
    with opened(tmp_path / "in.pt", Net().state_dict()) as ckpt:
        assert "layer1.0.weight" not in names(mc.strip_head(ckpt, head="layer1.0"))
        assert mc.find_head(ckpt, "fc").confidence == "certain"
        with pytest.raises(NoMatchError, match="no tensor matches 'nothing'"):
            mc.strip_head(ckpt, head="nothing")
        with pytest.raises(RefusedError, match="no tensor would be left"):
            mc.strip_head(ckpt, head="*")


def test_rename_head(tmp_path: Path) -> None:
    net = Net()
    optimizer = torch.optim.SGD(net.named_parameters(), lr=0.1)
    saved = {"state_dict": nn.DataParallel(net).state_dict(), "optimizer": optimizer.state_dict()}
    with opened(tmp_path / "in.pt", saved) as ckpt:
        out = load(mc.strip_head(ckpt, rename_head="old.fc"), tmp_path / "out.pt")
        assert list(out["state_dict"])[-2:] == ["module.old.fc.weight", "module.old.fc.bias"]
        assert torch.equal(out["state_dict"]["module.old.fc.weight"], net.fc.weight)
        assert out["optimizer"]["param_groups"][0]["param_names"][-2:] == [
            "old.fc.weight",
            "old.fc.bias",
        ]
        assert "module.old.fc" in out["state_dict"]._metadata
        assert "module.fc" not in out["state_dict"]._metadata
        assert "modelctl.removed" not in out["state_dict"]._metadata[""]
        with pytest.raises(CollisionError):
            mc.strip_head(ckpt, head="module.fc", rename_head="layer1.0")
        for broken in ("", "a..b", ".a", "a."):
            with pytest.raises(UsageError):
                mc.strip_head(ckpt, rename_head=broken)
    with pytest.raises(UsageError, match="takes one"):
        mc.strip_head(meta("googlenet"), rename_head="old")


def test_what_was_removed_is_recorded(tmp_path: Path) -> None:
    with opened(tmp_path / "in.pt", Net().state_dict()) as ckpt:
        stripped = mc.strip_head(ckpt)
        loaded = load(stripped, tmp_path / "out.pt")
        expected = [
            {"name": "fc.weight", "shape": [5, 6], "dtype": "float32"},
            {"name": "fc.bias", "shape": [5], "dtype": "float32"},
        ]
        assert loaded._metadata[""]["modelctl.removed"] == expected
        assert "fc" not in loaded._metadata
        more = load(mc.strip_head(stripped, head="layer1.0"), tmp_path / "out.pt")
        recorded = [one["name"] for one in more._metadata[""]["modelctl.removed"]]
        assert recorded == [*HEAD, "layer1.0.weight", "layer1.0.bias"]


def test_the_file_loads_into_a_model_with_another_head(tmp_path: Path) -> None:
    net = Net()
    with opened(tmp_path / "in.pt", net.state_dict()) as ckpt:
        loaded = load(mc.strip_head(ckpt), tmp_path / "out.pt")
    other = Net(classes=3)
    result = other.load_state_dict(loaded, strict=False)
    assert tuple(result.missing_keys) == HEAD
    assert result.unexpected_keys == []
    kept = {key: value for key, value in other.state_dict().items() if key not in HEAD}
    same_tensors(kept, {key: value for key, value in net.state_dict().items() if key not in HEAD})


def test_an_ema_copy_loses_its_head_too(tmp_path: Path) -> None:
    net = Net()
    copy = {f"module.{key}": value for key, value in net.state_dict().items()}
    with opened(
        tmp_path / "in.pt", {"state_dict": net.state_dict(), "ema_state_dict": copy}
    ) as ckpt:
        out = load(mc.strip_head(ckpt), tmp_path / "out.pt")
    assert not [key for key in out["ema_state_dict"] if "fc" in key]
    assert len(out["ema_state_dict"]) == len(out["state_dict"])


def test_a_wrong_choice_of_optimizer_policy(tmp_path: Path) -> None:
    with opened(tmp_path / "in.pt", Net().state_dict()) as ckpt, pytest.raises(UsageError):
        mc.strip_head(ckpt, optimizer="maybe")  # type: ignore[arg-type]


def test_two_models_are_not_one(tmp_path: Path) -> None:
    saved = {"generator": Net().state_dict(), "discriminator": Net().state_dict()}
    with opened(tmp_path / "in.pt", saved) as ckpt:
        with pytest.raises(AmbiguousError, match="generator, discriminator"):
            mc.strip_head(ckpt)
        out = load(mc.strip_head(ckpt.replace(key=("discriminator",))), tmp_path / "out.pt")
        assert len(out["generator"]) == len(out["discriminator"]) + 2
    with opened(tmp_path / "one.pt", {"generator": Net().state_dict(), "epoch": 1}) as ckpt:
        assert mc.find_head(ckpt).modules == ("fc",)


@pytest.mark.parametrize("bad", [None, 1])
def test_errors_are_ours(bad: object) -> None:
    with pytest.raises(ModelctlError):
        mc.strip_head(Checkpoint(bad))
