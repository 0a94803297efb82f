"""Models whose parameters are DTensors (FSDP2, tensor parallel), and others whose tensors are no
plain ones."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import modelctl.nn as mnn
from modelctl.errors import UnsupportedError
from tests.nn import ranks

MODULE = "tests.nn.loading.sharded"


@pytest.mark.parametrize("name", ranks.named(MODULE, 2))
def test_two_ranks(tmp_path_factory, name):
    ranks.check(tmp_path_factory, MODULE, 2, name)


@pytest.mark.parametrize("name", ranks.named(MODULE, 4))
def test_four_ranks(tmp_path_factory, name):
    ranks.check(tmp_path_factory, MODULE, 4, name)


class Scaled(torch.Tensor):
    """A tensor that wraps another, as quantized ones of torchao do."""

    @staticmethod
    def __new__(cls, inner, scale):
        made = torch.Tensor._make_wrapper_subclass(cls, inner.shape, dtype=torch.float32)
        made.inner, made.scale = inner, scale
        return made

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        plain = [one.inner * one.scale if isinstance(one, Scaled) else one for one in args]
        found = func(*plain, **(kwargs or {}))
        return Scaled(found, 1.0) if func is torch.ops.aten.detach.default else found


@pytest.mark.parametrize(
    ("kind", "make"),
    [
        ("Scaled", lambda: Scaled(torch.zeros(3, 3), 2.0)),
        ("sparse_coo", lambda: torch.eye(3).to_sparse()),
        ("quantized", lambda: torch.quantize_per_tensor(torch.zeros(3, 3), 0.1, 0, torch.qint8)),
    ],
)
@pytest.mark.filterwarnings("ignore")
def test_what_would_be_loaded_into_nothing_is_refused(tmp_path, kind, make):
    torch.save({"first": torch.ones(2), "odd": torch.ones(3, 3)}, tmp_path / "a.pt")
    model = nn.Module()
    model.register_buffer("first", torch.zeros(2))
    model.register_buffer("odd", make())
    with pytest.raises(UnsupportedError, match=rf"'odd' of the model is .*{kind}") as e:
        mnn.load_into(model, tmp_path / "a.pt")
    assert "before the model is quantized" in e.value.hint
    assert not model.first.any()
    torch.save({"first": torch.ones(2)}, tmp_path / "b.pt")
    mnn.load_into(model, tmp_path / "b.pt", on_mismatch="skip")  # it is not asked for
    assert model.first.all()


def test_memory_that_was_freed_is_not_written_to(tmp_path):
    model = nn.Linear(3, 3)
    torch.save(model.state_dict(), tmp_path / "a.pt")
    model.weight.untyped_storage().resize_(0)
    with pytest.raises(UnsupportedError, match="'weight' of the model has no memory now"):
        mnn.load_into(model, tmp_path / "a.pt")


def test_memory_that_was_loaded_into_can_be_freed(tmp_path):
    """As FSDP does with what it has gathered."""
    model = nn.Linear(300, 300)
    torch.save(model.state_dict(), tmp_path / "a.pt")
    mnn.load_into(model, tmp_path / "a.pt")
    model.weight.untyped_storage().resize_(0)
    assert model.weight.untyped_storage().nbytes() == 0
