"""A training on two processes that dies half way, is started again by torchrun, and goes on.

``torchrun --nproc-per-node 2 --max-restarts 1 -m tests.nn.training.ranks FOLDER``. The first time
it trains 10 steps straight, then 5 of the same and saves; the second time it resumes and trains 5
more. What each rank ended with goes to FOLDER / WHAT.RANK.
"""

from __future__ import annotations

import os
import random
import sys
import warnings
from pathlib import Path

import numpy as np
import torch
from torch import distributed, optim
from torch.nn.parallel import DistributedDataParallel

import modelctl.nn as mnn
from modelctl.errors import RefusedError, UsageError
from tests import processes
from tests.nn.nets import Net

from .loops import equal

ROW = "step-{step}.pt"


def built(number: int):
    torch.manual_seed(0)
    model = Net()
    mnn.freeze(model, "conv1")
    optimizer = optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    scheduler = mnn.warmup_cosine(optimizer, 3, 12)
    noise = torch.Generator().manual_seed(number)
    parts = {"model": model, "optimizer": optimizer, "scheduler": scheduler}
    return {**parts, "generators": {"noise": noise}}


def seed(number: int) -> None:
    torch.manual_seed(number)
    random.seed(number)
    np.random.seed(number)


def train(parts, steps: int) -> None:
    wrapped = DistributedDataParallel(parts["model"])
    for _ in range(steps):
        noise = random.random() + np.random.rand()
        noise += torch.rand(1, generator=parts["generators"]["noise"]).item()
        (wrapped(torch.randn(4, 3, 8, 8)).square().mean() * noise).backward()
        parts["optimizer"].step()
        parts["optimizer"].zero_grad()
        parts["scheduler"].step()


def thaw() -> None:
    """What thaws behind the wrapper would not be synchronised; what is wrapped anew is."""
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.Linear(4, 2))
    mnn.freeze(model, "0")
    wrapped = DistributedDataParallel(model)
    optimizer = optim.SGD(mnn.param_groups(model), lr=0.1)
    for late in (wrapped, torch.nn.Sequential(wrapped)):
        try:
            mnn.unfreeze(late, "*", optimizer=optimizer)
            refused = None
        except RefusedError as e:
            refused = e
        assert refused is not None
        assert "0.weight" in refused.message
        assert "wrap" in refused.hint
        assert not model[0].weight.requires_grad
    mnn.unfreeze(wrapped, "1")  # trains already
    mnn.unfreeze(mnn.unwrap(wrapped), "0", optimizer=optimizer)
    wrapped = DistributedDataParallel(model)
    seed(distributed.get_rank())
    for _ in range(2):
        optimizer.zero_grad()
        wrapped(torch.randn(8, 4)).square().mean().backward()
        optimizer.step()
    both = [torch.zeros(4, 4) for _ in range(2)]
    distributed.all_gather(both, model[0].weight.detach())
    assert torch.equal(*both)


def end(parts):
    return {
        "model": parts["model"].state_dict(),
        "optimizer": parts["optimizer"].state_dict()["state"],
        "random": [random.random(), float(np.random.rand()), torch.randn(3)],
    }


def first(folder: Path, rank: int) -> None:
    thaw()
    parts = built(rank)
    seed(rank)
    train(parts, 10)
    torch.save(end(parts), folder / f"straight.{rank}")
    parts = built(rank)
    seed(rank)
    train(parts, 5)
    # what one rank alone is refused, all hear of, and none waits
    try:
        lame = {"loader": iter([])} if rank == 1 else {}
        mnn.save_checkpoint(folder / "lame.pt", model=parts["model"], rng="all", **lame)
        refused = None
    except (RefusedError, UsageError) as e:
        refused = e
    assert refused is not None
    assert "loader is a list_iterator" in refused.message
    assert not os.path.exists(folder / "lame.pt")
    mnn.save_checkpoint(folder / ROW, **parts, step=5, rng="all", keep_last=1)
    # by every rank, by rank 0 alone, and with what it is wrapped in
    mnn.save_checkpoint(folder / "every.pt", **parts)
    if rank == 0:
        mnn.save_checkpoint(folder / "alone.pt", **parts)
    else:
        seen = sorted(os.listdir(folder))
        assert mnn.save_checkpoint(folder / "none.pt", **parts) == folder / "none.pt"
        assert "none.pt" not in {*seen, *os.listdir(folder)}
    distributed.barrier()
    assert os.path.exists(folder / "alone.pt")


def second(folder: Path, rank: int) -> None:
    seed(99)
    parts = built(99)
    state = mnn.resume(folder, **parts)
    assert state.path == folder / "latest.pt"
    assert state.missing == ()
    train(parts, 5)
    torch.save(end(parts), folder / f"resumed.{rank}")

    parts = built(rank)
    before = random.getstate()
    for name in ("every.pt", "alone.pt"):
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            state = mnn.resume(folder / name, **parts)
        assert ("rng" in state.restored) == (rank == 0)
        assert ("rng" in state.missing) == (rank == 1)
        assert (random.getstate() == before) == (rank == 1)
        assert ("loader" in state.restored) == (rank == 0)
        own = [str(w.message) for w in caught if str(w.message).startswith("the checkpoint has")]
        assert [text.partition(" processes")[0] for text in own] == [
            "the checkpoint has the loaders and generators of 1 of 2",
            "the checkpoint has the random number generators of 1 of 2",
        ] * rank
    mnn.unfreeze(parts["model"], "conv1")
    wrapped = DistributedDataParallel(parts["model"])
    weights = {name: value.clone() for name, value in wrapped.state_dict().items()}
    try:
        mnn.resume(folder / "every.pt", model=wrapped)
        refused = None
    except RefusedError as e:
        refused = e
    assert refused is not None, "conv1 would be frozen behind the wrapper's back"
    assert "conv1.weight" in refused.message
    assert "wrap" in refused.hint
    assert equal(dict(wrapped.state_dict()), weights)


if __name__ == "__main__":
    torch.set_num_threads(1)
    folder, restarts = Path(sys.argv[1]), os.environ["TORCHELASTIC_RESTART_COUNT"]
    mine, world = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    # a store of its own: in torchrun's the dead ones' addresses may still stand
    store = f"file://{folder}/store.{restarts}"
    distributed.init_process_group("gloo", store, rank=mine, world_size=world)
    again = restarts != "0"
    (second if again else first)(folder, mine)
    processes.end(0 if again else 1)
