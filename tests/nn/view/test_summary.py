"""nn.summary: what it takes, what it says of memory, what it advises, how it fails."""

from __future__ import annotations

import re
from collections import namedtuple
from contextlib import suppress

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

import modelctl.nn as mnn
from modelctl.errors import UsageError
from modelctl.nn import ForwardError, summary
from tests.nn.nets import Net


class Of(nn.Module):
    """A function of modules and inputs, as a module."""

    def __init__(self, function, **modules):
        super().__init__()
        self.function = function
        for name, module in modules.items():
            setattr(self, name, module)

    def forward(self, *args, **kwargs):
        return self.function(self, *args, **kwargs)


def rows(found):
    return {row.path: row for row in found.rows}


# -------------------------------------------------------------- inputs


@pytest.mark.parametrize(
    ("size", "options", "given", "batch"),
    [
        ((3, 8, 8), {}, "1x3x8x8 float32", 1),
        ([3, 8, 8], {}, "1x3x8x8 float32", 1),
        (torch.Size((3, 8, 8)), {}, "1x3x8x8 float32", 1),
        (tuple(np.array([3, 8, 8])), {}, "1x3x8x8 float32", 1),
        ((3, 8, 8), {"batch_size": 5}, "5x3x8x8 float32", 5),
        ((2, 3, 8, 8), {}, "2x3x8x8 float32", None),
        ((2, 3, 8, 8), {"batch_size": None}, "2x3x8x8 float32", None),
        ([(3, 8, 8)], {}, "1x3x8x8 float32", 1),
        ({"x": (3, 8, 8)}, {}, "1x3x8x8 float32", 1),
    ],
)
def test_shapes_of_images(size, options, given, batch):
    found = summary(Net(), size, **options)
    assert found.inputs == given
    assert found.batch == batch
    assert found.output == (int(given.partition("x")[0]), 5)
    assert (f"batch of {batch} added" in str(found)) == (batch is not None)


def test_an_int_is_a_vector():
    assert summary(nn.Linear(7, 2), 7).output == (1, 2)


def test_several_inputs_in_order_and_by_name():
    model = nn.Bilinear(3, 4, 5)
    assert summary(model, [(3,), (4,)]).output == (1, 5)
    assert summary(nn.Linear(4, 2), [3, 4]).inputs == "1x3x4 float32"  # a list of numbers is one
    assert summary(model, {"input2": 4, "input1": (3,)}, batch_size=2).output == (2, 5)


def test_dtypes_of_all_of_each_and_by_name():
    def kinds(_, *args, **kwargs):
        seen.append([str(x.dtype)[6:] for x in (*args, *kwargs.values())])
        return args[0] if args else kwargs["a"]

    model, sizes, seen = Of(kinds), [(2,), (3,)], []
    summary(model, sizes)
    summary(model, sizes, dtypes=torch.long)
    summary(model, sizes, dtypes=[torch.long, torch.bfloat16])
    summary(model, {"a": 2, "b": 3}, dtypes={"b": torch.bool})
    summary(model, sizes, dtypes=(torch.long, torch.float64), device="cpu")
    assert seen == [
        ["float32", "float32"],
        ["int64", "int64"],
        ["int64", "bfloat16"],
        ["float32", "bool"],
        ["int64", "float64"],
    ]


def test_inputs_have_the_models_own_dtype():
    assert "1x3x8x8 bfloat16" in str(summary(Net().bfloat16(), (3, 8, 8)))


def test_data_instead_of_shapes():
    x = torch.randn(2, 3, 8, 8)
    for data in (x, (x,), [x], {"x": x}):
        found = summary(Net(), input_data=data)
        assert found.output == (2, 5)
        assert found.batch is None
    Pair = namedtuple("Pair", "a b")
    model = Of(lambda _, pair, scale: pair.a * scale + pair.b[0])
    data = (Pair(torch.ones(2), [torch.ones(2)]), 3)
    assert summary(model, input_data=data).output == (2,)


