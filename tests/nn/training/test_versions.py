"""A training goes on in another torch: files of older and newer ones, made by versions/make.py."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

import modelctl.nn as mnn

from .versions.make import OPTIMIZERS, net, step

FILES = sorted((Path(__file__).parent / "versions").glob("*.pt"))


def test_each_optimizer_is_there_of_older_and_newer() -> None:
    assert len(FILES) >= 3 * len(OPTIMIZERS)
    assert {path.name.partition("-")[0] for path in FILES} == set(OPTIMIZERS)


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_a_training_goes_on_in_this_torch(path: Path) -> None:
    model = net()
    optimizer = OPTIMIZERS[path.name.partition("-")[0]](model.parameters())
    here = optimizer.param_groups[0].keys()
    mnn.resume(path, model=model, optimizer=optimizer, rng=False)
    saved = torch.load(path, weights_only=True)
    assert all(
        torch.equal(value, saved["model"][name]) for name, value in model.state_dict().items()
    )
    assert optimizer.param_groups[0].keys() >= here
    for name, value in step(model, optimizer, 3).items():
        torch.testing.assert_close(value, saved["then"][name], rtol=1e-6, atol=1e-7)
