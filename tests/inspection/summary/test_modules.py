"""Whole modules, read where their classes are not: the same as torch's own say."""

from __future__ import annotations

import json
import subprocess
import sys
import types
import warnings
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations, weight_norm

import modelctl
from modelctl.core.modules import (
    class_name,
    hyperparameters,
    is_training,
    module_tensors,
    submodules,
)
from modelctl.errors import UnreadableError
from modelctl.inspection.summary.summarize import summarize

# Describes files in a process where torch and torchvision can't be imported.
_READER = """
import json, sys, zlib

class Blocker:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in ("torch", "torchvision"):
            raise ImportError(f"{name} is not there")

sys.meta_path.insert(0, Blocker())
for name in ("torch", "torchvision"):
    try:
        __import__(name)
    except ImportError:
        continue
    sys.exit(f"{name} could be imported")

import modelctl
from modelctl.core.modules import class_name, hyperparameters, is_training, submodules

for path in sys.argv[1:]:
    with modelctl.open(path) as ckpt:
        totals = modelctl.summarize(ckpt).totals
        print(json.dumps({
            "modules": [
                [where, class_name(node), node.func.module, is_training(node),
                 hyperparameters(node)]
                for where, node in submodules(ckpt.root)
            ],
            "tensors": [
                [name, list(ref.shape), ref.dtype.name, ref.role, ref.requires_grad,
                 zlib.crc32(ref.tobytes())]
                for name, ref in ckpt.state_dict().items()
            ],
            "all": list(ckpt.tensors()),
            "totals": [totals.params_unique, totals.buffers, totals.trainable, totals.frozen],
            "findings": sorted({found.level for found in ckpt.findings}),
            "read": ckpt.bytes_read,
        }))
"""

_PLAIN = (type(None), str, int, float, tuple)


def plain(value: Any) -> Any:
    """As JSON gives it back."""
    return json.loads(json.dumps(value))


def modules_of(model: nn.Module) -> list[list[Any]]:
    """What torch says of each module; shared ones under each name."""
    own = set(vars(nn.Module()))
    return [
        [
            path,
            type(module).__name__,
            type(module).__module__,
            module.training,
            {
                name: plain(value)
                for name, value in vars(module).items()
                if name not in own and isinstance(value, _PLAIN)
            },
        ]
        for path, module in model.named_modules(remove_duplicate=False)
    ]


def tensors_of(model: nn.Module) -> list[list[Any]]:
    parameters = {name for name, _ in model.named_parameters(remove_duplicate=False)}
    return [
        [
            name,
            list(value.shape),
            str(value.dtype).removeprefix("torch."),
            "parameter" if name in parameters else "buffer",
            value.requires_grad if name in parameters else None,
            zlib.crc32(value.detach().contiguous().reshape(-1).view(torch.uint8).numpy()),
        ]
        for name, value in model.state_dict(keep_vars=True).items()
    ]  # fmt: skip


def resnet50() -> nn.Module:
    torchvision = pytest.importorskip("torchvision")
    model: nn.Module = torchvision.models.resnet50()
    model.layer1.requires_grad_(False)
    model.layer1.eval()
    model.fc.bias.requires_grad_(False)
    return model


def vit() -> nn.Module:
    torchvision = pytest.importorskip("torchvision")
    model: nn.Module = torchvision.models.vit_b_16().eval()
    model.requires_grad_(False)
    model.heads.requires_grad_(True)
    model.heads.train()
    return model


def data_parallel() -> nn.Module:
    torchvision = pytest.importorskip("torchvision")
    return nn.DataParallel(torchvision.models.resnet18(num_classes=7))


BIG: dict[str, Callable[[], nn.Module]] = {
    "resnet50": resnet50,
    "vit_b_16": vit,
    "data_parallel": data_parallel,
}


# Parameters and buffer elements, as published.
KNOWN = {"resnet50": [25_557_032, 53_173], "vit_b_16": [86_567_656, 0]}