def test_keyword_inputs_go_to_the_forward_with_their_values():
    lengths = torch.tensor([5, 2])

    def run(self, x, lengths, double=False):
        pack = nn.utils.rnn.pack_padded_sequence(x, lengths, batch_first=True)
        out, _ = self.lstm(pack)
        return nn.utils.rnn.pad_packed_sequence(out, batch_first=True)[0].repeat(1 + double, 1, 1)

    model = Of(run, lstm=nn.LSTM(4, 6, batch_first=True))
    found = summary(model, (5, 4), batch_size=2, lengths=lengths, double=True, device="cpu")
    assert found.output == (4, 5, 6)
    looks = Of(lambda _, x, at: x[:, : int(at)])
    assert summary(looks, (5,), at=torch.tensor(3)).output == (1, 3)
    assert summary(looks, input_data=torch.ones(1, 5), at=torch.tensor(3)).output == (1, 3)


def test_without_input_there_are_parameters_alone():
    found = summary(Net())
    assert (found.inputs, found.output, found.totals.macs) == (None, None, None)
    assert {(row.calls, row.out_shape, row.macs) for row in found.rows} == {(None, None, None)}
    text = str(found)
    assert "MACs" not in text
    assert "output" not in text
    assert found.totals.params_unique == sum(p.numel() for p in Net().parameters())


@pytest.mark.parametrize(
    "size",
    [(-1,), "abc", b"ab", 3.5, (3.0, 4), (True, 4), [[4], [4.0]], (1 << 40, 1 << 40), {"x": "a"}],
)
def test_what_is_no_shape(size):
    with pytest.raises(UsageError, match="shape"):
        summary(nn.Linear(4, 4), size)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"dtypes": "float32"}, "dtypes is a torch.dtype"),
        ({"dtypes": 3}, "dtypes is a torch.dtype"),
        ({"dtypes": [None]}, "dtypes is a torch.dtype"),
        ({"dtypes": [torch.long] * 2}, "2 dtypes for 1 inputs"),
        ({"dtypes": {"x": torch.long}}, "'x', which is not among the inputs"),
        ({"batch_size": -1}, "batch_size is a number from 0, or None, not -1"),
        ({"batch_size": True}, "batch_size is"),
        ({"batch_size": 1.5}, "batch_size is"),
        ({"batch_size": 1 << 60}, "no tensor has the shape"),
        ({"depth": 0}, "depth is a number from 1"),
        ({"depth": True}, "depth is a number from 1"),
        ({"depth": "deep"}, "depth is a number from 1"),
        ({"mode": "test"}, "mode is 'eval' or 'train'"),
        ({"device": "xyz"}, "'xyz' is no device"),
        ({"input_data": torch.ones(4)}, "give one"),
    ],
)
def test_wrong_options(options, words):
    with pytest.raises(UsageError, match=re.escape(words)):
        summary(nn.Linear(4, 4), (4,), **options)


@pytest.mark.parametrize("model", ["model.pt", nn.Linear, {}])
def test_what_is_no_model(model):
    with pytest.raises(UsageError, match=r"a torch\.nn\.Module is expected"):
        summary(model)


# -------------------------------------------------------------- errors of the forward

WRONG = {
    "linear": (nn.Linear(5, 4), "mat1 and mat2 shapes cannot be multiplied"),
    "linear dtype": (nn.Linear(4, 4).half(), "mat1 and mat2 must have the same dtype"),
    "conv": (nn.Conv1d(5, 4, 1), "expected input[1, 4, 4] to have 5 channels"),
    "conv dtype": (nn.Conv1d(4, 4, 1).half(), "should be the same"),
    "conv kernel": (nn.Conv1d(4, 4, 9), "Kernel size can't be greater"),
    "transposed conv": (nn.ConvTranspose1d(5, 4, 1), "to have 5 channels, but got 4"),
    "batch norm": (nn.BatchNorm1d(5), "running_mean should contain 4 elements not 5"),
    "group norm": (nn.GroupNorm(2, 6), "weight of shape [6]"),
    "layer norm": (nn.LayerNorm(5), "expected input with shape [*, 5]"),
    "embedding": (nn.Embedding(5, 3), "scalar types: Long, Int"),
    "attention": (nn.TransformerEncoderLayer(8, 2), "was expecting embedding dimension of 8"),
    "pooling": (nn.MaxPool1d(9), "Invalid computed output size: 0"),
    "bmm": (
        Of(lambda _, x: torch.bmm(x, x.double())),
        "expected scalar type Float but found Double",
    ),
}


