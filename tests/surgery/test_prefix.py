"""strip_prefix: each trap of wrapped names, on files that torch itself made."""

from __future__ import annotations

from collections import OrderedDict
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.optim.swa_utils import AveragedModel

import modelctl as mc
from modelctl.core.records import REMOVED, read_record
from modelctl.errors import CollisionError, ModelctlError, NoMatchError

from .nets import Net, in_memory, load, names, opened, same_tensors


def compiled(module: nn.Module) -> nn.Module:
    return torch.compile(module)  # nothing is compiled before the first call


WRAPPED = {
    "dataparallel": nn.DataParallel,
    "dataparallel twice": lambda net: nn.DataParallel(nn.DataParallel(net)),
    "compiled": compiled,
    "dataparallel of compiled": lambda net: nn.DataParallel(compiled(net)),
    "compiled dataparallel": lambda net: compiled(nn.DataParallel(net)),
    "averaged": AveragedModel,
    "averaged dataparallel": lambda net: AveragedModel(nn.DataParallel(net)),
}


@pytest.mark.parametrize("wrap", WRAPPED.values(), ids=WRAPPED)
def test_wrappers_give_the_bare_state_dict(tmp_path: Path, wrap) -> None:
    net = Net()
    bare = net.state_dict()
    with opened(tmp_path / "in.pt", wrap(net).state_dict()) as ckpt:
        stripped = mc.strip_prefix(ckpt)
        loaded = load(stripped, tmp_path / "out.pt")
        same_tensors(loaded, bare)
        found = dict(loaded._metadata)
        found[""] = {key: value for key, value in found[""].items() if "modelctl" not in key}
        assert found == dict(bare._metadata)
        Net().load_state_dict(loaded)
        again = mc.strip_prefix(stripped)
        assert again.root is stripped.root
        assert again.notes[-1].text == "no name has a wrapper prefix: nothing to strip"


def test_a_compiled_submodule(tmp_path: Path) -> None:
    net = Net()
    bare = net.state_dict()
    net.layer1 = compiled(net.layer1)
    assert "layer1._orig_mod.0.weight" in net.state_dict()
    with opened(tmp_path / "in.pt", net.state_dict()) as ckpt:
        loaded = load(mc.strip_prefix(ckpt), tmp_path / "out.pt")
        same_tensors(loaded, bare)
        assert dict(loaded._metadata) == dict(bare._metadata)


def test_one_prefix_once() -> None:
    ckpt = in_memory({"module.module.a.weight": (1,), "module.module.b": (1,)})
    once = mc.strip_prefix(ckpt, prefix="module.")
    assert names(once) == ["module.a.weight", "module.b"]
    assert names(mc.strip_prefix(ckpt, prefix="module")) == ["module.a.weight", "module.b"]
    assert names(mc.strip_prefix(ckpt, prefix="module.module")) == ["a.weight", "b"]
    assert names(mc.strip_prefix(ckpt)) == ["a.weight", "b"]


def test_a_child_that_is_really_called_module(tmp_path: Path) -> None:
    net = nn.Sequential(OrderedDict(stem=nn.Linear(2, 2), module=nn.Linear(2, 2)))
    with opened(tmp_path / "in.pt", nn.DataParallel(net).state_dict()) as ckpt:
        stripped = mc.strip_prefix(ckpt)
        assert names(stripped) == list(net.state_dict())
        again = mc.strip_prefix(stripped)  # is 'module' of some names a wrapper's?
        assert again.root is stripped.root
        assert "2 of 4 names start with 'module.'" in again.notes[-1].text
        assert "--prefix" in str(again.notes[-1].way_out)


def test_only_some_names_have_the_prefix() -> None:
    ckpt = in_memory({"module.a": (1,), "b": (1,)})
    same = mc.strip_prefix(ckpt)
    assert same.root is ckpt.root
    assert str(same.notes[-1]).startswith("warning: 1 of 2 names")
    assert names(mc.strip_prefix(ckpt, prefix="module.")) == ["a", "b"]


