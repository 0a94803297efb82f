"""A checkpoint and a script that are not quite the same: another head, other groups or settings."""

from __future__ import annotations

import warnings

import pytest
import torch
from torch import nn, optim
from torch.optim import lr_scheduler

import modelctl as mc
import modelctl.nn as mnn
from modelctl.errors import AmbiguousError, RefusedError, UsageError
from tests.nn.nets import Net, same, train_step

from .loops import equal


@pytest.fixture
def trained(net):
    optimizer = optim.AdamW(net.parameters(), lr=0.1)
    scheduler = mnn.warmup_cosine(optimizer, 2, 10)
    for _ in range(4):
        train_step(net, optimizer, scheduler)
    return {"model": net, "optimizer": optimizer, "scheduler": scheduler}


def trunk(state):
    return {name: value for name, value in state.items() if not name.startswith("fc.")}


def without_names(path):
    """As a script with plain torch.save would have written it."""
    whole = torch.load(path, weights_only=True)
    for group in whole["optimizer"]["param_groups"]:
        del group["param_names"]
    torch.save(whole, path)


# ------------------------------------------------------------------ another head


def test_what_the_file_does_not_know_keeps_what_it_has(net, tmp_path):
    """A fixed table that the model has got since: not in the record, and not trained either."""
    mnn.freeze(net, "conv1")
    mnn.save_checkpoint(tmp_path / "a.pt", model=net)
    model = Net()
    model.table = nn.Parameter(torch.arange(4.0), requires_grad=False)
    model.norm = nn.BatchNorm1d(2)
    mnn.freeze(model, ["norm", "bn1"], bn_eval=True)
    state = mnn.resume(tmp_path / "a.pt", model=model, on_mismatch="skip")
    assert mnn.trainable(model).frozen == (*("table", "conv1.weight", "norm.weight", "norm.bias"),)
    assert mnn.trainable(model).eval_batchnorms == ("norm",)
    assert state.thawed == ("bn1.weight", "bn1.bias")


@pytest.mark.parametrize("named", [True, False])
@pytest.mark.parametrize("stripped", [True, False])
def test_a_new_head_starts_fresh_on_the_old_trunk(trained, tmp_path, named, stripped):
    path = tmp_path / "a.pt"
    mnn.freeze(trained["model"], "conv1")
    mnn.save_checkpoint(path, **trained, epoch=3)
    if not named:
        without_names(path)
    if stripped:
        with mc.open(path) as ckpt:
            mc.save(mc.strip_head(ckpt), path, overwrite=True)
    old = trained["model"]
    model = Net(3)
    head = [
        {"params": [p for n, p in model.named_parameters() if "fc" not in n]},
        {"params": model.fc.parameters(), "lr": 0.4, "weight_decay": 0.3},
    ]
    optimizer = optim.AdamW(head, lr=0.1)
    scheduler = mnn.warmup_cosine(optimizer, 2, 10)
    fresh_head = {name: value.clone() for name, value in model.fc.state_dict().items()}
    parts = {"model": model, "optimizer": optimizer, "scheduler": scheduler}
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with pytest.raises(RefusedError, match=r"fc\.") as e:
        mnn.resume(path, **parts)
    assert "on_mismatch='skip'" in e.value.hint
    assert "resume" in e.value.hint
    assert same(model.state_dict(), before)

    with warnings.catch_warnings():
        warnings.simplefilter("error")
        state = mnn.resume(path, **parts, on_mismatch="skip")
    assert state.epoch == 3
    assert same(trunk(model.state_dict()), trunk(old.state_dict()))
    assert same(model.fc.state_dict(), fresh_head)
    assert not model.conv1.weight.requires_grad
    assert model.fc.weight.requires_grad
    for (name, mine), theirs in zip(model.named_parameters(), old.parameters(), strict=True):
        if "fc" in name:
            assert mine not in optimizer.state
        else:
            assert equal(optimizer.state[mine], trained["optimizer"].state[theirs]), name
    assert state.fresh == ("fc.weight", "fc.bias")
    if not stripped:
        assert state.dropped == ("fc.weight", "fc.bias")
    # the new head goes by the schedule, from where it is
    first, second = optimizer.param_groups
    assert second["lr"] == pytest.approx(4 * first["lr"])
    assert second["weight_decay"] == 0.3
    for _ in range(2):
        train_step(model, optimizer, scheduler)
        assert second["lr"] == pytest.approx(4 * first["lr"])
    assert model.fc.weight in optimizer.state
    assert "fc.weight" in str(state)


