"""Whole modules as torch pickled them up to 0.4: a parameter is ``Parameter(data)``, and what else
is known of it a state."""

from __future__ import annotations

import collections
import sys
import types
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import modelctl as mc
from modelctl.errors import UnreadableError

HOOKS: Any = collections.OrderedDict()


class Old:
    """Stands for a parameter while it is pickled."""

    def __init__(self, tensor: torch.Tensor, form: str) -> None:
        self.tensor, self.form = tensor, form

    def __reduce_ex__(self, protocol: Any) -> Any:
        data, grad = self.tensor.data, self.tensor.requires_grad
        if self.form == "0.4":
            return nn.Parameter, (data, grad)
        return nn.Parameter, (data,), (grad, False, HOOKS if self.form == "0.2" else None)


FORMS = ("0.2", "0.3", "0.4")


@pytest.fixture
def backend(monkeypatch: pytest.MonkeyPatch) -> Any:
    """What each module kept of torch's backends; the module that had it is gone."""
    module = types.ModuleType("torch.nn.backends.thnn")

    class Kept:
        def __reduce__(self) -> Any:
            return module._get_thnn_function_backend, ()

    exec("def _get_thnn_function_backend(): return 'thnn'", module.__dict__)
    monkeypatch.setitem(sys.modules, "torch.nn.backends", types.ModuleType("torch.nn.backends"))
    monkeypatch.setitem(sys.modules, "torch.nn.backends.thnn", module)
    return Kept


def saved(path: Path, form: str, new: bool, backend: Any) -> dict[str, torch.Tensor]:
    """A saved module with a frozen layer and a tied one; its state_dict."""
    net = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4), nn.Linear(4, 4))
    net[2].weight = net[0].weight
    net[1].requires_grad_(False)
    state = {name: tensor.clone() for name, tensor in net.state_dict().items()}
    old: dict[int, Old] = {}
    for module in net.modules():
        module.__dict__["_parameters"] = collections.OrderedDict(
            (name, old.setdefault(id(one), Old(one, form)))
            for name, one in module._parameters.items()
        )
        module.__dict__["_backend"] = backend()
    torch.save(net, path, _use_new_zipfile_serialization=new)
    again = torch.load(path, weights_only=False)
    assert torch.equal(again.state_dict()["0.weight"], state["0.weight"])
    assert not any(one.requires_grad for one in again[1].parameters())
    return state


@pytest.mark.parametrize("new", [False, True])
@pytest.mark.parametrize("form", FORMS)
def test_its_parameters_are_seen(form: str, new: bool, backend: Any, tmp_path: Path) -> None:
    state = saved(tmp_path / "net.pt", form, new, backend)
    with mc.open(tmp_path / "net.pt") as ckpt:
        refs = ckpt.state_dict()
        assert list(refs) == list(state)
        for name, ref in refs.items():
            assert ref.tobytes() == state[name].numpy().tobytes()
        assert {name for name, ref in refs.items() if ref.role == "buffer"} == {
            "1.running_mean",
            "1.running_var",
            "1.num_batches_tracked",
        }
        frozen = {name for name, ref in refs.items() if ref.requires_grad is False}
        assert frozen == {"1.weight", "1.bias"}
        assert refs["0.weight"].identity == refs["2.weight"].identity
        assert not [one for one in ckpt.findings if one.level == "dangerous"], ckpt.findings
        mc.save(ckpt, tmp_path / "again.pt")
        mc.save(mc.convert(ckpt, weights_only=True), tmp_path / "state.pt")
    found = torch.load(tmp_path / "state.pt")
    assert all(torch.equal(found[name], tensor) for name, tensor in state.items())
    again = torch.load(tmp_path / "again.pt", weights_only=False)
    assert [one.requires_grad for one in again.parameters()] == [True, True, False, False, True]
    assert again[0].weight is again[2].weight


def test_a_state_that_is_none_is_refused(tmp_path: Path) -> None:
    class Odd:
        def __reduce__(self) -> Any:
            return nn.Parameter, (torch.ones(2),), ("a", "b")

    torch.save({"a": Odd()}, tmp_path / "a.pt")
    with pytest.raises(UnreadableError, match="BUILD on a value"):
        mc.open(tmp_path / "a.pt")
