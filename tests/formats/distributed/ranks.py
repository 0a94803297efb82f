"""What the ranks of a training write: one of them, as ``python -m tests.formats.distributed.ranks
FOLDER RANK WORLD [READ]``. The first writes what torch itself makes of it, too.

With READ, a folder that modelctl wrote, and a file of what is expected of it: each rank reads its
own parts through torch.
"""

from __future__ import annotations

import os
import sys
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import nn
from torch.distributed.checkpoint.format_utils import dcp_to_torch_save
from torch.distributed.checkpoint.state_dict import get_state_dict
from torch.distributed.device_mesh import init_device_mesh

from tests import processes

try:
    from torch.distributed.fsdp import fully_shard
    from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor
except ImportError:  # torch 2.4
    from torch.distributed._composable.fsdp import fully_shard
    from torch.distributed._tensor import DTensor, Replicate, Shard, distribute_tensor


class Net(nn.Module):
    """Odd sizes, so that shards are uneven and some ranks have none of a tensor."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(5, 7)
        self.norm = nn.BatchNorm1d(7)
        self.head = nn.Linear(7, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.norm(self.first(x)).relu())


def trained() -> tuple[nn.Module, torch.optim.Optimizer]:
    torch.manual_seed(0)
    model = Net()
    for part in (model.first, model.head, model):
        fully_shard(part)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    for _ in range(2):
        optimizer.zero_grad()
        model(torch.randn(4, 5)).square().mean().backward()
        optimizer.step()
    return model, optimizer


def placed(world: int) -> dict[str, torch.Tensor]:
    """A tensor in each way in which ranks can share one."""
    line = init_device_mesh("cpu", (world,))
    values = torch.arange(7 * 6 * 5, dtype=torch.float32).reshape(7, 6, 5)
    found = {
        "rows": distribute_tensor(values, line, [Shard(0)]),
        "columns": distribute_tensor(values, line, [Shard(1)]),
        "last": distribute_tensor(values, line, [Shard(2)]),
        "everywhere": distribute_tensor(values, line, [Replicate()]),
        "half": distribute_tensor(values.bfloat16(), line, [Shard(0)]),
        "few": distribute_tensor(values[:1, 0], line, [Shard(0)]),
        "plain": values[0],
        "number": torch.tensor(3.5),
        "flags": values[0] > 3,
    }
    if world == 4:
        square = init_device_mesh("cpu", (2, 2))
        for name, how in {
            "tiles": [Shard(0), Shard(1)],
            "turned": [Shard(2), Shard(0)],
            "twice": [Shard(0), Shard(0)],
            "copied": [Replicate(), Shard(1)],
        }.items():
            found[name] = distribute_tensor(values, square, how)
    return found


def write(folder: Path, rank: int, world: int) -> None:
    model, optimizer = trained()
    weights, moments = get_state_dict(model, optimizer)
    state = {
        "model": weights,
        "optim": moments,
        "placed": placed(world),
        "step": 2,
        "config": {"name": "net", "sizes": [5, 7, 3], "a.b": {"c": None}},
        "list": [torch.ones(2), {"x": torch.zeros(3, dtype=torch.int64)}],
    }
    dcp.save(state, checkpoint_id=str(folder / "dcp"))
    ranks = folder / "ranks"
    ranks.mkdir(exist_ok=True)
    torch.save(
        model.state_dict() | placed(world), ranks / f"model_world_size_{world}_rank_{rank}.pt"
    )
    torch.save(optimizer.state_dict(), ranks / f"optim_world_size_{world}_rank_{rank}.pt")
    if rank == 0:
        dcp_to_torch_save(str(folder / "dcp"), folder / "dcp.pt")
    write_safetensors(folder, {n: v for n, v in placed(world).items() if n != "flags"})
    whole = {n: full(v) for n, v in (model.state_dict() | placed(world)).items()}
    if rank == 0:
        torch.save(whole, folder / "whole.pt")


def write_safetensors(folder: Path, state: dict[str, torch.Tensor]) -> None:
    try:
        from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageWriter

        writer = HuggingFaceStorageWriter(str(folder / "parts"), save_distributed=True)
    except (ImportError, TypeError):  # torch before 2.8
        return
    dcp.save(state, storage_writer=writer)


def full(value: torch.Tensor) -> torch.Tensor:
    return value.full_tensor() if isinstance(value, DTensor) else value


def read(folder: Path, expected: Path, world: int) -> None:
    """Through torch, sharded anew over these ranks."""
    wanted = torch.load(expected, weights_only=True)
    line = init_device_mesh("cpu", (world,))

    def room(value: object) -> object:
        if isinstance(value, dict):
            return {key: room(one) for key, one in value.items()}
        if isinstance(value, list):
            return [room(one) for one in value]
        if isinstance(value, torch.Tensor) and value.dim():
            return distribute_tensor(torch.zeros_like(value), line, [Shard(0)])
        return torch.zeros_like(value) if isinstance(value, torch.Tensor) else None

    def check(found: object, value: object, at: str) -> None:
        if isinstance(value, dict):
            for key, one in value.items():
                check(found[key], one, f"{at}.{key}")
        elif isinstance(value, list):
            for i, one in enumerate(value):
                check(found[i], one, f"{at}.{i}")
        elif isinstance(value, torch.Tensor):
            assert torch.equal(full(found), value), at
        else:
            assert found == value, at

    state = room(wanted)
    dcp.load(state, checkpoint_id=str(folder))
    check(state, wanted, "")


def main(folder: Path, rank: int, world: int, *to_read: str) -> None:
    name = f"store-{'read' if to_read else 'write'}-{os.environ['TRY']}"
    store = dist.FileStore(str(folder / name), world)
    dist.init_process_group(
        "gloo", store=store, rank=rank, world_size=world, timeout=timedelta(seconds=120)
    )
    if to_read:
        read(*map(Path, to_read), world)
    else:
        write(folder, rank, world)
    dist.barrier()
    processes.end()


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]), *sys.argv[4:])
