"""What load and load_into refuse before they read, and what autograd is told of new values."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import modelctl.nn as mnn
from modelctl.errors import UsageError
from tests.nn.nets import Net, same


@pytest.fixture
def path(tmp_path):
    torch.save(Net().state_dict(), tmp_path / "a.pt")
    return tmp_path / "a.pt"


def test_meta_is_no_place_to_load_to(net, path):
    before = {name: value.clone() for name, value in net.state_dict().items()}
    with pytest.raises(UsageError, match="holds no values") as e:
        mnn.load_into(net, path, device="meta")
    assert e.value.hint
    assert same(net.state_dict(), before)
    with pytest.raises(UsageError, match="no device"):
        mnn.load(path, device=None)


@pytest.mark.parametrize("dtype", [torch.int8, "bfloat16", 16])
def test_a_dtype_that_weights_cannot_have(net, path, dtype):
    before = {name: value.clone() for name, value in net.state_dict().items()}
    with pytest.raises(UsageError, match=r"floating torch\.dtype") as e:
        mnn.load_into(net, path, dtype=dtype)
    assert e.value.hint
    assert same(net.state_dict(), before)


@pytest.mark.parametrize("dtype", [None, torch.float64])
def test_a_backward_over_the_old_values_fails(tmp_path, dtype):
    model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    torch.save(model.state_dict(), tmp_path / "a.pt")
    loss = model(torch.ones(1, 2)).sum()
    mnn.load_into(model, tmp_path / "a.pt", dtype=dtype)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()
    with torch.inference_mode():  # its tensors have no version
        model = nn.Linear(2, 2)
    torch.save(model.state_dict(), tmp_path / "a.pt")
    mnn.load_into(model, tmp_path / "a.pt")
