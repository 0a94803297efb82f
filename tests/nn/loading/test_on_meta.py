"""Models that are built with parameters without memory and real buffers, and filled from a file."""

from __future__ import annotations

import copy
import threading

import pytest
import torch
from torch import nn

import modelctl.nn as mnn
from modelctl.errors import RefusedError
from tests.nn.nets import Net, same


class Rotary(nn.Module):
    """A table that no file holds, a norm, tied weights, and a parameter that is shared raw."""

    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(6, 4)
        self.norm = nn.BatchNorm1d(4)
        self.head = nn.Linear(4, 6, bias=False)
        self.head.weight = self.embed.weight
        scale = nn.Parameter(torch.full((4,), 2.0), requires_grad=False)
        scale.role = "scale"
        self.first, self.second = scale, scale
        self.rest = nn.ParameterList([torch.ones(2)])
        self.layers = nn.ModuleList([copy.deepcopy(nn.Linear(4, 4)) for _ in range(2)])
        self.register_buffer("table", torch.arange(4.0) / 3, persistent=False)
        self.made = torch.ones(2)

    def forward(self, x):
        y = self.norm(self.embed(x) * self.table * self.first)
        for layer in self.layers:
            y = layer(y)
        return self.head(y)


def built():
    with mnn.on_meta():
        return Rotary()


def test_parameters_have_no_memory_and_buffers_have_values():
    model = built()
    assert all(p.is_meta for p in model.parameters())
    assert not any(b.is_meta for b in model.buffers())
    assert torch.equal(model.table, torch.arange(4.0) / 3)
    assert torch.equal(model.norm.running_var, torch.ones(4))
    assert model.made.device.type == "cpu"
    assert model.head.weight is model.embed.weight
    assert model.first is model.second
    assert (model.first.requires_grad, model.first.role) == (False, "scale")
    assert not next(Net().parameters()).is_meta


def test_a_file_fills_it(tmp_path):
    torch.manual_seed(0)
    model = Rotary()
    nn.init.normal_(model.norm.running_mean)
    torch.save(model.state_dict(), tmp_path / "a.pt")
    other = built()
    mnn.load_into(other, tmp_path / "a.pt")
    assert same(model.state_dict(), other.state_dict())
    assert other.head.weight is other.embed.weight
    assert other.first is other.second
    inputs = torch.arange(6)
    assert torch.equal(model.eval()(inputs), other.eval()(inputs))


def test_what_is_wholly_on_meta_is_told_of_it(tmp_path):
    torch.save(Rotary().state_dict(), tmp_path / "a.pt")
    with torch.device("meta"):
        model = Rotary()
    with pytest.raises(RefusedError, match=r"1 tensors would stay on meta.*: table") as e:
        mnn.load_into(model, tmp_path / "a.pt")
    assert "on_meta()" in e.value.hint


def test_a_head_that_the_file_lacks_is_told_where_to_get_values(tmp_path):
    torch.save(nn.Sequential(nn.Linear(2, 2)).state_dict(), tmp_path / "a.pt")
    with mnn.on_meta():
        model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 3))
    with pytest.raises(RefusedError, match=r"stay on meta.*: 1\.weight, 1\.bias") as e:
        mnn.load_into(model, tmp_path / "a.pt", on_mismatch="skip")
    assert "on_meta()" not in e.value.hint  # it was built so
    assert "to_empty" in e.value.hint


def test_blocks_inside_each_other_and_errors():
    def fail():
        with mnn.on_meta():
            raise KeyError

    with mnn.on_meta():
        with pytest.raises(KeyError):
            fail()
        assert nn.Linear(2, 2).weight.is_meta
    with pytest.raises(KeyError):
        fail()
    assert not nn.Linear(2, 2).weight.is_meta


def test_other_threads_build_as_ever():
    found = []

    def build():
        found.append(nn.Linear(2, 2).weight.is_meta)
        with mnn.on_meta():
            found.append(nn.Linear(2, 2).weight.is_meta)

    with mnn.on_meta():
        thread = threading.Thread(target=build)
        thread.start()
        thread.join()
        assert nn.Linear(2, 2).weight.is_meta
    assert found == [False, True]