@pytest.mark.parametrize("name", BIG)
def test_it_is_what_torch_says(name: str, tmp_path: Path) -> None:
    """One test a model: they are large to make."""
    torch.manual_seed(0)
    model = BIG[name]()
    file = tmp_path / "a.pt"
    torch.save(model, file)
    done = subprocess.run(
        [sys.executable, "-c", _READER, str(file)], capture_output=True, text=True
    )
    file.unlink()
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)

    modules = modules_of(model)
    assert [one[0] for one in found["modules"]] == [one[0] for one in modules]
    for one, other in zip(found["modules"], modules, strict=True):
        assert one == other, other[0]

    tensors = tensors_of(model)
    assert found["all"] == [one[0] for one in tensors]
    assert len(found["tensors"]) == len(tensors)
    for one, other in zip(found["tensors"], tensors, strict=True):
        if other[4] is None:  # a buffer: it isn't said, or it doesn't train
            assert not one[4]
            one[4] = None
        assert one == other

    counts = [
        sum(p.numel() for p in model.parameters() if p.requires_grad is on) for on in (True, False)
    ]
    buffers = sum(b.numel() for b in model.buffers())
    assert found["totals"] == [sum(counts), buffers, *counts]
    assert found["totals"][:2] == KNOWN.get(name, found["totals"][:2])
    assert "dangerous" not in found["findings"]


# ------------------------------------------------------------------ small ones, in this process


