"""What is no plain tensor in a state_dict passes through as it is, and hides nothing."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch._dynamo  # plain torch loads jagged tensors only where these are imported
import torch.nested
from torch import nn

import modelctl as mc
import modelctl.nn as mnn
from modelctl.errors import NoMatchError

from .nets import opened


def quantized() -> dict[str, Any]:
    backends = torch.backends.quantized.supported_engines
    torch.backends.quantized.engine = next(one for one in backends if one != "none")
    net = nn.Sequential(nn.Linear(4, 3))
    made = torch.ao.quantization.quantize_dynamic(net, {nn.Linear})
    return {f"q.{name}": value for name, value in made.state_dict().items()}


def jagged() -> Any:
    parts = [torch.ones(2, 3), torch.ones(4, 3)]
    return torch.nested.nested_tensor(parts, layout=torch.jagged)


ODD: dict[str, Callable[[], dict[str, Any]]] = {
    "dtype": lambda: {"q.dtype": torch.qint8},
    "numbers": lambda: {"q.scale": 0.5, "q.pad": (1, 2), "q.size": torch.Size([2, 3])},
    "texts": lambda: {"q.name": "x", "q.device": torch.device("cpu"), "q.bias": None},
    "dict": lambda: {"store": {"params": {}, "constraints": {}}},
    "lists": lambda: {"auc.preds": [torch.rand(3)], "auc.target": [torch.ones(3)]},
    "parameters": lambda: {"p.all": [nn.Parameter(torch.ones(2)), nn.Parameter(torch.ones(3))]},
    "numpy": lambda: {"q.array": torch.arange(3.0).numpy(), "q.number": torch.ones(1).numpy()[0]},
    "quantized": quantized,
    "lazy": lambda: {f"lazy.{k}": v for k, v in nn.LazyBatchNorm1d().state_dict().items()},
    "jagged": lambda: {"q.jagged": jagged()},
    "sparse": lambda: {"q.eye": torch.eye(3).to_sparse()},
}
NOT_MADE = ("numpy", "quantized", "jagged", "sparse")


def same(one: Any, other: Any) -> bool:
    if isinstance(one, nn.parameter.UninitializedTensorMixin):
        return type(one) is type(other)
    if isinstance(one, torch.Tensor):
        if one.is_nested:
            return torch.equal(one.values(), other.values())
        if one.is_sparse or one.is_quantized:
            one, other = (
                part.to_dense() if part.is_sparse else part.dequantize() for part in (one, other)
            )
        return one.dtype == other.dtype and torch.equal(one, other)
    if isinstance(one, list | tuple) and not isinstance(one, torch.Size):
        return len(one) == len(other) and all(map(same, one, other))
    return repr(one) == repr(other)


def state(odd: str) -> dict[str, Any]:
    net = nn.Sequential(nn.Linear(4, 8), nn.Linear(8, 3)).state_dict()
    return {f"module.{name}": value for name, value in {**net, **ODD[odd]()}.items()}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("inside", [True, False], ids=["in a checkpoint", "bare"])
@pytest.mark.parametrize("odd", ODD)
def test_an_odd_entry_passes_through(odd: str, inside: bool, tmp_path: Path) -> None:
    saved = state(odd)
    with opened(tmp_path / "in.pt", {"epoch": 1, "state_dict": saved} if inside else saved) as ckpt:
        assert not [one for one in ckpt.findings if one.level == "dangerous"]
        assert {f"module.{i}.{part}" for i in (0, 1) for part in ("weight", "bias")} <= {
            *ckpt.state_dict()
        }
        mc.save(mc.drop(mc.strip_prefix(ckpt), "1"), tmp_path / "out.pt")
        mc.save(mc.convert(ckpt, weights_only=True), tmp_path / "out.safetensors")
    found = torch.load(tmp_path / "out.pt", weights_only=False)
    found = found["state_dict"] if inside else found
    expected = {k.removeprefix("module."): v for k, v in saved.items() if ".1." not in k[:9]}
    assert [*found] == [*expected]
    assert all(same(value, found[name]) for name, value in expected.items())
    assert {"module.0.weight", "module.1.bias"} <= {*mnn.load(tmp_path / "out.safetensors")}


@pytest.mark.parametrize("odd", [odd for odd in ODD if odd not in NOT_MADE])
def test_it_is_loaded(odd: str, tmp_path: Path) -> None:
    saved = state(odd)
    torch.save({"epoch": 1, "model_state_dict": saved}, tmp_path / "in.pt")
    found = mnn.load(tmp_path / "in.pt", key="model_state_dict")
    assert [*found] == [*saved]
    assert all(same(value, found[name]) for name, value in saved.items())


def test_a_dotted_tensor_beside_it_hides_no_model(tmp_path: Path) -> None:
    model = nn.Linear(4, 3).state_dict()
    saved = {"val.best": torch.tensor(0.5), "model": model}
    with opened(tmp_path / "in.pt", saved) as ckpt:
        assert [*ckpt.state_dict()] == [*model]
    with opened(tmp_path / "bag.pt", {"val.best": torch.ones(1), "x": [torch.ones(1)] * 9}) as ckpt:
        assert [*ckpt.state_dict()] == ["val.best"]
    with (
        opened(tmp_path / "none.pt", {"losses": [torch.ones(1)]}) as ckpt,
        pytest.raises(NoMatchError),
    ):
        ckpt.state_dict()


def test_others_metadata_of_the_root_stays(tmp_path: Path) -> None:
    """None in it is a value, as tensordict has it (``device``), and no record to be removed."""
    state = torch.nn.Linear(3, 2).state_dict()
    state._metadata[""]["device"] = None
    torch.save(state, tmp_path / "in.pt")
    with mc.open(tmp_path / "in.pt") as ckpt:
        mc.save(mc.freeze(mc.keep(ckpt, "weight"), "weight"), tmp_path / "frozen.pt")
    with mc.open(tmp_path / "frozen.pt") as ckpt:
        mc.save(mc.unfreeze(ckpt, "*"), tmp_path / "out.pt")
    for name in ("frozen.pt", "out.pt"):
        metadata = torch.load(tmp_path / name)._metadata[""]
        assert metadata["device"] is None
        assert ("modelctl.freeze" in metadata) == (name == "frozen.pt")


def test_weights_alone_of_what_is_no_mapping_name_what_they_leave(tmp_path: Path) -> None:
    net = torch.nn.Linear(3, 2)
    torch.save((net.state_dict(), {"mean": torch.ones(3)}, [torch.ones(1)]), tmp_path / "in.pt")
    with mc.open(tmp_path / "in.pt", key="0") as ckpt:
        out = mc.convert(ckpt, weights_only=True)
        assert [*out.state_dict()] == ["weight", "bias"]
        assert [note.text for note in out.notes] == ["left out, none of the model's: 1.mean, 2.0"]
    torch.save((net.state_dict(), 3), tmp_path / "in.pt")
    with mc.open(tmp_path / "in.pt") as ckpt:
        assert not mc.convert(ckpt, weights_only=True).notes
