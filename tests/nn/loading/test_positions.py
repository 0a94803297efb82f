"""Position embeddings of another grid of patches: named, and interpolated where that is asked."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import modelctl.nn as mnn
from modelctl.errors import RefusedError


class Vit(nn.Module):
    def __init__(self, side, prefix=1, width=8):
        super().__init__()
        self.pos_embed = nn.Parameter(torch.randn(1, prefix + side * side, width))
        self.head = nn.Linear(width, 2)


def saved(path, *arguments):
    torch.manual_seed(0)
    model = Vit(*arguments)
    torch.save(model.state_dict(), path)
    return model


@pytest.mark.parametrize("prefix", [0, 1, 2])
def test_as_timm_does_it(tmp_path, prefix):
    layers = pytest.importorskip("timm.layers")
    old = saved(tmp_path / "a.pt", 14, prefix)
    model = Vit(24, prefix)
    report = mnn.load_into(model, tmp_path / "a.pt", resize_pos_embed=True)
    assert "pos_embed" in report.loaded
    theirs = layers.resample_abs_pos_embed(old.pos_embed, [24, 24], num_prefix_tokens=prefix)
    assert torch.equal(model.pos_embed, theirs)
    assert torch.equal(model.pos_embed[:, :prefix], old.pos_embed[:, :prefix])
    assert torch.equal(model.head.weight, old.head.weight)


def test_what_it_is_is_named(tmp_path):
    saved(tmp_path / "a.pt", 14)
    model = Vit(24)
    before = model.pos_embed.clone()
    with pytest.raises(RefusedError, match=r"'pos_embed' has .* 14x14, 24x24 in the model") as e:
        mnn.load_into(model, tmp_path / "a.pt")
    assert "resize_pos_embed=True" in e.value.hint
    report = mnn.load_into(model, tmp_path / "a.pt", on_mismatch="skip")
    assert report.mismatched == (("pos_embed", (1, 197, 8), (1, 577, 8)),)
    assert torch.equal(model.pos_embed, before)


@pytest.mark.parametrize("shape", [(1, 197, 4), (1, 198 + 4, 8), (2, 197, 8)])
def test_what_is_no_such_grid_is_not_resized(tmp_path, shape):
    torch.save({**Vit(14).state_dict(), "pos_embed": torch.ones(shape)}, tmp_path / "a.pt")
    with pytest.raises(RefusedError, match="other shapes"):
        mnn.load_into(Vit(24), tmp_path / "a.pt", resize_pos_embed=True)


def test_onto_a_grid_that_is_not_square(tmp_path):
    old = saved(tmp_path / "a.pt", 4)
    model = Vit(4)
    model.pos_embed = nn.Parameter(torch.zeros(1, 1 + 6 * 3, 8))
    model.patch_embed = nn.Identity()
    model.patch_embed.grid_size = (6, 3)
    mnn.load_into(model, tmp_path / "a.pt", resize_pos_embed=True)
    layers = pytest.importorskip("timm.layers")
    assert torch.equal(model.pos_embed, layers.resample_abs_pos_embed(old.pos_embed, [6, 3]))
