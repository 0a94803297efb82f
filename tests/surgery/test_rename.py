"""rename, add_prefix, keep, drop: on files that torch made, and against torch's own state_dicts."""

from __future__ import annotations

import fnmatch
import re
from collections import OrderedDict
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from torch.optim.swa_utils import AveragedModel

import modelctl as mc
from modelctl.core.notes import info
from modelctl.core.records import REMOVED, read_record
from modelctl.errors import CollisionError, NoMatchError, RefusedError, UsageError

from .nets import HEAD, OPTIMIZERS, Net, in_memory, load, names, opened, same_tensors, train


def renamed(*maps: str, regex: bool = False, of: tuple[str, ...] = ()) -> list[str]:
    ckpt = in_memory(dict.fromkeys(of, (1,)))
    return names(mc.rename(ckpt, maps, regex=regex))


BLOCKS = ("blocks.0.attn.qkv.weight", "blocks.1.attn.proj.weight", "norm.weight", "attn")


@pytest.mark.parametrize(
    ("maps", "expected"),
    [
        # the n-th star fills the n-th star
        (
            ["blocks.*.attn.*=layers.*.attention.*"],
            [
                "layers.0.attention.qkv.weight",
                "layers.1.attention.proj.weight",
                "norm.weight",
                "attn",
            ],
        ),
        # a module is its subtree, and only that one
        (["blocks.1=last"], [BLOCKS[0], "last.attn.proj.weight", *BLOCKS[2:]]),
        (["attn=attention"], [*BLOCKS[:3], "attention"]),
        (["norm.weight=norm.scale"], [*BLOCKS[:2], "norm.scale", "attn"]),
        # sets and single characters match, but fill nothing
        (["blocks.[01].*=b.*"], ["b.attn.qkv.weight", "b.attn.proj.weight", *BLOCKS[2:]]),
        (["blocks.?.attn.q*=q*"], ["qkv.weight", *BLOCKS[1:]]),
        # each on what the one before made
        (["norm=a", "a=b"], [*BLOCKS[:2], "b.weight", "attn"]),
        # every name
        (["*=model.*"], [f"model.{name}" for name in BLOCKS]),
    ],
)
def test_globs(maps: list[str], expected: list[str]) -> None:
    assert renamed(*maps, of=BLOCKS) == expected


def test_a_star_takes_as_little_as_it_can() -> None:
    assert renamed("*.attn.*=*|*", of=("a.attn.attn.w",)) == ["a|attn.w"]


@pytest.mark.parametrize(
    ("map", "expected"),
    [
        (r"blocks\.(\d)=layer\1", ["layer0.attn.qkv.weight", "layer1.attn.proj.weight"]),
        (r"^attn$=a", list(BLOCKS[:2])),
        (r"(?<=attn\.)q=k", ["blocks.0.attn.kkv.weight", BLOCKS[1]]),  # parted at the last =
    ],
)
def test_regexes(map: str, expected: list[str]) -> None:
    found = renamed(map, regex=True, of=BLOCKS)
    assert found[:2] == expected
    assert found == [re.sub(*map.rpartition("=")[::2], name) for name in BLOCKS]


@pytest.mark.parametrize(
    ("map", "regex", "error", "match"),
    [
        ("blocks.0", False, UsageError, "OLD=NEW"),
        ("=x", False, UsageError, "OLD=NEW"),
        ("block.*=x.*", False, NoMatchError, r"no tensor matches 'block\.\*'"),
        ("norm.*=a.*.*", False, UsageError, "more '\\*'"),
        ("norm=", False, UsageError, "to '.weight'"),
        ("norm.weight=", False, UsageError, "to ''"),
        ("(=x", True, UsageError, "no regular expression"),
        (r"norm=\1", True, UsageError, "no regular expression"),
        ("blocks.*.attn.*.weight=same.weight", False, CollisionError, "would both be named"),
    ],
)
def test_refusals(map: str, regex: bool, error: type, match: str) -> None:
    with pytest.raises(error, match=match):
        renamed(map, regex=regex, of=BLOCKS)


NAMES = st.lists(
    st.lists(st.sampled_from(["a", "b", "ab", "0", "1", "weight", "x[0]"]), min_size=1, max_size=4)
    .map(".".join)
    .filter(lambda name: name != "x"),
    min_size=1,
    max_size=6,
    unique=True,
)
GLOBS = st.text("ab01.*?[]!w", min_size=1, max_size=8).filter(lambda text: "*" in text)


