"""Ranks that hold the same model, of which one reads the file for those on its machine."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import modelctl.nn as mnn
from tests.nn import ranks

MODULE = "tests.nn.loading.one_reader"


@pytest.mark.parametrize("name", ranks.named(MODULE, 2))
def test_two_ranks(tmp_path_factory, name):
    ranks.check(tmp_path_factory, MODULE, 2, name)


def test_a_process_without_others_reads_for_itself(tmp_path):
    source, model = nn.Linear(3, 4), nn.Linear(3, 4)
    torch.save(source.state_dict(), tmp_path / "a.pt")
    mnn.load_into(model, tmp_path / "a.pt", read_once=True)
    assert torch.equal(model.weight, source.weight)
