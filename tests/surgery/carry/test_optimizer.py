"""The optimizer in step: after a head is gone, training goes on bit for bit as before."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import modelctl as mc
from modelctl.errors import AmbiguousError, RefusedError
from modelctl.surgery.carry.optimizer_names import assign_names
from tests.surgery.nets import HEAD, OPTIMIZERS, Net, in_memory, load, opened, train


def one_group(net: nn.Module, named: bool) -> Any:
    return net.named_parameters() if named else net.parameters()


def decay_groups(net: nn.Module, named: bool) -> Any:
    pairs = list(net.named_parameters())
    split = [
        [pair for pair in pairs if pair[1].ndim > 1],
        [pair for pair in pairs if pair[1].ndim <= 1],
    ]
    groups: list[dict[str, Any]] = []
    for group, decay in zip(split, (0.1, 0.0), strict=True):
        params = group if named else [parameter for _, parameter in group]
        groups.append({"params": params, "weight_decay": decay})
    return groups


def states_by_name(net: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    names = {parameter: name for name, parameter in net.named_parameters()}
    return {
        names[parameter].replace("module.", ""): state
        for parameter, state in optimizer.state.items()
    }


@pytest.mark.parametrize("groups", [one_group, decay_groups])
@pytest.mark.parametrize("wrapped", [False, True], ids=["bare", "module."])
@pytest.mark.parametrize("named", [False, True], ids=["ids", "param_names"])
@pytest.mark.parametrize("kind", OPTIMIZERS)
def test_training_goes_on(tmp_path: Path, kind: str, named: bool, wrapped: bool, groups) -> None:
    torch.manual_seed(0)
    net = Net()
    model = nn.DataParallel(net) if wrapped else net
    optimizer = OPTIMIZERS[kind](groups(model, named))
    train(model, optimizer, range(3))
    saved = {"model": model.state_dict(), "optimizer": optimizer.state_dict(), "epoch": 3}
    with opened(tmp_path / "in.pt", saved) as ckpt:
        out = load(mc.strip_head(mc.strip_prefix(ckpt)), tmp_path / "out.pt")

    trunk = Net()
    missing = trunk.load_state_dict(out["model"], strict=False).missing_keys
    assert tuple(missing) == HEAD
    trunk.fc = nn.Identity()
    resumed = OPTIMIZERS[kind](groups(trunk, named))
    resumed.load_state_dict(out["optimizer"])
    before, after = states_by_name(model, optimizer), states_by_name(trunk, resumed)
    assert set(after) == set(before) - set(HEAD)
    assert len(after) == 7
    for name, state in after.items():
        for key, value in state.items():
            assert torch.equal(torch.as_tensor(value), torch.as_tensor(before[name][key])), name
    if named:
        recorded = [n for g in out["optimizer"]["param_groups"] for n in g["param_names"]]
        assert sorted(recorded) == sorted(after)

    train(model, optimizer, range(3, 6))
    train(trunk, resumed, range(3, 6))
    live = dict(net.named_parameters())
    for name, parameter in trunk.named_parameters():
        assert torch.equal(parameter, live[name]), name


def test_ids_have_no_gaps_and_settings_stay(tmp_path: Path) -> None:
    net = Net()
    optimizer = torch.optim.AdamW(decay_groups(net, False), lr=0.2)
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 3)
    train(net, optimizer, range(1))
    saved = {
        "model": net.state_dict(),
        "optimizer": optimizer.state_dict(),
        "scheduler": scheduler.state_dict(),
    }
    with opened(tmp_path / "in.pt", saved) as ckpt:
        out = load(mc.strip_head(ckpt), tmp_path / "out.pt")
    groups = out["optimizer"]["param_groups"]
    assert [group["params"] for group in groups] == [[0, 1], [2, 3, 4, 5, 6]]
    for old, new in zip(saved["optimizer"]["param_groups"], groups, strict=True):
        assert {**old, "params": None} == {**new, "params": None}
    assert out["scheduler"] == saved["scheduler"]
    assert list(out["optimizer"]["state"]) == list(range(7))


def test_a_group_that_gets_empty_stays(tmp_path: Path) -> None:
    net = Net()
    rest = [parameter for name, parameter in net.named_parameters() if name not in HEAD]
    optimizer = torch.optim.SGD(
        [{"params": rest, "lr": 0.1}, {"params": net.fc.parameters(), "lr": 0.5}], momentum=0.9
    )
    train(net, optimizer, range(2))
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, [lambda e: 1, lambda e: 1])
    saved = {
        "model": net.state_dict(),
        "optimizer": optimizer.state_dict(),
        "scheduler": scheduler.state_dict(),
    }
    with opened(tmp_path / "in.pt", saved) as ckpt:
        out = load(mc.strip_head(ckpt), tmp_path / "out.pt")
    assert out["optimizer"]["param_groups"][1]["params"] == []
    again = torch.optim.SGD([{"params": rest}, {"params": []}], lr=1, momentum=0.9)
    again.load_state_dict(out["optimizer"])
    assert [group["lr"] for group in again.param_groups] == [0.1, 0.5]


def test_frozen_parameters_that_were_passed_have_no_state(tmp_path: Path) -> None:
    net = Net()
    net.conv1.weight.requires_grad_(False)
    optimizer = torch.optim.AdamW(net.parameters())
    train(net, optimizer, range(2))
    saved = {"model": net.state_dict(), "optimizer": optimizer.state_dict()}
    assert 0 not in saved["optimizer"]["state"]
    with opened(tmp_path / "in.pt", saved) as ckpt:
        out = load(mc.strip_head(ckpt), tmp_path / "out.pt")
    assert list(out["optimizer"]["state"]) == [1, 2, 3, 4, 5, 6]
    assert out["optimizer"]["param_groups"][0]["params"] == list(range(7))


def test_frozen_parameters_that_were_filtered_out_shift_the_ids(tmp_path: Path) -> None:
    net = Net()
    net.conv1.requires_grad_(False)
    net.bn1.requires_grad_(False)
    optimizer = torch.optim.AdamW([p for p in net.parameters() if p.requires_grad])
    train(net, optimizer, range(2))
    saved = {"model": net.state_dict(), "optimizer": optimizer.state_dict()}
    with opened(tmp_path / "in.pt", saved) as ckpt:
        out = load(mc.strip_head(ckpt), tmp_path / "out.pt")
    live = dict(net.named_parameters())
    kept = ["layer1.0.weight", "layer1.0.bias", "layer1.1.weight", "layer1.1.bias"]
    assert out["optimizer"]["param_groups"][0]["params"] == [0, 1, 2, 3]
    for i, name in enumerate(kept):
        state = out["optimizer"]["state"][i]["exp_avg"]
        assert torch.equal(state, optimizer.state[live[name]]["exp_avg"])


def twins() -> nn.Module:
    return nn.Sequential(*(nn.Linear(4, 4, bias=False) for _ in range(3)), nn.Linear(4, 2))


def test_more_than_one_fit_refuses(tmp_path: Path) -> None:
    net = twins()
    optimizer = torch.optim.AdamW([net[0].weight, net[2].weight, *net[3].parameters()])
    train(net, optimizer, range(1))
    saved = {"model": net.state_dict(), "optimizer": optimizer.state_dict()}
    with opened(tmp_path / "in.pt", saved) as ckpt:
        with pytest.raises(AmbiguousError, match="in 3 ways") as e:
            mc.strip_head(ckpt)
        assert "--optimizer drop" in (e.value.hint or "")
        out = load(mc.strip_head(ckpt, optimizer="drop"), tmp_path / "out.pt")
        assert list(out) == ["model"]
        assert list(out["model"]) == ["0.weight", "1.weight", "2.weight"]


def test_state_that_shows_nothing_in_two_groups_refuses(tmp_path: Path) -> None:
    net = twins()
    groups = [{"params": [net[0].weight]}, {"params": [net[1].weight]}]
    optimizer = torch.optim.SGD([*groups, {"params": list(net[2:].parameters())}], lr=0.1)
    saved = {"model": net.state_dict(), "optimizer": optimizer.state_dict()}
    with opened(tmp_path / "in.pt", saved) as ckpt, pytest.raises(AmbiguousError):
        mc.strip_head(ckpt)


def test_factored_state_shows_the_shape_of_its_parameter(tmp_path: Path) -> None:
    net = nn.Sequential(nn.Linear(4, 6, bias=False), nn.Linear(6, 4, bias=False), nn.Linear(4, 2))
    optimizer = torch.optim.Adafactor([net[1].weight, *net[2].parameters()])
    train(net[1:], optimizer, range(1))
    saved = {"model": net.state_dict(), "optimizer": optimizer.state_dict()}
    with opened(tmp_path / "in.pt", saved) as ckpt:
        names = assign_names(ckpt.sections.optimizers[0][1], ckpt.state_dict())
    assert names == [["1.weight", "2.weight", "2.bias"]]


def test_lbfgs_refuses_a_removal_but_not_a_renaming(tmp_path: Path) -> None:
    net = Net()
    optimizer = torch.optim.LBFGS(net.parameters(), max_iter=2)

    def closure() -> torch.Tensor:
        optimizer.zero_grad()
        loss = sum(parameter.square().sum() for parameter in net.parameters())
        loss.backward()
        return loss

    optimizer.step(closure)
    saved = {"model": nn.DataParallel(net).state_dict(), "optimizer": optimizer.state_dict()}
    with opened(tmp_path / "in.pt", saved) as ckpt:
        with pytest.raises(RefusedError, match="LBFGS") as e:
            mc.strip_head(ckpt)
        assert "--optimizer drop" in (e.value.hint or "")
        assert "optimizer" not in load(mc.strip_head(ckpt, optimizer="drop"), tmp_path / "a.pt")
        out = load(mc.strip_prefix(ckpt), tmp_path / "b.pt")
    assert next(iter(out["model"])) == "conv1.weight"
    again = torch.optim.LBFGS(net.parameters(), max_iter=2)
    again.load_state_dict(out["optimizer"])


def test_another_models_optimizer_refuses(tmp_path: Path) -> None:
    net, other = Net(), Net(classes=3)
    for named in (True, False):
        optimizer = torch.optim.AdamW(one_group(other, named))
        train(other, optimizer, range(1))
        saved = {"model": net.state_dict(), "optimizer": optimizer.state_dict()}
        with opened(tmp_path / "in.pt", saved) as ckpt, pytest.raises(RefusedError):
            mc.strip_head(ckpt)


def test_relative_names_that_collide_give_way_to_shapes(tmp_path: Path) -> None:
    net = Net()
    parts = [net.conv1, net.bn1, net.layer1, net.fc]
    groups = [{"params": list(part.named_parameters())} for part in parts]
    # torch refuses the same name in two groups: give them different ones, all unknown
    for i, group in enumerate(groups):
        group["params"] = [(f"part{i}.{name}", p) for name, p in group["params"]]
    optimizer = torch.optim.AdamW(groups)
    train(net, optimizer, range(1))
    saved = {"model": net.state_dict(), "optimizer": optimizer.state_dict()}
    with opened(tmp_path / "in.pt", saved) as ckpt:
        out = load(mc.strip_head(ckpt), tmp_path / "out.pt")
    assert [len(group["params"]) for group in out["optimizer"]["param_groups"]] == [1, 2, 4, 0]


def test_names_that_are_unknown_without_any_state_refuse(tmp_path: Path) -> None:
    net = Net()
    named = [("x." + name, parameter) for name, parameter in net.named_parameters()]
    optimizer = torch.optim.SGD(named, lr=0.1)
    saved = {"model": net.state_dict(), "optimizer": optimizer.state_dict()}
    with opened(tmp_path / "in.pt", saved) as ckpt, pytest.raises(RefusedError, match=r"x\.conv1"):
        mc.strip_head(ckpt)


def test_names_recorded_under_compile(tmp_path: Path) -> None:
    net = Net()
    wrapped = torch.compile(net)
    optimizer = torch.optim.AdamW(wrapped.named_parameters())
    train(wrapped, optimizer, range(1))
    saved = {"model": net.state_dict(), "optimizer": optimizer.state_dict()}
    assert saved["optimizer"]["param_groups"][0]["param_names"][0] == "_orig_mod.conv1.weight"
    with opened(tmp_path / "in.pt", saved) as ckpt:
        out = load(mc.strip_head(ckpt), tmp_path / "out.pt")
    assert len(out["optimizer"]["state"]) == 7


def test_drop_leaves_the_scheduler_out_too(tmp_path: Path) -> None:
    net = Net()
    optimizer = torch.optim.AdamW(net.parameters())
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 3)
    saved = {
        "state_dict": net.state_dict(),
        "optimizer_states": [optimizer.state_dict()],
        "lr_schedulers": [scheduler.state_dict()],
        "epoch": 2,
    }
    with opened(tmp_path / "in.pt", saved) as ckpt:
        out = load(mc.strip_head(ckpt, optimizer="drop"), tmp_path / "out.pt")
    assert list(out) == ["state_dict", "epoch"]


def test_a_second_optimizer_is_kept_in_step_too(tmp_path: Path) -> None:
    net = Net()
    optimizers = [OPTIMIZERS[kind](net.parameters()) for kind in ("sgd", "adamw")]
    for optimizer in optimizers:
        train(net, optimizer, range(1))
    states = [copy.deepcopy(optimizer.state_dict()) for optimizer in optimizers]
    with opened(tmp_path / "in.pt", {"model": net.state_dict(), "optimizers": states}) as ckpt:
        out = load(mc.strip_head(ckpt), tmp_path / "out.pt")
    assert [len(state["state"]) for state in out["optimizers"]] == [7, 7]


# ---------------------------------------------------------------------- what is no parameter


def test_running_statistics_are_no_candidates() -> None:
    net = nn.Sequential(nn.Conv2d(3, 4, 1, bias=False), nn.BatchNorm2d(4), nn.Linear(4, 4))
    tensors = in_memory(net.state_dict()).state_dict()
    names = [name for name, _ in net.named_parameters()]
    state = {i: {"exp_avg": tensors[name]} for i, name in enumerate(names)}
    optimizer = {"state": state, "param_groups": [{"params": list(range(5))}]}
    assert assign_names(optimizer, tensors) == [names]


def test_a_parameter_that_is_not_the_models_stays(tmp_path: Path) -> None:
    net = Net()
    beside = nn.Parameter(torch.ones(2))
    optimizer = torch.optim.Adam([beside, *net.parameters()])
    train(net, optimizer, range(2))
    beside.grad = torch.ones(2)
    optimizer.step()
    saved = optimizer.state_dict()
    own = [name for name, _ in net.named_parameters()]
    saved["param_groups"][0]["param_names"] = ["", *own]
    with opened(tmp_path / "in.pt", {"model": net.state_dict(), "optimizer": saved}) as ckpt:
        out = load(mc.add_prefix(mc.strip_head(ckpt), "net"), tmp_path / "out.pt")["optimizer"]
    kept = [name for name in own if not name.startswith(HEAD)]
    assert out["param_groups"][0]["param_names"] == ["", *(f"net.{name}" for name in kept)]
    assert out["param_groups"][0]["params"] == [*range(len(kept) + 1)]
    assert torch.equal(out["state"][0]["exp_avg"], saved["state"][0]["exp_avg"])


@pytest.mark.parametrize("beside", ["fp32_from_fp16", "pairs"])
def test_state_beside_a_wrapped_optimizer_is_named(tmp_path: Path, beside: str) -> None:
    """What wraps an optimizer keeps masters, or state by (group, place), beside its state_dict."""
    net = Net()
    optimizer = torch.optim.Adam(net.parameters())
    train(net, optimizer, range(1))
    masters = [[parameter.detach().float() for parameter in net.parameters()]]
    pairs = {(0, i): {"alignment": torch.tensor(1.0)} for i in range(len(masters[0]))}
    wrapped = {"base": optimizer.state_dict(), beside: pairs if beside == "pairs" else masters}
    saved = {"model": net.state_dict(), "optimizer": {**wrapped, "scale": 2.0}}
    with opened(tmp_path / "in.pt", saved) as ckpt:
        warned = [note.text for note in mc.strip_head(ckpt).notes if note.level == "warning"]
        assert len(warned) == (1 if beside == "pairs" else 0), warned
        assert all(text.startswith(f"'optimizer.{beside}'") for text in warned)
        assert not any(note.level == "warning" for note in mc.rename(ckpt, "fc=head").notes)
