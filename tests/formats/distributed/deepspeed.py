"""What DeepSpeed's ``save_checkpoint`` writes of a training, as far as its layout goes: the pieces
of ranks, cut from a training that was never sharded."""

from __future__ import annotations

import enum
import sys
import types
from collections import OrderedDict
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import nn


class Net(nn.Module):
    """Odd sizes, a frozen layer, buffers of two dtypes, and a tied head."""

    def __init__(self) -> None:
        super().__init__()
        self.emb = nn.Embedding(11, 5)
        self.a = nn.Linear(5, 7)
        self.bn = nn.BatchNorm1d(7)
        self.one = nn.Parameter(torch.ones(1))
        self.frozen = nn.Linear(7, 5)
        self.out = nn.Linear(5, 11, bias=False)
        self.out.weight = self.emb.weight
        self.frozen.requires_grad_(False)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        x = self.bn(self.a(self.emb(ids))).relu() * self.one
        return self.out(self.frozen(x))


class Run(NamedTuple):
    """A training that was never sharded, with the names of each group."""

    model: Net
    optimizer: torch.optim.Optimizer
    groups: list[list[str]]

    def step(self) -> None:
        """One more step, the same for whoever is in the same state."""
        ids = torch.arange(8) % 11
        self.optimizer.zero_grad()
        nn.functional.cross_entropy(self.model(ids), ids.flip(0)).backward()
        self.optimizer.step()


def begun() -> Run:
    """A model, and an optimizer with a group that decays and one that does not."""
    torch.manual_seed(0)
    model = Net()
    # in an order that is not the model's
    groups = [["a.weight", "emb.weight"], ["bn.weight", "a.bias", "one", "bn.bias"]]
    of = dict(model.named_parameters())
    optimizer = torch.optim.AdamW(
        [
            {"params": [of[name] for name in names], "weight_decay": decay}
            for names, decay in zip(groups, (0.1, 0.0), strict=True)
        ],
        lr=0.01,
    )
    return Run(model, optimizer, groups)


def trained(steps: int = 2) -> Run:
    run = begun()
    for _ in range(steps):
        run.step()
    return run


@contextmanager
def deepspeed() -> Iterator[dict[str, Any]]:
    """The classes that DeepSpeed pickles, under its names, while it is left."""

    class LossScaler:
        def __init__(self) -> None:
            self.cur_scale, self.dynamic = 1.0, False

    class ZeroStageEnum(int, enum.Enum):
        disabled, optimizer_states, gradients, weights = range(4)

    class fragment_address:
        def __init__(self, numel: int, start: int) -> None:
            self.numel, self.start = numel, start

    places = {
        "deepspeed.runtime.fp16.loss_scaler": LossScaler,
        "deepspeed.runtime.zero.config": ZeroStageEnum,
        "deepspeed.utils.tensor_fragment": fragment_address,
    }
    before = dict(sys.modules)
    found = {}
    for name, cls in places.items():
        for part in (name[:i] for i, sign in enumerate(name + ".") if sign == "."):
            sys.modules.setdefault(part, types.ModuleType(part))
        cls.__module__, cls.__qualname__ = name, cls.__name__
        setattr(sys.modules[name], cls.__name__, cls)
        found[cls.__name__] = cls
    try:
        yield found
    finally:
        for name in [*sys.modules]:
            if name.startswith("deepspeed") and name not in before:
                del sys.modules[name]


class Layout(NamedTuple):
    """How a save is laid out.

    Attributes:
        stage: of ZeRO; 0 where the optimizer is in the file of the model.
        align: parameters begin at multiples of it (stages 1 and 2); None where the save does not
            say, as before 0.19.8.
        half: what the model trains in.
        says_stage: False for BF16_Optimizer.
        sub_group: the most elements of a rank in one flat group (stage 3).
    """

    stage: int
    world: int
    align: int | None = None
    half: torch.dtype = torch.bfloat16
    says_stage: bool = True
    sub_group: int = 10**9
    mp: int = 1


TAG = "global_step2"


