"""nn.summary leaves the model, the program and its inputs as they were, also when it fails."""

from __future__ import annotations

import copy
import functools
import random
import warnings
from collections import deque
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn.parameter import is_lazy
from torch.nn.utils import prune

import modelctl.nn as mnn
from modelctl.nn import ForwardError, summary
from tests.nn.nets import Net

BACKENDS = torch.backends
# Through a closure autograd counts up the version of the original's; the values stay
REACHED = ("num_batches_tracked", "running_mean", "running_var")


def contents(value, seen):
    """Identities of everything inside, containers by what they hold."""
    if id(value) in seen:
        return id(value)
    if isinstance(value, dict):
        seen.add(id(value))
        return id(value), [(key, contents(one, seen)) for key, one in value.items()]
    if isinstance(value, list | tuple | deque):
        seen.add(id(value))
        return id(value), [contents(one, seen) for one in value]
    if isinstance(value, functools.partial):
        return id(value), contents(value.args, seen), contents(value.keywords, seen)
    return id(value)


def of_tensor(name, tensor):
    if is_lazy(tensor):
        return id(tensor), type(tensor), tensor.requires_grad
    return (
        id(tensor),
        type(tensor),
        tensor.data_ptr() if not tensor.is_meta else 0,
        tensor.device,
        tensor.dtype,
        tensor.shape,
        tensor.stride(),
        tensor.requires_grad,
        tensor.is_leaf,
        0 if tensor.is_inference() or name in REACHED else tensor._version,
        id(tensor.grad) if tensor.is_leaf else None,
        {**vars(tensor)},
    )


def of_model(model):
    found = {}
    for name, module in model.named_modules(remove_duplicate=False):
        found[name] = (
            id(module),
            type(module),
            module.training,
            contents(vars(module), set()),
        )
    named = [*model.named_parameters(remove_duplicate=False)]
    named += model.named_buffers(remove_duplicate=False)
    return found, {name: of_tensor(name.rpartition(".")[2], one) for name, one in named}


def values(model):
    tensors = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    grads = {f"{name} grad": one.grad for name, one in tensors.items() if one.grad is not None}
    return {
        name: one.detach().clone()
        for name, one in {**tensors, **grads}.items()
        if not is_lazy(one) and not one.is_meta
    }


def bits(tensor):
    return tensor.reshape(-1).view(torch.uint8)


def of_program():
    return (
        random.getstate(),
        [part.tolist() if hasattr(part, "tolist") else part for part in np.random.get_state()],
        torch.get_rng_state().tolist(),
        torch.is_grad_enabled(),
        torch.is_inference_mode_enabled(),
        torch.is_autocast_enabled("cpu"),
        torch.get_default_dtype(),
        torch.get_default_device(),
        BACKENDS.mha.get_fastpath_enabled(),
        BACKENDS.mkldnn.enabled,
        getattr(BACKENDS.mkldnn, "deterministic", None),
        getattr(BACKENDS.mkldnn, "allow_tf32", None),
        BACKENDS.cudnn.enabled,
        BACKENDS.cudnn.flags,
        torch.get_num_threads(),
        torch.are_deterministic_algorithms_enabled(),
        len(torch.utils._python_dispatch._get_current_dispatch_mode_stack()),
        len(torch.overrides._get_current_function_mode_stack()),
        {
            name: contents(one, set())
            for name, one in vars(nn.modules.module).items()
            if "_hooks" in name
        },
    )


def unchanged(model, *args, fails=False, **options):
    """Call summary; everything is as before."""
    structure, before, program = of_model(model), values(model), of_program()
    keys = list(model.state_dict()) if not fails else None
    if fails:
        with pytest.raises(ForwardError) as failed:
            summary(model, *args, **options)
        found = failed.value
    else:
        found = summary(model, *args, **options)
    after = values(model)
    assert before.keys() == after.keys()
    for name, tensor in before.items():
        assert torch.equal(bits(tensor), bits(after[name])), name
    assert of_model(model) == structure
    assert of_program() == program
    assert keys is None or list(model.state_dict()) == keys
    return found


WAYS = [
    {},
    {"mode": "train"},
    {"device": "cpu"},
    {"device": "cpu", "mode": "train", "batch_size": 2},
]


