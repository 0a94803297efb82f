"""strip_head: what goes, what stays, what is recorded (test_find_head.py: what is found)."""

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


def test_it_is_stripped_once() -> None:
    stripped = mc.strip_head(in_memory(Net().state_dict()))
    with pytest.raises(NoMatchError, match="removed already: fc"):
        mc.strip_head(stripped)
    backbone = {name: ref.shape for name, ref in stripped.state_dict().items()}
    with pytest.raises(NoMatchError, match="no head is found"):  # without its record
        mc.strip_head(in_memory(backbone))


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
        mc.strip_head(
            in_memory({"body.weight": (4, 3), "fc.weight": (7, 4), "head_dist.weight": (7, 4)}),
            rename_head="old",
        )


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
