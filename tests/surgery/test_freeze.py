"""freeze and unfreeze: the record, what it follows, and that plain torch doesn't mind it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file
from torch import nn

import modelctl as mc
from modelctl.core.records import FREEZE, read_record
from modelctl.errors import AmbiguousError, NoMatchError, UsageError
from modelctl.formats.registry import for_writing
from modelctl.surgery.freeze import by_hand

from .nets import Net, load, opened, same_tensors, train

TRUNK = [
    "conv1.weight",
    "bn1.weight",
    "bn1.bias",
    *(f"layer1.{i}.{w}" for i in (0, 1) for w in ("weight", "bias")),
]


def test_the_record(tmp_path: Path) -> None:
    with opened(tmp_path / "in.pt", Net().state_dict()) as ckpt:
        frozen = mc.freeze(ckpt, "*", exclude="fc", bn_eval=True)
        loaded = load(frozen, tmp_path / "out.pt")
    assert loaded._metadata[""]["modelctl.freeze"] == {
        "version": 1,
        "frozen": TRUNK,  # parameters: no running statistics
        "bn_eval": True,
        "patterns": ["*", "!fc"],
    }
    assert loaded._metadata[""]["version"] == 1
    Net().load_state_dict(loaded)
    nn.DataParallel(Net()).module.load_state_dict(loaded)


def test_it_adds_up_and_unfreeze_takes_away(tmp_path: Path) -> None:
    with opened(tmp_path / "in.pt", Net().state_dict()) as ckpt:
        one = mc.freeze(ckpt, "layer1")
        two = mc.freeze(one, ["conv1", "bn?.weight"])
        record = read_record(two, FREEZE)
        assert record["frozen"] == ["conv1.weight", "bn1.weight", *TRUNK[3:]]
        assert record["patterns"] == ["layer1", "conv1", "bn?.weight"]
        less = mc.unfreeze(two, r"layer1\.1", exclude="weight$", regex=True)
        assert "layer1.1.bias" not in read_record(less, FREEZE)["frozen"]
        assert "layer1.1.weight" in read_record(less, FREEZE)["frozen"]
        assert read_record(mc.unfreeze(less, "*"), FREEZE) is None
        with pytest.raises(NoMatchError, match="none of the 2 parameters is frozen"):
            mc.unfreeze(two, "fc")


def test_mistakes(tmp_path: Path) -> None:
    with opened(tmp_path / "in.pt", Net().state_dict()) as ckpt:
        with pytest.raises(NoMatchError) as e:
            mc.freeze(ckpt, "layr1")
        assert "layer1" in (e.value.hint or "")
        with pytest.raises(NoMatchError, match="no parameter matches"):
            mc.freeze(ckpt, "*.running_mean")  # a buffer is no parameter
        with pytest.raises(NoMatchError):
            mc.freeze(ckpt, "*", exclude="nothing")
        with pytest.raises(NoMatchError, match="nothing is left"):
            mc.freeze(ckpt, "fc", exclude="fc")
        with pytest.raises(UsageError):
            mc.freeze(ckpt, "(", regex=True)
        with pytest.raises(UsageError):
            mc.freeze(ckpt, "fc", optimizer="x")  # type: ignore[arg-type]
        assert "warning: every parameter is frozen" in str(mc.freeze(ckpt, "*").notes[-1])
        some = mc.freeze(ckpt, "*", exclude="fc")
        assert [note.level for note in some.notes] == ["info"]


def test_it_follows_renames_removals_and_formats(tmp_path: Path) -> None:
    net = Net()
    with opened(tmp_path / "in.pt", nn.DataParallel(net).state_dict()) as ckpt:
        frozen = mc.freeze(ckpt, ["module.fc", "module.conv1", "module.bn1.bias"])
        mc.save(frozen, tmp_path / "1.pt")
    with mc.open(tmp_path / "1.pt") as ckpt:
        mc.save(mc.strip_prefix(ckpt), tmp_path / "2.safetensors")
    with safe_open(tmp_path / "2.safetensors", "pt") as f:
        record = json.loads(f.metadata()["modelctl.freeze"])
        assert f.metadata()["format"] == "pt"
    assert record["frozen"] == ["conv1.weight", "bn1.bias", "fc.weight", "fc.bias"]
    assert record["version"] == 1
    found = load_file(tmp_path / "2.safetensors")
    assert set(found) == set(net.state_dict())
    with mc.open(tmp_path / "2.safetensors") as ckpt:
        mc.save(mc.strip_head(ckpt, rename_head="old"), tmp_path / "3.pt")
        mc.save(mc.strip_head(ckpt), tmp_path / "4.pt")
    three = torch.load(tmp_path / "3.pt", weights_only=True)
    expected = ["conv1.weight", "bn1.bias", "old.weight", "old.bias"]
    assert three._metadata[""]["modelctl.freeze"]["frozen"] == expected
    four = torch.load(tmp_path / "4.pt", weights_only=True)
    assert four._metadata[""]["modelctl.freeze"]["frozen"] == expected[:2]
    with mc.open(tmp_path / "4.pt") as ckpt:
        mc.save(ckpt, tmp_path / "5.safetensors")
    with safe_open(tmp_path / "5.safetensors", "pt") as f:
        assert json.loads(f.metadata()["modelctl.freeze"])["frozen"] == expected[:2]
        assert [one["name"] for one in json.loads(f.metadata()["modelctl.removed"])] == [
            "fc.weight",
            "fc.bias",
        ]


def test_weights_only_keeps_the_record(tmp_path: Path) -> None:
    with opened(tmp_path / "in.pt", {"model": Net().state_dict(), "epoch": 1}) as ckpt:
        flat = mc.convert(mc.freeze(ckpt, "fc"), weights_only=True)
        mc.save(flat, tmp_path / "out.safetensors")
    with mc.open(tmp_path / "out.safetensors") as ckpt:
        assert read_record(ckpt, FREEZE)["frozen"] == ["fc.weight", "fc.bias"]


def test_a_record_does_not_touch_tensors_or_the_rest(tmp_path: Path) -> None:
    net = Net()
    saved = {"model": dict(net.state_dict()), "epoch": 3, "args": {"a": [1, 2.5, None]}}
    with opened(tmp_path / "in.pt", saved) as ckpt:
        loaded = load(mc.freeze(ckpt, "conv1"), tmp_path / "out.pt")
    same_tensors(loaded["model"], net.state_dict())
    assert loaded["epoch"] == 3
    assert loaded["args"] == saved["args"]


@pytest.mark.parametrize("named", [True, False])
def test_optimizer_drop(tmp_path: Path, named: bool) -> None:
    net = Net()
    optimizer = torch.optim.AdamW(net.named_parameters() if named else net.parameters())
    train(net, optimizer, range(2))
    saved = {"model": net.state_dict(), "optimizer": optimizer.state_dict()}
    with opened(tmp_path / "in.pt", saved) as ckpt:
        kept = load(mc.freeze(ckpt, "conv1"), tmp_path / "out.pt")
        assert len(kept["optimizer"]["state"]) == 9
        out = load(mc.freeze(ckpt, ["conv1", "bn1"], optimizer="drop"), tmp_path / "out.pt")
    left = [name for name, _ in net.named_parameters() if not name.startswith(("conv1", "bn1"))]
    assert out["optimizer"]["param_groups"][0]["params"] == list(range(6))
    live = dict(net.named_parameters())
    for i, name in enumerate(left):
        before = optimizer.state[live[name]]["exp_avg"]
        assert torch.equal(out["optimizer"]["state"][i]["exp_avg"], before)
    again = torch.optim.AdamW([live[name] for name in left])
    again.load_state_dict(out["optimizer"])
    assert "conv1.weight" in out["model"]


@pytest.mark.parametrize("nested", [False, True])
@pytest.mark.parametrize("safe", [False, True])
def test_the_lines_to_apply_it_by_hand_work(tmp_path: Path, nested: bool, safe: bool) -> None:
    net = Net()
    saved = {"state_dict": net.state_dict(), "epoch": 1} if nested else net.state_dict()
    with opened(tmp_path / "in.pt", saved) as ckpt:
        frozen = mc.freeze(ckpt, "*", exclude="fc")
        if safe:
            frozen = mc.convert(frozen, weights_only=True)
        path = str(tmp_path / ("it's.safetensors" if safe else "it's.pt"))
        mc.save(frozen, path)
        record = for_writing(None, path).record_by_hand(
            frozen, path, frozen.sections.model().path, FREEZE
        )
        assert record is not None
        lines = by_hand(frozen, record)
    assert len(lines) == 3
    exec("\n".join(lines), {"torch": torch, "json": json, "safe_open": safe_open, "model": net})
    trains = [name for name, parameter in net.named_parameters() if parameter.requires_grad]
    assert trains == ["fc.weight", "fc.bias"]


def test_the_record_tells_what_a_filtered_optimizer_has(tmp_path: Path) -> None:
    """Built from what trains, without names, over layers alike: the freeze record says which."""
    net = nn.Sequential(*(nn.Linear(4, 4) for _ in range(4)))
    net[0].requires_grad_(False)
    optimizer = torch.optim.AdamW([p for p in net.parameters() if p.requires_grad], lr=0.1)
    train(net, optimizer, range(2))
    saved = {"model": net.state_dict(), "optimizer": optimizer.state_dict()}
    with opened(tmp_path / "in.pt", saved) as ckpt:
        with pytest.raises(AmbiguousError):
            mc.drop(ckpt, "3")
        out = load(mc.drop(mc.freeze(ckpt, "0"), "3"), tmp_path / "out.pt")
    assert out["optimizer"]["param_groups"][0]["params"] == [0, 1, 2, 3]
    for i, parameter in enumerate([*net[1].parameters(), *net[2].parameters()]):
        ours = out["optimizer"]["state"][i]["exp_avg"]
        assert torch.equal(ours, optimizer.state[parameter]["exp_avg"])


def test_drop_takes_tied_names_together(tmp_path: Path) -> None:
    net = nn.Module()
    net.embed, net.mid, net.head = nn.Embedding(5, 3), nn.Linear(3, 3), nn.Linear(3, 5, bias=False)
    net.head.weight = net.embed.weight
    optimizer = torch.optim.AdamW(net.parameters(), lr=0.1)
    train(net, optimizer, range(2))
    saved = {"model": net.state_dict(), "optimizer": optimizer.state_dict()}
    with opened(tmp_path / "in.pt", saved) as ckpt:
        out = load(mc.freeze(ckpt, "head.weight", optimizer="drop"), tmp_path / "out.pt")
    assert out["model"]._metadata[""]["modelctl.freeze"]["frozen"] == [
        "embed.weight",
        "head.weight",
    ]
    left = torch.optim.AdamW(net.mid.parameters(), lr=0.1)
    left.load_state_dict(out["optimizer"])
    assert torch.equal(
        left.state[net.mid.weight]["exp_avg"], optimizer.state[net.mid.weight]["exp_avg"]
    )


@pytest.mark.parametrize(
    "record",
    ["all", 7, {"version": 1, "frozen": "all"}, {"frozen": {"fc.weight": True}}, {"version": 9}],
    ids=str,
)
def test_a_record_that_nobody_understands_is_said_so(tmp_path: Path, record: Any) -> None:
    """It is not taken for none without a word: not by who looks, renames, removes or freezes."""
    state = Net().state_dict()
    state._metadata[""][FREEZE] = record
    with opened(tmp_path / "in.pt", state) as ckpt:
        said = "the freeze record can't be understood: what it freezes is not known"
        assert said in [note.text for note in mc.summarize(ckpt).warnings]
        for edited in (mc.rename(ckpt, "fc=head"), mc.drop(ckpt, "fc")):
            assert said in [note.text for note in edited.notes]
            assert read_record(edited, FREEZE) == read_record(ckpt, FREEZE)
        frozen = mc.freeze(ckpt, "fc")
        replaced = "a freeze record that can't be understood is replaced"
        assert replaced in [note.text for note in frozen.notes]
        assert read_record(frozen, FREEZE)["frozen"] == ["fc.weight", "fc.bias"]