def save(folder: Path, run: Run, how: Layout, **client: Any) -> Path:
    """Write a save; gives its folder, in which ``latest`` stands."""
    inner = folder / TAG
    inner.mkdir(parents=True)
    (folder / "latest").write_text(TAG)
    with deepspeed() as classes:
        if how.stage == 0:
            state = run.optimizer.state_dict()
            torch.save(_model(run, how, 0, client) | {"optimizer": state}, inner / _name(how, None))
            return folder
        for rank in range(how.world if how.stage == 3 else 1):
            torch.save(_model(run, how, rank, client), inner / _name(how, rank))
        pieces = _slices if how.stage == 3 else _partitions
        for rank, fields in enumerate(pieces(run, how)):
            fields["loss_scaler"] = classes["LossScaler"]()
            if how.says_stage:
                fields["zero_stage"] = classes["ZeroStageEnum"](how.stage)
            if "param_slice_mappings" in fields:
                address = classes["fragment_address"](3, 0)
                fields["param_slice_mappings"] = [OrderedDict({"a.weight": address})]
            prefix = "bf16_" if how.half is torch.bfloat16 else ""
            torch.save(
                {"optimizer_state_dict": fields, "ds_config": {}, "ds_version": "0.19.8"},
                inner / f"{prefix}zero_pp_rank_{rank}_mp_rank_00_optim_states.pt",
            )
    return folder


def universal(folder: Path, run: Run, how: Layout, **client: Any) -> Path:
    """What ds_to_universal.py makes of a save; in stage 3 it leaves the tensors flat."""
    save(folder, run, how, **client)
    inner = folder / TAG
    (folder / "latest_universal").write_text(TAG)
    of = dict(run.model.named_parameters())
    with deepspeed():
        (path,) = inner.glob("*zero_pp_rank_0_*optim_states.pt")
        fields = torch.load(path, weights_only=False)["optimizer_state_dict"]
        for one in inner.glob("*optim_states.pt"):
            one.unlink()
        for name in (name for group in run.groups for name in group):
            (inner / "zero" / name).mkdir(parents=True)
            state = dict(run.optimizer.state[of[name]])
            step = state.pop("step")
            for key, value in (state | {"fp32": of[name].detach()}).items():
                held = value.reshape(-1) if how.stage == 3 else {"cat_dim": 0, "param": value}
                torch.save(held, inner / "zero" / name / f"{key}.pt")
            if how.stage != 3:
                torch.save(step, inner / "zero" / name / "step.pt")
        if how.stage == 3:
            options = fields["optimizer_state_dict"]["param_groups"]
        else:
            options = fields.pop("base_optimizer_state")["param_groups"]
            del fields["single_partition_of_fp32_groups"]
        torch.save(fields | {"param_groups": options}, inner / "zero" / "optimizer_state.pt")
    return folder


def _name(how: Layout, rank: int | None) -> str:
    of = f"zero_pp_rank_{rank}_" if how.stage == 3 else ""
    return f"{of}mp_rank_00_model_states.pt"


def expected(run: Run, how: Layout) -> dict[str, torch.Tensor]:
    """The model in fp32: what trains as it is, the rest as it was in half precision."""
    trains = {name for group in run.groups for name in group} | {"out.weight"}

    def in_half(value: torch.Tensor) -> torch.Tensor:
        return value.to(how.half).float() if value.is_floating_point() else value

    return {
        name: value.detach().clone() if name in trains else in_half(value.detach())
        for name, value in run.model.state_dict().items()
    }


def _model(run: Run, how: Layout, rank: int, client: dict[str, Any]) -> dict[str, Any]:
    state = run.model.state_dict()
    of = dict(run.model.named_parameters(remove_duplicate=False))
    frozen = [name for name, value in of.items() if not value.requires_grad]

    def cast(value: torch.Tensor) -> torch.Tensor:
        return value.to(how.half) if value.is_floating_point() else value

    fragments = {}
    for name in frozen:
        whole = cast(of[name].detach())
        fragments[name] = _slice(whole, how.world, rank) if how.stage == 3 else whole
    module = OrderedDict(
        (name, torch.zeros(0, dtype=how.half) if how.stage == 3 and name in of else cast(value))
        for name, value in state.items()
    )
    shapes = [OrderedDict((name, of[name].shape) for name in group) for group in run.groups]
    return {
        "module": module,
        "buffer_names": [name for name, _ in run.model.named_buffers()],
        "optimizer": None,
        "param_shapes": shapes if how.stage else None,
        "frozen_param_shapes": OrderedDict((name, of[name].shape) for name in frozen),
        "shared_params": {"out.weight": "emb.weight"},
        "frozen_param_fragments": OrderedDict(fragments),
        "lr_scheduler": None,
        "skipped_steps": 0,
        "global_steps": 2,
        "dp_world_size": how.world,
        "mp_world_size": how.mp,
        "ds_config": {},
        "ds_version": "0.19.8",
        **client,
    }


