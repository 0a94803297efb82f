"""lr_find: what it finds, and that nothing is left of it."""

from __future__ import annotations

import copy
import math
import pickle
import random
import sys
from itertools import pairwise

import numpy as np
import pytest
import torch
from torch import nn, optim
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

import modelctl.nn as mnn
from modelctl.errors import MissingExtraError, NoMatchError, RefusedError, UsageError
from tests.nn.nets import Net


class Counted(Net):
    """Draws from all generators, counts its forwards, and makes a buffer anew each time."""

    def __init__(self):
        super().__init__()
        self.calls, self.kind = 0, "plain"
        self.register_buffer("last", torch.zeros(2))
        self.register_buffer("wide", torch.zeros(1).expand(4))

    def forward(self, x):
        self.calls += 1
        self.cache = x
        self.last = x.detach().mean((0, 2, 3))[:2]
        return super().forward(x + 0.01 * random.random() + 0.01 * np.random.rand())


def data(size=4, **options):
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(20, 3, 8, 8, generator=generator)
    y = torch.randint(5, (20,), generator=generator)
    return DataLoader(TensorDataset(x, y), batch_size=size, **options)


def np_state():
    kind, keys, *rest = np.random.get_state()
    return kind, keys.tolist(), rest


def snapshot(model, optimizer, loader):
    """All that a trial may touch, as bytes and objects."""

    def plain(value):
        if isinstance(value, torch.Tensor):
            return (id(value), value.dtype, value.shape, value.stride(), value.tolist())
        if isinstance(value, dict):
            return {key if isinstance(key, str) else id(key): plain(v) for key, v in value.items()}
        if isinstance(value, list | tuple):
            return [plain(one) for one in value]
        return value

    bits = {n: v.detach().contiguous().view(torch.uint8).tolist() if v.dim() else v.item()
            for n, v in (*model.named_parameters(), *model.named_buffers())}  # fmt: skip
    own = {"training", "calls", "kind", "cache"}
    return {
        "bits": bits,
        "tensors": plain(dict(model.named_parameters()) | dict(model.named_buffers())),
        "modules": [
            {k: v for k, v in vars(m).items() if k in own} | {"all": [*vars(m)]}
            for m in model.modules()
        ],
        "grads": {n: plain(p.grad) for n, p in model.named_parameters()},
        "state": plain(dict(optimizer.state)),
        "groups": plain(optimizer.param_groups),
        "optimizer": {k: plain(v) for k, v in vars(optimizer).items() if k.startswith("_opt_")},
        "rng": (torch.get_rng_state().tolist(), random.getstate(), pickle.dumps(np_state())),
        "generator": loader.generator and loader.generator.get_state().tolist(),
        "iterator": id(loader._iterator),
    }


OPTIMIZERS = {
    "sgd": lambda groups: optim.SGD(groups, lr=0.1, momentum=0.9, weight_decay=0.1),
    "adamw": lambda groups: optim.AdamW(groups, lr=0.1),
    "foreach": lambda groups: optim.AdamW(groups, lr=0.1, foreach=True, amsgrad=True),
    "fused": lambda groups: optim.AdamW(groups, lr=0.1, fused=True),
    "tensor lr": lambda groups: optim.AdamW(groups, lr=torch.tensor(0.1), foreach=False),
    "rprop": lambda groups: optim.Rprop(groups, lr=0.1),
}


@pytest.mark.parametrize("trained", [False, True], ids=["new", "trained"])
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_no_trace(name, trained):
    torch.manual_seed(0)
    model = Counted()
    mnn.freeze(model, ["bn1", "conv1"], bn_eval=True)
    model.layer1.eval()
    optimizer = OPTIMIZERS[name](
        [
            {"params": [*model.fc.parameters()]},
            {"params": [p for n, p in model.named_parameters() if "layer" in n], "lr": 0.01},
        ]
    )
    loader = data(shuffle=True, generator=torch.Generator().manual_seed(3))
    if trained:
        for x, y in loader:
            optimizer.zero_grad()
            F.cross_entropy(model(x), y).backward()
            optimizer.step()  # and leaves a gradient
        scheduler = mnn.warmup_cosine(optimizer, 2, 10)
        scheduler.step()
        assert all(p.grad is not None for p in model.fc.parameters())
    with torch.no_grad():
        model.fc.bias[0] = -0.0
        model.layer2[1].running_mean[0] = math.nan
    before = snapshot(model, optimizer, loader)
    found = mnn.lr_find(model, optimizer, loader, start=1e-3, end=1.0, steps=12)
    assert len(found.lrs) > 3
    after = snapshot(model, optimizer, loader)
    for what, value in before.items():
        assert repr(after[what]) == repr(value), what  # nan is not nan
    assert model.calls == (5 if trained else 0)