@pytest.fixture(params=range(len(WAYS)), ids=["eval", "train", "cpu", "cpu train"])
def way(request):
    return WAYS[request.param]


def prepared(model):
    """In a state that shows what moves: modes and gradients that are mixed."""
    for i, module in enumerate(model.modules()):
        module.training = i % 3 != 0
    for i, p in enumerate(model.parameters()):
        if not is_lazy(p):
            p.requires_grad_(i % 4 != 0)
            p.grad = torch.full_like(p, i) if i % 2 else None
    return model


def test_a_model_with_batchnorm_and_dropout(way):
    unchanged(prepared(Net()), (3, 8, 8), **{"batch_size": 2, **way})


def test_without_input():
    unchanged(prepared(Net()))


def test_nothing_is_warned_of(way):
    torch.set_warn_always(True)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            summary(Net(), (3, 8, 8), **{"batch_size": 2, **way})
    finally:
        torch.set_warn_always(False)


def test_whatever_mode_the_program_is_in(way):
    model = prepared(Net())
    with torch.no_grad():
        unchanged(model, (3, 8, 8), **{"batch_size": 2, **way})
    with torch.inference_mode():
        unchanged(model, (3, 8, 8), **{"batch_size": 2, **way})
    with torch.autocast("cpu", dtype=torch.bfloat16):
        unchanged(model, (3, 8, 8), **{"batch_size": 2, **way})
    BACKENDS.mha.set_fastpath_enabled(False)
    try:
        unchanged(model, (3, 8, 8), **{"batch_size": 2, **way})
    finally:
        BACKENDS.mha.set_fastpath_enabled(True)


class Fails(nn.Module):
    """Changes what it can, then fails."""

    def __init__(self):
        super().__init__()
        self.net = Net()
        self.bad = nn.Linear(3, 3)
        self.steps = 0
        self.seen = []
        self.state = {"last": None}
        self.queue = deque(maxlen=2)
        self.register_buffer("total", torch.zeros(3))

    def forward(self, x):
        self.steps += 1
        self.seen.append(x)
        self.state["last"] = x
        self.queue.append(x)
        self.total += 1
        self.net.conv1.weight.data.zero_()
        self.net.fc.requires_grad_(False)
        self.net.fc.new = nn.Parameter(torch.ones(1))
        self.net.eval()
        del self.net.drop
        self.net.register_forward_hook(lambda *_: None)
        random.random()
        np.random.rand()
        torch.rand(1)
        torch.set_grad_enabled(False)
        return self.bad(x)


def test_a_forward_that_changes_the_model_and_fails(way):
    error = unchanged(prepared(Fails()), (3, 8, 8), fails=True, **way)
    assert "in 'bad' (Linear)" in str(error)


@pytest.mark.parametrize("error", [ValueError("x"), KeyboardInterrupt(), SystemExit(3)])
def test_any_exception(way, error):
    class Raises(nn.Module):
        def forward(self, x):
            raise error

    model = nn.Sequential(nn.BatchNorm2d(3), Raises())
    structure, program = of_model(model), of_program()
    with pytest.raises(ForwardError if isinstance(error, Exception) else type(error)):
        summary(model, (3, 8, 8), **way)
    assert of_model(model) == structure
    assert of_program() == program


def test_inputs_are_left_alone(way):
    class InPlace(nn.Module):
        def forward(self, x, y, more):
            more["z"].mul_(3)
            return x.add_(1) * y.neg_()

    x, y, z = torch.ones(2), torch.ones(2), torch.ones(2)
    options = {name: value for name, value in way.items() if name != "batch_size"}
    for data in ((x,), [x], x):
        unchanged(InPlace(), input_data=data, y=y, more={"z": z}, **options)
    unchanged(InPlace(), (2,), y=y, more={"z": z}, **way)
    for one in (x, y, z):
        assert one.tolist() == [1, 1]
        assert one._version == 0
        assert not one.is_meta


# -------------------------------------------------------------- ways to reach the original


class Helper:
    """Not copied, and leads to the model's own modules."""

    def __init__(self, module):
        self.module = module

    def __call__(self, x):
        return self.module(x)


