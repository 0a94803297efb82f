from __future__ import annotations

import math
import warnings

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn, optim

import modelctl.nn as mnn
from modelctl.errors import NoMatchError, RefusedError, UsageError
from tests.nn.nets import Net, train_step


def settings_of(groups) -> dict[str, dict]:
    return {
        name: {k: v for k, v in group.items() if k not in ("params", "param_names")}
        for group in groups
        for name in group["param_names"]
    }


def test_first_match_wins_and_the_rest_get_the_defaults(net):
    groups = mnn.param_groups(
        net,
        {"fc": {"lr": 1e-3}, "layer*": {"lr": 1e-4, "weight_decay": 0.5}, "*.bias": {"lr": 9}},
        lr=1e-5,
        weight_decay=0.01,
    )
    found = settings_of(groups)
    assert found["fc.bias"] == {"lr": 1e-3, "weight_decay": 0.01}
    assert found["layer1.0.bias"] == {"lr": 1e-4, "weight_decay": 0.5}
    assert found["bn1.bias"] == {"lr": 9, "weight_decay": 0.01}
    assert found["conv1.weight"] == {"lr": 1e-5, "weight_decay": 0.01}
    assert found.keys() == dict(net.named_parameters()).keys()
    assert [group["lr"] for group in groups] == [1e-3, 1e-4, 9, 1e-5]


PATTERNS = ["fc", "*.bias", "layer1", "layer?.0.*", "*.weight", "conv1", "*"]
LAYERS = ["fc", "layer1", "bn1", "layer2.0", "conv1"]


@settings(max_examples=60, deadline=None)
@given(
    rules=st.lists(st.sampled_from(PATTERNS), unique=True, max_size=4),
    frozen=st.lists(st.sampled_from(LAYERS), max_size=3),
    no_decay=st.sampled_from([False, True, "*.bias"]),
)
def test_groups_are_a_partition_of_what_trains(rules, frozen, no_decay):
    net = Net()
    if frozen:
        mnn.freeze(net, frozen)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        groups = mnn.param_groups(
            net,
            {pattern: {"lr": float(i + 1)} for i, pattern in enumerate(rules)},
            no_decay=no_decay,
            lr=0.5,
            weight_decay=0.1,
        )
    named = dict(net.named_parameters())
    found = [name for group in groups for name in group["param_names"]]
    assert sorted(found) == sorted(name for name, p in named.items() if p.requires_grad)
    for group in groups:
        assert group["params"]
        for name, parameter in zip(group["param_names"], group["params"], strict=True):
            assert named[name] is parameter
            first = next((i for i, r in enumerate(rules) if name in _matched(named, r)), None)
            assert group["lr"] == (0.5 if first is None else first + 1)
            bare = no_decay is not False and (
                name.endswith("bias") or (no_decay is True and parameter.ndim < 2)
            )
            assert group["weight_decay"] == (0 if bare else 0.1)


def _matched(named, pattern):
    from fnmatch import fnmatchcase

    return [n for n in named if fnmatchcase(n, pattern) or n.startswith(pattern + ".")]


OPTIMIZERS = [
    name
    for name, kind in vars(optim).items()
    if isinstance(kind, type) and issubclass(kind, optim.Optimizer) and kind is not optim.Optimizer
]
ONE_GROUP = {"LBFGS"}
MATRICES = {"Muon"}  # and nothing else
ANY_LR = {"Rprop", "Adafactor"}  # not the lr alone scales their steps