def test_an_ema_copy_skips_the_head_too(net, tmp_path):
    ema = optim.swa_utils.AveragedModel(net)
    mnn.save_checkpoint(tmp_path / "a.pt", model=net, ema=ema)
    model = Net(3)
    other = optim.swa_utils.AveragedModel(model)
    with pytest.raises(RefusedError, match=r"fc\.weight"):
        mnn.resume(tmp_path / "a.pt", model=net, ema=other)
    state = mnn.resume(tmp_path / "a.pt", model=model, ema=other, on_mismatch="skip")
    assert "ema" in state.restored
    assert torch.equal(other.module.conv1.weight, net.conv1.weight)


def test_nothing_that_fits_is_refused_with_skip_too(trained, tmp_path):
    mnn.save_checkpoint(tmp_path / "a.pt", **trained)
    with pytest.raises(RefusedError, match="does not fit"):
        mnn.resume(tmp_path / "a.pt", model=nn.Linear(2, 2), on_mismatch="skip")
    with pytest.raises(UsageError, match="on_mismatch"):
        mnn.resume(tmp_path / "a.pt", model=Net(), on_mismatch="ignore")


def test_parameters_that_the_model_lacks(trained, tmp_path):
    mnn.save_checkpoint(tmp_path / "a.pt", **trained)
    whole = torch.load(tmp_path / "a.pt", weights_only=True)
    for name in ("fc.weight", "fc.bias"):
        del whole["model"][name]
    torch.save(whole, tmp_path / "a.pt")
    model = Net()
    model.fc = nn.Identity()
    optimizer = optim.AdamW(model.parameters(), lr=0.1)
    with pytest.raises(RefusedError, match=r"model lacks: fc\.weight, fc\.bias") as e:
        mnn.resume(tmp_path / "a.pt", model=model, optimizer=optimizer)
    assert "on_mismatch='skip'" in e.value.hint
    state = mnn.resume(tmp_path / "a.pt", model=model, optimizer=optimizer, on_mismatch="skip")
    assert state.dropped == ("fc.weight", "fc.bias")
    assert state.fresh == ()
    assert len(optimizer.state) == 11


# ------------------------------------------------------------------ other groups


def groups(model, *parts):
    named = dict(model.named_parameters())
    return [{"params": [p for n, p in named.items() if n.startswith(part)]} for part in parts]


@pytest.mark.parametrize("named", [True, False])
def test_other_groups_are_mapped_by_name(trained, tmp_path, named):
    """Without names in the file its own model proves them."""
    path = tmp_path / "a.pt"
    mnn.save_checkpoint(path, **trained)
    if not named:
        without_names(path)
    other = Net()
    made = optim.AdamW(groups(other, "fc", "layer", ("conv1", "bn1")), lr=0.1)
    schedule = mnn.warmup_cosine(made, 2, 10)
    mnn.resume(path, model=other, optimizer=made, scheduler=schedule)
    old = trained["optimizer"].state
    for mine, theirs in zip(other.parameters(), trained["model"].parameters(), strict=True):
        assert equal(made.state[mine], old[theirs])
    for _ in range(2):
        state = torch.get_rng_state()
        train_step(trained["model"], trained["optimizer"], trained["scheduler"])
        torch.set_rng_state(state)
        train_step(other, made, schedule)
    assert same(other.state_dict(), trained["model"].state_dict())


