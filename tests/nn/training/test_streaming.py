"""The optimizer's state on its way from the file: straight to where it will be."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn, optim

import modelctl as mc
import modelctl.nn as mnn
from modelctl.core.tensors import TensorRef
from modelctl.core.tree import walk
from modelctl.errors import DamagedError
from modelctl.nn.loading.values import live
from modelctl.nn.training.optimizers.streaming import States

needs_cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device here")


class OwnWay(optim.Adam):
    def load_state_dict(self, state_dict):
        super().load_state_dict(state_dict)


def trained(dtype: torch.dtype | None = None, seed: int = 0) -> dict:
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(30, 20), nn.Linear(20, 5)).to(dtype)
    optimizer = optim.Adam(model.parameters(), lr=0.1)
    for _ in range(2):
        model(torch.randn(4, 30, dtype=dtype)).square().sum().backward()
        optimizer.step()
    return {"model": model, "optimizer": optimizer}


def fresh(dtype: torch.dtype | None = None, device: str = "cpu", kind: type = optim.Adam) -> dict:
    with torch.device(device):
        model = nn.Sequential(nn.Linear(30, 20), nn.Linear(20, 5)).to(dtype)
    return {"model": model, "optimizer": kind(model.parameters(), lr=0.1)}


@pytest.fixture
def path(tmp_path) -> Path:
    path = tmp_path / "a.pt"
    mnn.save_checkpoint(path, **trained())
    return path


def exactly(a: dict, b: dict) -> bool:
    """Whether two optimizers keep the same, of the same dtypes in the same places."""
    mine, theirs = (list(parts["optimizer"].state.values()) for parts in (a, b))
    return len(mine) == len(theirs) and all(
        x.keys() == y.keys()
        and all((x[k].dtype, x[k].device) == (y[k].dtype, y[k].device) for k in x)
        and all(torch.equal(x[k], y[k]) for k in x)
        for x, y in zip(mine, theirs, strict=True)
    )


@pytest.mark.parametrize("kind", [optim.Adam, OwnWay])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_it_is_what_torch_would_load(path, dtype, kind):
    found, wanted = fresh(dtype, kind=kind), fresh(dtype, kind=kind)
    mnn.resume(path, **found)
    wanted["optimizer"].load_state_dict(trained()["optimizer"].state_dict())
    assert found["optimizer"].state
    assert exactly(found, wanted)


@pytest.mark.parametrize("kind", [optim.Adam, OwnWay])
def test_it_goes_to_the_device_of_its_parameter(path, kind):
    """On meta, which no byte has to be read for: only what stays on the CPU is."""
    parameters = [*fresh(device="meta")["model"].parameters()]
    optimizer = kind(parameters)
    with mc.open(path) as ckpt:
        saved = live(ckpt.root["optimizer"]["state"], "state", lazy=True)
        source = next(
            ref for _, ref in walk(ckpt.root) if isinstance(ref, TensorRef)
        ).storage.source
        before = source.bytes_read
        states = States(optimizer)
        for pid, parameter in enumerate(parameters):
            states.add(saved[pid], parameter)
        states.read()
        read = source.bytes_read - before
        made = [states.made(saved[pid], parameter) for pid, parameter in enumerate(parameters)]
    usual = kind is optim.Adam
    assert {str(one["exp_avg"].device) for one in made} == {"meta" if usual else "cpu"}
    assert [float(one["step"]) for one in made] == [2.0] * 4
    moments = 2 * sum(4 * parameter.numel() for parameter in parameters)
    assert (read < 2000) if usual else (read >= moments)


def test_what_is_damaged_is_refused_before_anything_changes(path):
    with mc.open(path) as ckpt:
        ref = ckpt.root["optimizer"]["state"][0]["exp_avg"]
        data = bytearray(path.read_bytes())
        data[ref.storage.offset + 100] ^= 1
    path.write_bytes(data)
    parts = fresh()
    before = {name: value.clone() for name, value in parts["model"].state_dict().items()}
    with pytest.raises(DamagedError):
        mnn.resume(path, **parts)
    assert all(torch.equal(before[k], v) for k, v in parts["model"].state_dict().items())
    assert not parts["optimizer"].state


def test_what_is_shared_stays_shared_and_what_is_nested_is_found(path):
    """Tensors in lists and dicts of a state, sparse ones among them."""
    state = torch.load(path, weights_only=False)
    one = torch.randn(20, 30)
    nested = {"list": [one, (one, 3)], "dict": {"in": one, "step": torch.tensor(7.0)}}
    nested["sparse"] = torch.eye(30)[:20].to_sparse()
    state["optimizer"]["state"][0].update(nested)
    torch.save(state, path)
    parts = fresh()
    mnn.resume(path, **parts)
    found = next(iter(parts["optimizer"].state.values()))
    assert torch.equal(found["list"][0], one)
    assert found["list"][0] is found["list"][1][0] is found["dict"]["in"]
    assert found["list"][1][1] == 3
    assert float(found["dict"]["step"]) == 7
    assert torch.equal(found["sparse"].to_dense(), torch.eye(30)[:20])


@needs_cuda
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_onto_a_real_gpu(path, dtype):
    found, wanted = fresh(dtype, "cuda"), fresh(dtype, "cuda")
    mnn.resume(path, **found)
    wanted["optimizer"].load_state_dict(trained()["optimizer"].state_dict())
    assert exactly(found, wanted)