def test_a_collision_is_refused_and_names_both() -> None:
    ckpt = in_memory({"module.a": (1,), "a": (2,)})
    with pytest.raises(CollisionError, match=r"'module\.a' and 'a' would both be named 'a'"):
        mc.strip_prefix(ckpt, prefix="module.")


def test_compiled_and_not_collide() -> None:
    with pytest.raises(CollisionError):
        mc.strip_prefix(in_memory({"a._orig_mod.weight": (1,), "a.weight": (1,)}))


@pytest.mark.parametrize(
    "name",
    ["head.aux_head.weight", "submodule.weight", "modules.x", "my_orig_mod.w", "_orig_modx.w"],
)
def test_only_whole_segments(name: str) -> None:
    ckpt = in_memory({name: (1,), "other.weight": (1,)})
    assert names(mc.strip_prefix(ckpt)) == [name, "other.weight"]
    inner = in_memory({"head." + name: (1,)})
    assert names(mc.strip_prefix(inner, prefix="head")) == [name]


def test_a_tensor_called_module() -> None:
    assert names(mc.strip_prefix(in_memory({"module": (1,)}))) == ["module"]
    assert names(mc.strip_prefix(in_memory({"module.module": (1,)}))) == ["module"]


def test_a_prefix_that_no_name_has() -> None:
    with pytest.raises(NoMatchError) as e:
        mc.strip_prefix(
            in_memory({"module.a.weight": (1,), "module.b.weight": (1,)}), prefix="modul"
        )
    text = f"{e.value.message} {e.value.hint}"
    assert "modul.*" in text
    assert "module" in text.replace("modul.*", "")


def test_inner_module_segments_stay() -> None:
    ckpt = in_memory({"module.a.module.b": (1,), "module.c": (1,)})
    assert names(mc.strip_prefix(ckpt)) == ["a.module.b", "c"]


def test_checkpoint_wrappers_prefix_goes_with_and_without_being_asked_for() -> None:
    ckpt = in_memory({"_checkpoint_wrapped_module.a": (1,), "_checkpoint_wrapped_module.b": (1,)})
    assert names(mc.strip_prefix(ckpt)) == ["a", "b"]
    assert names(mc.strip_prefix(ckpt, prefix="_checkpoint_wrapped_module")) == ["a", "b"]


def test_n_averaged_goes_only_with_its_wrapper() -> None:
    bare = in_memory({"n_averaged": (), "a.weight": (1,)})
    assert names(mc.strip_prefix(bare)) == ["n_averaged", "a.weight"]
    wrapped = in_memory({"n_averaged": (), "module.a.weight": (1,)})
    stripped = mc.strip_prefix(wrapped)
    assert names(stripped) == ["a.weight"]
    assert read_record(stripped, REMOVED) is None  # no head: strip-head still looks for one


def test_metadata_of_modules_without_tensors_follows(tmp_path: Path) -> None:
    net = nn.Sequential(nn.ReLU(), nn.Sequential(nn.Dropout(), nn.Linear(2, 2)), nn.Identity())
    with opened(tmp_path / "in.pt", nn.DataParallel(net).state_dict()) as ckpt:
        loaded = load(mc.strip_prefix(ckpt), tmp_path / "out.pt")
        assert dict(loaded._metadata) == dict(net.state_dict()._metadata)


def test_metadata_that_decides_how_a_layer_loads(tmp_path: Path) -> None:
    # BatchNorm's version 2 means that num_batches_tracked is there; lost, load_state_dict adds it
    net = Net()
    with opened(tmp_path / "in.pt", nn.DataParallel(net).state_dict()) as ckpt:
        loaded = load(mc.strip_prefix(ckpt), tmp_path / "out.pt")
        assert loaded._metadata["bn1"] == {"version": 2}