def test_the_freeze_record_tells_which_of_those_alike_have_state(tmp_path):
    """Three layers alike, one of them frozen and never in the optimizer, and no names."""
    net, other = (
        nn.Sequential(*(nn.Linear(4, 4, bias=False) for _ in range(3)), nn.Linear(4, 2))
        for _ in range(2)
    )
    mnn.freeze(net, "0")
    optimizer = optim.Adam([p for p in net.parameters() if p.requires_grad])
    net(torch.randn(3, 4)).square().sum().backward()
    optimizer.step()
    mnn.save_checkpoint(tmp_path / "a.pt", model=net, optimizer=optimizer)
    without_names(tmp_path / "a.pt")
    made = optim.Adam([{"params": other[3].parameters()}, {"params": other[1:3].parameters()}])
    mnn.resume(tmp_path / "a.pt", model=other, optimizer=made)
    for mine, theirs in zip(other[1:].parameters(), net[1:].parameters(), strict=True):
        assert equal(made.state[mine], optimizer.state[theirs])


def test_position_stands_where_it_fits_and_nothing_else_is_known(tmp_path):
    """An order of one's own, the same on both sides: what torch does is right."""
    net, other = (nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4)) for _ in range(2))
    optimizer = optim.Adam(list(net.parameters())[::-1])
    net(torch.randn(3, 4)).square().sum().backward()
    optimizer.step()
    mnn.save_checkpoint(tmp_path / "a.pt", model=net, optimizer=optimizer)
    without_names(tmp_path / "a.pt")
    made = optim.Adam(list(other.parameters())[::-1])
    mnn.resume(tmp_path / "a.pt", model=other, optimizer=made)
    for mine, theirs in zip(other.parameters(), net.parameters(), strict=True):
        assert equal(made.state[mine], optimizer.state[theirs])


def test_what_joins_trains_where_no_record_says_so(net, tmp_path):
    """Frozen as built, and in the optimizer of a file that plain torch.save wrote."""
    optimizer = optim.AdamW(net.parameters(), lr=0.1)
    train_step(net, optimizer)
    saved = optimizer.state_dict()
    saved["param_groups"][0]["param_names"] = [name for name, _ in net.named_parameters()]
    torch.save({"model": net.state_dict(), "optimizer": saved}, tmp_path / "a.pt")
    other = Net()
    other.conv1.requires_grad_(False)
    made = optim.AdamW([p for p in other.parameters() if p.requires_grad], lr=0.1)
    state = mnn.resume(tmp_path / "a.pt", model=other, optimizer=made)
    assert state.joined == ("conv1.weight",)
    assert other.conv1.weight.requires_grad
    assert equal(made.state[other.conv1.weight], optimizer.state[net.conv1.weight])


def test_names_for_ids(trained, tmp_path):
    """torch.distributed.checkpoint names parameters where torch numbers them."""
    mnn.save_checkpoint(tmp_path / "a.pt", **trained)
    whole = torch.load(tmp_path / "a.pt", weights_only=True)
    (group,) = whole["optimizer"]["param_groups"]
    names = group.pop("param_names")
    group["params"] = names
    state = whole["optimizer"]["state"]
    whole["optimizer"]["state"] = {names[i]: entry for i, entry in state.items()}
    torch.save(whole, tmp_path / "a.pt")
    other = Net()
    made = optim.AdamW([*other.parameters()][::-1], lr=0.1)
    mnn.resume(tmp_path / "a.pt", model=other, optimizer=made)
    for mine, theirs in zip(other.parameters(), trained["model"].parameters(), strict=True):
        assert equal(made.state[mine], trained["optimizer"].state[theirs])


# ------------------------------------------------------------------ other settings


