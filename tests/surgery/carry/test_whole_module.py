"""Surgery on whole modules (``torch.save(model)``): what comes out is a module that runs."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.optim.swa_utils import AveragedModel

import modelctl as mc
from modelctl.core.checkpoint import Checkpoint
from modelctl.core.records import HISTORY, REMOVED, read_record
from modelctl.errors import RefusedError
from modelctl.inspection.ls import list_tensors
from tests.surgery.nets import HEAD, Net, names, same_tensors

torchvision = pytest.importorskip("torchvision")
IMAGE = torch.randn(1, 3, 32, 32)


def through(model: nn.Module, path: Path, edit: Callable[[Checkpoint], Checkpoint]) -> Any:
    """A whole module through an edit and back into a live one."""
    torch.save(model, path / "in.pt")
    with mc.open(path / "in.pt") as ckpt:
        mc.save(edit(ckpt), path / "out.pt", overwrite=True, history=["edited"])
    return torch.load(path / "out.pt", weights_only=False)


@pytest.mark.parametrize(
    ("name", "head"),
    [("resnet18", "fc"), ("mobilenet_v3_small", "classifier.3"), ("vit_b_16", "heads.head")],
)
def test_the_head_becomes_an_identity(name: str, head: str, tmp_path: Path) -> None:
    model = torchvision.models.get_model(name).eval()
    image = torch.randn(1, 3, 224, 224) if name == "vit_b_16" else IMAGE
    out = through(model, tmp_path, mc.strip_head)
    assert type(out) is type(model)
    identity = out.get_submodule(head)
    assert type(identity) is nn.Identity
    assert not identity.training
    model.set_submodule(head, nn.Identity())
    assert vars(identity).keys() == vars(model.eval().get_submodule(head)).keys()
    assert torch.equal(out(image), model(image))
    same_tensors(out.state_dict(), model.state_dict())
    with mc.open(tmp_path / "out.pt") as ckpt:
        assert {one["name"] for one in read_record(ckpt, REMOVED)} == {
            f"{head}.weight",
            f"{head}.bias",
        }
        assert read_record(ckpt, HISTORY) == ["edited"]
        flat = mc.convert(ckpt, weights_only=True)
        assert read_record(flat, HISTORY) == ["edited"]
        assert names(flat) == list(model.state_dict())


def test_a_dropped_block_is_one_identity(tmp_path: Path) -> None:
    model = torchvision.models.resnet18().eval()
    out = through(model, tmp_path, lambda ckpt: mc.drop(ckpt, ["layer4", "fc"]))
    assert type(out.layer4) is nn.Identity
    model.layer4, model.fc = nn.Identity(), nn.Identity()
    assert torch.equal(out(IMAGE), model(IMAGE))


def test_a_part_of_a_layer_stays(tmp_path: Path) -> None:
    with pytest.raises(RefusedError, match="lose a part of a layer") as e:
        through(Net(), tmp_path, lambda ckpt: mc.drop(ckpt, "fc.bias"))
    assert "convert --weights-only" in (e.value.hint or "")


def test_a_shared_layer_goes_everywhere_or_not_at_all(tmp_path: Path) -> None:
    net = nn.Sequential(nn.Linear(4, 4), nn.ReLU())
    net.add_module("again", net[0])
    net.add_module("last", nn.Linear(4, 4))
    with pytest.raises(RefusedError):
        through(net, tmp_path, lambda ckpt: mc.drop(ckpt, "again"))
    out = through(net, tmp_path, lambda ckpt: mc.drop(ckpt, ["0", "again"]))
    assert out[0] is out.again
    assert type(out[0]) is nn.Identity


@pytest.mark.parametrize("wrap", [nn.DataParallel, AveragedModel, lambda net: net])
def test_wrappers_come_off(wrap: Callable[[nn.Module], nn.Module], tmp_path: Path) -> None:
    net = Net()
    out = through(wrap(net), tmp_path, mc.strip_prefix)
    assert type(out) is Net
    same_tensors(out.state_dict(), net.state_dict())


def test_a_compiled_part_is_that_part(tmp_path: Path) -> None:
    net = Net()
    plain = {name: value.clone() for name, value in net.state_dict().items()}
    net.layer1 = torch.compile(net.layer1, backend="eager")
    out = through(nn.DataParallel(net), tmp_path, mc.strip_prefix)
    assert type(out.layer1) is nn.Sequential
    same_tensors(out.state_dict(), plain)


@pytest.mark.parametrize("edit", ["rename", "add_prefix", "rename_head"])
def test_names_are_the_classs(edit: str, tmp_path: Path) -> None:
    edits: dict[str, Callable[[Checkpoint], Checkpoint]] = {
        "rename": lambda ckpt: mc.rename(ckpt, "fc=head"),
        "add_prefix": lambda ckpt: mc.add_prefix(ckpt, "model"),
        "rename_head": lambda ckpt: mc.strip_head(ckpt, rename_head="old"),
    }
    with pytest.raises(RefusedError, match="be renamed"):
        through(Net(), tmp_path, edits[edit])


# ------------------------------------------------------------------ what trains


def flags(model: nn.Module) -> dict[str, bool]:
    return {name: p.requires_grad for name, p in model.named_parameters()}


def test_freeze_sets_the_real_flags(tmp_path: Path) -> None:
    net = Net()
    out = through(net, tmp_path, lambda ckpt: mc.freeze(ckpt, "*", exclude="fc"))
    assert flags(out) == {name: name in HEAD for name in flags(net)}
    assert all(module.training for module in out.modules())
    with mc.open(tmp_path / "out.pt") as ckpt:
        told = {row.name: row.requires_grad for row in list_tensors(ckpt) if row.requires_grad}
        assert set(told) == set(HEAD)
    back = through(out, tmp_path, lambda ckpt: mc.unfreeze(ckpt, "layer1"))
    assert flags(back) == {n: n in HEAD or n.startswith("layer1") for n in flags(net)}
    loss = back(IMAGE).sum()
    loss.backward()
    assert back.conv1.weight.grad is None
    assert back.layer1[0].weight.grad is not None


def test_bn_eval_sets_the_mode_of_frozen_ones(tmp_path: Path) -> None:
    out = through(Net(), tmp_path, lambda ckpt: mc.freeze(ckpt, "layer1", bn_eval=True))
    assert not out.layer1[1].training
    assert out.bn1.training
    assert out.layer1.training
    before = out.layer1[1].running_mean.clone()
    out(IMAGE)
    assert torch.equal(before, out.layer1[1].running_mean)


def test_tied_parameters_freeze_together(tmp_path: Path) -> None:
    net = nn.Module()
    net.embed, net.head = nn.Embedding(5, 3), nn.Linear(3, 5, bias=False)
    net.head.weight = net.embed.weight
    net.other = nn.Linear(3, 3)
    out = through(net, tmp_path, lambda ckpt: mc.freeze(ckpt, "embed"))
    assert out.head.weight is out.embed.weight
    assert not out.head.weight.requires_grad
    assert out.other.weight.requires_grad


def test_an_lstm_keeps_its_flat_weights(tmp_path: Path) -> None:
    net = nn.Sequential(nn.LSTM(3, 4, batch_first=True))
    out = through(net, tmp_path, lambda ckpt: mc.freeze(ckpt, "0.weight_hh_l0"))
    assert [p.requires_grad for p in out.parameters()] == [True, False, True, True]
    x = torch.randn(1, 2, 3)
    assert torch.equal(out(x)[0], net(x)[0])


def test_freezing_everything_warns(tmp_path: Path) -> None:
    torch.save(Net(), tmp_path / "in.pt")
    with mc.open(tmp_path / "in.pt") as ckpt:
        assert "the loss will not move" in mc.freeze(ckpt, "*").notes[-1].text


def test_a_frozen_module_tells_its_state_dict(tmp_path: Path) -> None:
    net = Net()
    net.conv1.requires_grad_(False)
    torch.save(net, tmp_path / "in.pt")
    with mc.open(tmp_path / "in.pt") as ckpt:
        flat = mc.freeze(mc.convert(ckpt), "bn1")
        assert {row.name for row in list_tensors(flat) if row.requires_grad is False} >= {
            "conv1.weight",
            "bn1.weight",
        }