def test_every_section_follows(tmp_path: Path) -> None:
    net = Net()
    ddp = nn.DataParallel(net)
    optimizer = torch.optim.AdamW(ddp.named_parameters(), lr=0.1)
    saved = {
        "state_dict": ddp.state_dict(),
        "state_dict_ema": AveragedModel(ddp).state_dict(),
        "optimizer": optimizer.state_dict(),
        "epoch": 3,
        "note": "module.conv1.weight",
    }
    with opened(tmp_path / "in.pt", saved) as ckpt:
        loaded = load(mc.strip_prefix(ckpt), tmp_path / "out.pt")
    bare = list(net.state_dict())
    assert list(loaded["state_dict"]) == bare
    AveragedModel(Net()).load_state_dict(loaded["state_dict_ema"])  # its own wrapper stays
    recorded = loaded["optimizer"]["param_groups"][0]["param_names"]
    assert recorded == [name for name, _ in net.named_parameters()]
    assert (loaded["epoch"], loaded["note"]) == (3, "module.conv1.weight")
    assert list(loaded) == list(saved)


def test_a_wrapped_ema_copy_beside_a_bare_model(tmp_path: Path) -> None:
    net = Net()
    saved = {
        "model": net.state_dict(),
        "ema": {"decay": 0.9, "shadow": AveragedModel(net).state_dict()},
    }
    with opened(tmp_path / "in.pt", saved) as ckpt:
        loaded = load(mc.strip_prefix(ckpt), tmp_path / "out.pt")
    assert list(loaded["ema"]["shadow"]) == list(AveragedModel(net).state_dict())
    assert loaded["ema"]["decay"] == 0.9


def test_names_as_ids_follow(tmp_path: Path) -> None:
    # torch.distributed.checkpoint's optimizer state_dicts
    net = nn.Linear(2, 2)
    saved = {
        "model": {"module.weight": net.weight.detach(), "module.bias": net.bias.detach()},
        "optimizer": {
            "state": {"module.weight": {"momentum_buffer": torch.ones(2, 2)}},
            "param_groups": [{"lr": 0.1, "params": ["module.weight", "module.bias"]}],
        },
    }
    with opened(tmp_path / "in.pt", saved) as ckpt:
        loaded = load(mc.strip_prefix(ckpt), tmp_path / "out.pt")
        assert list(loaded["optimizer"]["state"]) == ["weight"]
        assert loaded["optimizer"]["param_groups"][0]["params"] == ["weight", "bias"]
        loaded = load(mc.strip_head(mc.strip_prefix(ckpt), head="bias"), tmp_path / "out.pt")
        assert list(loaded["optimizer"]["state"]) == ["weight"]
        assert loaded["optimizer"]["param_groups"][0]["params"] == ["weight"]


def test_the_input_is_not_changed(tmp_path: Path) -> None:
    with opened(tmp_path / "in.pt", nn.DataParallel(Net()).state_dict()) as ckpt:
        before = names(ckpt)
        mc.strip_prefix(ckpt)
        assert names(ckpt) == before


def test_ties_survive(tmp_path: Path) -> None:
    net = nn.Sequential(nn.Linear(3, 3, bias=False), nn.Linear(3, 3, bias=False))
    net[1].weight = net[0].weight
    with opened(tmp_path / "in.pt", nn.DataParallel(net).state_dict()) as ckpt:
        loaded = load(mc.strip_prefix(ckpt), tmp_path / "out.pt")
    assert loaded["0.weight"].data_ptr() == loaded["1.weight"].data_ptr()


def test_no_state_dict_is_an_error(tmp_path: Path) -> None:
    with opened(tmp_path / "in.pt", {"a": 1}) as ckpt, pytest.raises(ModelctlError):
        mc.strip_prefix(ckpt)


@pytest.mark.parametrize("inside", ["_fsdp_wrapped_module", "_checkpoint_wrapped_module"])
def test_what_fsdp_and_checkpointing_put_between_names_goes(inside: str) -> None:
    names = {
        f"module.{inside}.embed.weight": (3,),
        f"module.{inside}.layers.0.{inside}._orig_mod.fc.weight": (2,),
    }
    stripped = mc.strip_prefix(in_memory(names))
    assert list(stripped.state_dict()) == ["embed.weight", "layers.0.fc.weight"]
    assert mc.match(in_memory(names), stripped).after.fits
    bare = {name.removeprefix("module."): shape for name, shape in names.items()}
    (told,) = [n.text for n in mc.summarize(in_memory(bare)).warnings if "wrapper" in n.text]
    assert f"start with '{inside}.'" in told
