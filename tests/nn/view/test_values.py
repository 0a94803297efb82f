"""Small tensors keep their values on meta: what a forward looks at, and no more than that."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence

import modelctl.nn as mnn
from modelctl.nn.view.trace import ForwardError


def macs(model, *inputs, **kwargs):
    """On meta; the same for real."""
    on_meta = mnn.summary(model, input_data=inputs, **kwargs)
    assert (
        on_meta.totals.macs
        == mnn.summary(model, input_data=inputs, device="cpu", **kwargs).totals.macs
    )
    return on_meta.totals.macs


class Looks(nn.Module):
    """Runs its layer as often as ``times`` finds in what it is given."""

    def __init__(self, times, **buffers):
        super().__init__()
        self.layer, self.times = nn.Linear(4, 4, bias=False), times
        for name, value in buffers.items():
            self.register_buffer(name, value, persistent=False)

    def forward(self, x, *given):
        for _ in range(int(self.times(self, x, *given))):
            x = self.layer(x)
        return x


X = torch.ones(1, 4)
THREE = torch.tensor([3, 1, 2])
FINDS = {
    "an item": lambda _, x, n: n.max().item(),
    "a list": lambda _, x, n: n.tolist()[0],
    "through views": lambda _, x, n: n.view(3, 1).t()[0, 1:].sum(),
    "an index of lists": lambda _, x, n: n[[0, 1]][0],
    "written in place": lambda _, x, n: n.clone().fill_(3)[1],
    "written to a part": lambda _, x, n: (n := n.clone(), n[1:].add_(2))[0][1],
    "a mask": lambda _, x, n: len(n[n > 0]),
    "counted": lambda _, x, n: (n > 0).nonzero().shape[0],
    "unique": lambda _, x, n: len(torch.unique(torch.cat([n, n]))),
    "made there": lambda _, x, n: torch.ones(3, device=x.device).sum(),
    "made alike": lambda _, x, n: torch.ones_like(x[0, :3]).sum(),
    "filled alike": lambda _, x, n: x.new_full((1,), 3.0),
    "made of a list": lambda _, x, n: torch.tensor([1, 2], device=x.device).sum(),
    "asked for": lambda _, x, n: 3 if torch.equal(n, n.clone()) else 0,
    "in Python": lambda _, x, n: 3 if 2 in n else 0,
    "on the CPU": lambda _, x, n: n.cpu().numpy()[0],
    "repeated": lambda _, x, n: n.repeat_interleave(n)[0],
    "a buffer": lambda self, x, n: self.count,
}


@pytest.mark.parametrize("how", FINDS)
def test_values_that_are_known(how):
    model = Looks(FINDS[how], count=torch.tensor(3))
    assert macs(model, X, THREE) == 3 * 16


UNKNOWN = {
    "of a weight": lambda self, x, n: self.layer.weight.sum() + 3,
    "of what a layer gave": lambda self, x, n: self.layer(x).sum(),
    "overwritten with it": lambda self, x, n: n.float().copy_(self.layer(x)[0, :3]).sum(),
    "a part overwritten": lambda self, x, n: (
        n := n.float().clone(),
        n[:1].copy_(self.layer(x)[0, :1]),
    )[0].sum(),
    "written into memory": lambda self, x, n: torch.zeros(4).copy_(self.layer(x)[0]).sum(),
    "written to a part of memory": lambda self, x, n: (
        (m := torch.zeros(4), m[1:].copy_(self.layer(x)[0, 1:]))[0].sum() + n[0]
    ),
    "added in memory": lambda self, x, n: (
        (m := torch.zeros(2, 4), m[0].add_(self.layer(x)[0]))[0].sum().item()
    ),
    "random": lambda self, x, n: torch.rand(3, device=x.device).sum() * 0 + 3,
    "undefined": lambda self, x, n: torch.empty_like(n).sum() * 0 + 3,
}


@pytest.mark.parametrize("how", UNKNOWN)
def test_values_that_nobody_knows_are_not_guessed(how):
    with pytest.raises(ForwardError, match="needs the values of tensors"):
        mnn.summary(Looks(UNKNOWN[how]), input_data=(X, THREE))


def test_what_is_large_has_no_values():
    large = torch.full((1 << 20,), 3)
    with pytest.raises(ForwardError, match="needs the values of tensors"):
        mnn.summary(Looks(lambda _, x, n: n[0].item()), input_data=(X, large))


def test_the_models_own_values_stay():
    def counts(self, x):
        self.seen.add_(1)
        return self.seen

    model = Looks(counts, seen=torch.tensor(2))
    given = X.clone()
    assert mnn.summary(model, input_data=given).totals.macs == 3 * 16
    assert model.seen.item() == 2
    assert torch.equal(given, X)


class Packed(nn.Module):
    def __init__(self, kind):
        super().__init__()
        self.rnn = kind(8, 8, batch_first=True, num_layers=2, bidirectional=True)

    def forward(self, x, lengths):
        packed = pack_padded_sequence(x, lengths, batch_first=True, enforce_sorted=False)
        return pad_packed_sequence(self.rnn(packed)[0], batch_first=True)[0]


@pytest.mark.parametrize("kind", [nn.LSTM, nn.GRU, nn.RNN])
def test_packed_sequences(kind):
    model, x, lengths = Packed(kind), torch.randn(3, 5, 8), torch.tensor([5, 3, 2])
    given = mnn.summary(model, input_data=(x, lengths))
    named = mnn.summary(model, input_data=x, lengths=lengths)
    assert given.totals.macs == named.totals.macs == macs(model, x, lengths) > 0
    assert given.output == (3, 5, 16)
    shorter = mnn.summary(model, input_data=(x, torch.tensor([2, 2, 2])))
    assert shorter.totals.macs * 10 == given.totals.macs * 6  # as many steps


def test_lengths_that_nobody_gave_are_asked_for():
    with pytest.raises(ForwardError, match="needs the values of tensors") as e:
        mnn.summary(Packed(nn.LSTM), [(5, 8), ()], dtypes=[torch.float32, torch.long], batch_size=3)
    assert "device='cpu'" in str(e.value.hint)


def test_attention_is_counted_wherever_it_runs():
    class Attention(nn.Module):
        def forward(self, x):
            return F.scaled_dot_product_attention(x, x, x)

    assert macs(Attention(), torch.ones(1, 4, 128, 16)) == 2 * 4 * 128 * 128 * 16


@pytest.mark.parametrize("device", ["meta", "cpu"])
def test_flex_attention_is_named_as_uncounted(device):
    flex = pytest.importorskip("torch.nn.attention.flex_attention")
    if not hasattr(flex, "_validate_device"):
        pytest.skip("this torch has it compiled alone")

    class Attention(nn.Module):
        def __init__(self):
            super().__init__()
            self.proj = nn.Linear(16, 16, bias=False)

        def forward(self, x):
            x = self.proj(x)
            return flex.flex_attention(x, x, x)

    found = mnn.summary(Attention(), input_data=torch.ones(1, 2, 128, 16), device=device)
    assert found.totals.macs == 2 * 128 * 16 * 16
    assert [name for name, _, _ in found.uncounted] == ["flex_attention"]
    assert found.output == (1, 2, 128, 16)
