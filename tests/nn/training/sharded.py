"""What the ranks of :mod:`.test_sharded` do: one training, sharded over some of them or not at all,
step by step the same."""

from __future__ import annotations

import os
import warnings
from contextlib import nullcontext
from pathlib import Path
from unittest import mock

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import nn, optim
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    RowwiseParallel,
    parallelize_module,
)
from torch.utils.data import DataLoader, TensorDataset

import modelctl as mc
import modelctl.nn as mnn
from modelctl.errors import ModelctlError, RefusedError, UsageError, WriteError
from modelctl.nn.training import save_together
from tests.nn.loading.sharded import Replicate, full, fully_shard


class Net(nn.Module):
    """A parameter of which most ranks have nothing, one of one element, a buffer."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(6, 12)
        self.norm = nn.LayerNorm(12)
        self.head = nn.Linear(12, 1)
        self.register_buffer("seen", torch.zeros(()))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.seen += 1
        return self.head(self.norm(self.first(x)).relu())


def shard(model: nn.Module, mesh: DeviceMesh | None = None) -> nn.Module:
    for part in (model.first, model.head, model):
        fully_shard(part, mesh=mesh)
    return model


def built(seed: int, wrap=shard, **how) -> dict:
    torch.manual_seed(seed)
    model = wrap(Net())
    optimizer = optim.AdamW(mnn.param_groups(model, lr=0.05, no_decay=True), **how)
    return {
        "model": model,
        "optimizer": optimizer,
        "scheduler": mnn.warmup_cosine(optimizer, 2, 10),
    }


def plain(model: nn.Module) -> nn.Module:
    return model


def train(parts: dict, start: int, stop: int) -> list[float]:
    """The losses of some steps, each on data of its own, the same on every rank."""
    losses = []
    for step in range(start, stop):
        x = torch.randn(8, 6, generator=torch.Generator().manual_seed(step))
        loss = (parts["model"](x) - x.sum(1, keepdim=True)).square().mean()
        loss.backward()
        parts["optimizer"].step()
        parts["optimizer"].zero_grad()
        parts["scheduler"].step()
        losses.append(float(full(loss)))
    return losses


def values(parts: dict) -> dict[str, torch.Tensor]:
    """All that was learnt, whole, by name."""
    names = {p: name for name, p in parts["model"].named_parameters()}
    found = {name: full(p).detach() for name, p in parts["model"].state_dict().items()}
    for parameter, state in parts["optimizer"].state.items():
        found |= {f"{names[parameter]}/{key}": full(value) for key, value in state.items()}
    return {name: value.clone() for name, value in found.items()}


def close(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> None:
    assert a.keys() == b.keys()
    for name, value in a.items():
        torch.testing.assert_close(value, b[name], msg=name)


def straight(steps: int) -> tuple[dict, list[float]]:
    """The training on one rank, unsharded."""
    parts = built(0, plain)
    losses = train(parts, 0, steps)
    return values(parts), losses


def goes_on(path: Path, wrap=shard, *, seed: int = 9) -> None:
    """Resumed after three steps, the next three are those of the training that was not cut."""
    parts = built(seed, wrap)
    state = mnn.resume(path, **parts)
    assert (state.epoch, state.step) == (1, 3)
    assert {"model", "optimizer", "scheduler"} <= {*state.restored}
    assert state.extra == {"note": {"by": "us", "list": [1, 2]}}
    three, _ = straight(3)
    close(values(parts), three)
    losses = train(parts, 3, 6)
    six, wanted = straight(6)
    close(values(parts), six)
    torch.testing.assert_close(torch.tensor(losses), torch.tensor(wanted[3:]))


def saved(folder: Path, wrap=shard, name: str = "run/epoch-{epoch:03d}", **how) -> Path:
    parts = built(0, wrap)
    train(parts, 0, 3)
    note = {"by": "us", "list": [1, 2]}
    return mnn.save_checkpoint(folder / name, **parts, epoch=1, step=3, note=note, **how)


# ------------------------------------------------------------------ two ranks


def on_2_saved_and_resumed(folder: Path, rank: int) -> None:
    path = saved(folder)
    assert path == folder / "run/epoch-001"
    assert sorted(os.listdir(path)) == [".metadata", "__0_0.distcp", "__1_0.distcp"]
    assert sorted(os.listdir(folder / "run")) == ["epoch-001", "latest"]
    assert os.readlink(folder / "run/latest") == "epoch-001"
    goes_on(path)
    goes_on(folder / "run")
    goes_on(path, plain)


def on_2_saved_without_a_warning(folder: Path, rank: int) -> None:
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*SavePlanner")
        saved(folder)


def on_2_torch_itself_reads_it(folder: Path, rank: int) -> None:
    from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict

    path = saved(folder)
    parts = built(9)
    model, optimizer = get_state_dict(parts["model"], parts["optimizer"])
    state = {"model": model, "optimizer": optimizer}
    dcp.load(state, checkpoint_id=str(path))
    set_state_dict(
        parts["model"],
        parts["optimizer"],
        model_state_dict=state["model"],
        optim_state_dict=state["optimizer"],
    )
    close(values(parts), straight(3)[0])


def on_2_from_one_file(folder: Path, rank: int) -> None:
    if rank == 0:
        saved(folder, plain, "a.pt")
    dist.barrier()
    goes_on(folder / "a.pt")


def on_2_optimizer_state_is_read_by_parts(folder: Path, rank: int) -> None:
    def wide(model: nn.Module) -> nn.Module:
        model.first = nn.Linear(6, 4000)
        model.norm, model.head = nn.LayerNorm(4000), nn.Linear(4000, 1)
        return model

    if rank == 0:
        saved(folder, wide, "a.pt")
    dist.barrier()
    from modelctl.nn.training import resume

    seen = []

    def opened(*args, **kwargs):
        seen.append(mc.open(*args, **kwargs))
        return seen[-1]

    parts = built(9, lambda model: shard(wide(model)))
    with mock.patch.object(resume, "open_checkpoint", opened):
        mnn.resume(folder / "a.pt", **parts)
    weights = sum(p.to_local().nbytes for p in parts["model"].parameters())
    assert seen[0].bytes_read < 4 * weights + 60_000


def on_2_the_freeze_record_and_the_generators(folder: Path, rank: int) -> None:
    parts = built(0)
    mnn.freeze(parts["model"], "first")
    train(parts, 0, 1)
    torch.manual_seed(rank)
    own = {"of.it": torch.Generator().manual_seed(rank)}
    rows = TensorDataset(torch.arange(9))
    loader = DataLoader(rows, shuffle=True, generator=torch.Generator().manual_seed(rank))
    place = {"loader": {"train": loader}, "generators": own}
    path = mnn.save_checkpoint(folder / "a", **parts, **place, epoch=0, rng="all")
    after = [torch.randn(3), torch.rand(3, generator=own["of.it"]), *[x for (x,) in loader]]
    parts = built(9)
    state = mnn.resume(path, **parts, **place)
    assert {"rng", "loader"} <= {*state.restored}
    again = [torch.randn(3), torch.rand(3, generator=own["of.it"]), *[x for (x,) in loader]]
    assert all(map(torch.equal, again, after))
    assert not parts["model"].first.weight.requires_grad
    assert parts["model"].head.weight.requires_grad
    again = mnn.freeze_record(parts["model"])
    assert again["frozen"] == ["first.weight", "first.bias"]
    with mc.open(path) as ckpt:
        assert len(ckpt.root["rng"]["others"]) == 1


def on_2_before_the_first_step(folder: Path, rank: int) -> None:
    parts = built(0)
    path = mnn.save_checkpoint(folder / "a", **parts, epoch=0)
    other = built(9)
    state = mnn.resume(path, **other)
    assert {"optimizer", "scheduler"} <= {*state.restored}  # nothing in it, and there all the same
    close(values(other), values(parts))


def on_2_several_optimizers(folder: Path, rank: int) -> None:
    def pair(seed: int):
        torch.manual_seed(seed)
        model = shard(Net())
        return model, {
            "low": optim.AdamW(model.first.parameters(), lr=0.01),
            "high": optim.SGD(model.head.parameters(), lr=0.1, momentum=0.9),
        }

    def step(model, optimizers):
        model(torch.ones(2, 6)).sum().backward()
        for one in optimizers.values():
            one.step()
            one.zero_grad()
        return [full(p).detach().clone() for p in model.parameters()]

    for as_list in (False, True):
        first, given = pair(0)
        step(first, given)
        how = [*given.values()] if as_list else given
        path = mnn.save_checkpoint(folder / f"a{as_list}", model=first, optimizer=how, epoch=1)
        second, others = pair(9)
        how = [*others.values()] if as_list else others
        mnn.resume(path, model=second, optimizer=how)
        for a, b in zip(step(first, given), step(second, others), strict=True):
            assert torch.equal(a, b)


def on_2_only_what_trains(folder: Path, rank: int) -> None:
    parts, others = built(0), built(0)
    for one in (parts, others):
        mnn.freeze(one["model"], "first")
    train(parts, 0, 2)
    mnn.save_checkpoint(folder / "head", **parts, epoch=1, only="trainable")
    state = mnn.resume(folder / "head", **others)
    assert {*state.model.base} == {"first.weight", "first.bias", "seen"}
    others["model"].seen.copy_(parts["model"].seen)  # a buffer of what has no parameters
    known, found = values(parts), values(others)
    assert known.keys() == found.keys()
    assert all(torch.equal(known[name], found[name]) for name in known)
    assert train(parts, 2, 4) == train(others, 2, 4)


def on_2_a_row_of_folders(folder: Path, rank: int) -> None:
    parts = built(0)
    if rank == 0:
        (folder / "epoch-000").mkdir()
        (folder / "epoch-000/mine.txt").write_text("kept")
    dist.barrier()
    for epoch in range(1, 4):
        mnn.save_checkpoint(folder / "epoch-{epoch:03d}", **parts, epoch=epoch, keep_last=2)
    assert sorted(os.listdir(folder)) == ["epoch-000", "epoch-002", "epoch-003", "latest"]
    assert mnn.resume(folder, **built(9)).epoch == 3
    mnn.save_checkpoint(folder / "epoch-{epoch:03d}", **parts, epoch=3, step=7)
    assert mnn.resume(folder, **built(9)).step == 7
    dist.barrier()
    if rank == 0:
        os.unlink(folder / "latest")
    dist.barrier()
    assert mnn.resume(folder, **built(9)).epoch == 3
    for epoch, acc in ((4, 0.5), (5, float("nan")), (6, 0.9), (7, 0.9), (8, 0.1)):
        mnn.save_checkpoint(
            folder / "epoch-{epoch:03d}",
            **parts,
            epoch=epoch,
            acc=acc,
            keep_last=1,
            keep_best=("acc", "max", 2),
        )
    there = ["best", *(f"epoch-00{i}" for i in (0, 6, 7, 8)), "latest"]
    assert sorted(os.listdir(folder)) == there
    assert os.readlink(folder / "best") == "epoch-006"
    assert mnn.resume(folder / "best", **built(9)).epoch == 6
    with pytest.raises(RefusedError, match="sharded"):
        mnn.save_checkpoint(folder / "late", **parts, asynchronous=True)
    for name, error, why in (
        ("epoch-000", WriteError, "no folder that ranks wrote"),
        ("a.pt", UsageError, "saved as a folder"),
    ):
        with pytest.raises(error if rank == 0 or error is UsageError else ModelctlError, match=why):
            mnn.save_checkpoint(folder / name, **parts, epoch=0)
    assert (folder / "epoch-000/mine.txt").read_text() == "kept"


def on_2_one_fails_and_nothing_is_changed(folder: Path, rank: int) -> None:
    path = saved(folder, name="a")
    before = {one: (path / one).read_bytes() for one in os.listdir(path)}
    parts = built(9)
    odd = {"odd": object()} if rank == 1 else {}
    error = "odd" if rank == 1 else "rank 1 stopped before anything was written"
    with pytest.raises(RefusedError, match=error):
        mnn.save_checkpoint(path, **parts, extra=odd)

    def fails(*args, **kwargs):
        raise OSError("the disk is full")

    last = mock.patch.object(save_together, "open_checkpoint", fails)  # rank 0 alone looks
    error, why = (RefusedError, "rank 0 stopped") if rank else (WriteError, "not written: ")
    with last, pytest.raises(error, match=why):
        mnn.save_checkpoint(path, **parts)
    writer = mock.patch("torch.distributed.checkpoint.FileSystemWriter.write_data", fails)
    both = pytest.raises(WriteError, match=r"rank 1: .*the disk is full")
    with writer if rank == 1 else nullcontext(), both:
        mnn.save_checkpoint(path, **parts)
    dist.barrier()
    assert {one: (path / one).read_bytes() for one in os.listdir(path)} == before
    assert os.listdir(folder) == ["a"]
    there = path if rank == 0 else folder / "none"
    with pytest.raises(ModelctlError, match=r"rank 1 stopped before" if rank == 0 else "none"):
        mnn.resume(there, **parts)


def on_2_what_only_one_rank_would_save_is_refused(folder: Path, rank: int) -> None:
    parts = built(0)
    train(parts, 0, 1)
    weight = parts["model"].first.weight
    state = parts["optimizer"].state[weight]
    whole = state["exp_avg"]
    state["exp_avg"] = whole.to_local()
    with pytest.raises(RefusedError, match=r"'exp_avg' of 'first\.weight' is no DTensor"):
        mnn.save_checkpoint(folder / "a", **parts)
    state["exp_avg"] = whole.redistribute(placements=[Replicate()])
    with pytest.raises(RefusedError, match=r"'exp_avg' of 'first\.weight' is \(Replicate"):
        mnn.save_checkpoint(folder / "a", **parts)
    state["exp_avg"] = whole
    parts["model"].register_buffer(f"of_{rank}", torch.ones(2))
    why = "rank 1 has other tensors than the first rank"
    with pytest.raises(RefusedError, match=why):
        mnn.save_checkpoint(folder / "a", **parts)
    assert os.listdir(folder) == []


def on_2_state_that_is_not_by_element_is_refused(folder: Path, rank: int) -> None:
    if not hasattr(optim, "Adafactor"):
        return

    def made(wrap):
        model = wrap(Net())
        return {"model": model, "optimizer": optim.Adafactor(model.parameters())}

    if rank == 0:
        parts = made(plain)
        parts["model"](torch.ones(2, 6)).sum().backward()
        parts["optimizer"].step()
        mnn.save_checkpoint(folder / "a.pt", **parts)
    dist.barrier()
    parts = made(shard)
    with pytest.raises(RefusedError, match=r"'row_var' of 'first\.weight' is not one value"):
        mnn.resume(folder / "a.pt", **parts)


def on_2_frozen_and_thawed_between_steps(folder: Path, rank: int) -> None:
    """FSDP2 takes notice of both, as a model that is not sharded does."""

    def run(wrap):
        torch.manual_seed(0)
        model = wrap(Net())
        optimizer = optim.AdamW(mnn.param_groups(model, lr=0.05, no_decay=True))
        parts = {"model": model, "optimizer": optimizer}
        parts["scheduler"] = optim.lr_scheduler.ConstantLR(optimizer)
        train(parts, 0, 2)
        report = mnn.freeze(model, "first")
        assert (report.before, report.after, report.total) == (121, 37, 121)
        first = full(model.first.weight).clone()
        train(parts, 2, 4)
        assert torch.equal(full(model.first.weight), first)
        mnn.unfreeze(model, "first")
        train(parts, 4, 6)
        assert not torch.equal(full(model.first.weight), first)
        late = mnn.trainable(model)
        assert late.frozen == ()
        return values(parts)

    close(run(shard), run(plain))


def on_2_a_frozen_part_joins_the_optimizer(folder: Path, rank: int) -> None:
    def run(wrap):
        torch.manual_seed(0)
        model = Net()
        mnn.freeze(model, "first")
        model = wrap(model)
        optimizer = optim.AdamW(mnn.param_groups(model, lr=0.05))
        parts = {"model": model, "optimizer": optimizer}
        parts["scheduler"] = mnn.warmup_cosine(optimizer, 2, 10)
        train(parts, 0, 2)
        joined = mnn.unfreeze(model, "first", optimizer=optimizer, scheduler=parts["scheduler"])
        assert joined.joined == ("first.weight", "first.bias")
        train(parts, 2, 5)
        return values(parts)

    close(run(shard), run(plain))


# ------------------------------------------------------------------ four ranks


def on_4_resumed_by_others_than_those_that_saved(folder: Path, rank: int) -> None:
    goes_on(path := saved(folder))
    goes_on(folder.parents[1] / f"{__name__}-2" / "on_2_saved_and_resumed" / "run")
    if rank == 0:
        goes_on(path, plain)
    dist.barrier()
    mesh = DeviceMesh("cpu", [0, 1])
    if rank < 2:
        with pytest.raises(RefusedError, match="sharded over 2 of 4 ranks"):
            saved(folder, lambda model: shard(model, mesh), "two")


def on_4_fsdp2_over_tensor_parallel(folder: Path, rank: int) -> None:
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("dp", "tp"))

    def wrap(model: nn.Module) -> nn.Module:
        how = {
            "first": ColwiseParallel(output_layouts=Replicate()),
            "head": RowwiseParallel(input_layouts=Replicate()),
        }
        parallelize_module(model, mesh["tp"], how)
        return shard(model, mesh["dp"])

    path = saved(folder, wrap)
    goes_on(path, wrap)
    goes_on(path)
    goes_on(path, plain)