@given(NAMES, GLOBS)
def test_a_map_matches_what_the_pattern_matches(found: list[str], glob: str) -> None:
    """Against :mod:`fnmatch`: the same names, and filled in where they came from the same ones."""
    matched = [name for name in found if fnmatch.fnmatchcase(name, glob)]
    ckpt = in_memory(dict.fromkeys(found, (1,)))
    if not matched:
        with pytest.raises(NoMatchError):
            mc.rename(ckpt, f"{glob}=z")
        return
    stars = len(re.findall(r"\*", re.sub(r"\[!?\]?[^\]]*\]", "", glob)))
    new = "z" + "|*" * stars
    try:
        out = names(mc.rename(ckpt, f"{glob}={new}"))
    except (CollisionError, UsageError):  # several may get one name, or one that is none
        return
    assert [name.startswith("z") for name in out] == [name in matched for name in found]


@given(NAMES, st.sampled_from(["module", "backbone.", "a", "a.b", "_orig_mod"]))
def test_strip_after_add_is_the_identity(found: list[str], prefix: str) -> None:
    ckpt = in_memory(dict.fromkeys(found, (1,)))
    there = mc.add_prefix(ckpt, prefix)
    assert names(there) == [f"{prefix.rstrip('.')}.{name}" for name in found]
    assert names(mc.strip_prefix(there, prefix)) == found


@pytest.mark.parametrize("prefix", ["", ".", "a..b", ".a"])
def test_what_is_no_prefix(prefix: str) -> None:
    with pytest.raises(UsageError):
        mc.add_prefix(in_memory({"a": (1,)}), prefix)


def test_add_and_strip_on_a_training_checkpoint(tmp_path: Path) -> None:
    """Bytes included: the file is the same one, history aside."""
    net = Net()
    optimizer = torch.optim.SGD([*net.named_parameters()], lr=0.1, momentum=0.9)
    train(net, optimizer, range(2))
    ema = {f"module.{name}": value for name, value in net.state_dict().items()}
    saved = {
        "model": net.state_dict(),
        "state_dict_ema": OrderedDict(ema, n_averaged=torch.tensor(3)),
        "optimizer": optimizer.state_dict(),
    }
    with opened(tmp_path / "in.pt", saved) as ckpt:
        ckpt = mc.freeze(ckpt, "conv1")
        mc.save(ckpt, tmp_path / "frozen.pt")
        added = mc.add_prefix(ckpt, "backbone")
        out = load(added, tmp_path / "added.pt")
        mc.save(mc.strip_prefix(added, "backbone"), tmp_path / "back.pt")
    parent = nn.Module()
    parent.backbone = net
    same_tensors(out["model"], parent.state_dict())
    assert {k: v for k, v in out["model"]._metadata.items() if k} == {
        k: v for k, v in parent.state_dict()._metadata.items() if k
    }
    averaged = list(AveragedModel(parent).state_dict())
    assert sorted(out["state_dict_ema"]) == sorted(averaged)
    assert out["optimizer"]["param_groups"][0]["param_names"] == [
        name for name, _ in parent.named_parameters()
    ]
    assert out["model"]._metadata[""]["modelctl.freeze"]["frozen"] == ["backbone.conv1.weight"]
    with mc.open(tmp_path / "frozen.pt") as a, mc.open(tmp_path / "back.pt") as b:
        assert not mc.diff(a, b).differs
    before = torch.load(tmp_path / "frozen.pt", weights_only=True)["model"]
    after = torch.load(tmp_path / "back.pt", weights_only=True)["model"]
    assert list(before._metadata.items()) == list(after._metadata.items())


@pytest.mark.parametrize("wrapper", ["", "module.", "_orig_mod.", "module._orig_mod."])
@pytest.mark.parametrize("of_model", ["", "module."])
def test_names_behind_other_wrappers_follow(tmp_path: Path, wrapper: str, of_model: str) -> None:
    net = Net()
    saved = {
        "model": {of_model + name: value for name, value in net.state_dict().items()},
        "ema": {wrapper + name: value for name, value in net.state_dict().items()},
    }
    with opened(tmp_path / "in.pt", saved) as ckpt:
        out = load(
            mc.rename(ckpt, f"{of_model}layer1.*={of_model}stage.*"), tmp_path / "renamed.pt"
        )
        kept = load(mc.keep(ckpt, f"{of_model}layer1"), tmp_path / "kept.pt")
    expected = [name.replace("layer1", "stage") for name in net.state_dict()]
    assert list(out["model"]) == [of_model + name for name in expected]
    assert list(out["ema"]) == [wrapper + name for name in expected]
    inside = [name for name in net.state_dict() if name.startswith("layer1.")]
    assert list(kept["ema"]) == [wrapper + name for name in inside]