class Helped(nn.Module):
    def __init__(self):
        super().__init__()
        self.norm = nn.BatchNorm2d(3)
        self.unused = nn.Linear(2, 2)
        self.helper = Helper(self.norm)

    def forward(self, x):
        return self.helper(x)


def patched(kind):
    model = Net()
    old = model.forward
    if kind == "closure":
        model.forward = lambda x: old(x) * 2
    elif kind == "partial":
        model.forward = functools.partial(type(model).forward, model)
    elif kind == "bound method":
        model.forward = old
    elif kind == "inner closure":
        inner = model.layer1.forward
        model.layer1.forward = lambda x: inner(x) + 0
    elif kind == "update_wrapper":  # as accelerate does
        model.layer1.forward = functools.update_wrapper(
            functools.partial(lambda module, x: type(module).forward(module, x), model.layer1),
            model.layer1.forward,
        )
    return model


@pytest.mark.parametrize(
    "kind", ["closure", "partial", "bound method", "inner closure", "update_wrapper"]
)
def test_a_forward_that_was_replaced(kind, way):
    found = unchanged(prepared(patched(kind)), (3, 8, 8), **{"batch_size": 2, **way})
    assert found.totals.macs == summary(Net(), (3, 8, 8), **{"batch_size": 2, **way}).totals.macs
    assert not [note for note in found.advice if "never touches" in note.text]


def test_a_helper_object_that_holds_a_module(way):
    model = prepared(Helped())
    model.norm.train()
    found = unchanged(model, (3, 8, 8), **{"batch_size": 2, **way})
    assert [note.text.partition(":")[2] for note in found.advice] == [" unused"]


def test_modules_in_plain_lists_and_deques(way):
    class Listed(nn.Module):
        def __init__(self):
            super().__init__()
            self.plain = [nn.BatchNorm2d(3)]
            self.queue = deque([{"one": nn.BatchNorm2d(3)}])

        def forward(self, x):
            return self.queue[0]["one"](self.plain[0](x))

    model = Listed()
    norms = model.plain[0], model.queue[0]["one"]
    before = [copy.deepcopy(norm.state_dict()) for norm in norms]
    unchanged(model, (3, 8, 8), **{"batch_size": 2, **way})
    for norm, state in zip(norms, before, strict=True):
        assert norm.training
        assert all(torch.equal(value, norm.state_dict()[name]) for name, value in state.items())
        assert not any(p.is_meta for p in norm.parameters())


# -------------------------------------------------------------- kinds of modules


def test_hooks_of_the_user_run_and_stay(way):
    model, ran = prepared(Net()), []
    handles = [
        model.layer1.register_forward_pre_hook(lambda *_: ran.append("pre")),
        model.layer1.register_forward_hook(lambda *_: ran.append("post")),
        model.fc.register_full_backward_hook(lambda *_: ran.append("backward")),
        model.register_forward_hook(lambda *_, **__: ran.append("last"), with_kwargs=True),
        model.bn1.weight.register_hook(lambda grad: None),
    ]
    unchanged(model, (3, 8, 8), **{"batch_size": 2, **way})
    assert ran == ["pre", "post", "last"]
    for handle in handles:
        handle.remove()


def test_lazy_modules_stay_lazy(way):
    if not hasattr(nn, "Buffer"):
        pytest.skip("before torch 2.5 nobody may watch a lazy BatchNorm take its shape")
    model = nn.Sequential(nn.LazyConv2d(4, 3), nn.LazyBatchNorm2d(), nn.Flatten(), nn.LazyLinear(2))
    hooks = [list(module._forward_pre_hooks) for module in model]
    found = unchanged(model, (3, 8, 8), **{"batch_size": 2, **way})
    assert found.totals.macs == found.inputs.startswith("2x") * 2 * (36 * 4 * 27 + 144 * 2)
    assert found.totals.params_unique == 4 * 27 + 4 + 8 + 144 * 2 + 2
    assert [type(module) for module in model] == [
        nn.LazyConv2d,
        nn.LazyBatchNorm2d,
        nn.Flatten,
        nn.LazyLinear,
    ]
    assert [list(module._forward_pre_hooks) for module in model] == hooks
    unchanged(model)
    unchanged(model, (3, 1, 1), fails=True, **way)
    assert model(torch.randn(2, 3, 8, 8)).shape == (2, 2)  # and come to life as they would


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    "norm",
    [
        nn.utils.weight_norm,
        nn.utils.spectral_norm,
        nn.utils.parametrizations.weight_norm,
        nn.utils.parametrizations.spectral_norm,
        nn.utils.parametrizations.orthogonal,
    ],
    ids=["weight_norm", "spectral_norm", "weight_norm 2", "spectral_norm 2", "orthogonal"],
)
def test_reparametrized_weights(norm, way):
    model = nn.Sequential(nn.Linear(4, 4), norm(nn.Linear(4, 4)))
    found = unchanged(model, (4,), **way)
    assert sum(row.params for row in found.rows) == found.totals.params_unique
    model(torch.ones(1, 4)).sum().backward()