@pytest.mark.parametrize("name", WRONG)
def test_a_wrong_layer_is_named_with_torchs_own_words(name):
    layer, words = WRONG[name]
    model = nn.Sequential(nn.Identity(), nn.Sequential(nn.Linear(4, 4), layer))
    with pytest.raises(Exception) as real:
        model.eval()(torch.randn(1, 4, 4))
    with pytest.raises(ForwardError) as failed:
        summary(model, (4, 4))
    message, cause = str(failed.value), failed.value.__cause__
    place = "1.1.self_attn" if name == "attention" else "1.1"
    assert message.startswith(f"forward failed in '{place}' (")
    assert "given 1x4x4 float32" in message
    assert "\n" not in message
    assert type(cause) is type(real.value)
    assert words in str(real.value)
    assert " ".join(str(real.value).split())[:300] in message


def test_the_layer_that_raised_is_named_not_one_that_was_caught():
    def run(self, x):
        with suppress(RuntimeError):
            self.broken(x)
        raise KeyError("mine")

    with pytest.raises(ForwardError, match=r"in the model itself \(Of\), .*KeyError: 'mine'"):
        summary(Of(run, broken=nn.Linear(3, 3)), (4,))
    direct = Of(lambda self, x: self.a.forward(x), a=nn.Linear(3, 3))
    with pytest.raises(ForwardError, match=r"in 'a' \(Linear\)"):
        summary(direct, (4,))


def test_the_inputs_that_came_furthest_give_the_error():
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Flatten(), nn.Linear(9, 2))
    with pytest.raises(ForwardError, match="in '2' \\(Linear\\), given 1x144 float32"):
        summary(model, (1, 3, 8, 8))  # with a batch it fails in '0'
    with pytest.raises(ForwardError) as failed:
        summary(model, (1, 4, 8, 8))  # both fail in '0'
    assert "batch_size=None" in failed.value.hint


def test_a_hint_for_indices():
    with pytest.raises(ForwardError) as failed:
        summary(nn.Embedding(5, 3), (4,))
    assert failed.value.hint.startswith("give integers: dtypes=[torch.long]")


NEED_VALUES = {
    "item": lambda x: x * x.sum().item(),
    "if": lambda x: x if x.sum() > 0 else -x,
    "list": lambda x: x.split(x.long().abs()[0].tolist(), 1),
    "numpy": lambda x: torch.from_numpy(x.detach().numpy()),
    "nonzero": lambda x: x.nonzero(),
    "mask": lambda x: x[x > 0],
    "masked_select": lambda x: x.masked_select(x > 0),
    "unique": lambda x: x.unique(),
    "bincount": lambda x: torch.bincount(x.long().abs().flatten()),
    "equal": lambda x: x if torch.equal(x, x) else -x,
    "tensor": lambda x: torch.tensor([x.sum(), x.mean()]),
}


@pytest.mark.parametrize("name", NEED_VALUES)
def test_what_needs_values_says_so(name):
    model = Of(lambda self, x: NEED_VALUES[name](self.fc(x)), fc=nn.Linear(4, 4))
    with pytest.raises(ForwardError, match="needs the values of tensors") as failed:
        summary(model, (4,))
    assert "device='cpu'" in failed.value.hint
    if name != "list":
        assert summary(model, (4,), device="cpu").output is not None