def test_what_is_no_plain_parameter_stays():
    class Own(nn.Parameter):
        pass

    with mnn.on_meta():
        lazy = nn.LazyLinear(2)
        module = nn.Module()
        module.own = Own(torch.ones(2))
        module.register_parameter("nothing", None)
    assert isinstance(lazy.weight, nn.UninitializedParameter)
    assert type(module.own) is Own
    assert torch.equal(module.own, torch.ones(2))


def test_a_recurrent_net_computes_with_what_was_loaded(tmp_path):
    """It keeps its weights in a list, too."""
    torch.manual_seed(0)
    model = nn.LSTM(3, 4, num_layers=2)
    torch.save(model.state_dict(), tmp_path / "a.pt")
    with mnn.on_meta():
        other = nn.LSTM(3, 4, num_layers=2)
    mnn.load_into(other, tmp_path / "a.pt")
    inputs = torch.randn(5, 3)
    assert torch.equal(model(inputs)[0], other(inputs)[0])


def configs():
    tf = pytest.importorskip("transformers")
    small = {"hidden_size": 32, "num_attention_heads": 2, "intermediate_size": 64}
    layers = {**small, "num_hidden_layers": 2, "vocab_size": 100}
    clip = {"num_hidden_layers": 2, **small}
    vision = {**clip, "image_size": 16, "patch_size": 8}
    return {
        "llama": (tf.LlamaForCausalLM, tf.LlamaConfig(**layers)),
        "llama, tied": (tf.LlamaForCausalLM, tf.LlamaConfig(**layers, tie_word_embeddings=True)),
        "bert": (tf.BertForMaskedLM, tf.BertConfig(**layers)),
        "gpt2": (tf.GPT2LMHeadModel, tf.GPT2Config(n_embd=32, n_layer=2, n_head=2, vocab_size=100)),
        "mixtral": (
            tf.MixtralForCausalLM,
            tf.MixtralConfig(**layers, num_key_value_heads=2, num_local_experts=2),
        ),
        "clip": (
            tf.CLIPModel,
            tf.CLIPConfig(text_config={**clip, "vocab_size": 100}, vision_config=vision),
        ),
    }


@pytest.mark.parametrize("kind", ["llama", "llama, tied", "bert", "gpt2", "mixtral", "clip"])
def test_models_of_transformers(tmp_path, kind):
    make, config = configs()[kind]
    torch.manual_seed(0)
    model = make(config).eval()
    torch.save(model.state_dict(), tmp_path / "a.pt")
    with mnn.on_meta():
        other = make(config).eval()
    assert all(p.is_meta for p in other.parameters())
    mnn.load_into(other, tmp_path / "a.pt")
    assert same(dict(model.named_buffers()), dict(other.named_buffers()))
    inputs = {"input_ids": torch.arange(10).reshape(2, 5)}
    if kind == "clip":
        inputs["pixel_values"] = torch.ones(2, 3, 16, 16)
    with torch.no_grad():
        mine, theirs = (one(**inputs) for one in (model, other))
    key = "logits_per_image" if kind == "clip" else "logits"
    assert torch.equal(mine[key], theirs[key])
    tied = [
        {
            tuple(sorted(n for n, q in one.named_parameters(remove_duplicate=False) if q is p))
            for p in one.parameters()
        }
        for one in (model, other)
    ]
    assert tied[0] == tied[1]


@pytest.mark.parametrize(
    "name", ["resnet18", "swin_t", "vit_b_16", "shufflenet_v2_x0_5", "mnasnet0_5"]
)
def test_models_of_torchvision(tmp_path, name):
    models = pytest.importorskip("torchvision.models")
    torch.manual_seed(0)
    model = models.get_model(name).eval()
    torch.save(model.state_dict(), tmp_path / "a.pt")
    with mnn.on_meta():
        other = models.get_model(name).eval()
    mnn.load_into(other, tmp_path / "a.pt")
    inputs = torch.randn(1, 3, 224, 224)
    with torch.no_grad():
        assert torch.equal(model(inputs), other(inputs))
