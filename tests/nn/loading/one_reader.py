"""What the ranks of :mod:`.test_one_reader` do: one reads, and all have it."""

from __future__ import annotations

import os
from pathlib import Path
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from torch import nn

import modelctl as mc
import modelctl.nn as mnn
from modelctl.errors import DamagedError, ModelctlError, RefusedError, UsageError
from modelctl.nn.loading import together
from tests.nn.loading.sharded import check, load, net, sharded, values, written


class Many(nn.Module):
    """Large and small tensors of several dtypes, one in another order of memory, and none."""

    def __init__(self, seed: int) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.large = nn.Linear(700, 600)
        self.turned = nn.Conv2d(3, 5, 2).to(memory_format=torch.channels_last)
        self.norm = nn.BatchNorm1d(9)
        self.low = nn.Parameter(torch.randn(3, 3).bfloat16())
        self.register_buffer("mask", torch.rand(7) > 0.5)
        self.register_buffer("none", torch.empty(0, 3))
        self.register_buffer("one", torch.rand(()).to(torch.complex64))


def on_2_one_reads(folder: Path, rank: int) -> None:
    path = written(folder / "a.pt", rank, Many(0).state_dict())
    wanted = Many(0).state_dict()
    for how in ({}, {"dtype": torch.float64}, {"device": "cpu"}):
        for meta in (False, True):
            model = Many(rank + 1)
            if meta:
                model.to("meta")
            _, structure, read = load(model, path, read_once=True, **how)
            check(model, wanted)
            nbytes = sum(value.nbytes for value in wanted.values())
            assert (read >= nbytes) if rank == 0 else (read == 0)
            assert structure < nbytes / 10


def on_2_in_small_pieces(folder: Path, rank: int) -> None:
    path = written(folder / "a.pt", rank, Many(0).state_dict())
    for bucket, small in ((1000, 10), (100, 10_000_000), (1 << 20, 1)):
        model = Many(rank + 1)
        with mock.patch.multiple(together, _BUCKET=bucket, _SMALL=small):
            mnn.load_into(model, path, read_once=True)
        check(model, Many(0).state_dict())


def on_2_damage_is_told_to_all(folder: Path, rank: int) -> None:
    path = written(folder / "a.pt", rank, Many(0).state_dict())
    if rank == 0:
        with mc.open(path) as ckpt:
            at = ckpt.tensors()["large.weight"].storage.offset + 1000
        data = bytearray(path.read_bytes())
        data[at] ^= 1
        path.write_bytes(data)
    dist.barrier()
    model = Many(rank + 1)
    before = values(model)
    with pytest.raises(DamagedError if rank == 0 else RefusedError, match="is damaged") as e:
        mnn.load_into(model, path, read_once=True)
    if rank == 1:
        assert "rank 0 stopped while it read" in str(e.value)
        check(model, before)


def on_2_ranks_that_differ_are_refused(folder: Path, rank: int) -> None:
    path = written(folder / "a.pt", rank, net(0).state_dict())
    model = net(1)
    before = values(model)
    how = {"dtype": torch.float64} if rank else {}
    with pytest.raises(RefusedError, match=r"is another than|stopped before"):
        mnn.load_into(model, path, read_once=True, **how)
    check(model, before)
    missing = RefusedError if rank == 0 else ModelctlError  # a file that only the first has
    with pytest.raises(missing, match="no such file"):
        mnn.load_into(model, path if rank == 0 else folder / "none.pt", read_once=True)
    check(model, before)


def on_2_what_needs_no_reader_is_refused(folder: Path, rank: int) -> None:
    path = written(folder / "a.pt", rank, net(0).state_dict())
    with pytest.raises(UsageError, match="has DTensors"):
        mnn.load_into(sharded(net(1)), path, read_once=True)
    with pytest.raises(UsageError, match="maps the file"):
        mnn.load_into(net(1), path, read_once=True, assign=True)


def on_2_each_machine_has_a_reader(folder: Path, rank: int) -> None:
    path = written(folder / "a.pt", rank, Many(0).state_dict())
    with (
        mock.patch.dict(os.environ, {"GROUP_RANK": str(rank)}),
        mock.patch.object(together, "_known", (None, None)),
    ):
        model = Many(rank + 1)
        _, _, read = load(model, path, read_once=True)
    check(model, Many(0).state_dict())
    assert read > 0