def test_training_goes_on_as_if_nothing_had_been():
    def trained(find):
        torch.manual_seed(0)
        random.seed(0)
        np.random.seed(0)
        model = Counted()
        optimizer = optim.AdamW(model.parameters(), lr=0.01)
        scheduler = mnn.warmup_cosine(optimizer, 2, 10)
        loader = data(shuffle=True)
        for epoch in range(3):
            if find and epoch < 2:
                mnn.lr_find(model, optimizer, loader, steps=15)
            for x, y in loader:
                optimizer.zero_grad()
                F.cross_entropy(model(x), y).backward()
                optimizer.step()
            scheduler.step()
        return {**model.state_dict(), "lr": torch.tensor(optimizer.param_groups[0]["lr"])}

    plain, found = trained(False), trained(True)
    assert all(torch.equal(value, found[name]) for name, value in plain.items())


def test_no_trace_either_where_it_raises():
    model, loader = Counted(), data()
    optimizer = optim.AdamW(model.parameters(), lr=0.1)
    calls = []

    def step():
        calls.append(1)
        if len(calls) == 4:
            raise ValueError("no more")
        x, y = next(iter(loader))
        return F.cross_entropy(model(x), y)

    model.eval()
    before = snapshot(model, optimizer, loader)
    with pytest.raises(ValueError, match="no more"):
        mnn.lr_find(model, optimizer, step)
    assert repr(snapshot(model, optimizer, loader)) == repr(before)


def test_it_trains_meanwhile_in_train_mode():
    model = Net().eval()
    optimizer = optim.SGD(model.parameters(), lr=0.1)
    weights, modes = [], []

    def step():
        weights.append(model.fc.weight.detach().clone())
        modes.append(model.training)
        return model(torch.randn(4, 3, 8, 8)).square().mean()

    with torch.no_grad():
        found = mnn.lr_find(model, optimizer, step, start=0.01, end=0.1, steps=5)
    assert modes == [True] * 5
    assert not model.training
    assert all(not torch.equal(a, b) for a, b in pairwise(weights))
    assert found.lrs == pytest.approx([0.01 * 10 ** (i / 4) for i in range(5)])


def test_modes_go_back_by_each_module_s_own_train():
    """LoRA layers merge their weights there."""
    calls = []

    class Merging(nn.Linear):
        def train(self, mode=True):
            calls.append(mode)
            return super().train(mode)

    model = nn.Sequential(Merging(2, 2)).eval()
    calls.clear()
    batch = (torch.ones(2, 2), torch.zeros(2, dtype=torch.long))
    mnn.lr_find(model, optim.SGD(model.parameters(), lr=0.1), [batch], steps=3, end=0.1)
    assert (calls[0], calls[-1], model[0].training) == (True, False, False)


def test_a_parabola_falls_and_runs_away():
    """Of x²/2 by plain descent: each step multiplies x by 1 - lr, so that it ends at lr 2."""
    weight = nn.Parameter(torch.tensor([3.0]))
    model = nn.Module()
    model.weight = weight
    optimizer = optim.SGD(model.parameters(), lr=0.1)
    half = lambda: weight.square().sum() / 2  # noqa: E731
    found = mnn.lr_find(model, optimizer, half, start=1e-4, end=100.0, steps=101)
    assert found.diverged
    assert found.losses[0] == 4.5
    assert 2 < found.lrs[-1] < 20
    assert 1e-3 < found.steepest < 1
    assert found.tenth == found.lrs[found.smoothed.index(min(found.smoothed))] / 10
    assert found.steepest < found.tenth * 10
    assert "the loss ran away there\nsuggested: steepest descent" in str(found)
    assert weight.item() == 3


def test_a_loss_that_does_not_fall_suggests_nothing():
    model = nn.Linear(1, 1)
    grown = iter(range(1, 1000))
    step = lambda: model.weight.sum() * 0 + next(grown) ** 0.1  # noqa: E731
    found = mnn.lr_find(model, optim.SGD(model.parameters(), lr=0.1), step, steps=30)
    assert not found.diverged
    assert (found.steepest, found.tenth) == (None, None)
    assert str(found).endswith("no suggestion: the loss does not fall")


def test_a_loss_below_zero_is_no_divergence():
    weight = nn.Parameter(torch.zeros(1))
    model = nn.ParameterList([weight])
    step = lambda: weight.sum() - 5  # noqa: E731
    found = mnn.lr_find(model, optim.SGD([weight], lr=0.1), step, end=1e-3, steps=20)
    assert (found.diverged, len(found.lrs)) == (False, 20)


def test_groups_keep_what_they_are_to_each_other():
    model, seen = Net(), []
    groups = mnn.param_groups(model, {"fc": {"lr": 1.0}}, lr=0.1)
    optimizer = optim.SGD(groups)
    mnn.warmup_cosine(optimizer, 10, 20)  # whatever the schedule made of them by now

    def step():
        seen.append([group["lr"] for group in optimizer.param_groups])
        return model(torch.ones(2, 3, 8, 8)).square().mean()

    found = mnn.lr_find(model, optimizer, step, start=1e-4, end=1e-2, steps=3)
    assert seen == [pytest.approx([lr, lr / 10]) for lr in (1e-4, 1e-3, 1e-2)]
    assert found.lrs == pytest.approx((1e-4, 1e-3, 1e-2))


