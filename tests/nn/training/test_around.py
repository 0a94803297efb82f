"""A bare model's training goes on in a model that has it as a part, beside a head."""

from __future__ import annotations

import warnings
from pathlib import Path

import pytest
import torch
from torch import nn, optim
from torch.optim.swa_utils import AveragedModel

import modelctl.nn as mnn
from modelctl.errors import RefusedError


class Bare(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(4, 8)
        self.second = nn.Linear(8, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.second(self.first(x).relu())


class Headed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.trunk = Bare()
        self.head = nn.Linear(3, 2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.trunk(x))


def built(model: nn.Module, **how) -> dict:
    outside = nn.Parameter(torch.ones(()))
    named = [("temperature", outside), *model.named_parameters()]
    return {
        "model": model,
        "optimizer": optim.AdamW(named, lr=0.1, **how),
        "ema": AveragedModel(model),
    }


def step(parts: dict) -> None:
    loss = parts["model"](torch.randn(3, 4)).square().sum()
    scale = parts["optimizer"].param_groups[0]["params"][0]
    (loss * scale).backward()
    parts["optimizer"].step()
    parts["optimizer"].zero_grad()
    parts["ema"].update_parameters(parts["model"])


def moments(optimizer: optim.Optimizer, names: list[str]) -> dict:
    params = [p for group in optimizer.param_groups for p in group["params"]]
    return {n: optimizer.state[p] for n, p in zip(names, params, strict=True) if optimizer.state[p]}


def test_weights_moments_freezing_and_average_find_their_names(tmp_path: Path):
    parts = built(Bare())
    mnn.freeze(parts["model"], "first.bias")
    step(parts)
    step(parts)
    path = mnn.save_checkpoint(tmp_path / "bare.pt", **parts, epoch=2)
    others = built(Headed())
    with pytest.raises(RefusedError, match=r"missing in the file: head\.weight") as e:
        mnn.resume(path, **others)
    assert "on_mismatch='skip'" in str(e.value.hint)
    state = mnn.resume(path, **others, on_mismatch="skip")
    assert (state.epoch, state.model.added) == (2, "trunk.")
    assert state.fresh == ("head.weight", "head.bias")
    assert state.dropped == ()
    for name, value in parts["model"].state_dict().items():
        assert torch.equal(others["model"].trunk.state_dict()[name], value)
        averaged = others["ema"].module.trunk.state_dict()[name]
        assert torch.equal(averaged, parts["ema"].module.state_dict()[name])
    assert not others["model"].trunk.first.bias.requires_grad
    known = moments(parts["optimizer"], parts["optimizer"].param_groups[0]["param_names"])
    found = moments(others["optimizer"], others["optimizer"].param_groups[0]["param_names"])
    assert {*known} == {"temperature", "first.weight", "second.weight", "second.bias"}
    assert {*found} == {n if n == "temperature" else f"trunk.{n}" for n in known}
    for name, entry in known.items():
        other = found[name if name == "temperature" else f"trunk.{name}"]
        assert all(torch.equal(entry[key], other[key]) for key in entry)
    step(others)


def test_bert_goes_on_as_a_classifier(tmp_path: Path):
    tf = pytest.importorskip("transformers")
    config = tf.BertConfig(
        vocab_size=20,
        hidden_size=8,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=12,
        max_position_embeddings=10,
    )
    model = tf.BertModel(config)
    optimizer = optim.AdamW(model.parameters(), lr=0.01)
    ids = torch.arange(6).reshape(1, 6)
    model(ids).pooler_output.square().sum().backward()
    optimizer.step()
    path = mnn.save_checkpoint(tmp_path / "bert.pt", model=model, optimizer=optimizer, step=1)
    wrapped = tf.BertForSequenceClassification(config)
    other = optim.AdamW(wrapped.parameters(), lr=0.01)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        state = mnn.resume(path, model=wrapped, optimizer=other, on_mismatch="skip")
    assert state.model.added == "bert."
    assert {*state.fresh} == {"classifier.weight", "classifier.bias"}
    inside = dict(wrapped.bert.named_parameters())
    for name, p in model.named_parameters():
        assert torch.equal(p, inside[name])
        assert optimizer.state[p].keys() == other.state[inside[name]].keys()
        for key, value in optimizer.state[p].items():
            assert torch.equal(value, other.state[inside[name]][key])
    wrapped(ids, labels=torch.tensor([1])).loss.backward()
    other.step()
