from __future__ import annotations

import argparse
import pickle
import random
import warnings
import zipfile

import pytest
import torch
from torch import nn, optim

import modelctl.nn as mnn
from modelctl.errors import AmbiguousError, RefusedError, UnsupportedError
from tests.nn.nets import Net, same, train_step

from .loops import equal

# ------------------------------------------------------------------ what does not fit


def snapshot(model, *others):
    parts = [model.state_dict(), *(other.state_dict() for other in others)]
    import copy

    return copy.deepcopy(parts), torch.get_rng_state().clone(), random.getstate()


@pytest.fixture
def trained(net):
    optimizer = optim.AdamW(mnn.param_groups(net, {"fc": {"lr": 0.1}}, lr=0.01))
    scheduler = mnn.warmup_cosine(optimizer, 2, 10)
    for _ in range(3):
        train_step(net, optimizer, scheduler)
    return net, optimizer, scheduler


def adamw(model, **options):
    return optim.AdamW(mnn.param_groups(model, {"fc": {"lr": 0.1}}, lr=0.01), **options)


# torch before 2.7 writes the same settings of Adam and AdamW
TOLD = "decoupled_weight_decay" in optim.Adam([torch.zeros(1)]).defaults


@pytest.mark.parametrize(
    ("change", "match"),
    [
        ("model", "does not fit the model"),
        ("sgd", "is no SGD"),
        ("adam", "is no Adam" if TOLD else "whose settings differ"),
        ("adamax", "is no Adamax"),
        ("scheduler", "is no StepLR"),
        ("schedulers", "has 1 scheduler, 2 schedulers are given"),
        ("state", r"state of 'fc\.weight' is .*'exp_avg' is \[2, 2\]"),
        ("rng", "rng is not one"),
        ("object", "optimizer.state.0.odd"),
    ],
)
def test_what_does_not_fit_changes_nothing(trained, tmp_path, change, match):
    net, optimizer, scheduler = trained
    path = tmp_path / "a.pt"
    mnn.save_checkpoint(path, model=net, optimizer=optimizer, scheduler=scheduler, epoch=1)
    whole = torch.load(path, weights_only=True)
    if change == "state":
        whole["optimizer"]["state"][0]["exp_avg"] = torch.zeros(2, 2)
    elif change == "rng":
        whole["rng"]["python"] = (3, (1, 2), None)
    elif change == "object":
        whole["optimizer"]["state"][0]["odd"] = argparse.Namespace(a=1)
    torch.save(whole, path)
    other = Net(3 if change == "model" else 5)
    kinds = {"sgd": optim.SGD, "adam": optim.Adam, "adamax": optim.Adamax}
    made = kinds[change](other.parameters()) if change in kinds else adamw(other)
    schedulers = [mnn.warmup_cosine(made, 2, 10)]
    if change == "scheduler":
        schedulers = optim.lr_scheduler.StepLR(made, 2)
    elif change == "schedulers":
        schedulers.append(optim.lr_scheduler.StepLR(made, 2))
    each = schedulers if isinstance(schedulers, list) else [schedulers]
    before = snapshot(other, made, *each)
    with pytest.raises((RefusedError, UnsupportedError), match=match) as e:
        mnn.resume(path, model=other, optimizer=made, scheduler=schedulers)
    assert e.value.hint
    assert all(map(equal, snapshot(other, made, *each), before))


