"""``torch.fx.GraphModule``s: whole modules whose forward is code in the file."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import fx, nn

import modelctl as mc
from modelctl.errors import RefusedError


class Block(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(width, width, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.scale = nn.Parameter(torch.ones(width, 1, 1))
        self.register_buffer("shift", torch.zeros(width, 1, 1))

    def forward(self, x: Any) -> Any:
        return torch.relu(self.bn1(self.conv1(x)) * self.scale + self.shift + x)


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.token = nn.Parameter(torch.zeros(1))
        self.stem = nn.Conv2d(3, 4, 3)
        self.layer1 = nn.Sequential(Block(4), Block(4))
        self.fc = nn.Linear(4, 10)

    def forward(self, x: Any) -> Any:
        return self.fc(self.layer1(self.stem(x)).mean((2, 3))) + self.token


@pytest.fixture
def graph() -> fx.GraphModule:
    torch.manual_seed(0)
    return fx.symbolic_trace(Net().eval())


@pytest.mark.parametrize("zip", [True, False])
def test_it_is_a_whole_module(tmp_path: Path, graph: fx.GraphModule, zip: bool) -> None:
    torch.save(graph, tmp_path / "m.pt", _use_new_zipfile_serialization=zip)
    with mc.open(tmp_path / "m.pt") as ckpt:
        assert ckpt.sections.kind == "whole module"
        assert any(one.level == "dangerous" for one in ckpt.findings)
        found = ckpt.state_dict()
        wanted = graph.state_dict()
        assert list(found) == list(wanted)
        assert all(torch.equal(ref.torch(), wanted[name]) for name, ref in found.items())
        roles = {name for name, ref in found.items() if ref.role == "parameter"}
        assert roles == {name for name, _ in graph.named_parameters()}
        rows = {row["path"]: row for row in mc.summary(ckpt, depth=9).as_dict()["rows"]}
        assert "layer1.0.bn1" in rows
        assert rows["fc"]["type"] == "Linear"
        assert rows[""]["type"] == "GraphModule"
        assert "reduce_graph_module" not in str(mc.show(ckpt))
        assert "def forward" in ckpt["_code"]


def test_it_becomes_its_state_dict(tmp_path: Path, graph: fx.GraphModule) -> None:
    torch.save(graph, tmp_path / "m.pt")
    for weights_only in (False, True):
        convert = {"do": "convert", "weights-only": weights_only}
        mc.edit(tmp_path / "m.pt", convert, output=tmp_path / f"sd{weights_only}.pt")
        loaded = torch.load(tmp_path / f"sd{weights_only}.pt")
        assert list(loaded) == list(graph.state_dict())


@pytest.mark.parametrize("wrapped", [False, True])
@pytest.mark.parametrize("edit", [{"do": "freeze", "pattern": ["*"]}, {"do": "strip-prefix"}])
def test_its_code_is_not_written_again(
    tmp_path: Path, graph: fx.GraphModule, wrapped: bool, edit: dict[str, Any]
) -> None:
    torch.save(nn.DataParallel(graph) if wrapped else graph, tmp_path / "m.pt")
    if edit["do"] == "strip-prefix" and not wrapped:
        return
    with pytest.raises(RefusedError, match="not written out again") as e:
        mc.edit(tmp_path / "m.pt", edit, output=tmp_path / "n.pt")
    assert "--weights-only" in (e.value.hint or "")
    assert not (tmp_path / "n.pt").exists()


@pytest.mark.parametrize(
    "edit",
    [
        {"do": "rename", "map": ["stem.*=root.*"]},
        {"do": "add-prefix", "prefix": "m"},
        {"do": "drop", "pattern": ["layer1.0"]},
        {"do": "drop", "pattern": ["token"]},
        {"do": "strip-head"},
    ],
    ids=lambda edit: edit["do"],
)
def test_its_code_names_its_modules(
    tmp_path: Path, graph: fx.GraphModule, edit: dict[str, Any]
) -> None:
    torch.save(graph, tmp_path / "m.pt")
    with pytest.raises(RefusedError, match=r"fx\.GraphModule, whose code names.*: '?\w") as e:
        mc.edit(tmp_path / "m.pt", edit, output=tmp_path / "n.pt")
    assert "convert" in (e.value.hint or "")
    assert not (tmp_path / "n.pt").exists()


class Inner(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.module = nn.Linear(3, 3)

    def forward(self, x: Any) -> Any:
        return self.module(x)


def test_a_wrapper_that_its_code_calls_stays(tmp_path: Path) -> None:
    torch.save(fx.symbolic_trace(Inner()), tmp_path / "m.pt")
    with pytest.raises(RefusedError, match="whose code names"):
        mc.edit(tmp_path / "m.pt", {"do": "strip-prefix"}, output=tmp_path / "n.pt")


def test_one_beside_the_model_goes_along(tmp_path: Path, graph: fx.GraphModule) -> None:
    torch.save({"model": Net().state_dict(), "graph": graph}, tmp_path / "m.pt")
    with mc.open(tmp_path / "m.pt") as ckpt:
        assert ckpt.sections.models[0].path == ("model",)


class Hostile:
    """A call of the same function on what is no module."""

    def __reduce__(self) -> Any:
        from torch.fx.graph_module import reduce_graph_module

        return reduce_graph_module, ({"_code": "print()"}, "")


def test_what_is_no_module_is_not_written(tmp_path: Path) -> None:
    torch.save({"model": Net().state_dict(), "x": Hostile()}, tmp_path / "m.pt")
    with pytest.raises(RefusedError, match="not written out again"):
        mc.edit(tmp_path / "m.pt", {"do": "add-prefix", "prefix": "m"}, output=tmp_path / "n.pt")