def _padded(value: torch.Tensor, multiple: int) -> torch.Tensor:
    """A vector, with what must not be seen at its end."""
    flat = value.detach().reshape(-1)
    return torch.cat([flat, torch.full((-len(flat) % multiple,), 1e9)]).to(value.dtype)


def _slice(value: torch.Tensor, world: int, rank: int) -> torch.Tensor:
    return _padded(value, world).chunk(world)[rank].clone()


def _moments(run: Run, names: list[str]) -> tuple[list[dict[str, Any]], list[nn.Parameter]]:
    of = dict(run.model.named_parameters())
    parameters = [of[name] for name in names]
    return [dict(run.optimizer.state[one]) for one in parameters], parameters


def _options(run: Run, numbers: list[list[int]]) -> list[dict[str, Any]]:
    groups = run.optimizer.state_dict()["param_groups"]
    return [{**group, "params": ids} for group, ids in zip(groups, numbers, strict=True)]


def _partitions(run: Run, how: Layout) -> Iterator[dict[str, Any]]:
    """Stages 1 and 2: a flat vector of each group, cut in as many equal parts as there are ranks;
    in fp32 the last one is without what fills it up."""
    align = how.align or 1
    flats, moments, paddings, alignments = [], [], [], []
    for names in run.groups:
        states, parameters = _moments(run, names)
        sizes = [one.numel() for one in parameters]
        alignments.append([-n % align for n in sizes])
        joined = torch.cat([_padded(one, align) for one in parameters])
        flat = _padded(joined, 2 * how.world)
        paddings.append(len(flat) - len(joined))
        flats.append(flat.chunk(how.world))
        moments.append(
            {
                key: _padded(
                    torch.cat([_padded(state[key], align) for state in states]), 2 * how.world
                ).chunk(how.world)
                for key in ("exp_avg", "exp_avg_sq")
            }
            | {"step": states[0]["step"]}
        )
    for rank in range(how.world):
        last = rank == how.world - 1
        own = []
        for parts, padding in zip(flats, paddings, strict=True):
            lean = len(parts[rank]) - (padding if last and how.says_stage else 0)
            own.append(parts[rank][: max(lean, 0)].clone())
        state = {
            index: {
                key: value if key == "step" else value[rank].clone() for key, value in one.items()
            }
            for index, one in enumerate(moments)
        }
        fields: dict[str, Any] = {
            "base_optimizer_state": {
                "state": state,
                "param_groups": _options(run, [[i] for i in range(len(run.groups))]),
            },
            "single_partition_of_fp32_groups": own,
            "group_paddings": [padding if last else 0 for padding in paddings],
            "partition_count": [how.world] * len(run.groups),
            "param_slice_mappings": [],
        }
        if how.align is not None:
            fields["param_alignment_paddings"] = alignments
        yield fields


def _slices(run: Run, how: Layout) -> Iterator[dict[str, Any]]:
    """Stage 3: an equal slice of each parameter a rank, in flat groups of at most so many."""
    for rank in range(how.world):
        flats: list[torch.Tensor] = []
        state: dict[int, dict[str, Any]] = {}
        numbers = []
        for names in run.groups:
            states, parameters = _moments(run, names)
            first = len(flats)
            sub: list[int] = []
            size = 0
            for i, one in enumerate([*parameters, None]):
                n = -(-one.numel() // how.world) if one is not None else 0
                if sub and (one is None or size + n > how.sub_group):
                    cut = {
                        key: torch.cat([_slice(states[k][key], how.world, rank) for k in sub])
                        for key in ("exp_avg", "exp_avg_sq")
                    }
                    state[len(flats)] = {"step": states[0]["step"], **cut}
                    flats.append(
                        torch.cat([_slice(parameters[k], how.world, rank) for k in sub]).detach()
                    )
                    sub, size = [], 0
                sub.append(i)
                size += n
            numbers.append(list(range(first, len(flats))))
        yield {
            "partition_count": how.world,
            "optimizer_state_dict": {"state": state, "param_groups": _options(run, numbers)},
            "fp32_flat_groups": flats,
        }