def test_a_same_shape_swap_is_mapped_by_name(tmp_path):
    """torch's load_state_dict gives each the other's state here."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(4, 4, bias=False), nn.Linear(4, 4, bias=False))
    optimizer = optim.Adam(net.named_parameters(), lr=0.1)
    net(torch.randn(3, 4)).square().sum().backward()
    optimizer.step()
    mnn.save_checkpoint(tmp_path / "a.pt", model=net, optimizer=optimizer)
    other = nn.Sequential(nn.Linear(4, 4, bias=False), nn.Linear(4, 4, bias=False))
    for named in (reversed([*other.named_parameters()]), reversed([*other.parameters()])):
        swapped = optim.Adam(list(named), lr=0.1)
        mnn.resume(tmp_path / "a.pt", model=other, optimizer=swapped)
        for mine, theirs in zip(other.parameters(), net.parameters(), strict=True):
            assert equal(swapped.state[mine], optimizer.state[theirs])
    assert "param_names" not in swapped.param_groups[0]


def test_groups_in_another_order_take_their_schedule_with_them(trained, tmp_path):
    net, optimizer, scheduler = trained
    mnn.save_checkpoint(tmp_path / "a.pt", model=net, optimizer=optimizer, scheduler=scheduler)
    other = Net()
    groups = mnn.param_groups(other, {"fc": {"lr": 0.1}}, lr=0.01)[::-1]
    made = optim.AdamW(groups)
    schedule = mnn.warmup_cosine(made, 2, 10)
    mnn.resume(tmp_path / "a.pt", model=other, optimizer=made, scheduler=schedule)
    assert schedule.base_lrs == [0.01, 0.1]
    for _ in range(3):
        lrs = [g["lr"] for g in optimizer.param_groups]
        assert [g["lr"] for g in made.param_groups] == lrs[::-1]
        train_step(net, optimizer, scheduler)
        train_step(other, made, schedule)


def test_a_split_group_is_fine_and_a_mixed_one_refused(trained, tmp_path):
    net, optimizer, _ = trained
    mnn.save_checkpoint(tmp_path / "a.pt", model=net, optimizer=optimizer)
    split = optim.AdamW(mnn.param_groups(net, {"fc": {"lr": 0.1}, "layer1": {}}, lr=0.01))
    mnn.resume(tmp_path / "a.pt", model=net, optimizer=split)
    assert equal(split.state[net.layer1[0].weight], optimizer.state[net.layer1[0].weight])
    assert split.param_groups[1]["lr"] == optimizer.param_groups[1]["lr"]
    with pytest.raises(RefusedError, match="settings differ"):
        mnn.resume(tmp_path / "a.pt", model=net, optimizer=optim.AdamW(net.parameters(), lr=0.01))


def test_another_lr_warns_and_the_saved_one_is_used(trained, tmp_path):
    net, optimizer, scheduler = trained
    mnn.save_checkpoint(tmp_path / "a.pt", model=net, optimizer=optimizer, scheduler=scheduler)
    other = Net()
    made = optim.AdamW(mnn.param_groups(other, {"fc": {"lr": 0.5}}, lr=0.01))
    schedule = mnn.warmup_cosine(made, 2, 10)
    with pytest.warns(UserWarning, match=r"group 0: built with lr 0\.5; used is lr 0\.1"):
        state = mnn.resume(tmp_path / "a.pt", model=other, optimizer=made, scheduler=schedule)
    assert state.lr == made.param_groups[0]["lr"] == optimizer.param_groups[0]["lr"]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        again = adamw(other)
        schedule = mnn.warmup_cosine(again, 2, 10)
        mnn.resume(tmp_path / "a.pt", model=other, optimizer=again, scheduler=schedule)


def test_how_the_optimizer_runs_stays_as_built(trained, tmp_path):
    net, optimizer, _ = trained
    mnn.save_checkpoint(tmp_path / "a.pt", model=net, optimizer=optimizer)
    made = adamw(net, foreach=True, weight_decay=0.7)
    mnn.resume(tmp_path / "a.pt", model=net, optimizer=made)
    assert made.param_groups[0]["foreach"] is True
    assert made.param_groups[0]["weight_decay"] == 0.01


def test_the_record_is_applied_exactly(net, tmp_path):
    """A thaw before the save is a thaw after it, although the script freezes at its start."""
    mnn.freeze(net, "*", exclude="fc", bn_eval=True)
    optimizer = optim.SGD(net.parameters(), lr=0.1)
    mnn.unfreeze(net, "layer2", optimizer=optimizer)
    mnn.save_checkpoint(tmp_path / "a.pt", model=net, optimizer=optimizer)
    other = Net()
    mnn.freeze(other, "*", exclude="fc", bn_eval=True)
    state = mnn.resume(
        tmp_path / "a.pt", model=other, optimizer=optim.SGD(other.parameters(), lr=0.1)
    )
    assert state.joined == ()
    assert mnn.freeze_record(other) == mnn.freeze_record(net)
    assert other.layer2[1].training
    assert type(other.layer2[1]) is nn.BatchNorm2d
    mnn.unfreeze(net, "*")
    mnn.save_checkpoint(tmp_path / "a.pt", model=net)
    mnn.resume(tmp_path / "a.pt", model=other)
    assert all(p.requires_grad for p in other.parameters())


def test_whatever_device_it_was_saved_on(net, tmp_path):
    """As on a machine with four GPUs, by the names of the devices in the file."""
    optimizer = optim.Adam(net.parameters())
    train_step(net, optimizer)
    mnn.save_checkpoint(tmp_path / "a.pt", model=net, optimizer=optimizer)
    with (
        zipfile.ZipFile(tmp_path / "a.pt") as source,
        zipfile.ZipFile(tmp_path / "b.pt", "w", zipfile.ZIP_STORED) as target,
    ):
        for name in source.namelist():
            data = source.read(name)
            if name.endswith("data.pkl"):
                data = data.replace(b"X\3\0\0\0cpu", b"X\6\0\0\0cuda:3")
            target.writestr(name, data)
    with pytest.raises((RuntimeError, pickle.UnpicklingError), match=r"CUDA|cuda"):
        torch.load(tmp_path / "b.pt", weights_only=True)
    other = Net()
    made = optim.Adam(other.parameters(), fused=True)
    mnn.resume(tmp_path / "b.pt", model=other, optimizer=made)
    assert same(other.state_dict(), net.state_dict())
    for mine, theirs in zip(other.parameters(), net.parameters(), strict=True):
        assert equal(made.state[mine], optimizer.state[theirs])
    train_step(other, made)


def test_rng_false_leaves_the_generators(net, tmp_path):
    mnn.save_checkpoint(tmp_path / "a.pt", model=net)
    torch.manual_seed(5)
    before = torch.get_rng_state()
    state = mnn.resume(tmp_path / "a.pt", model=net, rng=False)
    assert torch.equal(torch.get_rng_state(), before)
    assert state.unused == ("rng",)


# ------------------------------------------------------------------ merged checkpoints


def merged(path, model, optimizer, **more):
    """What ``modelctl merge`` writes: no rng, no param_names."""
    saved = optimizer.state_dict()
    for group in saved["param_groups"]:
        group.pop("param_names", None)
    torch.save({"model": model.state_dict(), "optimizer": saved, "epoch": 12, **more}, path)


def test_a_merged_checkpoint_resumes_and_reports_what_is_missing(trained, tmp_path):
    net, optimizer, _ = trained
    merged(tmp_path / "a.pt", net, optimizer, lr=0.03)
    other = Net()
    made = adamw(other)
    schedule = mnn.warmup_cosine(made, 2, 10)
    with pytest.warns(UserWarning, match="not in the checkpoint: scheduler"):
        state = mnn.resume(tmp_path / "a.pt", model=other, optimizer=made, scheduler=schedule)
    assert (state.epoch, state.step) == (12, None)
    assert state.missing == ("scheduler", "rng")
    assert same(other.state_dict(), net.state_dict())
    assert equal(made.state_dict()["state"], optimizer.state_dict()["state"])
    assert "scheduler" in str(state)
    assert "epoch 12" in str(state)


def test_a_merged_model_alone(net, tmp_path):
    torch.save({"model": net.state_dict(), "epoch": 3, "lr": 0.25}, tmp_path / "a.pt")
    assert mnn.resume(tmp_path / "a.pt", model=Net()).lr == 0.25
    optimizer = optim.SGD(net.parameters(), lr=0.1)
    with pytest.warns(UserWarning, match=r"checkpoint's lr is 0\.25"):
        state = mnn.resume(tmp_path / "a.pt", model=net, optimizer=optimizer)
    assert state.missing == ("optimizer", "rng")
    assert state.lr == 0.1


def test_an_optimizer_over_a_part_goes_where_only_one_order_fits(net, tmp_path):
    head = optim.Adam(net.fc.parameters(), lr=0.1)
    train_step(net, head)
    merged(tmp_path / "a.pt", net, head)
    whole = optim.Adam(net.parameters(), lr=0.1)
    state = mnn.resume(tmp_path / "a.pt", model=net, optimizer=whole)
    assert equal(whole.state[net.fc.weight], head.state[net.fc.weight])
    assert net.conv1.weight not in whole.state
    assert state.fresh[0] == "conv1.weight"
    assert len(state.fresh) == len(list(net.parameters())) - 2
    train_step(net, whole)


def test_an_order_that_is_not_certain_is_refused(net, tmp_path):
    part = optim.Adam([net.bn1.weight], lr=0.1)
    train_step(net, part)
    merged(tmp_path / "a.pt", net, part)
    before = {k: v.clone() for k, v in net.state_dict().items()}
    with pytest.raises(AmbiguousError, match="in more than one way"):
        mnn.resume(tmp_path / "a.pt", model=net, optimizer=optim.Adam(net.parameters(), lr=0.1))
    with pytest.raises(RefusedError, match="in order"):
        mnn.resume(tmp_path / "a.pt", model=net, optimizer=optim.Adam(net.fc.parameters()))
    assert same(net.state_dict(), before)


def test_names_relative_to_a_part_are_the_optimizers_own(net, tmp_path):
    head = optim.Adam(net.fc.named_parameters(), lr=0.1)
    train_step(net, head)
    mnn.save_checkpoint(tmp_path / "a.pt", model=net, optimizer=head)
    made = optim.Adam(list(net.fc.named_parameters())[::-1], lr=0.1)
    mnn.resume(tmp_path / "a.pt", model=net, optimizer=made)
    assert equal(made.state[net.fc.weight], head.state[net.fc.weight])
