"""What the ranks of :mod:`.test_sharded` do: all together, each in a process of its own."""

from __future__ import annotations

from pathlib import Path
from unittest import mock

import pytest
import safetensors.torch
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FullyShardedDataParallel as FSDP

import modelctl as mc
import modelctl.nn as mnn
from modelctl.errors import ModelctlError, RefusedError, UnsupportedError, UsageError
from modelctl.nn.loading import load as loading
from modelctl.nn.loading.plan import Plan

try:
    from torch.distributed.fsdp import fully_shard
    from torch.distributed.tensor import DTensor, Partial, Replicate, Shard, distribute_tensor
except ImportError:  # torch 2.4
    from torch.distributed._composable.fsdp import fully_shard
    from torch.distributed._tensor import DTensor, Replicate, Shard, distribute_tensor
    from torch.distributed._tensor.placement_types import Partial
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    RowwiseParallel,
    parallelize_module,
)


class Net(nn.Module):
    """Odd sizes: shards are uneven, and of some tensors a rank has none."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(5, 7)
        self.norm = nn.BatchNorm1d(7)
        self.head = nn.Linear(7, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.norm(self.first(x)).relu())


def net(seed: int) -> Net:
    torch.manual_seed(seed)
    made = Net()
    made.norm.running_mean.normal_()
    return made


def sharded(model: nn.Module) -> nn.Module:
    for part in (model.first, model.head, model):
        fully_shard(part)
    return model


def full(value: torch.Tensor) -> torch.Tensor:
    return value.full_tensor() if isinstance(value, DTensor) else value


def values(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name: full(value).detach().clone() for name, value in model.state_dict().items()}


def check(model: nn.Module, wanted: dict[str, torch.Tensor]) -> None:
    found = values(model)
    assert found.keys() == wanted.keys()
    for name, value in wanted.items():
        assert torch.equal(found[name], value.to(found[name].dtype)), name


def written(path: Path, rank: int, state: dict[str, torch.Tensor]) -> Path:
    if rank == 0:
        torch.save(state, path)
    dist.barrier()
    return path


def load(model: nn.Module, path: Path, **how) -> tuple[mnn.LoadReport, int, int]:
    """The report, and how many bytes were read: of the structure, and then of the tensors."""
    seen = []

    def opened(*args, **kwargs):
        ckpt = mc.open(*args, **kwargs)
        seen.append(ckpt)
        return ckpt

    def run(self, *args, **kwargs):
        seen.append(seen[0].bytes_read)
        done(self, *args, **kwargs)

    done = Plan.run
    with mock.patch.object(loading, "open_checkpoint", opened), mock.patch.object(Plan, "run", run):
        report = mnn.load_into(model, path, **how)
    return report, seen[1], seen[0].bytes_read - seen[1]


def placed(state: dict[str, torch.Tensor], how, shape=(2,)) -> nn.Module:
    """A module of DTensors with zeros, placed as ``how`` says by name."""
    mesh = init_device_mesh("cpu", shape)
    module = nn.Module()
    for name, value in state.items():
        made = distribute_tensor(torch.zeros_like(value), mesh, how[name])
        module.register_parameter(name, nn.Parameter(made, requires_grad=False))
    return module


# ------------------------------------------------------------------ two ranks


def on_2_fsdp2_from_every_source(folder: Path, rank: int) -> None:
    state = net(1).state_dict()
    written(folder / "a.pt", rank, state)
    if rank == 0:
        torch.save(state, folder / "old.pt", _use_new_zipfile_serialization=False)
        safetensors.torch.save_file(state, folder / "a.safetensors")
        mc.save(mc.open(folder / "a.pt"), f"{folder}/shards/", max_shard_size="100B")
    model = sharded(net(1))
    dcp.save({"model": model.state_dict()}, checkpoint_id=str(folder / "dcp"))
    (folder / "ranks").mkdir(exist_ok=True)
    torch.save(model.state_dict(), folder / "ranks" / f"model_world_size_2_rank_{rank}.pt")
    dist.barrier()
    for name in ("a.pt", "old.pt", "a.safetensors", "shards", "dcp", "ranks"):
        model = sharded(net(2))
        params = [*model.parameters()]
        report = mnn.load_into(model, folder / name)
        assert len(report.loaded) == len(state), name
        check(model, state)
        assert all(a is b for a, b in zip(params, model.parameters(), strict=True))


def on_2_fsdp2_what_is_gathered_is_put_back_first(folder: Path, rank: int) -> None:
    path = written(folder / "a.pt", rank, net(1).state_dict())
    model = sharded(net(2))
    with torch.no_grad():
        model.eval()(torch.ones(2, 5))  # the outermost keeps what it gathered
    assert not isinstance(model.norm.weight, DTensor)
    mnn.freeze(model, "norm")
    assert isinstance(model.norm.weight, DTensor)
    assert not model.norm.weight.requires_grad
    with torch.no_grad():
        model(torch.ones(2, 5))
    mnn.load_into(model, path)
    check(model, net(1).state_dict())
    x = torch.randn(3, 5)
    torch.testing.assert_close(model.eval()(x), net(1).eval()(x))


def on_2_fsdp2_from_meta(folder: Path, rank: int) -> None:
    state = net(1).state_dict()
    path = written(folder / "a.pt", rank, state)
    for empty in (False, True):
        with torch.device("meta"):
            model = sharded(Net())
        if empty:
            model.to_empty(device="cpu")
        mnn.load_into(model, path)
        check(model, state)
        assert model.first.weight.to_local().device.type == "cpu"
        assert isinstance(model.first.weight, nn.Parameter)
        optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
        x = torch.ones(2, 5) * torch.arange(1, 3)[:, None]
        model.eval()(x).sum().backward()
        plain = net(1).eval()
        plain(x).sum().backward()
        assert torch.allclose(full(model.first.weight.grad), plain.first.weight.grad)
        optimizer.step()
        after = plain.first.weight - plain.first.weight.grad
        assert torch.allclose(full(model.first.weight), after)


def on_2_fsdp2_into_another_dtype(folder: Path, rank: int) -> None:
    state = net(1).state_dict()
    path = written(folder / "a.pt", rank, state)
    mnn.load_into(model := sharded(net(2).bfloat16()), path)
    assert model.first.weight.dtype == torch.bfloat16
    check(model, state)
    mnn.load_into(model := sharded(net(2)), path, dtype=torch.float64, device="cpu")
    assert model.first.weight.dtype == torch.float64
    assert model.norm.running_mean.dtype == torch.float64
    check(model, state)
    model(torch.ones(2, 5).double()).sum().backward()
    gpu = mock.patch.object(loading, "choose_device", return_value=torch.device("cuda", 0))
    with gpu, pytest.raises(UsageError, match="stays on its cpu") as e:
        mnn.load_into(model, path, device="cuda")
    assert "mesh" in e.value.hint


def on_2_each_reads_its_own_bytes_alone(folder: Path, rank: int) -> None:
    state = {
        "rows": torch.randn(600, 1000),
        "columns": torch.randn(300, 4000),
        "deep": torch.randn(7, 30, 2000),
        "everywhere": torch.randn(500),
    }
    how = {
        "rows": [Shard(0)],
        "columns": [Shard(1)],
        "deep": [Shard(1)],
        "everywhere": [Replicate()],
    }
    path = written(folder / "a.pt", rank, state)
    if rank == 0:
        safetensors.torch.save_file(state, folder / "a.safetensors")
        mc.save(mc.open(path), folder / "dcp", to="dcp")
    dist.barrier()
    for name in ("a.pt", "a.safetensors", "dcp"):
        model = placed(state, how)
        own = sum(p.to_local().nbytes for p in model.parameters())
        _, before, after = load(model, folder / name)
        check(model, state)
        assert before < 40_000, name
        # of DCP, what says where the data begin
        assert own <= after <= own + 40_000 * (name == "dcp"), (name, own, after)
    model = placed(state, how).half()
    own = 2 * sum(p.to_local().nbytes for p in model.parameters())
    _, _, after = load(model, path)
    assert own <= after <= own + 20_000
    check(model, state)


def on_2_every_placement(folder: Path, rank: int) -> None:
    big = torch.arange(7 * 6 * 5.0).reshape(7, 6, 5)
    state = {
        "rows": big,
        "columns": big + 1,
        "last": big + 2,
        "everywhere": big + 3,
        "few": big[:1, 0].clone(),
        "turned": big.transpose(0, 2),
        "scalar": torch.tensor(3.5),
        "flags": big > 3,
        "complex": torch.complex(big[..., 0], big[..., 1]).conj(),
    }
    how = {
        "rows": [Shard(0)],
        "columns": [Shard(1)],
        "last": [Shard(2)],
        "everywhere": [Replicate()],
        "few": [Shard(0)],
        "turned": [Shard(1)],
        "scalar": [Replicate()],
        "flags": [Shard(2)],
        "complex": [Shard(0)],
    }
    if not hasattr(dist.tensor, "Shard"):  # gloo of torch 2.4 knows neither dtype
        del state["flags"], state["complex"]
    path = written(folder / "a.pt", rank, state)
    model = placed(state, how)
    mnn.load_into(model, path)
    check(model, state)


def on_2_what_is_not_understood_is_refused(folder: Path, rank: int) -> None:
    mesh = init_device_mesh("cpu", (2,))
    path = written(folder / "a.pt", rank, {"a": torch.ones(4), "b": torch.ones(4)})
    model = nn.Module()
    model.register_buffer("a", torch.zeros(4))
    model.register_buffer("b", DTensor.from_local(torch.zeros(4), mesh, [Partial()]))
    with pytest.raises(UnsupportedError, match=r"'b' of the model is Partial"):
        mnn.load_into(model, path)

    class Odd(Shard):
        pass

    model.b = distribute_tensor(torch.zeros(4), mesh, [Shard(0)])
    model.b._spec.placements = (Odd(0),)
    with pytest.raises(UnsupportedError, match=r"'b' of the model is .*Odd"):
        mnn.load_into(model, path)
    assert not model.a.any()


def on_2_one_is_refused_and_all_are(folder: Path, rank: int) -> None:
    state = {"a": torch.randn(4, 3), "b": torch.randn(3)}
    path = written(folder / "a.pt", rank, state)
    how = {"a": [Shard(0)], "b": [Shard(0)]}

    def refused(path: Path, why: str, **patched) -> None:
        model = placed(state, how)
        before = values(model)
        with pytest.raises(ModelctlError) as e:
            mnn.load_into(model, path, **patched)
        text = f"{e.value.message} {e.value.hint}"
        assert why in text, text
        assert ("rank 1 stopped" in text) == (rank == 0), text
        check(model, before)

    refused(path if rank == 0 else folder / "none.pt", "none.pt")
    refused(path, "on_mismatch is 'error' or 'skip'", on_mismatch="oh" if rank else "error")
    torch.save({"a": state["a"]}, other := folder / f"other-{rank}.pt")
    refused(path if rank == 0 else other, "missing in the file")

    def fails(self, *args, **settings):
        raise OSError("the disk is gone")

    model = placed(state, how)
    broken = mock.patch.object(Plan, "run", fails if rank == 1 else Plan.run)
    error = OSError if rank else RefusedError
    with broken, pytest.raises(error, match="the disk is gone") as e:
        mnn.load_into(model, path)
    assert rank or "in part" in e.value.message


def on_2_fsdp1_is_refused_until_it_is_gathered(folder: Path, rank: int) -> None:
    path = written(folder / "a.pt", rank, net(1).state_dict())
    for original in (False, True):
        model = FSDP(net(2), use_orig_params=original, device_id=torch.device("cpu"))
        with pytest.raises(RefusedError, match="does not fit the model") as e:
            mnn.load_into(model, path)
        assert "summon_full_params" in e.value.hint
        with pytest.raises(RefusedError, match="inside FullyShardedDataParallel"):
            mnn.save_checkpoint(folder / "b.pt", model=model)
        with FSDP.summon_full_params(model):
            mnn.load_into(model, path)
        with FSDP.summon_full_params(model):
            for a, b in zip(model.parameters(), net(1).parameters(), strict=True):
                assert torch.equal(a, b)


def on_2_without_dtensors_nobody_waits(folder: Path, rank: int) -> None:
    path = written(folder / "a.pt", rank, net(1).state_dict())
    if rank == 0:
        mnn.load_into(model := net(2), path)
        check(model, net(1).state_dict())


# ------------------------------------------------------------------ four ranks


def on_4_every_placement_on_two_dimensions(folder: Path, rank: int) -> None:
    big = torch.arange(7 * 6 * 5.0).reshape(7, 6, 5)
    how = {
        "tiles": [Shard(0), Shard(1)],
        "turned": [Shard(2), Shard(0)],
        "copied": [Replicate(), Shard(1)],
        "sharded": [Shard(0), Replicate()],
    }
    if hasattr(torch.distributed.tensor, "Shard"):  # see below
        how["twice"] = [Shard(0), Shard(0)]
    state = {name: big + i for i, name in enumerate(how)}
    path = written(folder / "a.pt", rank, state)
    model = placed(state, how, (2, 2))
    mnn.load_into(model, path)
    check(model, state)
    twice = placed({"a": big}, {"a": [Shard(0), Shard(0)]}, (2, 2))
    if "twice" not in how:  # torch 2.4 says the same of FSDP over tensor parallel
        written(folder / "b.pt", rank, {"a": big})
        with pytest.raises(UnsupportedError, match="sharded twice over one dimension"):
            mnn.load_into(twice, folder / "b.pt")


class Wide(nn.Module):
    def __init__(self, width: int = 16) -> None:
        super().__init__()
        self.up = nn.Linear(12, width)
        self.down = nn.Linear(width, 8)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.down(self.up(x).relu())


def on_4_fsdp2_over_tensor_parallel(folder: Path, rank: int) -> None:
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("dp", "tp"))
    torch.manual_seed(1)
    plain = Wide()
    path = written(folder / "a.pt", rank, plain.state_dict())
    torch.manual_seed(2)
    model = Wide()
    parallelize_module(model, mesh["tp"], {"up": ColwiseParallel(), "down": RowwiseParallel()})
    fully_shard(model, mesh=mesh["dp"])
    mnn.load_into(model, path)
    check(model, plain.state_dict())
    x = torch.randn(3, 12, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(full(model(x)), plain(x))


def on_4_fsdp2_over_tensor_parallel_unevenly(folder: Path, rank: int) -> None:
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("dp", "tp"))
    torch.manual_seed(1)
    plain = Wide(10)
    path = written(folder / "a.pt", rank, plain.state_dict())
    model = Wide(10)
    parallelize_module(model, mesh["tp"], {"up": ColwiseParallel(), "down": RowwiseParallel()})
    fully_shard(model, mesh=mesh["dp"])
    mnn.load_into(model, path)
    dp, tp = mesh.get_coordinate()  # not every torch puts such a one together again
    rows = plain.up.weight.chunk(2)[tp].chunk(2)[dp]
    assert torch.equal(model.up.weight.to_local(), rows)
    columns = plain.down.weight.chunk(2, dim=1)[tp].chunk(2)[dp]
    assert torch.equal(model.down.weight.to_local(), columns)


def on_4_fsdp2_with_copies(folder: Path, rank: int) -> None:
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("copies", "parts"))
    path = written(folder / "a.pt", rank, net(1).state_dict())
    model = net(2)
    fully_shard(model, mesh=mesh)
    mnn.load_into(model, path)
    check(model, net(1).state_dict())


def on_4_a_refusal_reaches_across_the_mesh(folder: Path, rank: int) -> None:
    state = {"a": torch.randn(4, 6)}
    path = written(folder / "a.pt", rank, state)
    model = placed(state, {"a": [Shard(0), Shard(1)]}, (2, 2))
    with pytest.raises(ModelctlError, match=r"none\.pt" if rank == 3 else "rank 3 stopped"):
        mnn.load_into(model, folder / "none.pt" if rank == 3 else path)
    assert not full(model.a).any()


def on_4_who_is_not_in_the_mesh_reads_nothing(folder: Path, rank: int) -> None:
    path = written(folder / "a.pt", rank, state := {"a": torch.randn(4, 6)})
    from torch.distributed.device_mesh import DeviceMesh

    mesh = DeviceMesh("cpu", [0, 1])
    model = nn.Module()
    made = distribute_tensor(torch.zeros(4, 6), mesh, [Shard(0)])
    model.register_parameter("a", nn.Parameter(made))
    _, _, after = load(model, path)
    assert after == (48 if rank < 2 else 0)
    if rank < 2:
        check(model, state)