class Shared(nn.Module):
    """A tied weight, a module under two names, a buffer that isn't saved, a tuple, a class."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(7, 4)
        self.block = nn.Sequential(nn.Linear(4, 4), nn.ReLU())
        self.again = self.block
        self.head = nn.Linear(4, 7, bias=False)
        self.head.weight = self.embedding.weight
        self.register_buffer("kept", torch.ones(3))
        self.register_buffer("scratch", torch.ones(9), persistent=False)
        self.register_buffer("nothing", None)
        self.register_parameter("no_bias", None)
        self.alpha = nn.Parameter(torch.ones(2), requires_grad=False)
        self.sizes = (1, 2, 3)
        self.layer = nn.Linear
        self.kind = "shared"
        self.blocks = nn.ModuleList([nn.Linear(4, 4) for _ in range(3)])
        self.parts = nn.ModuleDict({"a": nn.Linear(4, 2), "b": nn.Identity()})
        self.loose = nn.ParameterList([torch.ones(2), torch.ones(3)])


def quantized() -> nn.Module:
    from torch.ao.quantization import quantize_dynamic

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return quantize_dynamic(nn.Sequential(nn.Linear(4, 4), nn.ReLU()), {nn.Linear})


def normed() -> nn.Module:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return weight_norm(nn.Linear(3, 4))


SMALL: dict[str, Callable[[], nn.Module]] = {
    "shared": Shared,
    "lstm": lambda: nn.LSTM(3, 4, num_layers=2, bidirectional=True),
    "gru": lambda: nn.Sequential(nn.GRU(3, 4), nn.GRUCell(3, 4)),
    "attention": lambda: nn.TransformerEncoderLayer(8, 2, 16),
    "weight_norm": normed,
    "spectral_norm": lambda: nn.utils.spectral_norm(nn.Conv2d(3, 4, 3)),
    "ema": lambda: torch.optim.swa_utils.AveragedModel(nn.Linear(2, 2)),
    "hooked": lambda: _hooked(),
    "half": lambda: nn.Linear(3, 4).to(torch.bfloat16),
    "empty": nn.Identity,
    "syncbn": lambda: nn.SyncBatchNorm(4),
}


def _hook(module: nn.Module, *args: Any) -> None:
    return None


def _hooked() -> nn.Module:
    model = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4))
    model[0].register_forward_hook(_hook)
    model.register_state_dict_pre_hook(_hook)
    return model


@pytest.mark.parametrize("name", SMALL)
def test_small_modules(name: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = SMALL[name]()
    torch.save(model, tmp_path / "a.pt")
    with modelctl.open(tmp_path / "a.pt") as ckpt:
        found = [
            [path, class_name(node), node.func.module, is_training(node), hyperparameters(node)]
            for path, node in submodules(ckpt.root)
        ]
        assert plain(found) == modules_of(model)
        tensors = tensors_of(model)
        refs = ckpt.state_dict() if tensors else module_tensors(ckpt.root)
        seen = []
        for name_, ref in refs.items():
            grad = ref.requires_grad if ref.role == "parameter" else None
            crc = zlib.crc32(ref.tobytes())
            seen.append([name_, list(ref.shape), ref.dtype.name, ref.role, grad, crc])
        assert seen == tensors
        assert list(ckpt.tensors()) == [one[0] for one in tensors]
        totals = summarize(ckpt).totals
        saved = {id(value): value for value in model.state_dict(keep_vars=True).values()}
        parameters = {id(value) for value in model.parameters()}
        assert totals.params_unique == sum(t.numel() for t in model.parameters())
        assert totals.buffers == sum(t.numel() for key, t in saved.items() if key not in parameters)


def test_tied_and_shared_parts(tmp_path: Path) -> None:
    torch.save(Shared(), tmp_path / "a.pt")
    with modelctl.open(tmp_path / "a.pt") as ckpt:
        refs = ckpt.state_dict()
        assert refs["head.weight"].identity == refs["embedding.weight"].identity
        nodes = dict(submodules(ckpt.root))
        assert nodes["again"] is nodes["block"]
        assert nodes["again.0"] is nodes["block.0"]
        found = summarize(ckpt)
        assert {frozenset(names) for names in found.tied} == {
            frozenset(("embedding.weight", "head.weight")),
            frozenset(("block.0.weight", "again.0.weight")),
            frozenset(("block.0.bias", "again.0.bias")),
        }
        assert "scratch" not in refs


def test_a_class_that_is_nowhere(tmp_path: Path) -> None:
    gone = types.ModuleType("gone_for_good")
    cls = type("Net", (nn.Sequential,), {"__module__": "gone_for_good"})
    gone.Net = cls  # type: ignore[attr-defined]
    sys.modules["gone_for_good"] = gone
    try:
        torch.save(cls(nn.Linear(2, 3)), tmp_path / "a.pt")
    finally:
        del sys.modules["gone_for_good"]
    with pytest.raises((ImportError, AttributeError)):
        torch.load(tmp_path / "a.pt", weights_only=False)
    with modelctl.open(tmp_path / "a.pt") as ckpt:
        assert summarize(ckpt).module == "gone_for_good.Net, in train mode"
        assert list(ckpt.state_dict()) == ["0.weight", "0.bias"]


def test_a_quantized_module_is_read(tmp_path: Path) -> None:
    model = quantized()
    torch.save(model, tmp_path / "a.pt")
    with modelctl.open(tmp_path / "a.pt") as ckpt:
        found = [
            [path, class_name(node), is_training(node)] for path, node in submodules(ckpt.root)
        ]
        assert found == [
            [path, type(module).__name__, module.training]
            for path, module in model.named_modules(remove_duplicate=False)
        ]
        summarize(ckpt)


def test_a_parametrized_module_leaves_a_failed_save(tmp_path: Path) -> None:
    model = parametrizations.weight_norm(nn.Linear(2, 2))
    with pytest.raises(RuntimeError, match="parametrized"):
        torch.save(model, tmp_path / "a.pt")
    with pytest.raises(UnreadableError, match=r"without data\.pkl.*failed") as raised:
        modelctl.open(tmp_path / "a.pt")
    assert raised.value.hint


@pytest.mark.parametrize("part", [False, True])
def test_a_compiled_module(tmp_path: Path, part: bool) -> None:
    """It pickles as a call with the module in it: nothing of that may be missing."""
    net = nn.Sequential(nn.Linear(2, 3), nn.Sequential(nn.Linear(3, 3)))
    if part:
        net[1] = torch.compile(net[1], backend="eager")
    else:
        net = torch.compile(net, backend="eager")
    torch.save(net, tmp_path / "net.pt")
    with modelctl.open(tmp_path / "net.pt") as ckpt:
        assert list(ckpt.state_dict()) == list(net.state_dict())
        flat = modelctl.strip_prefix(modelctl.convert(ckpt, weights_only=True))
        assert list(flat.state_dict()) == [
            "0.weight",
            "0.bias",
            "1.0.weight",
            "1.0.bias",
        ]