def test_other_settings_are_said_once_and_the_saved_ones_win(net, tmp_path):
    path = tmp_path / "a.pt"
    optimizer = optim.AdamW(groups(net, "conv", "bn", "layer", "fc"), lr=0.1, eps=1e-7)
    mnn.save_checkpoint(path, model=net, optimizer=optimizer)
    built = {"lr": 0.2, "betas": (0.8, 0.9), "fused": True}
    made = optim.AdamW(groups(net, "conv", "bn", "layer", "fc"), **built)
    with pytest.warns(UserWarning, match="groups 0, 1, 2, 3: built with") as caught:
        mnn.resume(path, model=net, optimizer=made)
    (text,) = [str(w.message) for w in caught]
    assert "lr 0.2, betas (0.8, 0.9), eps 1e-08" in text
    assert "used is lr 0.1, betas (0.9, 0.999), eps 1e-07, from the checkpoint" in text
    assert caught[0].filename == __file__
    assert made.param_groups[3]["betas"] == (0.9, 0.999)
    assert made.param_groups[3]["fused"] is True
    four = enumerate(groups(net, "conv", "bn", "layer", "fc"))
    made = optim.AdamW([{**group, "lr": i + 2.0} for i, group in four])
    with pytest.warns(UserWarning, match="optimizer: 1 more of its groups") as caught:
        mnn.resume(path, model=net, optimizer=made)
    assert len(caught) == 4


def test_cycled_settings_are_the_schedulers(net, tmp_path):
    def parts(total):
        optimizer = optim.SGD(net.parameters(), lr=0.1, momentum=0.9)
        scheduler = lr_scheduler.OneCycleLR(optimizer, 0.2, total_steps=total)
        return {"model": net, "optimizer": optimizer, "scheduler": scheduler}

    one = parts(10)
    train_step(net, one["optimizer"], one["scheduler"])
    mnn.save_checkpoint(tmp_path / "a.pt", **one)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        mnn.resume(tmp_path / "a.pt", **parts(10))
    with pytest.warns(UserWarning, match="built with total_steps 20; used is total_steps 10"):
        mnn.resume(tmp_path / "a.pt", **parts(20))


@pytest.mark.parametrize(
    ("make", "match"),
    [
        (
            lambda o, n: mnn.warmup_cosine(o, 2, n),
            "scheduler: .* total_steps 20; .* total_steps 10",
        ),
        (lambda o, n: lr_scheduler.MultiStepLR(o, [n, 30]), "milestones"),
        (
            lambda o, n: lr_scheduler.SequentialLR(
                o, [lr_scheduler.ConstantLR(o), lr_scheduler.StepLR(o, n)], [3]
            ),
            r"1\.step_size 20",
        ),
        (lambda o, n: lr_scheduler.ReduceLROnPlateau(o, patience=n), "patience 20"),
        (lambda o, n: lr_scheduler.CosineAnnealingWarmRestarts(o, n), "T_0 20"),
    ],
)
def test_other_schedules_are_said(net, tmp_path, make, match):
    def parts(number):
        optimizer = optim.SGD(net.parameters(), lr=0.1)
        return {"model": net, "optimizer": optimizer, "scheduler": make(optimizer, number)}

    one = parts(10)
    for _ in range(4):
        one["optimizer"].step()
        plateau = isinstance(one["scheduler"], lr_scheduler.ReduceLROnPlateau)
        one["scheduler"].step(*([1.0] if plateau else []))
    mnn.save_checkpoint(tmp_path / "a.pt", **one)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        mnn.resume(tmp_path / "a.pt", **parts(10))
    with pytest.warns(UserWarning, match=match):
        mnn.resume(tmp_path / "a.pt", **parts(20))


# ------------------------------------------------------------------ several


def two(net, names=("trunk", "head")):
    made = [
        optim.Adam([p for n, p in net.named_parameters() if "fc" not in n]),
        optim.SGD(net.fc.parameters(), lr=0.1, momentum=0.9),
    ]
    return made if names is None else dict(zip(names, made, strict=True))