@pytest.mark.parametrize("kind", OPTIMIZERS)
def test_every_optimizer_takes_them_and_saves_their_names(net, kind):
    """All that torch has, so that a new one is noticed."""
    if kind == "SparseAdam":
        net = nn.Sequential(
            nn.Embedding(5, 2, sparse=True), nn.Embedding(5, 2, sparse=True), nn.Embedding(5, 2)
        ).requires_grad_()
        mnn.freeze(net, "2")
    if kind in MATRICES:
        mnn.freeze(net, [n for n, p in net.named_parameters() if p.ndim != 2])
    names = [name for name, p in net.named_parameters() if p.requires_grad]
    rules = {} if kind in ONE_GROUP else {names[-1]: {"lr": 0.5}}
    if len(names) > 1 and rules:
        rules[names[0]] = {"lr": 0.0}
    # Rprop and LBFGS know no weight_decay: a group may say what its optimizer does not read
    groups = mnn.param_groups(net, rules, no_decay=kind not in ONE_GROUP, lr=0.01)
    optimizer = getattr(optim, kind)(groups)
    scheduler = optim.lr_scheduler.StepLR(optimizer, 1)
    before = {name: p.detach().clone() for name, p in net.named_parameters()}

    def loss():
        optimizer.zero_grad()
        if kind == "SparseAdam":
            value = (net[0](torch.tensor([1])) + net[1](torch.tensor([2]))).square().sum()
        else:
            value = net(torch.randn(4, 3, 8, 8)).square().mean()
        value.backward()
        return value

    optimizer.step(loss) if kind == "LBFGS" else (loss(), optimizer.step())
    scheduler.step()
    now = dict(net.named_parameters())
    assert not torch.equal(now[names[-1]], before[names[-1]])
    if len(names) > 1 and rules and kind not in ANY_LR:
        assert torch.equal(now[names[0]], before[names[0]])
    assert all(torch.equal(now[n], before[n]) for n in before if n not in names)
    saved = optimizer.state_dict()["param_groups"]
    assert sorted(n for group in saved for n in group["param_names"]) == sorted(names)
    assert saved[0]["param_names"] == (names if kind in ONE_GROUP else [names[-1]])
    assert math.isclose(float(optimizer.param_groups[0]["lr"]), 0.001 if not rules else 0.05)


def test_the_update_of_each_parameter_is_its_own_lr(net):
    rules = {"fc": {"lr": 0.1}, "layer1": {"lr": 0.01}}
    net = net.double()  # however torch's kernels round
    optimizer = optim.SGD(mnn.param_groups(net, rules, lr=1.0))
    net(torch.randn(4, 3, 8, 8, dtype=torch.double)).square().mean().backward()
    before = {name: p.detach().clone() for name, p in net.named_parameters()}
    optimizer.step()
    for name, p in net.named_parameters():
        lr = 0.1 if name.startswith("fc") else 0.01 if name.startswith("layer1") else 1.0
        torch.testing.assert_close(p.detach(), before[name] - lr * p.grad, rtol=0, atol=1e-15)


def test_frozen_left_out_tied_once_names_without_wrappers():
    model = nn.ModuleDict({"embed": nn.Embedding(7, 3), "head": nn.Linear(3, 7)})
    model["head"].weight = model["embed"].weight
    mnn.freeze(model, "head.bias")
    groups = mnn.param_groups(nn.DataParallel(model), {"module.head.weight": {"lr": 1.0}})
    assert [group["param_names"] for group in groups] == [["embed.weight"]]