def test_positions_that_a_forward_makes_keep_their_values():
    def run(self, x):
        n = int(torch.arange(3).sum())
        return self.fc(x)[:, :n] + torch.ones(n) + torch.arange(n, device="cpu")

    assert summary(Of(run, fc=nn.Linear(4, 3)), (9, 4)).output == (1, 3, 3)


# -------------------------------------------------------------- memory


def saved_for_real(model, *inputs):
    """Bytes of the storages that autograd keeps, parameters, buffers and inputs aside."""
    outside = {t.untyped_storage().data_ptr() for t in (*model.parameters(), *model.buffers())}
    outside |= {x.untyped_storage().data_ptr() for x in inputs}
    kept = {}

    def pack(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in outside:
            kept[storage.data_ptr()] = storage  # held, so that no other gets its place
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        out = model(*inputs)
    del out
    return sum(storage.nbytes() for storage in kept.values())


OLD = not hasattr(nn, "Buffer")  # torch before 2.5

SAVED = {
    "net": (Net(), (2, 3, 8, 8)),
    "mlp": (nn.Sequential(nn.Linear(8, 16), nn.GELU(), nn.Linear(16, 4), nn.Softmax(-1)), (3, 8)),
    "in place": (nn.Sequential(nn.Linear(8, 16), nn.ReLU(inplace=True), nn.Linear(16, 4)), (3, 8)),
    "layer norm": (nn.Sequential(nn.Linear(8, 8), nn.LayerNorm(8), nn.SiLU()), (3, 8)),
    "frozen": (nn.Sequential(nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 8)).requires_grad_(False), 8),
    "recomputed": (
        Of(
            lambda self, x: torch.utils.checkpoint.checkpoint(self.inner, x, use_reentrant=False),
            inner=nn.Sequential(nn.Linear(8, 8), nn.Tanh()),
        ),
        (3, 8),
    ),
}


@pytest.mark.parametrize("mode", ["eval", "train"])
@pytest.mark.parametrize("name", SAVED)
def test_saved_is_what_autograd_keeps(name, mode):
    if name == "recomputed" and OLD:
        pytest.skip("torch recomputes nothing on the meta device before 2.5")
    model, size = SAVED[name]
    dims = (size,) if isinstance(size, int) else size
    expected = saved_for_real(model.train(mode == "train"), torch.randn(dims))
    found = summary(model, dims, batch_size=None, mode=mode)
    assert found.totals.saved == expected
    assert (expected == 0) == (name in ("frozen", "recomputed"))


def test_saved_is_the_same_whatever_grad_mode_it_is_called_in():
    model = SAVED["mlp"][0]
    expected = summary(model, (8,)).totals
    for context in (torch.no_grad(), torch.inference_mode()):
        with context:
            assert summary(model, (8,)).totals == expected
            assert summary(model, input_data=torch.ones(1, 8), device="cpu").totals == expected


def test_activations_are_the_most_alive_at_once():
    wide = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 4))
    # the output of the first and that of ReLU
    assert summary(wide, (8,), batch_size=3).totals.activations == 4 * 3 * (16 + 16)
    placed = nn.Sequential(nn.Linear(8, 16), nn.ReLU(inplace=True), nn.Linear(16, 4))
    assert summary(placed, (8,), batch_size=3).totals.activations == 4 * 3 * (16 + 4)
    deep = nn.Sequential(*(nn.Linear(8, 8, bias=False) for _ in range(9)))
    assert summary(deep, (8,)).totals.activations == 4 * (8 + 8)  # whatever the depth
    skip = Of(lambda self, x: x + self.c(self.b(self.a(x))), **{n: nn.Linear(8, 8) for n in "abc"})
    kept = Of(lambda self, x: self.a(x) + self.c(self.b(self.a(x))), a=skip.a, b=skip.b, c=skip.c)
    assert summary(skip, (8,)).totals.activations == 4 * 16
    assert summary(kept, (8,)).totals.activations == 4 * 24


