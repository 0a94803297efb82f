"""Trainings whose models are sharded over ranks (FSDP2, tensor parallel): saved by all of them into
one folder, and resumed by as many, by others, and unsharded."""

from __future__ import annotations

import pytest

from tests.nn import ranks

MODULE = "tests.nn.training.sharded"


@pytest.mark.parametrize("name", ranks.named(MODULE, 2))
def test_two_ranks(tmp_path_factory, name):
    ranks.check(tmp_path_factory, MODULE, 2, name)


@pytest.mark.parametrize("name", ranks.named(MODULE, 4))
def test_four_ranks(tmp_path_factory, name):
    ranks.check(tmp_path_factory, MODULE, 4, name)