def test_pruned_weights(way):
    model = nn.Sequential(nn.Linear(4, 4))
    prune.l1_unstructured(model[0], "weight", amount=0.5)
    unchanged(model, (4,), **way)


def test_a_held_batchnorm(way):
    model = Net()
    mnn.freeze(model, "layer1.*", bn_eval=True)
    unchanged(model, (3, 8, 8), **{"batch_size": 2, **way})
    model.train()
    assert not model.layer1[1].training


@pytest.mark.parametrize("wrapper", [torch.compile, nn.DataParallel])
def test_wrappers(wrapper, way):
    model = wrapper(prepared(Net()))
    unchanged(model, (3, 8, 8), **{"batch_size": 2, **way})
    unchanged(nn.Sequential(model), (3, 8, 8), **{"batch_size": 2, **way})


def test_compiled_in_place(way):
    model = prepared(Net())
    model.layer1.compile()
    unchanged(model, (3, 8, 8), **{"batch_size": 2, **way})


def test_recurrent_weights_stay_together(way):
    model = nn.LSTM(4, 6, batch_first=True)
    unchanged(model, (5, 4), **way)
    assert all(a is b for a, b in zip(model._flat_weights, model.parameters(), strict=True))


def test_a_model_on_meta_and_one_of_inference_tensors(way):
    with torch.device("meta"):
        model = Net()
    unchanged(model, (3, 8, 8), mode=way.get("mode", "eval"), batch_size=2)
    with torch.inference_mode():
        model = Net()
    unchanged(model, (3, 8, 8), **{"batch_size": 2, **way})


# -------------------------------------------------------------- real models

REAL = [
    "densenet121", "efficientnet_b0", "googlenet", "mnasnet0_5", "mobilenet_v2",
    "mobilenet_v3_small", "regnet_y_400mf", "resnet18", "shufflenet_v2_x0_5", "squeezenet1_1",
    "lraspp_mobilenet_v3_large",
]  # fmt: skip


@pytest.mark.parametrize("name", REAL)
def test_real_models(name, monkeypatch):
    models = pytest.importorskip("torchvision").models
    for init in ("normal_", "trunc_normal_", "kaiming_normal_", "kaiming_uniform_", "uniform_"):
        monkeypatch.setattr(nn.init, init, lambda tensor, *_, **__: tensor)  # takes seconds
    options = {"weights_backbone": None} if "lraspp" in name else {}
    if name in ("googlenet", "inception_v3"):
        options["init_weights"] = False
    model = prepared(models.get_model(name, **options))
    size = {"inception_v3": 299}.get(name, 224)
    unchanged(model, (3, size, size))
    unchanged(model, (5, size, size), fails=True)


class Cache:
    """A helper that is no module, with values for each length."""

    def __init__(self) -> None:
        self.found: dict[int, Any] = {}

    def __call__(self, x: Any) -> Any:
        if x.shape[1] not in self.found:
            self.found[x.shape[1]] = torch.zeros(x.shape[1], 1, device=x.device)
        return x + self.found[x.shape[1]]


class Cached(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.cache, self.fc = Cache(), nn.Linear(4, 4)

    def forward(self, x: Any) -> Any:
        return self.fc(self.cache(x))


def test_a_helpers_cache_stays_empty():
    model = Cached()
    summary(model, (5, 4))
    assert model.cache.found == {}
    model(torch.zeros(1, 5, 4))
    summary(model, (5, 4))
    assert model.cache.found[5].device.type == "cpu"
