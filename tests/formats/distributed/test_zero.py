"""DeepSpeed's folders, joined: the model, its optimizer, and a training that goes on with torch
alone."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import pytest

import modelctl as mc

torch = pytest.importorskip("torch")

from . import deepspeed as ds  # noqa: E402

LAYOUTS = {
    **{
        f"{stage}-{world}": ds.Layout(stage, world)
        for stage, world in itertools.product((1, 2, 3), (1, 2, 4))
    },
    "0": ds.Layout(0, 1, half=torch.float32),
    "1-aligned": ds.Layout(1, 4, align=4),
    "2-aligned": ds.Layout(2, 2, align=8),
    "1-fp16": ds.Layout(1, 2, half=torch.float16),
    "1-fp32": ds.Layout(1, 2, half=torch.float32),
    "bf16": ds.Layout(1, 2, says_stage=False),
    "bf16-4": ds.Layout(1, 4, says_stage=False),
    "3-subgroups": ds.Layout(3, 2, sub_group=20),
    "3-a-group-each": ds.Layout(3, 4, sub_group=1),
    "1-more-ranks-than-elements": ds.Layout(1, 40),
    "3-more-ranks-than-elements": ds.Layout(3, 40, sub_group=1),
}
# Their `mp` tells them from those that are not converted.
UNIVERSAL = [ds.Layout(1, 2, mp=0), ds.Layout(3, 2, mp=0)]
LAYOUTS |= {f"universal-{how.stage}": how for how in UNIVERSAL}


@pytest.fixture(params=LAYOUTS)
def how(request: pytest.FixtureRequest) -> ds.Layout:
    return LAYOUTS[request.param]


@pytest.fixture
def folder(tmp_path: Path, how: ds.Layout) -> Path:
    make = ds.universal if how in UNIVERSAL else ds.save
    return make(tmp_path / "run", ds.trained(), how, epoch=4)


def values(ckpt: mc.Checkpoint) -> dict[str, Any]:
    return {name: ref.torch() for name, ref in ckpt.state_dict().items()}


def test_the_model_is_in_fp32_bit_for_bit(folder, how):
    wanted = ds.expected(ds.trained(), how)
    with mc.open(folder) as ckpt:
        found = values(ckpt)
        assert list(found) == list(wanted)
        for name, value in wanted.items():
            assert found[name].dtype == value.dtype, name
            assert torch.equal(found[name], value), name
        assert ckpt.sections.kind == "training checkpoint"
        assert ckpt["epoch"] == 4


def test_the_optimizer_is_by_parameter(folder, how):
    run = ds.trained()
    of = dict(run.model.named_parameters())
    with mc.open(folder) as ckpt:
        state = ckpt["optimizer.state"]
        names = [name for group in run.groups for name in group]
        assert list(state) == list(range(len(names)))
        for number, name in enumerate(names):
            wanted = run.optimizer.state[of[name]]
            assert state[number].keys() == wanted.keys()
            for key, value in wanted.items():
                assert torch.equal(state[number][key].torch(), value), (name, key)
        if how.stage:
            groups = ckpt["optimizer.param_groups"]
            assert [group["param_names"] for group in groups] == run.groups
            assert [group["weight_decay"] for group in groups] == [0.1, 0.0]


def test_torch_alone_takes_the_next_step_as_if_it_had_never_been_sharded(folder, how, tmp_path):
    out = tmp_path / "out.pt"
    with mc.open(folder) as ckpt:
        mc.save(ckpt, out)
    saved = torch.load(out, weights_only=True)
    resumed, whole = ds.begun(), ds.trained()
    resumed.model.load_state_dict(saved["module"])
    resumed.optimizer.load_state_dict(saved["optimizer"])
    for name, value in ds.expected(whole, how).items():  # frozen ones and buffers were rounded
        whole.model.state_dict()[name].copy_(value)
    resumed.step(), whole.step()
    for (name, a), b in zip(
        resumed.model.state_dict().items(), whole.model.state_dict().values(), strict=True
    ):
        assert torch.equal(a, b), name
    assert resumed.model.out.weight is resumed.model.emb.weight


def test_ties_stay_tied(folder):
    with mc.open(folder) as ckpt:
        model = ckpt.state_dict()
        assert model["out.weight"].identity == model["emb.weight"].identity


def test_the_folder_of_a_tag_is_the_same(folder):
    with mc.open(folder) as ckpt, mc.open(folder / ds.TAG) as inner:
        assert ckpt.tensors().keys() == inner.tensors().keys()


@pytest.mark.parametrize("half", [torch.float16, torch.bfloat16])
def test_a_frozen_weight_that_is_transposed(tmp_path, half):
    """Its strides are kept in the file."""
    run = ds.trained()
    weight = run.model.frozen.weight
    weight.data = weight.data.t().contiguous().t()
    how = ds.Layout(2, 2, half=half)
    with mc.open(ds.save(tmp_path / "run", run, how)) as ckpt:
        found = ckpt.state_dict()["frozen.weight"].torch()
        assert torch.equal(found, ds.expected(run, how)["frozen.weight"])


def test_a_scheduler_and_a_client_s_own_optimizer_by_another_name_stay(tmp_path):
    client = {"lr_scheduler": {"last_epoch": 2}, "ema": {"decay": 0.5}}
    folder = ds.save(tmp_path / "run", ds.trained(), ds.Layout(2, 2), **client)
    with mc.open(folder) as ckpt:
        assert ckpt["lr_scheduler"] == {"last_epoch": 2}
        assert ckpt["ema"] == {"decay": 0.5}
        assert ckpt["loss_scaler"] == {"cur_scale": 1.0, "dynamic": False}