def test_memory_adds_up():
    model = Net()
    model.conv1.requires_grad_(False)
    totals = summary(model, (3, 8, 8)).totals
    trainable = sum(p.nbytes for p in model.parameters() if p.requires_grad)
    assert totals.param_bytes == sum(p.nbytes for p in model.parameters())
    assert totals.buffer_bytes == sum(b.nbytes for b in model.buffers())
    assert totals.gradients == trainable
    assert totals.optimizer == 2 * trainable
    weights = totals.param_bytes + totals.buffer_bytes
    assert totals.training == weights + 3 * trainable + totals.saved
    assert totals.by_dtype == {
        "float32": totals.params_unique + totals.buffers - 3,
        "int64": 3,
    }


# -------------------------------------------------------------- advice


def advice(model, size=None, **options):
    return [note.text for note in summary(model, size, **options).advice]


def test_nothing_is_odd_about_a_good_model():
    conv = nn.Conv2d(3, 4, 1, bias=False)
    assert advice(nn.Sequential(conv, nn.BatchNorm2d(4), nn.Conv2d(4, 2, 1)), (3, 8, 8)) == []


def test_everything_frozen():
    model = nn.Linear(2, 2).requires_grad_(False)
    assert advice(model) == ["every parameter is frozen: the loss will not move"]
    model.bias.requires_grad_(True)
    assert advice(model) == []
    assert advice(nn.ReLU()) == []


def test_frozen_batchnorm_that_goes_on_moving():
    model = nn.Sequential(nn.BatchNorm1d(4), nn.Linear(4, 4))
    assert advice(model) == []
    mnn.freeze(model, "0")
    (text,) = advice(model)
    assert text.startswith("1 frozen BatchNorm in train mode (0): the running statistics")
    assert advice(model.eval()) == []
    assert len(advice(model.train())) == 1
    mnn.freeze(model, "0", bn_eval=True)
    assert advice(model) == []


def test_mixed_dtypes():
    model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 3))
    model[1].bias.data = model[1].bias.data.half()
    (text,) = advice(model)
    assert text.startswith("parameters of several dtypes (12 float32, 3 float16)")
    model.register_buffer("steps", torch.zeros(1, dtype=torch.long))
    assert advice(model.float()) == []


def test_a_small_view_of_something_huge():
    big = torch.zeros(1 << 20)
    model = nn.Linear(4, 4)
    model.weight = nn.Parameter(big[:16].view(4, 4))
    (text,) = advice(model)
    assert text.startswith("'weight' uses 64 of the 4,194,304 bytes that it keeps alive")
    model.weight = nn.Parameter(big[: 1 << 19].view(-1, 4))
    assert advice(model) == []


def test_bias_right_before_batchnorm():
    norm, conv = nn.BatchNorm1d(4), nn.Linear(4, 4)
    (text,) = advice(nn.Sequential(conv, norm), (4,))
    assert text.startswith("1 bias right before BatchNorm (0): it subtracts the mean, so 4 ")
    without = {
        "no bias": nn.Sequential(nn.Linear(4, 4, bias=False), norm),
        "between": nn.Sequential(conv, nn.ReLU(), norm),
        "in place between": nn.Sequential(conv, nn.ReLU(inplace=True), norm),
        "other norm": nn.Sequential(conv, nn.LayerNorm(4)),
        "used beside": Of(lambda m, x: m.norm(y := m.conv(x)) + y, conv=conv, norm=norm),
        "used before": Of(lambda m, x: (y := m.conv(x)).exp() + m.norm(y), conv=conv, norm=norm),
    }
    for name, model in without.items():
        assert advice(model, (4,)) == [], name
    two = Of(
        lambda m, x: m.a(y := m.conv(x)) + m.norm(y), conv=conv, a=nn.BatchNorm1d(4), norm=norm
    )
    (text,) = advice(two, (4,))
    assert text.startswith("1 bias right before BatchNorm (conv)")
    held = nn.Sequential(conv, nn.BatchNorm1d(4))
    mnn.freeze(held, "1", bn_eval=True)  # its mean is a constant: the bias does something
    assert advice(held, (4,)) == []