def test_loaders_that_end_begin_anew_and_iterators_end():
    model = Net()
    optimizer = optim.SGD(model.parameters(), lr=0.1)
    assert len(mnn.lr_find(model, optimizer, data(10), end=1e-3, steps=7).lrs) == 7
    once = iter(data(10))
    assert len(mnn.lr_find(model, optimizer, once, end=1e-3, steps=7).lrs) == 2
    with pytest.raises(NoMatchError, match="the loader gave no batch"):
        mnn.lr_find(model, optimizer, once)


def test_workers_are_gone_with_it():
    loader = data(10, num_workers=1, persistent_workers=True)
    model = Net()
    mnn.lr_find(model, optim.SGD(model.parameters(), lr=0.1), loader, end=1e-3, steps=3)
    assert loader._iterator is None


def test_models_of_transformers_take_dicts():
    transformers = pytest.importorskip("transformers")
    config = transformers.BertConfig(
        vocab_size=20,
        hidden_size=8,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=8,
    )
    model = transformers.BertForSequenceClassification(config)
    before = copy.deepcopy(model.state_dict())
    batch = {"input_ids": torch.ones(2, 3, dtype=torch.long), "labels": torch.tensor([0, 1])}
    found = mnn.lr_find(model, optim.AdamW(model.parameters()), [batch], steps=10, end=0.1)
    assert len(found.lrs) == 10
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_what_an_optimizer_wraps_is_as_it_was():
    timm_optim = pytest.importorskip("timm.optim")
    model, loader = Net(), data()
    inner = optim.AdamW(model.parameters(), lr=0.1)
    outer = timm_optim.Lookahead(inner, k=2)
    before = snapshot(model, inner, loader)
    mnn.lr_find(model, outer, loader, steps=8, end=0.1)
    assert repr(snapshot(model, inner, loader)) == repr(before)


class Axes:
    def __init__(self):
        self.drawn, self.lines, self.settings = [], [], {}

    def plot(self, x, y, **_):
        self.drawn.append((x, y))

    def axvline(self, x, **_):
        self.lines.append(x)

    def set(self, **settings):
        self.settings = settings


def test_the_plot_is_drawn_on_axes_and_needs_matplotlib_for_new_ones(monkeypatch):
    found = mnn.LrRange((0.1, 0.2, 0.4, 0.8), (4, 3, 1, 2), (4, 3.5, 2.0, 2.5), False)
    ax = found.plot(Axes())
    assert ax.drawn == [(found.lrs, found.losses), (found.lrs, found.smoothed)]
    assert ax.settings["xscale"] == "log"
    assert ax.lines == [0.2, pytest.approx(0.04)]
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(MissingExtraError, match="pip install matplotlib"):
        found.plot()


ODD = {
    "start": ({"start": 0}, UsageError, "start < end above 0"),
    "end": ({"start": 1, "end": 0.1}, UsageError, "start < end above 0"),
    "steps": ({"steps": 1}, UsageError, "2 steps or more"),
    "diverge": ({"diverge": 1}, UsageError, "diverge above 1"),
}


@pytest.mark.parametrize("name", ODD)
def test_odd_settings(name):
    options, error, message = ODD[name]
    model = Net()
    with pytest.raises(error, match=message):
        mnn.lr_find(model, optim.SGD(model.parameters(), lr=0.1), data(), **options)


def test_refused():
    model = Net()
    optimizer = optim.SGD(model.parameters(), lr=0.1)
    for what, error, message in (
        (lambda: 3.0, UsageError, "gave no loss to take the gradient of: float"),
        (lambda: torch.ones(1), UsageError, "gave no loss"),
        (lambda: model.fc.weight, UsageError, r"the gradient of: \(5, 6\)"),
        (3, UsageError, "a loader or a function is wanted, not int"),
        ([torch.ones(2, 3, 8, 8)], UsageError, r"a pair \(x, y\) or a dict, not a Tensor"),
        (lambda: model.fc.weight.sum() * math.nan, RefusedError, "not finite before the first"),
    ):
        with pytest.raises(error, match=message):
            mnn.lr_find(model, optimizer, what)
    with pytest.raises(RefusedError, match="LBFGS"):
        mnn.lr_find(model, optim.LBFGS(model.parameters()), data())
    lazy = nn.LazyLinear(3)
    with pytest.raises(UsageError, match="no shape yet"):
        mnn.lr_find(lazy, optim.SGD(lazy.parameters(), lr=0.1), data())
    optimizer.param_groups[0]["lr"] = None
    with pytest.raises(RefusedError, match="SGD finds its own lr"):
        mnn.lr_find(model, optimizer, data())
