"""The commands on real checkpoints, which nobody in this project wrote."""

from __future__ import annotations

import json
import zipfile
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from .files import Cli

CORPUS = Path(__file__).resolve().parents[3] / "shared" / "corpus"
pytestmark = pytest.mark.skipif(not CORPUS.is_dir(), reason=f"there is no {CORPUS}")

RESNET = CORPUS / "dataparallel" / "akamaster__pytorch_resnet_cifar10__resnet20-12fca82f.th"
TRAINING = CORPUS / "training_ckpt"
PAIRS = CORPUS / "model_opt_pair"


def load(path: str | Path, **options: Any) -> Any:
    return torch.load(path, map_location="cpu", **options)  # some were saved on a GPU


def test_the_resnet_story(cli: Cli, place: Path) -> None:
    original = load(RESNET, weights_only=False)["state_dict"]
    found = json.loads(cli("summary", RESNET, "--format", "json").out)
    totals = found["totals"]
    assert totals["tensors"] == 97
    assert totals["params"] + totals["buffers"] == 271_098
    assert totals["buffers"] == sum(t.numel() for n, t in original.items() if "running" in n)

    assert cli("strip-prefix", RESNET, "-o", "1.pt").code == 0
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
    for name, tensors in loaded.items():
        expected = bare if name.startswith("1") else trunk
        assert set(tensors) == set(expected), name
        for key, tensor in expected.items():
            assert torch.equal(tensors[key], tensor.cpu()), (name, key)
    listed = cli("ls", "4.safetensors", "--long", "--format", "json").out
    for row in json.loads(listed)["tensors"]:
        if row["role"] == "parameter":
            assert row["requires_grad"] is row["name"].startswith("layer3")


def one(pattern: str) -> Path:
    (found,) = TRAINING.glob(pattern)
    return found


@pytest.mark.parametrize(
    ("pattern", "head", "left"),
    [
        ("*band-gap*", "fc_out", 28),
        ("*formation-energy*", "fc_out", 28),
        ("*extrasmall-qat8.pth*", "fc.op", 23),
        ("*extrasmall-qat8-q*", "fc.op", 23),
    ],
)
def test_a_head_goes_with_its_state(
    cli: Cli, place: Path, pattern: str, head: str, left: int
) -> None:
    source = one(pattern)
    before = load(source, weights_only=False)
    result = cli("strip-head", source, "-o", "out.pt")
    assert result.code == 0, result.err
    assert f"head: {head} " in result.out
    after = load("out.pt", weights_only=False)
    gone = {f"{head}.weight", f"{head}.bias"}
    assert set(before["state_dict"]) - set(after["state_dict"]) == gone
    key = next(key for key in after if key.startswith("optimizer"))
    assert len(after[key]["param_groups"][0]["params"]) == left
    for old, new in zip(before[key]["state"].values(), after[key]["state"].values(), strict=False):
        assert torch.equal(old["momentum_buffer"], new["momentum_buffer"])
    assert set(after) == set(before)
    trunk = [t for n, t in after["state_dict"].items() if "running" not in n and "num_" not in n]
    shapes = {tuple(tensor.shape) for tensor in trunk}
    for state in after[key]["state"].values():
        assert tuple(state["momentum_buffer"].shape) in shapes


def test_an_optimizer_that_does_not_fit_says_so(cli: Cli, place: Path) -> None:
    source = one("*svhn*")
    assert "no head is found" in cli("strip-head", source, "-o", "out.pt").err
    head = ("--head", "pred_convs.cl_conv12_2.op")
    result = cli("strip-head", source, *head, "-o", "out.pt")
    assert result.code == 2
    assert "the optimizer has 200 parameters, the model 160" in result.err
    assert "--optimizer drop" in result.err
    assert cli("strip-head", source, *head, "--optimizer", "drop", "-o", "out.pt").code == 0
    assert "optimizer" not in load("out.pt", weights_only=False)


@pytest.mark.parametrize(
    ("name", "make"),
    [("a2c", torch.optim.RMSprop), ("ppo", torch.optim.Adam)],
)
def test_a_policy_and_its_optimizer(cli: Cli, place: Path, name: str, make: type) -> None:
    policy = PAIRS / f"DLR-RM__rl-trained-agents__{name}-CartPole-v1__policy.pth"
    optimizer = policy.with_name(policy.name.replace("policy.pth", "policy.optimizer.pth"))
    argv = ("merge", "--model", policy, "--optimizer", optimizer, "--epoch", "3", "-o", "out.pt")
    result = cli(*argv)
    assert result.code == 0, result.err
    assert "added: optimizer, epoch" in result.out
    loaded = load("out.pt", weights_only=True)
    before = load(optimizer, weights_only=True)
    assert loaded["optimizer"]["param_groups"] == before["param_groups"]
    parameters = [torch.nn.Parameter(tensor) for tensor in loaded["model"].values()]
    live = make(parameters)
    live.load_state_dict(loaded["optimizer"])
    for parameter in parameters:
        parameter.grad = torch.ones_like(parameter)
    live.step()


def test_the_wrong_optimizer_is_refused(cli: Cli, place: Path) -> None:
    policy = PAIRS / "DLR-RM__rl-trained-agents__sac-Pendulum-v1__policy.pth"
    wrong = PAIRS / "DLR-RM__rl-trained-agents__ppo-CartPole-v1__policy.optimizer.pth"
    result = cli("merge", "--model", policy, "--optimizer", wrong, "-o", "out.pt")
    assert result.code == 2
    assert "don't fit" in result.err or "don't belong" in result.err
    assert not Path("out.pt").exists()


@pytest.mark.parametrize(
    "path",
    [path for path in sorted(CORPUS.rglob("*")) if path.is_file() and path.parent.name != "facts"],
    ids=lambda path: path.name[-40:],
)
def test_looking_never_fails_badly(cli: Cli, path: Path) -> None:
    for argv in (("summary", path), ("ls", path, "--section", "all"), ("show", path)):
        for options in ((), ("--format", "json")):
            result = cli(*argv, *options)
            assert result.code in (0, 2), result
            assert "bug in modelctl" not in result.err
            if result.code == 2:
                assert result.err.startswith("error: ")
                assert len(result.err.splitlines()) <= 2
            elif options:
                json.loads(result.out)


def test_a_plain_zip_is_no_checkpoint(cli: Cli, place: Path) -> None:
    with zipfile.ZipFile("x.pt", "w") as archive:
        archive.writestr("a.txt", "hello")
    result = cli("summary", "x.pt")
    assert result.code == 2
    assert "x.pt" in result.err
