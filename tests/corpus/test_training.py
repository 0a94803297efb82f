"""What people do to training checkpoints, by the commands, on real ones."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import nn, optim

import modelctl as mc
import modelctl.nn as mnn
from tests.cli.files import Cli
from tests.conftest import SHARED

from .made import Made
from .make.training import policy
from .nets import ResNet

CORPUS = SHARED / "corpus"
TRAINING, PAIRS = CORPUS / "training_ckpt", CORPUS / "model_opt_pair"
AKAMASTER = CORPUS / "dataparallel" / "akamaster__pytorch_resnet_cifar10__resnet20-12fca82f.th"
Find = Callable[[str], Path]


@pytest.fixture
def find(made: Callable[[str], Made]) -> Find:
    """A file of our own by its maker, or a shared one by its path in the corpus."""

    def get(name: str) -> Path:
        if "/" not in name:
            return made(name).path
        if not CORPUS.is_dir():
            pytest.skip(f"there is no {CORPUS}")
        (path,) = CORPUS.glob(name)
        return path

    return get


def load(path: str | Path, **options: Any) -> Any:
    return torch.load(path, map_location="cpu", **options)  # some were saved on a GPU


@pytest.mark.parametrize(
    "name", ["data_parallel", "data_parallel_legacy", "dataparallel/akamaster*resnet20*"]
)
def test_the_resnet_story(name: str, find: Find, cli: Cli, place: Path) -> None:
    """A wrapped model to frozen features: each step is what torch loads."""
    source = find(name)
    original = load(source, weights_only=True)["state_dict"]
    totals = json.loads(cli("summary", source, "--format", "json").out)["totals"]
    assert totals["tensors"] == len(original)
    assert totals["params"] + totals["buffers"] == sum(t.numel() for t in original.values())
    statistics = ("running_mean", "running_var", "num_batches_tracked")
    assert totals["buffers"] == sum(
        t.numel() for n, t in original.items() if n.endswith(statistics)
    )

    assert cli("strip-prefix", source, "-o", "1.pt").code == 0
    head = cli("strip-head", "1.pt", "-o", "2.pt")
    assert "head: linear (named like a head, 10 outputs" in head.out
    freeze = ("freeze", "2.pt", "--pattern", "*", "--exclude", "layer3")
    assert cli(*freeze, "-o", "3.pt").code == 0
    assert cli("convert", "3.pt", "--weights-only", "-o", "4.safetensors").code == 0

    bare = {name.removeprefix("module."): tensor for name, tensor in original.items()}
    trunk = {name: tensor for name, tensor in bare.items() if not name.startswith("linear")}
    assert len(bare) - len(trunk) == 2
    loaded = {
        "1.pt": load("1.pt", weights_only=True)["state_dict"],
        "1.pt, mapped": load("1.pt", weights_only=True, mmap=True)["state_dict"],
        "3.pt": load("3.pt", weights_only=True)["state_dict"],
        "4.safetensors": load_file("4.safetensors"),
    }
    for step, tensors in loaded.items():
        expected = bare if step.startswith("1") else trunk
        assert set(tensors) == set(expected), step
        for key, tensor in expected.items():
            assert torch.equal(tensors[key], tensor), (step, key)
    for row in json.loads(cli("ls", "4.safetensors", "--long", "--format", "json").out)["tensors"]:
        if row["role"] == "parameter":
            assert row["requires_grad"] is row["name"].startswith("layer3")


def test_a_wrapped_checkpoint_goes_into_a_bare_model(find: Find) -> None:
    path = find("data_parallel")
    expected = {
        name.removeprefix("module."): tensor
        for name, tensor in load(path, weights_only=True)["state_dict"].items()
    }
    model = ResNet()
    report = mnn.load_into(model, path)
    assert set(report.loaded) == set(expected)
    for name, value in model.state_dict().items():
        assert torch.equal(value, expected[name]), name


@pytest.mark.parametrize(
    ("name", "head", "left"),
    [
        ("imagenet", "linear", 39),
        ("imagenet_legacy", "linear", 39),
        ("training_ckpt/*band-gap*", "fc_out", 28),
        ("training_ckpt/*formation-energy*", "fc_out", 28),
        ("training_ckpt/*extrasmall-qat8.pth*", "fc.op", 23),
        ("training_ckpt/*extrasmall-qat8-q*", "fc.op", 23),
    ],
)
def test_a_head_goes_with_its_state(
    name: str, head: str, left: int, find: Find, cli: Cli, place: Path
) -> None:
    source = find(name)
    before = load(source, weights_only=False)
    result = cli("strip-head", source, "-o", "out.pt")
    assert result.code == 0, result.err
    assert f"{head} (" in result.out
    after = load("out.pt", weights_only=False)
    gone = before["state_dict"].keys() - after["state_dict"].keys()
    assert {name.removeprefix("module.") for name in gone} == {f"{head}.weight", f"{head}.bias"}
    key = next(key for key in after if key.startswith("optimizer"))
    assert len(after[key]["param_groups"][0]["params"]) == left
    for old, new in zip(before[key]["state"].values(), after[key]["state"].values(), strict=False):
        assert torch.equal(old["momentum_buffer"], new["momentum_buffer"])
    assert set(after) == set(before)
    trunk = [t for n, t in after["state_dict"].items() if "running" not in n and "num_" not in n]
    shapes = {tuple(tensor.shape) for tensor in trunk}
    for state in after[key]["state"].values():
        assert tuple(state["momentum_buffer"].shape) in shapes


def stranger(folder: Path) -> Path:
    """An optimizer over more than the model."""
    net, more = ResNet(), nn.Linear(4, 4)
    optimizer = optim.SGD([*net.parameters(), *more.parameters()], lr=0.1, momentum=0.9)
    saved = {"state_dict": net.state_dict(), "optimizer": optimizer.state_dict()}
    torch.save(saved, folder / "stranger.pt")
    return folder / "stranger.pt"


@pytest.mark.parametrize(
    ("name", "head", "says"),
    [
        ("stranger", "linear", "the optimizer has 43 parameters, the model 41"),
        (
            "training_ckpt/*svhn*",
            "pred_convs.cl_conv12_2.op",
            "the optimizer has 200 parameters, the model 160",
        ),
    ],
)
def test_an_optimizer_that_does_not_fit_says_so(
    name: str, head: str, says: str, find: Find, cli: Cli, place: Path
) -> None:
    source = stranger(place) if name == "stranger" else find(name)
    result = cli("strip-head", source, "--head", head, "-o", "out.pt")
    assert result.code == 2
    assert says in result.err
    assert "--optimizer drop" in result.err
    drop = ("strip-head", source, "--head", head, "--optimizer", "drop", "-o", "out.pt")
    assert cli(*drop).code == 0
    left = load("out.pt", weights_only=False)
    assert not [part for part in left.values() if isinstance(part, dict) and "param_groups" in part]


@pytest.mark.parametrize(
    ("model", "state", "make"),
    [
        ("a_policy", "adam", optim.Adam),
        ("a_policy", "rmsprop_legacy", optim.RMSprop),
        ("model_opt_pair/*a2c*policy.pth", "model_opt_pair/*a2c*policy.opt*", optim.RMSprop),
        ("model_opt_pair/*ppo*policy.pth", "model_opt_pair/*ppo*policy.opt*", optim.Adam),
    ],
)
def test_a_policy_and_its_optimizer(
    model: str, state: str, make: type[optim.Optimizer], find: Find, cli: Cli, place: Path
) -> None:
    """Saved apart, put together, and trained on."""
    result = cli(
        *("merge", "--model", find(model), "--optimizer", find(state)),
        *("--epoch", "3", "-o", "out.pt"),
    )
    assert result.code == 0, result.err
    assert "added: optimizer, epoch" in result.out
    loaded = load("out.pt", weights_only=True)
    before = load(find(state), weights_only=True)
    assert loaded["optimizer"]["param_groups"] == before["param_groups"]
    parameters = [nn.Parameter(tensor) for tensor in loaded["model"].values()]
    live = make(parameters)
    live.load_state_dict(loaded["optimizer"])
    for parameter in parameters:
        parameter.grad = torch.ones_like(parameter)
    live.step()


@pytest.mark.parametrize(
    ("model", "state"),
    [
        ("resnet", "adam"),
        ("a_policy", "trainer_optimizer"),
        ("model_opt_pair/*sac*policy.pth", "model_opt_pair/*ppo*policy.opt*"),
    ],
)
def test_the_wrong_optimizer_is_refused(
    model: str, state: str, find: Find, cli: Cli, place: Path
) -> None:
    result = cli("merge", "--model", find(model), "--optimizer", find(state), "-o", "out.pt")
    assert result.code == 2
    assert "don't fit" in result.err or "don't belong" in result.err
    assert not Path("out.pt").exists()


def test_the_right_one_by_size_in_another_order_is_not_taken(cli: Cli, place: Path) -> None:
    net, optimizer = policy(optim.Adam)
    torch.save(dict(reversed(net.state_dict().items())), "model.pt")
    torch.save(optimizer.state_dict(), "optimizer.pt")
    merge = ("merge", "--model", "model.pt", "--optimizer", "optimizer.pt", "-o", "out.pt")
    assert cli(*merge).code == 2


@pytest.mark.parametrize(
    "name",
    [
        *("imagenet", "timm_saver", "lightning_trainer"),
        *("training_ckpt/*band-gap*", "lightning/*v2_reg*"),
    ],
)
def test_split_and_merge_give_the_same(name: str, find: Find, place: Path) -> None:
    with mc.open(find(name)) as ckpt:
        parts = mc.split(ckpt)
        assert {"model", "optimizer", "rest"} <= set(parts)
        mc.save_parts(parts, "parts")
        opened = {part: mc.open(f"parts/{part}.pt") for part in parts}
        mc.save(mc.merge(**opened), "whole.pt")
        for part in opened.values():
            part.close()
        with mc.open("whole.pt") as whole:
            assert not mc.diff(ckpt, whole).differs
            assert list(ckpt.tensors()) == list(whole.tensors())
