"""``summary`` with an architecture or an input: the live view on the command line."""

from __future__ import annotations

import csv
import io
import json
import random
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.cli.files import Cli, tensor, write

torch = pytest.importorskip("torch")

NET = """
import torch
from torch import nn

class Net(nn.Module):
    def __init__(self, width=4, classes=5):
        super().__init__()
        self.conv1 = nn.Conv2d(3, width, 3, stride=2, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.layer1 = nn.Sequential(nn.Linear(width, 6), nn.Linear(6, 6))
        self.fc = nn.Linear(6, classes)

    def forward(self, images):
        return self.fc(self.layer1(self.pool(self.bn1(self.conv1(images))).flatten(1)))

class Words(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(10, 4)
    def forward(self, ids, mask=None):
        return self.embed(ids)

ready = Net()
number = 3

def broken():
    raise OSError("the disk is on fire")
"""
SIZE = ("--input-size", "2,3,9,9")
MACS = 2 * (16 * 4 * 27 + 4 * 6 + 6 * 6 + 6 * 5)


@pytest.fixture
def mine(flat: Path) -> Iterator[Path]:
    """``flat.pt`` and the code of its model, ``mynet.py``."""
    Path("mynet.py").write_text(NET)
    before = set(sys.modules)
    yield flat
    for name in set(sys.modules) - before:
        if name.startswith("mynet"):
            del sys.modules[name]


def live(cli: Cli, *argv: object) -> dict[str, Any]:
    result = cli("summary", *argv, "--format", "json")
    assert result.code == 0, result.err
    found: dict[str, Any] = json.loads(result.out)
    return found


@pytest.mark.parametrize("arch", ["mynet.py:Net", "mynet:Net", "./mynet.py:ready"])
def test_a_model_of_ones_own(cli: Cli, mine: Path, arch: str) -> None:
    path = list(sys.path)
    found = live(cli, mine, "--arch", arch, *SIZE)
    assert found["schema"] == "modelctl.summary/1"
    assert found["totals"]["macs"] == MACS
    assert found["totals"]["flops"] == 2 * MACS
    assert found["totals"]["params_unique"] == sum(row["params"] for row in found["rows"])
    rows = {row["path"]: row for row in found["rows"]}
    assert rows["conv1"]["out_shape"] == [2, 4, 4, 4]
    assert (rows["conv1"]["kernel"], rows["conv1"]["stride"]) == ([3, 3], [2, 2])
    assert rows["layer1.1"]["macs"] == 72
    assert found["fit"] == {
        "loaded": 12,
        "prefix": "",
        "missing": [],
        "unexpected": [],
        "mismatched": [],
    }
    assert found["model"]["output"] == [2, 5]
    assert [one["name"] for one in found["tensors"]][:2] == ["conv1.weight", "bn1.weight"]
    assert sys.path == path


def test_the_table(cli: Cli, mine: Path) -> None:
    result = cli("summary", mine, "--arch", "mynet.py:Net", *SIZE)
    assert result.code == 0
    lines = result.out.splitlines()
    assert lines[1] == " mynet.py:Net: all 12 tensors fit"
    assert lines[2].startswith(" Net · input 2x3x9x9 float32 · eval mode, on meta")
    assert f" MACs {MACS:,}" in result.out
    assert max(map(len, lines[4:])) <= 80
    found = cli("summary", mine, "--arch", "mynet.py:Net", *SIZE, "--format", "csv")
    rows = list(csv.DictReader(io.StringIO(found.out)))
    assert sum(int(row["macs"]) for row in rows) == MACS
    assert rows[0]["out_shape"] == "2x4x4x4"
    found = cli("summary", mine, "--arch", "mynet.py:Net", *SIZE, "--format", "markdown")
    assert found.out.splitlines()[0].startswith("| name ")
    assert len({line.count("|") for line in found.out.splitlines()}) == 1


def test_sorted_and_cut(cli: Cli, mine: Path) -> None:
    argv = (mine, "--arch", "mynet.py:Net", *SIZE, "--sort", "params", "--depth", "1")
    rows = csv.DictReader(io.StringIO(cli("summary", *argv, "--format", "csv").out))
    assert [row["path"] for row in rows][:3] == ["conv1", "layer1", "fc"]


