"""Settings that one torch writes into param_groups and another does not know."""

from __future__ import annotations

import warnings

import pytest
import torch
from torch import nn, optim

import modelctl.nn as mnn
from modelctl.errors import RefusedError

from .loops import equal

DECOUPLED = "decoupled_weight_decay"


def made(cls=optim.AdamW, **options):
    net = nn.Linear(3, 2)
    return net, cls(net.parameters(), lr=0.1, **options)


def saved(path, cls=optim.AdamW, options=None, **keys):
    """A checkpoint after a step whose groups have these keys; None takes one out."""
    net, optimizer = made(cls, **(options or {}))
    net(torch.ones(1, 3)).sum().backward()
    optimizer.step()
    state = optimizer.state_dict()
    for group in state["param_groups"]:
        group.update(keys)
        for key in [key for key, value in keys.items() if value is None]:
            del group[key]
    torch.save({"model": net.state_dict(), "optimizer": state}, path)
    return net, optimizer


def old(cls=optim.AdamW, without=(DECOUPLED,), **options):
    """An optimizer as a torch makes it that does not have these settings."""
    net, optimizer = made(cls, **options)
    for key in without:
        optimizer.defaults.pop(key, None)
        for group in optimizer.param_groups:
            group.pop(key, None)
    return net, optimizer


def resumed(path, net, optimizer):
    """What it warned of."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        mnn.resume(path, model=net, optimizer=optimizer, rng=False)
    return [str(one.message) for one in caught]


@pytest.mark.parametrize(
    ("cls", "does"), [(optim.AdamW, True), (optim.Adam, False), (optim.NAdam, False)]
)
def test_what_the_class_does_anyway_is_no_difference(tmp_path, cls, does):
    """AdamW of 2.6 and later says that its decay is decoupled; that of 2.4 just does it."""
    path = tmp_path / "a.pt"
    theirs, saver = saved(path, cls, **{DECOUPLED: does})
    net, optimizer = old(cls)
    assert resumed(path, net, optimizer) == []
    for mine, other in zip(net.parameters(), theirs.parameters(), strict=True):
        assert equal(optimizer.state[mine], saver.state[other])
    # the other way round
    saved(path, cls, **{DECOUPLED: None, "maximize": None})
    net, optimizer = made(cls)
    before = dict(optimizer.param_groups[0])
    assert resumed(path, net, optimizer) == []
    after = optimizer.param_groups[0]
    assert {key: after[key] for key in before} == before


@pytest.mark.parametrize(("cls", "says"), [(optim.AdamW, False), (optim.Adam, True)])
def test_what_the_class_does_not_do_is_refused(tmp_path, cls, says):
    saved(tmp_path / "a.pt", cls, **{DECOUPLED: says})
    for net, optimizer in (old(cls), made(cls)):
        with pytest.raises(RefusedError, match=rf"is no {cls.__name__}: .* {DECOUPLED}") as e:
            resumed(tmp_path / "a.pt", net, optimizer)
        assert "resume without optimizer=" in e.value.hint


def test_a_class_derived_from_one_of_torchs_does_what_that_does(tmp_path):
    class Mine(optim.AdamW):
        pass

    saved(tmp_path / "a.pt", **{DECOUPLED: True})
    assert resumed(tmp_path / "a.pt", *old(Mine)) == []
    saved(tmp_path / "a.pt", **{DECOUPLED: False})
    with pytest.raises(RefusedError, match="is no Mine"):
        resumed(tmp_path / "a.pt", *old(Mine))


def test_maximize_that_this_torch_lacks(tmp_path):
    path = tmp_path / "a.pt"
    saved(path, maximize=False)
    assert resumed(path, *old(without=("maximize",))) == []
    saved(path, options={"maximize": True})
    (note,) = resumed(path, *made())
    assert "built with maximize False; used is maximize True" in note
    with pytest.raises(RefusedError, match="differ in maximize"):
        resumed(path, *old(without=("maximize",)))


def test_settings_that_a_later_torch_may_have_got_keep_their_default(tmp_path):
    saved(tmp_path / "a.pt")
    net, optimizer = made()
    optimizer.defaults["cautious"] = False
    optimizer.param_groups[0]["cautious"] = False
    assert resumed(tmp_path / "a.pt", net, optimizer) == []
    assert optimizer.param_groups[0]["cautious"] is False


def test_keys_that_mean_nothing_here_are_said(tmp_path):
    path = tmp_path / "a.pt"
    saved(path, cautious=True, lr_scale=0.5)
    net, optimizer = made()
    (note,) = resumed(path, net, optimizer)
    assert note.startswith("optimizer: cautious, lr_scale in the checkpoint's groups")
    assert "no setting of AdamW here" in note
    assert optimizer.param_groups[0]["lr_scale"] == 0.5
    net = nn.Linear(3, 2)
    groups = [{"params": net.parameters(), "lr_scale": 0.5, "cautious": True}]
    assert resumed(path, net, optim.AdamW(groups, lr=0.1)) == []


def test_what_a_scheduler_left_in_the_groups_is_no_such_key(tmp_path):
    net, optimizer = made(optim.SGD, momentum=0.9)
    optim.lr_scheduler.OneCycleLR(optimizer, 0.2, total_steps=10)
    assert {"initial_lr", "max_lr", "min_lr"} <= optimizer.param_groups[0].keys()
    torch.save({"model": net.state_dict(), "optimizer": optimizer.state_dict()}, tmp_path / "a.pt")
    net, optimizer = made(optim.SGD, momentum=0.9)
    notes = resumed(tmp_path / "a.pt", net, optimizer)
    assert not any("no setting" in note for note in notes)


@pytest.mark.parametrize("cls", [optim.RAdam, optim.Adamax, optim.NAdam])
def test_a_setting_that_only_another_kind_has(tmp_path, cls):
    saved(tmp_path / "a.pt", optim.Adam, **{DECOUPLED: None})
    with pytest.raises(RefusedError, match=f"is no {cls.__name__}: .* amsgrad"):
        resumed(tmp_path / "a.pt", *made(cls))


def test_sgd_into_muon_and_back(tmp_path):
    """They have the same state: only their settings tell them apart."""
    if not hasattr(optim, "Muon"):
        pytest.skip("this torch has no Muon")
    pairs = {}
    for cls in (optim.SGD, optim.Muon):
        net = nn.Linear(3, 2, bias=False)
        optimizer = cls(net.parameters(), lr=0.1, momentum=0.9)
        net(torch.ones(1, 3)).sum().backward()
        optimizer.step()
        whole = {"model": net.state_dict(), "optimizer": optimizer.state_dict()}
        torch.save(whole, tmp_path / f"{cls.__name__}.pt")
        pairs[cls.__name__] = net, optimizer
    for name, other in (("SGD", "Muon"), ("Muon", "SGD")):
        with pytest.raises(RefusedError, match=f"is no {other}"):
            resumed(tmp_path / f"{name}.pt", *pairs[other])