def test_parameters_that_the_forward_never_touches():
    model = Of(lambda m, x: m.a(x), a=nn.Linear(4, 4), b=nn.Linear(4, 4))
    (text,) = advice(model, (4,))
    assert text == "2 parameters (20 elements) that this forward never touches, eval mode: b"
    assert advice(model) == []  # no forward, no claim
    helper = Of(lambda m, x: m.b(x) if m.training else m.a(x), a=nn.Linear(4, 4), b=nn.Linear(4, 4))
    assert advice(helper, (4,)) == []  # an auxiliary head
    assert not rows(summary(helper, (4,)))["b"].touched  # not called, nor by another
    assert len(advice(helper, (4,), mode="train")) == 1
    functional = Of(lambda m, x: F.linear(x, m.a.weight[:2], m.a.bias.data[:2]), a=nn.Linear(4, 4))
    assert advice(functional, (4,)) == []


def test_attention_that_borrows_its_output_layer():
    found = summary(nn.MultiheadAttention(8, 2), input_data=[torch.ones(5, 1, 8)] * 3)
    assert found.advice == []
    row = rows(found)["out_proj"]
    assert (row.calls, row.touched) == (0, True)
    assert "weights only" in str(found)


# -------------------------------------------------------------- kinds of models


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3, bias=False)
        self.norm = nn.BatchNorm2d(4)

    def forward(self, x):
        return self.norm(self.conv(x))


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    "kind",
    ["plain", "fx", "exported", "scripted", "traced", "parallel", "compiled", "compile()"],
)
@pytest.mark.parametrize("device", ["meta", "cpu"])
def test_the_same_of_every_kind(kind, device):
    if (kind, device) == ("traced", "meta") and OLD:
        pytest.skip("traced programs run on no meta device before torch 2.5")
    block, example = Block().eval(), torch.randn(1, 3, 8, 8)
    if kind == "fx":
        block = torch.fx.symbolic_trace(block)
    elif kind == "exported":
        block = torch.export.export(block, (example,)).module()
    elif kind == "scripted":
        block = torch.jit.script(block)
    elif kind == "traced":
        block = torch.jit.trace(block, example)
    elif kind == "parallel":
        block = nn.DataParallel(block)
    elif kind == "compiled":
        block = torch.compile(block)
    elif kind == "compile()":
        block.compile()
    found = summary(block, (3, 8, 8), device=device)
    assert found.totals.macs == 36 * 4 * 27
    assert found.output == (1, 4, 6, 6)
    assert found.totals.params_unique == sum(row.params for row in found.rows) == 116
    buffers = sum(
        one.numel() for one in block.buffers()
    )  # 9; torch 2.4 exports no count of batches
    assert found.totals.buffers == sum(row.buffers for row in found.rows) == buffers
    # inside another model
    found = summary(nn.Sequential(nn.Conv2d(3, 3, 1), block), (3, 8, 8), device=device)
    assert found.totals.macs == 36 * 4 * 27 + 64 * 9
    if kind in ("plain", "fx", "parallel", "compiled", "compile()"):
        assert rows(found)["1.conv"].macs == 36 * 4 * 27
        assert rows(found)["1.norm"].calls == 1


def test_depth_fold_and_their_defaults():
    deep = nn.Sequential(*(nn.Sequential(*(nn.Linear(2, 2) for _ in range(4))) for _ in range(50)))
    assert len(summary(deep, (2,), depth="all", fold=False).rows) == 200
    assert [row.path for row in summary(deep, (2,), depth=1, fold=True).rows] == ["{0-49}"]
    auto = summary(deep, (2,))
    assert len(auto.rows) <= 60
    assert sum(row.repeat for row in auto.rows) >= 50
    small = summary(Net(), (3, 8, 8))
    assert small.depth == 2
    assert {row.repeat for row in small.rows} == {1}