def test_arguments_and_what_does_not_fit(cli: Cli, mine: Path) -> None:
    found = live(cli, mine, "--arch", "mynet:Net", "--arch-arg", "classes=7", *SIZE)
    assert found["model"]["arch_args"] == ["classes=7"]
    assert found["fit"]["mismatched"][0] == {
        "name": "fc.weight",
        "found": [5, 6],
        "expected": [7, 6],
    }
    table = cli("summary", mine, "--arch", "mynet:Net", "--arch-arg", "classes=7", *SIZE).out
    assert "10 of 12 tensors fit" in table
    assert "other shapes (file -> model): fc.weight [5, 6] -> [7, 6]" in table


def test_the_files_prefix_dtype_and_freeze_record(cli: Cli, mine: Path) -> None:
    assert cli("add-prefix", mine, "--prefix", "module.", "-o", "p.pt").code == 0
    argv = ("--pattern", "*", "--exclude", "module.fc", "-o", "f.pt")
    assert cli("freeze", "p.pt", *argv).code == 0
    found = live(cli, "f.pt", "--arch", "mynet:Net", *SIZE)
    assert found["fit"]["loaded"] == 12
    assert found["totals"]["trainable"] == 35
    half = {"fc.weight": torch.zeros(5, 6).half(), "fc.bias": torch.zeros(5).half()}
    torch.save(half, "half.pt")
    found = live(cli, "half.pt", "--arch", "mynet:Net", *SIZE)
    assert found["model"]["input"] == "2x3x9x9 float16"
    assert len(found["fit"]["missing"]) == 9  # BatchNorm makes its counter


def test_inputs_by_keyword_and_dtype(cli: Cli, mine: Path) -> None:
    torch.save({"embed.weight": torch.zeros(10, 4)}, "words.pt")
    words = ("words.pt", "--arch", "mynet:Words")
    found = live(cli, *words, "--input-size", "ids=1x7", "--input-dtype", "int64")
    assert found["model"]["output"] == [1, 7, 4]
    two = ("--input-size", "1,7", "--input-size", "1,7", "--input-dtype", "int64")
    assert live(cli, *words, *two, "--input-dtype", "bool")["model"]["input"] == (
        "1x7 int64, 1x7 bool"
    )
    result = cli("summary", *words, "--input-size", "1,7")
    assert result.code == 2
    assert "'embed' (Embedding), given 1x7 float32" in result.err
    assert "--input-dtype int64" in result.err


def test_without_an_input_nothing_is_run(cli: Cli, mine: Path) -> None:
    found = live(cli, mine, "--arch", "mynet:Net")
    assert found["totals"]["macs"] is None
    assert {row["macs"] for row in found["rows"]} == {None}
    assert found["totals"]["params_unique"] == 108 + 8 + 30 + 42 + 35


def test_building_takes_no_memory_and_no_random_numbers(cli: Cli, mine: Path) -> None:
    Path("mynet_big.py").write_text(
        "import random, torch\nfrom torch import nn\n"
        "class Big(nn.Module):\n"
        "    def __init__(self):\n"
        "        super().__init__()\n"
        "        width = int(torch.tensor([1 << 20]).max().item())\n"  # needs values
        "        self.fc, self.x = nn.Linear(6, 5), nn.Linear(width, width)\n"
        "        torch.rand(3), random.random()\n"
        "    def forward(self, x): return self.x(x)\n"
    )
    before = torch.get_rng_state(), random.getstate()
    found = live(cli, mine, "--arch", "mynet_big:Big", "--input-size", "1,1048576")
    assert found["totals"]["macs"] == 1 << 40
    assert torch.equal(before[0], torch.get_rng_state())
    assert before[1] == random.getstate()


