"""MACs of nn.summary: published counts, formulas written out, and torch's own counter on a real
forward."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from modelctl.nn import summary
from modelctl.nn.view.macs import formula


class Calls(nn.Module):
    """A function as a module."""

    def __init__(self, function, *modules):
        super().__init__()
        self.function = function
        self.inner = nn.ModuleList(modules)

    def forward(self, *args):
        return self.function(*self.inner, *args)


def macs(model, size, **options) -> int:
    return summary(model, size, batch_size=None, **options).totals.macs


# model, shapes of its inputs, MACs written out
FORMULAS = {
    "linear": (nn.Linear(5, 7), [(2, 3, 5)], 2 * 3 * 5 * 7),
    "conv1d": (nn.Conv1d(4, 6, 3), [(2, 4, 10)], 2 * 8 * 6 * 4 * 3),
    "conv2d": (nn.Conv2d(4, 6, (3, 5), padding=1), [(2, 4, 8, 9)], 2 * 6 * 8 * 7 * 4 * 15),
    "conv3d": (nn.Conv3d(2, 3, 2), [(1, 2, 4, 5, 6)], 3 * 3 * 4 * 5 * 2 * 8),
    "grouped": (nn.Conv2d(8, 8, 3, groups=4), [(1, 8, 6, 6)], 8 * 16 * 2 * 9),
    "depthwise": (nn.Conv2d(8, 16, 3, groups=8), [(1, 8, 6, 6)], 16 * 16 * 1 * 9),
    "dilated": (nn.Conv2d(3, 4, 3, dilation=2), [(1, 3, 9, 9)], 4 * 5 * 5 * 3 * 9),
    "strided": (nn.Conv2d(3, 4, 3, stride=2), [(1, 3, 9, 9)], 4 * 4 * 4 * 3 * 9),
    # each input element meets each weight of its channel
    "transposed": (nn.ConvTranspose2d(4, 6, 3, stride=2), [(2, 4, 5, 5)], 2 * 4 * 25 * 6 * 9),
    "transposed grouped": (nn.ConvTranspose1d(4, 6, 3, groups=2), [(1, 4, 5)], 4 * 5 * 3 * 3),
    "functional conv": (
        Calls(lambda x, w: F.conv2d(x, w)),
        [(1, 3, 8, 8), (4, 3, 3, 3)],
        36 * 4 * 27,
    ),
    "matmul": (Calls(torch.matmul), [(2, 3, 4, 5), (5, 6)], 2 * 3 * 4 * 5 * 6),
    "vectors": (Calls(torch.matmul), [(5,), (5,)], 5),
    "matrix by vector": (Calls(torch.matmul), [(4, 5), (5,)], 20),
    "addmv": (Calls(torch.addmv), [(4,), (4, 5), (5,)], 20),
    "bmm": (Calls(torch.bmm), [(3, 4, 5), (3, 5, 6)], 3 * 4 * 5 * 6),
    "baddbmm": (Calls(torch.baddbmm), [(3, 4, 6), (3, 4, 5), (3, 5, 6)], 3 * 4 * 5 * 6),
    "addbmm": (Calls(torch.addbmm), [(4, 6), (3, 4, 5), (3, 5, 6)], 3 * 4 * 5 * 6),
    "einsum": (Calls(lambda a, b: torch.einsum("bhid,bhjd->bhij", a, b)), [(2, 3, 4, 5)] * 2, 480),
    "in place": (Calls(lambda a, b, c: (a * 1).addmm_(b, c)), [(4, 6), (4, 5), (5, 6)], 120),
    "attention": (
        Calls(F.scaled_dot_product_attention),
        [(2, 3, 7, 8), (2, 3, 9, 8), (2, 3, 9, 8)],
        2 * 3 * 7 * 9 * 8 * 2,
    ),
    "multi-head": (
        Calls(lambda mha, x: mha(x, x, x)[0], nn.MultiheadAttention(8, 2, batch_first=True)),
        [(2, 5, 8)],
        2 * (5 * 8 * 24 + 2 * 5 * 5 * 8 + 5 * 8 * 8),
    ),
    "lstm": (
        nn.LSTM(4, 6, 2, batch_first=True),
        [(2, 5, 4)],
        2 * 5 * 4 * 6 * ((4 + 6) + (6 + 6)),
    ),
    "lstm both ways": (nn.LSTM(4, 6, bidirectional=True), [(5, 2, 4)], 2 * 2 * 5 * 4 * 6 * 10),
    "gru": (nn.GRU(4, 6), [(5, 2, 4)], 2 * 5 * 3 * 6 * (4 + 6)),
    "rnn": (nn.RNN(4, 6), [(5, 2, 4)], 2 * 5 * 6 * (4 + 6)),
    "bilinear": (nn.Bilinear(3, 4, 5), [(2, 3), (2, 4)], 2 * 3 * 4 * 5),
    "conv_tbc": (Calls(torch.conv_tbc), [(9, 2, 4), (3, 4, 6), (6,)], 7 * 2 * 6 * 3 * 4),
    "none": (nn.Sequential(nn.BatchNorm2d(3), nn.ReLU(), nn.MaxPool2d(2)), [(1, 3, 8, 8)], 0),
}
# torch's counter lacks a formula (or nn.Bilinear's is not an operator of its own there)
NOT_IN_TORCH = {
    "vectors",
    "matrix by vector",
    "addmv",
    "addbmm",
    "bilinear",
    "conv_tbc",
    "in place",
}


@pytest.mark.parametrize("name", FORMULAS)
def test_macs_are_those_of_the_formula(name):
    model, shapes, expected = FORMULAS[name]
    found = summary(model, shapes, batch_size=None)
    assert found.totals.macs == expected
    assert found.totals.flops == 2 * expected
    assert found.uncounted == []


@pytest.mark.parametrize("name", FORMULAS)
def test_macs_are_the_same_with_values_and_in_both_modes(name):
    model, shapes, expected = FORMULAS[name]
    assert macs(model, shapes, device="cpu") == expected
    assert macs(model, shapes, mode="train") == expected
    assert macs(model, shapes, mode="train", device="cpu") == expected


@pytest.mark.parametrize("name", sorted(FORMULAS.keys() - NOT_IN_TORCH))
def test_macs_are_those_of_torchs_counter_on_a_real_forward(name):
    model, shapes, expected = FORMULAS[name]
    with (
        torch.backends.mkldnn.flags(enabled=False),  # its LSTM is one operator
        sdpa_kernel(SDPBackend.MATH),  # it knows the CPU's fused attention only since 2.15
        FlopCounterMode(display=False) as counter,
    ):
        model.train()(*(torch.randn(one) for one in shapes))
    assert counter.get_total_flops() == 2 * expected


FUSED = sorted(
    name
    for name in torch._C._dispatch_get_all_op_names()
    if name.startswith("aten::_scaled_dot_product_")
    and "backward" not in name
    and not torch._C._dispatch_has_kernel_for_dispatch_key(name, "CompositeImplicitAutograd")
)


@pytest.mark.parametrize("name", FUSED)
def test_fused_attention_counts_whoever_has_the_kernel(name):
    op = getattr(torch.ops.aten, name.removeprefix("aten::").partition(".")[0]).default
    # four heads of queries share two of keys and values, and values are wider than keys
    query, key, value = (torch.empty(2, *one) for one in ((4, 7, 8), (2, 9, 8), (2, 9, 16)))
    flops = formula(op)
    assert flops is not None
    assert flops(query, key, value, out_val=None) == 2 * (2 * 4 * 7 * 9) * (8 + 16)


def test_grouped_products_of_experts():
    if not hasattr(torch, "_grouped_mm"):
        pytest.skip("this torch has no grouped products")
    experts, rows = nn.Parameter(torch.randn(4, 16, 32, dtype=torch.bfloat16)), (8, 16)

    class Experts(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = experts

        def forward(self, x):
            ends = torch.tensor([2, 4, 6, 8], dtype=torch.int32, device=x.device)
            return torch._grouped_mm(x, self.weight, offs=ends)

    assert macs(Experts(), rows) == 8 * 16 * 32  # each row meets one expert
    ends = torch.tensor([8, 16], dtype=torch.int32)
    columns = Calls(lambda a, b: torch._grouped_mm(a, b, offs=ends))
    bf16 = torch.bfloat16
    assert macs(columns, [(2, 8, 16), (16, 16)], dtypes=bf16) == 8 * 16 * 16
    assert macs(columns, [(8, 16), (16, 32)], dtypes=bf16) == 8 * 16 * 32


def test_deformable_convolution_counts_as_a_convolution():
    ops = pytest.importorskip("torchvision").ops
    model = ops.DeformConv2d(4, 6, 3, groups=2)
    found = summary(model, [(1, 4, 8, 8), (1, 18, 6, 6)], batch_size=None)
    assert found.totals.macs == 36 * 6 * 2 * 9
    assert found.uncounted == []


# -------------------------------------------------------------- known models


def on_meta(build, *args, **options):
    with torch.device("meta"):
        return build(*args, **options)


def test_resnet50():
    models = pytest.importorskip("torchvision").models
    found = summary(on_meta(models.resnet50), (3, 224, 224))
    assert found.totals.macs == 4_089_184_256
    assert found.totals.params_unique == 25_557_032
    assert found.output == (1, 1000)


def test_vit_b_16():
    models = pytest.importorskip("torchvision").models
    found = summary(on_meta(models.vit_b_16), (3, 224, 224))
    tokens, width, layers = 197, 768, 12
    block = tokens * width * width * (3 + 1 + 4 + 4) + 2 * tokens * tokens * width
    assert found.totals.macs == 196 * 768 * 768 + layers * block + 768 * 1000
    assert round(found.totals.macs / 1e9, 2) == 17.56


def test_gpt2():
    transformers = pytest.importorskip("transformers")
    config = transformers.GPT2Config(n_layer=2)
    model = on_meta(transformers.GPT2LMHeadModel, config)
    found = summary(model, (8,), dtypes=torch.long)
    tokens, width, vocabulary = 8, 768, 50257
    block = tokens * width * width * 12 + 2 * tokens * tokens * width
    assert found.totals.macs == 2 * block + tokens * width * vocabulary == 422_221_824


class Tied(nn.Module):
    def __init__(self):
        super().__init__()
        self.embedding = nn.Embedding(1000, 64)
        self.hidden = nn.Linear(64, 64)
        self.out = nn.Linear(64, 1000, bias=False)
        self.out.weight = self.embedding.weight

    def forward(self, tokens):
        return self.out(self.hidden(self.embedding(tokens)))


def test_tied_weights_count_once():
    found = summary(Tied(), (8,), dtypes=torch.long)
    assert found.totals.params_unique == 68_160
    assert found.totals.params == 68_160 + 64_000
    assert found.totals.macs == 8 * 64 * 64 + 8 * 64 * 1000  # but each use is work
    rows = {row.path: row.params for row in found.rows}
    assert rows == {"embedding": 64_000, "hidden": 4160, "out": 0}
    assert found.totals.param_bytes == found.totals.gradients == 4 * 68_160
    assert found.totals.optimizer == 8 * 68_160
    assert "params 68,160 (with ties 132,160)" in str(found)


def test_a_layer_called_twice_is_counted_once_and_works_twice():
    model = Calls(lambda layer, x: layer(layer(x)), nn.Linear(4, 4))
    found = summary(model, (4,))
    (row,) = [row for row in found.rows if row.path == "inner.0"]
    assert (row.calls, row.params, row.macs) == (2, 20, 32)
    assert found.totals.macs == 32
    assert "called 2x" in str(found)


def test_modules_that_are_never_called_are_in_the_totals():
    model = Calls(lambda used, _, x: used(x), nn.Linear(4, 4), nn.Linear(4, 100))
    found = summary(model, (4,))
    assert found.totals.params_unique == 20 + 500
    (row,) = [row for row in found.rows if row.path == "inner.1"]
    assert (row.calls, row.params, row.macs, row.out_shape) == (0, 500, 0, None)
    assert "not called" in str(found)


@pytest.mark.parametrize("device", ["meta", "cpu"])
@pytest.mark.parametrize("mode", ["eval", "train"])
def test_a_transformer_layer_counts_alike(device, mode):
    model = nn.TransformerEncoderLayer(16, 4, 32, batch_first=True)
    expected = 2 * (6 * 16 * 16 * 4 + 2 * 6 * 6 * 16 + 2 * 6 * 16 * 32)
    assert macs(model, (2, 6, 16), mode=mode, device=device) == expected
    assert torch.backends.mha.get_fastpath_enabled()


# -------------------------------------------------------------- rows and totals

leaves = st.sampled_from(
    [
        lambda: nn.Linear(4, 4),
        lambda: nn.Linear(4, 4, bias=False),
        nn.ReLU,
        lambda: nn.LayerNorm(4),
        lambda: nn.utils.parametrizations.weight_norm(nn.Linear(4, 4)),
        nn.Identity,
    ]
)
nets = st.recursive(
    leaves,
    lambda inner: st.one_of(
        st.lists(inner, min_size=1, max_size=4).map(
            lambda parts: lambda: nn.Sequential(*(build() for build in parts))
        ),
        st.tuples(inner, st.integers(1, 4)).map(
            lambda alike: lambda: nn.Sequential(*(alike[0]() for _ in range(alike[1])))
        ),
        # the same module twice
        inner.map(lambda build: lambda: nn.Sequential(*([build()] * 2))),
        # a module that is not called, and a buffer
        inner.map(lambda build: lambda: Calls(lambda a, b, x: a(x) @ b(x).mT, build(), build())),
        inner.map(lambda build: lambda: frozen(build())),
    ),
    max_leaves=8,
)


def frozen(module):
    module.requires_grad_(False)
    module.register_buffer("steps", torch.zeros(3, dtype=torch.long))
    return module


class Square(nn.Module):
    """Whatever is inside gets 4 x 4."""

    def __init__(self, inner):
        super().__init__()
        self.inner = inner

    def forward(self, x):
        return self.inner(x)


@settings(max_examples=60, deadline=None, database=None, derandomize=True)
@given(nets, st.sampled_from([1, 2, 3, "all", "auto"]), st.booleans(), st.booleans())
def test_rows_sum_to_the_totals_whatever_is_shown(build, depth, fold, run):
    model = Square(build())
    options = {"input_size": (4, 4), "batch_size": None} if run else {}
    whole = summary(model, **options, depth="all", fold=False)
    found = summary(model, **options, depth=depth, fold=fold)
    assert found.totals == whole.totals
    totals, rows = found.totals, found.rows
    assert sum(row.params for row in rows) == totals.params_unique
    assert totals.params_unique == sum(p.numel() for p in model.parameters())
    assert sum(row.trainable for row in rows) == totals.trainable
    assert totals.trainable + totals.frozen == totals.params_unique
    assert sum(row.buffers for row in rows) == totals.buffers
    assert sum(row.nbytes for row in rows) == totals.param_bytes + totals.buffer_bytes
    if run:
        assert sum(row.macs for row in rows) == totals.macs
        with FlopCounterMode(display=False) as counter:
            model(torch.randn(4, 4))
        assert counter.get_total_flops() == totals.flops
    else:
        assert totals.macs is None
        assert {row.macs for row in rows} == {None}
    assert all(row.level == row.path.count(".") + bool(row.path) for row in rows)
    assert isinstance(depth, str) or all(row.level <= depth for row in rows)


# -------------------------------------------------------------- what has no formula


@torch.library.custom_op("modelctl_tests::twice", mutates_args=(), schema="(Tensor x) -> Tensor")
def twice(x: torch.Tensor) -> torch.Tensor:
    return 2 * x


@twice.register_fake
def _(x):
    return torch.empty_like(x)


UNCOUNTED = {
    "fft": (lambda x: torch.fft.fft(x).real, "aten::_fft_r2c"),
    "cdist": (lambda x: torch.cdist(x, x), "aten::_cdist_forward"),
    "inverse": (torch.linalg.inv, "aten::linalg_inv_ex"),
    "custom": (twice, "modelctl_tests::twice"),
}


@pytest.mark.parametrize("name", UNCOUNTED)
def test_what_has_no_formula_is_listed_and_unknown_not_zero(name):
    function, op = UNCOUNTED[name]
    model = nn.Sequential(nn.Linear(4, 4), Calls(function), Calls(function, nn.Linear(4, 4)))
    model[2].function = lambda inner, x: function(inner(x))
    found = summary(model, (4, 4), depth="all", fold=False)
    assert [(name, module) for name, module, _ in found.uncounted] == [(op, "1"), (op, "2")]
    rows = {row.path: row for row in found.rows}
    assert rows["0"].macs == 64
    assert rows["1"].macs is None
    assert rows["1"].uncounted == (op,)
    assert rows["2.inner.0"].macs == 64
    assert found.totals.macs == 128  # a lower bound, and said so
    text = str(found)
    assert "MACs at least 128" in text
    assert f"uncounted: {op} in 1, 2" in text
    short = summary(model, (4, 4), depth=1)
    assert [row.macs for row in short.rows] == [64, None, 64]
    assert "64+?" in str(short)


FREE = {
    "in place": lambda x: (x * 1).abs_().t_().unsqueeze_(0).squeeze_(0),
    "comparisons in place": lambda x: (x * 1).gt_(0),
    "division": lambda x: torch.floor_divide(x, 2),
    "threshold": lambda x: F.threshold(x * 1, 0.1, 0.0, inplace=True),
    "split": lambda x: torch.unsafe_split(x, 2)[0],
    "padding": lambda x: F.pad(x, (1, 1), mode="reflect"),
    "sorting": lambda x: x.sort().values.cumsum(0).topk(2).values,
    "norms": lambda x: F.group_norm(F.layer_norm(F.normalize(x), (4,)), 2),
    "resizing": lambda x: F.interpolate(x[None, None], scale_factor=2, mode="bicubic"),
    "dropout": lambda x: F.dropout(x, training=True) + torch.rand_like(x),
    "masks": lambda x: x.masked_fill(torch.ones_like(x).tril().bool(), -1).softmax(-1),
    "distance": lambda x: torch.dist(x, x) + torch.linalg.vector_norm(x),
}


@pytest.mark.parametrize("name", FREE)
def test_what_moves_data_and_goes_by_elements_has_none(name):
    found = summary(Calls(FREE[name]), (4, 4), batch_size=None)
    assert found.uncounted == []
    assert found.totals.macs == 0


class Frozen(nn.Module):
    """A trunk that runs in inference mode, where operators come whole."""

    def __init__(self) -> None:
        super().__init__()
        self.trunk = nn.Sequential(nn.Conv2d(3, 4, 3), nn.MaxPool2d(2), nn.Flatten())
        self.fc = nn.Linear(36, 2)

    def forward(self, x: Any) -> Any:
        with torch.inference_mode():
            x = self.trunk(x)
        return self.fc(x.clone())


@pytest.mark.parametrize("device", ["meta", "cpu"])
def test_inference_mode_inside_a_forward(device):
    found = summary(Frozen(), (3, 8, 8), device=device)
    assert found.totals.macs == 36 * 4 * 27 + 72
    assert found.uncounted == []


class Gradient(nn.Module):
    """As physics-informed and adversarial networks do."""

    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(4, 1)

    def forward(self, x: Any) -> Any:
        with torch.enable_grad():
            x = x.detach().requires_grad_()
            return torch.autograd.grad(self.fc(x).sum(), x)[0]


@pytest.mark.parametrize("device", ["meta", "cpu"])
def test_a_forward_that_takes_gradients(device):
    found = summary(Gradient(), (4,), device=device)
    assert found.output == (1, 4)
    assert found.totals.macs >= 4
    assert found.totals.saved is None
    assert "training" not in str(found).split("params")[-1]