def test_no_decay_knows_norms():
    class RMSNorm(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = nn.Parameter(torch.ones(2, 2))

    model = nn.Sequential(nn.Linear(2, 2), nn.LayerNorm((2, 2)), RMSNorm())
    found = settings_of(mnn.param_groups(model, {}, no_decay=True, weight_decay=0.1))
    decayed = {name for name, group in found.items() if group["weight_decay"]}
    assert decayed == {"0.weight"}


def test_rules_that_would_be_lost(net):
    with pytest.raises(NoMatchError) as e:
        mnn.param_groups(net, {"layer3": {"lr": 1.0}})
    assert "layer1" in e.value.hint
    with pytest.raises(NoMatchError):
        mnn.param_groups(net, {}, no_decay="norm*")
    with pytest.warns(UserWarning, match="taken by earlier rules"):
        mnn.param_groups(net, {"*": {}, "fc": {"lr": 1.0}})
    mnn.freeze(net, "layer1")
    with pytest.warns(UserWarning, match=r"'layer1'.* is frozen"):
        mnn.param_groups(net, {"layer1": {"lr": 1.0}})
    with pytest.raises(UsageError, match="params"):
        mnn.param_groups(net, {"fc": {"params": []}})
    with pytest.raises(UsageError, match="the rule 'fc' has no settings") as e:
        mnn.param_groups(net, {"fc": 1e-3})
    assert e.value.hint == "{'fc': {'lr': 0.001}}"
    with pytest.raises(UsageError, match="not a list"):
        mnn.param_groups(net, [{"lr": 1e-3}])
    with pytest.warns(UserWarning, match="will not move"):
        mnn.freeze(net, "*")
    with pytest.raises(RefusedError, match="every parameter is frozen"):
        mnn.param_groups(net, {})


def test_describe_groups(net):
    groups = mnn.param_groups(net, {"fc": {"lr": 1e-3, "betas": (0.8, 0.9)}}, lr=1e-5, eps=1e-6)
    lines = mnn.describe_groups(groups).splitlines()
    assert lines[0].split() == ["group", "params", "elements", "lr", "betas", "names"]
    assert lines[1].split() == ["0", "2", "35", "0.001", "(0.8,", "0.9)", "fc.weight,", "fc.bias"]
    assert "and 8 more" in lines[2]
    optimizer = optim.AdamW(groups, weight_decay=0.1)
    assert "weight_decay" in mnn.describe_groups(optimizer)
    assert "?" in mnn.describe_groups(optim.SGD(net.parameters(), lr=1))
    groups = mnn.param_groups(net, lr=torch.tensor(0.25))
    assert mnn.describe_groups(groups).splitlines()[1].split()[3] == "0.25"
    pairs = mnn.describe_groups([{"params": [*net.fc.named_parameters()]}])
    assert pairs.splitlines()[1].split() == ["0", "2", "35", "weight,", "bias"]
    assert mnn.describe_groups([{"params": net.fc.bias}]).splitlines()[1].split()[2] == "5"
    for odd in (net.parameters(), [{"params": net.parameters()}], [{}], [3]):
        with pytest.raises(UsageError, match="a param group is a dict with a list of params"):
            mnn.describe_groups(odd)


# ------------------------------------------------------------------ warm-up and cosine


def test_warmup_cosine_is_the_formula():
    optimizer = optim.SGD([nn.Parameter(torch.ones(1))], lr=0.4)
    optimizer.add_param_group({"params": [nn.Parameter(torch.ones(1))], "lr": 0.1})
    scheduler = mnn.warmup_cosine(optimizer, 4, 20)
    for t in range(25):
        expected = (
            (t + 1) / 4
            if t < 4
            else 0.0
            if t >= 20
            else 0.5 * (1 + math.cos(math.pi * (t - 4) / (20 - 4)))
        )
        for group, lr in zip(optimizer.param_groups, (0.4, 0.1), strict=True):
            assert group["lr"] == pytest.approx(lr * expected, abs=1e-12), t
        optimizer.step()
        scheduler.step()
    with pytest.raises(UsageError):
        mnn.warmup_cosine(optimizer, 5, 5)
    for steps in ((0.25 * 10, 10), (1, 9.5), (math.nan, 10), (1, math.inf), ("1", 10)):
        with pytest.raises(UsageError, match="must be a whole number of steps"):
            mnn.warmup_cosine(optimizer, *steps)
    whole = mnn.warmup_cosine(optimizer, 0.1 * 20, 20.0).lr_lambdas[0]
    assert vars(whole) == {"warmup_steps": 2, "total_steps": 20}
    assert type(whole.total_steps) is int
    assert mnn.warmup_cosine(optimizer, 0, 5).lr_lambdas[0](0) == 1.0


def test_the_cosine_ends_at_min_lr():
    """A learning rate, not a part of one: the same for all groups; the warm-up knows none."""
    optimizer = optim.SGD([nn.Parameter(torch.ones(1))], lr=0.4)
    for lr in (0.1, 0.005):
        optimizer.add_param_group({"params": [nn.Parameter(torch.ones(1))], "lr": lr})
    scheduler = mnn.warmup_cosine(optimizer, 4, 20, min_lr=0.01)
    seen = []
    for _ in range(25):
        seen.append(tuple(group["lr"] for group in optimizer.param_groups))
        optimizer.step()
        scheduler.step()
    assert seen[0] == pytest.approx((0.1, 0.025, 0.00125))
    assert seen[3] == seen[4] == pytest.approx((0.4, 0.1, 0.005))
    assert seen[12] == pytest.approx((0.205, 0.055, 0.005))  # half-way
    assert seen[20] == seen[24] == (0.01, 0.01, 0.005)  # no group rises
    for odd in (-0.1, math.nan, math.inf, "0.1", None):
        with pytest.raises(UsageError, match="it must be a learning rate"):
            mnn.warmup_cosine(optimizer, 1, 5, min_lr=odd)
    with pytest.raises(
        UsageError, match=r"min_lr=0.5 is above the lr of every group \(0.4 at most"
    ):
        mnn.warmup_cosine(optimizer, 1, 5, min_lr=0.5)


@pytest.mark.parametrize("at", [2, 12])
def test_min_lr_resumes(net, tmp_path, at):
    def parts():
        optimizer = optim.SGD(mnn.param_groups(net, {"fc": {"lr": 0.4}}, lr=0.1))
        return {
            "model": net,
            "optimizer": optimizer,
            "scheduler": mnn.warmup_cosine(optimizer, 4, 20, min_lr=0.01),
        }

    def go(parts, steps):
        lrs = []
        for _ in range(steps):
            parts["optimizer"].step()
            parts["scheduler"].step()
            lrs.append([group["lr"] for group in parts["optimizer"].param_groups])
        return lrs

    first = parts()
    go(first, at)
    mnn.save_checkpoint(tmp_path / "a.pt", **first)
    again = parts()
    mnn.resume(tmp_path / "a.pt", **again)
    assert go(again, 20) == go(first, 20)
    assert again["scheduler"].get_last_lr() == [0.01, 0.01]
    other = parts()
    other["scheduler"] = mnn.warmup_cosine(other["optimizer"], 4, 20)
    with pytest.raises(RefusedError, match="they differ in min_lr"):
        mnn.resume(tmp_path / "a.pt", **other)


def test_min_lr_holds_for_what_thaws_later(net):
    mnn.freeze(net, "conv1")
    optimizer = optim.SGD(mnn.param_groups(net, lr=0.4))
    scheduler = mnn.warmup_cosine(optimizer, 0, 8, min_lr=0.01)
    mnn.unfreeze(net, "conv1", optimizer=optimizer, scheduler=scheduler, lr=0.1)
    for _ in range(8):
        optimizer.step()
        scheduler.step()
    assert scheduler.get_last_lr() == pytest.approx([0.01, 0.01])


# ------------------------------------------------------------------ thawing


SCHEDULERS = {
    "cosine": lambda o: optim.lr_scheduler.CosineAnnealingLR(o, 20),
    "lambda": lambda o: optim.lr_scheduler.LambdaLR(o, lambda t: 0.9**t),
    "multiplicative": lambda o: optim.lr_scheduler.MultiplicativeLR(o, lambda t: 0.9),
    "warmup_cosine": lambda o: mnn.warmup_cosine(o, 3, 20),
    "step": lambda o: optim.lr_scheduler.StepLR(o, 2),
    "multistep": lambda o: optim.lr_scheduler.MultiStepLR(o, [2, 5]),
    "exponential": lambda o: optim.lr_scheduler.ExponentialLR(o, 0.9),
    "polynomial": lambda o: optim.lr_scheduler.PolynomialLR(o, 20),
    "restarts": lambda o: optim.lr_scheduler.CosineAnnealingWarmRestarts(o, 4),
    "onecycle": lambda o: optim.lr_scheduler.OneCycleLR(o, 0.4, total_steps=20),
    "cyclic": lambda o: optim.lr_scheduler.CyclicLR(o, 0.04, 0.4, 4),
    "sequential": lambda o: optim.lr_scheduler.SequentialLR(
        o,
        [
            optim.lr_scheduler.LinearLR(o, 0.1, total_iters=3),
            optim.lr_scheduler.CosineAnnealingLR(o, 10),
        ],
        [3],
    ),
    "chained": lambda o: optim.lr_scheduler.ChainedScheduler(
        [optim.lr_scheduler.ConstantLR(o, 0.5, 3), optim.lr_scheduler.ExponentialLR(o, 0.9)]
    ),
}


@pytest.mark.parametrize("name", SCHEDULERS)
def test_every_scheduler_keeps_what_layers_are_to_each_other(net, name):
    groups = mnn.param_groups(net, {"fc": {"lr": 8.0}}, lr=0.4, layer_decay=0.5)
    optimizer = optim.SGD(groups, momentum=0.9)
    scheduler = SCHEDULERS[name](optimizer)
    # these two have lrs of their own, and one for all groups unless they are given a list
    flat = name in ("onecycle", "cyclic")
    expected = [1.0] * 4 if flat else [160.0, 1.0, 2.0, 4.0]
    for _ in range(8):
        lrs = [group["lr"] for group in optimizer.param_groups]
        assert [lr / lrs[1] for lr in lrs] == pytest.approx(expected)
        train_step(net, optimizer, scheduler)


@pytest.mark.parametrize("name", SCHEDULERS)
@pytest.mark.parametrize("steps", [0, 2, 4])
def test_a_thawed_block_follows_the_schedule(net, name, steps):
    """From the thaw on, its lr is to its base what the first group's is to its own."""
    mnn.freeze(net, "*", exclude="fc")
    groups = mnn.param_groups(net, {}, lr=0.4)
    optimizer = optim.SGD(groups, momentum=0.9)
    scheduler = SCHEDULERS[name](optimizer)
    key = "max_lr" if name == "onecycle" else "initial_lr"
    base = optimizer.param_groups[0][key]
    for _ in range(steps):
        train_step(net, optimizer, scheduler)
    report = mnn.unfreeze(net, "layer2", optimizer=optimizer, scheduler=scheduler, lr=base / 10)
    assert report.joined == tuple(n for n, _ in net.named_parameters() if n.startswith("layer2"))
    assert optimizer.param_groups[1]["param_names"] == list(report.joined)
    before = net.layer2[0].weight.clone()
    for _ in range(12):
        old, new = optimizer.param_groups
        assert new["lr"] == pytest.approx(old["lr"] / 10, rel=1e-6, abs=1e-12)
        assert new[key] == base / 10
        assert new["momentum"] == old["momentum"]
        train_step(net, optimizer, scheduler)
    assert not torch.equal(net.layer2[0].weight, before)
    assert len(scheduler.get_last_lr()) == 2


@pytest.mark.parametrize("name", SCHEDULERS)
def test_without_lr_a_thawed_block_follows_the_schedule_of_the_others(net, name):
    """Whatever the optimizer's own lr says: no group has that."""
    mnn.freeze(net, "layer2")
    optimizer = optim.SGD(mnn.param_groups(net, {"fc": {}}, lr=0.4), lr=9.0, momentum=0.9)
    scheduler = SCHEDULERS[name](optimizer)
    train_step(net, optimizer, scheduler)
    mnn.unfreeze(net, "layer2", optimizer=optimizer, scheduler=scheduler)
    for _ in range(12):
        assert len({group["lr"] for group in optimizer.param_groups}) == 1
        train_step(net, optimizer, scheduler)


@pytest.mark.parametrize("name", ["onecycle", "cyclic"])
def test_a_thaw_does_not_choose_between_lrs_of_a_schedule(net, name):
    mnn.freeze(net, "layer2")
    optimizer = optim.SGD(mnn.param_groups(net, {"fc": {}}, lr=0.4), momentum=0.9)
    kinds = optim.lr_scheduler
    if name == "onecycle":
        scheduler = kinds.OneCycleLR(optimizer, [0.4, 0.1], total_steps=20)
    else:
        scheduler = kinds.CyclicLR(optimizer, 0.01, [0.4, 0.1])
    with pytest.raises(UsageError, match=r"\(0\.4, 0\.1\)") as e:
        mnn.unfreeze(net, "layer2", optimizer=optimizer, scheduler=scheduler)
    assert "lr=" in e.value.hint
    assert not net.layer2[0].weight.requires_grad
    mnn.unfreeze(net, "layer2", optimizer=optimizer, scheduler=scheduler, lr=0.2)
    assert optimizer.param_groups[2]["max_lr" if name == "onecycle" else "lr"] == 0.2


def test_a_thawed_group_has_what_all_groups_have_in_common(net):
    mnn.freeze(net, "layer*")
    groups = mnn.param_groups(
        net, {"fc": {"dampening": 0.1}}, lr=0.1, momentum=0.9, weight_decay=0.3, no_decay=True
    )
    optimizer = optim.SGD(groups, lr=1, weight_decay=0.7)
    mnn.unfreeze(net, "layer1", optimizer=optimizer)
    new = settings_of(optimizer.param_groups)["layer1.0.bias"]
    assert [new[key] for key in ("lr", "momentum", "weight_decay")] == [0.1, 0.9, 0.3]
    assert new["dampening"] == 0  # the groups have several: the optimizer's own
    given = {"nesterov": True, "weight_decay": 0.2, "lr": 0.5}
    mnn.unfreeze(net, "layer2", optimizer=optimizer, no_decay=True, **given)
    found = settings_of(optimizer.param_groups)
    assert len(found) == len([*net.parameters()])
    for name in ("layer2.0.weight", "layer2.0.bias", "layer2.1.weight"):
        decay = 0.2 if name == "layer2.0.weight" else 0
        expected = {"momentum": 0.9, **given, "weight_decay": decay}
        assert {key: found[name][key] for key in expected} == expected, name


def test_a_thaw_with_plateau_and_several_schedulers(net):
    mnn.freeze(net, "layer2")
    optimizer = optim.SGD([p for p in net.parameters() if p.requires_grad], lr=1.0)
    plateau = optim.lr_scheduler.ReduceLROnPlateau(optimizer, patience=0, min_lr=[0.01])
    other = optim.lr_scheduler.StepLR(optimizer, 100)
    mnn.unfreeze(net, "layer2", optimizer=optimizer, scheduler=[plateau, other], lr=0.5)
    for _ in range(9):
        plateau.step(1.0)
    assert [g["lr"] for g in optimizer.param_groups] == pytest.approx([0.01, 0.01])
    assert "param_names" not in optimizer.param_groups[1]
    optimizer.step()
    other.step()


def test_a_parameter_that_was_passed_while_frozen_is_not_added_twice(net):
    mnn.freeze(net, "layer2")
    optimizer = optim.SGD(net.parameters(), lr=1.0)
    report = mnn.unfreeze(net, "layer2", optimizer=optimizer)
    assert report.joined == ()
    assert report.changed
    assert len(optimizer.param_groups) == 1
    mnn.freeze(net, "layer2")
    with pytest.warns(UserWarning, match="keep the lr and the settings of their group"):
        mnn.unfreeze(net, "layer2", optimizer=optimizer, lr=0.1)


def test_a_thaw_that_can_not_be_done_changes_nothing(net):
    mnn.freeze(net, "layer2")
    params = [p for p in net.parameters() if p.requires_grad]
    optimizer, other = optim.SGD(params, lr=1.0), optim.SGD(params, lr=1.0)
    scheduler = optim.lr_scheduler.StepLR(other, 1)
    with pytest.raises(UsageError, match="another optimizer"):
        mnn.unfreeze(net, "layer2", optimizer=optimizer, scheduler=scheduler)
    with pytest.raises(UsageError, match="optimizer="):
        mnn.unfreeze(net, "layer2", lr=0.1)
    with pytest.raises(UsageError, match=r"no_decay, optmizer.*optimizer="):
        mnn.unfreeze(net, "layer2", optmizer=optimizer)
    with pytest.raises(UsageError, match="SGD has no setting 'beta'"):
        mnn.unfreeze(net, "layer2", optimizer=optimizer, beta=1)
    with pytest.raises(RefusedError, match="LBFGS"):
        mnn.unfreeze(net, "layer2", optimizer=optim.LBFGS(params))
    assert not net.layer2[0].weight.requires_grad
    with pytest.warns(UserWarning, match="a scheduler drives"):
        mnn.unfreeze(net, "layer2", optimizer=other)