@pytest.mark.parametrize(
    ("argv", "says"),
    [
        (("--arch", "mynet"), "'mynet' is not an architecture"),
        (("--arch", "nothere:Net"), "'nothere' can't be imported"),
        (("--arch", "nothere.py:Net"), "there is no file 'nothere.py'"),
        (("--arch", "mynet:Nett"), "nearest: Net"),
        (("--arch", "mynet:number"), "neither a function nor a class"),
        (("--arch", "mynet:broken"), "OSError: the disk is on fire"),
        (("--arch", "mynet:Net", "--arch-arg", "depth=3"), "it takes width, classes"),
        (("--arch", "mynet:Net", "--arch-arg", "3"), "NAME=VALUE is"),
        (("--arch", "json:dumps", "--arch-arg", "obj=1"), "gives a str, not a torch.nn.Module"),
        (("--arch", "mynet:Words", *SIZE), "has none of the file's tensors"),
        (("--arch", "mynet:Net", "--input-size", "3,a"), "'3,a' is not a shape"),
        (("--arch", "mynet:Net", *SIZE, "--input-dtype", "float"), None),
        (("--arch", "mynet:Net", *SIZE, "--input-dtype", "int"), None),
        (("--arch", "mynet:Net", *SIZE, "--input-dtype", "words"), "'words' is no dtype"),
        (("--arch", "mynet:Net", *SIZE, *SIZE[:1], "a=1"), "a name of its own, or none"),
        (("--arch", "mynet:Net", *SIZE, "--stats"), "leave one out"),
        (("--arch", "mynet:Net", *SIZE, "--device", "gpu"), "gpu"),
        (("--arch", "torchvision:resnet51"), "nearest: resnet50"),
        (("--arch", "torchvision:resnet50", "--arch-arg", "weights=DEFAULT"), "no weights"),
        (("--trust",), "--input-size 1,3,224,224 asks for it"),
        (("--arch-arg", "a=1", *SIZE), "--arch-arg needs --arch"),
        (SIZE, "which model these tensors are of is not certain"),
        (("--arch", "mynet:Net", "--input-size", "1,3,2,2"), "'conv1' (Conv2d)"),
        (("--arch", "mynet:Net", "--input-size", "3,9,9"), "the batch dimension and all"),
    ],
)
def test_errors(cli: Cli, mine: Path, argv: tuple[str, ...], says: str | None) -> None:
    result = cli("summary", mine, *argv)
    if says is None:
        return
    assert result.code == 2, result
    assert result.out == ""
    assert says in result.err
    assert len(result.err.splitlines()) <= 2
    assert "bug in modelctl" not in result.err


def test_an_identified_architecture(cli: Cli, place: Path) -> None:
    models = pytest.importorskip("torchvision").models
    with torch.device("meta"):
        shapes = models.squeezenet1_1(num_classes=10).state_dict()
    write(place / "s.pt", {f"module.{n}": tensor(*t.shape) for n, t in shapes.items()})
    found = live(cli, "s.pt", "--input-size", "1,3,64,64")
    assert found["model"]["arch"] == "torchvision:squeezenet1_1"
    assert found["model"]["arch_args"] == ["num_classes=10"]
    assert found["model"]["identified"] is True
    assert found["model"]["output"] == [1, 10]
    assert found["fit"]["loaded"] == len(shapes)
    offered = "--arch torchvision:squeezenet1_1 --arch-arg num_classes=10 --input-size 1,3,224,224"
    assert offered in cli("summary", "s.pt").out
    assert "--arch torch" not in cli("summary", "s.pt", "--format", "csv").out


def test_timm(cli: Cli, place: Path) -> None:
    timm = pytest.importorskip("timm")
    torch.save(timm.create_model("resnet10t", num_classes=3).state_dict(), "t.pt")
    argv = ("t.pt", "--arch", "timm:resnet10t", "--arch-arg", "num_classes=3")
    assert live(cli, *argv, "--input-size", "1,3,64,64")["fit"]["missing"] == []
    assert "nearest: resnet10t" in cli("summary", "t.pt", "--arch", "timm:resnet10").err


def test_match_with_a_model_of_ones_own(cli: Cli, mine: Path) -> None:
    result = cli("match", mine, "--arch", "mynet.py:Net")
    assert result.code == 0
    assert "fits: load_state_dict takes all 12 tensors" in result.out
    assert cli("rename", mine, "--map", "layer1.*=mlp.*", "-o", "r.pt").code == 0
    found = json.loads(cli("match", "r.pt", "--arch", "mynet:Net", "--format", "json").out)
    assert [one["map"] for one in found["maps"]] == ["mlp=layer1"]
    argv = ("--arch", "mynet:Net", "--arch-arg", "classes=7", "--format", "json")
    found = json.loads(cli("match", mine, *argv).out)
    assert [one["name"] for one in found["mismatched"]] == ["fc.weight", "fc.bias"]
    assert cli("match", mine, "--arch", "mynet:Net", "--like", mine).code == 2
    assert "nearest: Net" in cli("match", mine, "--arch", "mynet:Nett").err