def test_several_are_matched_by_what_they_are_called(net, tmp_path):
    path = tmp_path / "a.pt"
    mnn.save_checkpoint(path, model=net, optimizer=two(net))
    state = mnn.resume(path, model=net, optimizer={"head": two(net)["head"]})
    assert state.unused == ("optimizer 'trunk'",)
    for given, hint in (
        (two(net, None), "a dict with the names that were saved: trunk, head"),
        (two(net, ("trunk", "top")), "trunk, head"),
        (two(net)["head"], "trunk, head"),
    ):
        with pytest.raises(RefusedError, match=r"has 2 optimizers \(trunk, head\)") as e:
            mnn.resume(path, model=net, optimizer=given)
        assert hint in e.value.hint
    mnn.save_checkpoint(path, model=net, optimizer=two(net, None))
    mnn.resume(path, model=net, optimizer=tuple(two(net, None)))
    with pytest.raises(RefusedError, match="2 optimizers, 1 optimizer is given") as e:
        mnn.resume(path, model=net, optimizer=two(net, None)[:1])
    assert "a list" in e.value.hint
    one = optim.Adam(net.parameters())
    mnn.save_checkpoint(path, model=net, optimizer={"main": one})
    mnn.resume(path, model=net, optimizer=one)
    with pytest.raises(RefusedError, match=r"1 optimizer \(main\), 1 optimizer \(other\) is"):
        mnn.resume(path, model=net, optimizer={"other": one})


def test_a_scheduler_of_another_optimizer(net, tmp_path):
    mnn.save_checkpoint(tmp_path / "a.pt", model=net)
    stranger = lr_scheduler.StepLR(optim.SGD(net.parameters()), 1)
    with pytest.raises(UsageError, match="another optimizer"):
        mnn.resume(tmp_path / "a.pt", model=net, optimizer=two(net), scheduler=stranger)


# ------------------------------------------------------------------ scaler and EMA


def scaler(**options):
    return torch.amp.GradScaler("cpu", **options)


def test_scalers(net, tmp_path):
    path = tmp_path / "a.pt"
    mnn.save_checkpoint(path, model=net, scaler=scaler(init_scale=8.0))
    assert torch.load(path, weights_only=True)["scaler"]["scale"] == 8.0
    assert mnn.resume(path, model=net).unused == ("scaler",)
    assert mnn.resume(path, model=net, scaler=scaler(enabled=False)).unused == ("scaler",)
    with pytest.warns(UserWarning, match="scaler: built with growth_interval 7; used is growth_i"):
        mnn.resume(path, model=net, scaler=scaler(growth_interval=7))
    live = scaler()
    live.scale(torch.zeros(1))  # its scale is a tensor from here on
    assert "scaler" in mnn.resume(path, model=net, scaler=live).restored
    assert live.get_scale() == 8.0
    whole = torch.load(path, weights_only=True)
    whole["amp_scaler"] = {**whole["scaler"], "scale": "8"}
    torch.save(whole, path)
    with pytest.raises(AmbiguousError, match="scaler, amp_scaler"):
        mnn.resume(path, model=net, scaler=live)
    del whole["scaler"]
    torch.save(whole, path)
    with pytest.raises(RefusedError, match="no number for scale"):
        mnn.resume(path, model=net, scaler=live)
    mnn.save_checkpoint(path, model=net, scaler=scaler(enabled=False))
    with pytest.warns(UserWarning, match="not in the checkpoint: scaler"):
        assert mnn.resume(path, model=net, scaler=live).missing == ("scaler",)


def test_an_ema_that_is_a_state_dict(net, tmp_path):
    ema = {name: value.clone() for name, value in net.state_dict().items()}
    mnn.save_checkpoint(tmp_path / "a.pt", model=net, ema={**ema, "decay": 0.9})
    target = {name: torch.zeros_like(value) for name, value in ema.items()}
    kept = target["fc.weight"]
    target["decay"] = 0.5
    mnn.resume(tmp_path / "a.pt", model=net, ema=target)
    assert target.pop("decay") == 0.9
    assert same(target, ema)
    assert target["fc.weight"] is kept
    copy = Net()
    with torch.no_grad():
        copy.fc.weight.zero_()
    mnn.save_checkpoint(tmp_path / "b.pt", model=net, ema=ema)
    mnn.resume(tmp_path / "b.pt", model=net, ema=copy)
    assert same(copy.state_dict(), ema)
    target["conv1.weight"] = torch.zeros(3)
    with pytest.raises(RefusedError, match=r"ema does not fit.*conv1\.weight"):
        mnn.resume(tmp_path / "b.pt", model=net, ema=target)