@pytest.mark.parametrize("kind", OPTIMIZERS)
@pytest.mark.parametrize("edit", ["keep", "drop"])
def test_the_optimizer_keeps_what_the_model_keeps(tmp_path: Path, kind: str, edit: str) -> None:
    net = Net()
    optimizer = OPTIMIZERS[kind](net.parameters())
    train(net, optimizer, range(3))
    saved = {"model": net.state_dict(), "optimizer": optimizer.state_dict()}
    with opened(tmp_path / "in.pt", saved) as ckpt:
        if edit == "keep":
            changed = mc.keep(ckpt, "*", exclude=["fc", "conv1"])
        else:
            changed = mc.drop(ckpt, ["conv1", "fc"])
        assert read_record(changed, REMOVED) is None  # that is what strip-head says of a head
        out = load(changed, tmp_path / "out.pt")
    kept = [(name, p) for name, p in net.named_parameters() if name not in (*HEAD, "conv1.weight")]
    fresh = OPTIMIZERS[kind]([p for _, p in kept])
    fresh.load_state_dict(out["optimizer"])
    for _, parameter in kept:
        theirs = optimizer.state[parameter]
        ours = fresh.state[parameter]
        assert theirs.keys() == ours.keys()
        for key, value in theirs.items():
            assert torch.equal(torch.as_tensor(value), torch.as_tensor(ours[key])), key


@pytest.mark.parametrize("recorded", [False, True])
def test_layers_that_change_places_take_their_state_along(tmp_path: Path, recorded: bool) -> None:
    """The live model has its parameters in the order of their names: ids must be issued anew."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 4), nn.Linear(4, 4))
    named = list(net.named_parameters())
    optimizer = torch.optim.AdamW(named if recorded else [p for _, p in named], lr=0.1)
    train(net, optimizer, range(3))
    saved = {"model": net.state_dict(), "optimizer": optimizer.state_dict()}
    maps = ["1=tmp", "2=1", "tmp=2"]
    with opened(tmp_path / "in.pt", saved) as ckpt:
        out = load(mc.rename(ckpt, maps), tmp_path / "out.pt")
    other = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 4), nn.Linear(4, 4))
    other.load_state_dict(out["model"])
    fresh = torch.optim.AdamW(other.parameters(), lr=0.1)
    fresh.load_state_dict(out["optimizer"])
    for i, j in ((0, 0), (1, 2), (2, 1)):
        for a, b in zip(net[i].parameters(), other[j].parameters(), strict=True):
            assert torch.equal(a, b)
            assert torch.equal(optimizer.state[a]["exp_avg"], fresh.state[b]["exp_avg"])


def test_keep_and_drop_halve_it(tmp_path: Path) -> None:
    with opened(tmp_path / "in.pt", Net().state_dict()) as ckpt:
        inside, outside = mc.keep(ckpt, "layer1"), mc.drop(ckpt, "layer1")
        assert sorted(names(inside) + names(outside)) == sorted(names(ckpt))
        everything = mc.keep(ckpt, "*")
        assert everything.root is ckpt.root
        assert everything.notes == (info("every tensor is kept"),)
        with pytest.raises(RefusedError, match="no tensor would be left"):
            mc.drop(ckpt, "*")
        with pytest.raises(NoMatchError):
            mc.keep(ckpt, "layer9")
        # strip-head still looks for the head
        assert HEAD[0] not in names(mc.strip_head(mc.drop(ckpt, "conv1")))


def test_extra_state_goes_with_its_module(tmp_path: Path) -> None:
    class Extra(nn.Linear):
        def get_extra_state(self) -> object:
            return {"scale": 2.0}

        def set_extra_state(self, state: object) -> None:
            pass

    net = nn.Sequential(OrderedDict(a=Extra(2, 2), b=nn.Linear(2, 2)))
    with opened(tmp_path / "in.pt", net.state_dict()) as ckpt:
        out = load(mc.rename(ckpt, "a=c"), tmp_path / "out.pt")
        assert out["c._extra_state"] == {"scale": 2.0}
        assert "a._extra_state" not in load(mc.drop(ckpt, "a"), tmp_path / "dropped.pt")