# ---------------------------------------------------------------------- what files hold


def test_a_whole_module_runs_only_with_trust(cli: Cli, place: Path) -> None:
    model = torch.nn.Sequential(torch.nn.Conv2d(3, 4, 3), torch.nn.ReLU())
    torch.save(model, "whole.pt")
    refused = cli("summary", "whole.pt", "--input-size", "1,3,8,8")
    assert refused.code == 2
    assert "unpickles it, which runs whatever" in refused.err
    assert "--trust" in refused.err
    found = live(cli, "whole.pt", "--input-size", "1,3,8,8", "--trust")
    assert found["totals"]["macs"] == 36 * 4 * 27
    assert found["fit"] is None


def test_a_module_whose_class_is_not_here(cli: Cli, mine: Path) -> None:
    sys.path.insert(0, ".")
    import mynet  # type: ignore[import-not-found]

    torch.save(mynet.Net(), "whole.pt")
    del sys.modules["mynet"]
    sys.path.remove(".")
    assert live(cli, "whole.pt", *SIZE, "--trust")["totals"]["macs"] == MACS
    Path("mynet.py").unlink()
    sys.modules.pop("mynet", None)
    result = cli("summary", "whole.pt", *SIZE, "--trust")
    assert result.code == 2
    assert "the class of the module is not here" in result.err
    assert "without an input, needs no class" in result.err
    assert cli("summary", "whole.pt").code == 0


@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_torchscript_runs_only_with_trust(cli: Cli, place: Path) -> None:
    model = torch.nn.Sequential(torch.nn.Conv2d(3, 4, 3), torch.nn.ReLU())
    torch.jit.script(model).save("script.pt")
    refused = cli("summary", "script.pt", "--input-size", "1,3,8,8")
    assert refused.code == 2
    assert "a TorchScript program" in refused.err
    found = live(cli, "script.pt", "--input-size", "1,3,8,8", "--trust")
    assert found["totals"]["macs"] == 36 * 4 * 27
    assert found["totals"]["params_unique"] == sum(row["params"] for row in found["rows"]) == 112
    assert found["model"]["output"] == [1, 4, 6, 6]


def test_an_exported_program_shows_what_it_recorded(cli: Cli, place: Path) -> None:
    class Two(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body = torch.nn.Sequential(torch.nn.Conv2d(3, 4, 3), torch.nn.ReLU())
            self.fc = torch.nn.Linear(4, 2)

        def forward(self, x: Any) -> Any:
            return self.fc(self.body(self.body[0](x)[:, :3]).mean((2, 3)))

    model = Two().eval()
    shapes: dict[str, list[int]] = {}
    for name, module in model.named_modules():
        module.register_forward_hook(
            lambda m, a, out, name=name: shapes.__setitem__(name, list(out.shape))
        )
    x = torch.zeros(2, 3, 9, 9)
    model(x)
    torch.export.save(torch.export.export(Two().eval(), (x,)), "p.pt2")
    rows = json.loads(cli("summary", "p.pt2", "--format", "json").out)["rows"]
    assert {row["path"]: row["out_shape"] for row in rows} == {
        name: shape for name, shape in shapes.items() if name in ("body.0", "body.1", "fc")
    }
    assert {row["path"]: row["type"] for row in rows}["body.0"] == "Conv2d"
    table = cli("summary", "p.pt2").out
    assert "2x4x5x5" in table  # what body gave last
    assert "torch not loaded" in table
    asked = cli("summary", "p.pt2", "--input-size", "2,3,9,9")
    assert "'modelctl summary' without an input shows them" in asked.err
    batch = torch.export.Dim("batch")
    program = torch.export.export(Two().eval(), (x,), dynamic_shapes=({0: batch},))
    torch.export.save(program, "d.pt2")
    rows = json.loads(cli("summary", "d.pt2", "--format", "json").out)["rows"]
    free, *fixed = next(row["out_shape"] for row in rows if row["path"] == "fc")
    assert isinstance(free, str)
    assert fixed == [2]
