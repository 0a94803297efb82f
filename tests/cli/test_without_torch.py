"""The base install does everything with files: torch can't be imported here, and what came out is
read by a dozen lines that are not modelctl's."""

from __future__ import annotations

import json
import math
import pickle
import shutil
import sys
import zipfile
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from .files import Cli

SAMPLES = Path(__file__).parents[2] / "sample_models"
READABLE = sorted(
    one.name
    for one in SAMPLES.iterdir()
    if one.suffix not in (".py", ".md", ".toml") and one.name != "__pycache__"
)
SIZES = {"FloatStorage": 4, "LongStorage": 8}


@pytest.fixture(autouse=True)
def alone(monkeypatch: pytest.MonkeyPatch, place: Path) -> None:
    for name in [one for one in sys.modules if one.partition(".")[0] in ("torch", "safetensors")]:
        monkeypatch.delitem(sys.modules, name)
    for name in [one for one in sys.modules if one.startswith("modelctl.nn")]:
        monkeypatch.delitem(sys.modules, name)
    for name in ("torch", "torchvision", "safetensors", "timm"):
        monkeypatch.setitem(sys.modules, name, None)  # as if it were not installed
    shutil.copytree(SAMPLES, place, dirs_exist_ok=True)


class Seen(NamedTuple):
    shape: tuple[int, ...]
    data: bytes


def by_pickle(path: Path) -> Any:
    """A torch zip file, by the standard library."""
    archive = zipfile.ZipFile(path)
    root = archive.namelist()[0].partition("/")[0]

    def rebuilt(storage: tuple[bytes, int], at: int, shape: Any, stride: Any, *_: Any) -> Seen:
        data, size = storage
        assert tuple(stride) == tuple(math.prod(shape[i + 1 :]) for i in range(len(shape)))
        return Seen(tuple(shape), data[at * size : (at + math.prod(shape)) * size])

    class Unpickler(pickle.Unpickler):
        def find_class(self, module: str, name: str) -> Any:
            if name == "OrderedDict":
                return OrderedDict
            return rebuilt if name.startswith("_rebuild_tensor") else name

        def persistent_load(self, pid: Any) -> tuple[bytes, int]:
            return archive.read(f"{root}/data/{pid[2]}"), SIZES[pid[1]]

    with archive, archive.open(f"{root}/data.pkl") as file:
        return Unpickler(file).load()


def by_header(path: Path) -> dict[str, Seen]:
    """A safetensors file, by its header."""
    data = path.read_bytes()
    start = 8 + int.from_bytes(data[:8], "little")
    header = json.loads(data[8:start])
    header.pop("__metadata__", None)
    return {
        name: Seen(tuple(one["shape"]), data[start:][slice(*one["data_offsets"])])
        for name, one in header.items()
    }


@pytest.mark.parametrize("name", READABLE)
@pytest.mark.parametrize("command", [["summary"], ["ls", "--long"], ["summary", "--stats"]])
def test_every_sample_is_read(cli: Cli, command: list[str], name: str) -> None:
    done = cli(*command, name, "--format", "json")
    assert done.code == 0, done.err
    assert json.loads(done.out)


NAMES: dict[str, Callable[[str], str | None]] = {
    "strip-prefix": lambda name: name.removeprefix("module."),
    "add-prefix --prefix net": lambda name: f"net.{name}",
    "rename --map 'module.layer*.bn*=layers.*.norm*'": lambda name: (
        name.replace("module.layer", "layers.").replace(".bn", ".norm")
        if ".bn" in name[8:]
        else name
    ),
    "keep --pattern 'module.layer1'": lambda name: name if "layer1." in name else None,
    "drop --pattern 'module.layer1'": lambda name: None if "layer1." in name else name,
    "strip-head": lambda name: None if ".fc." in name else name,
    "freeze --pattern '*'": lambda name: name,
    "convert": lambda name: name,
}


@pytest.mark.parametrize("output", ["out.pt", "out.safetensors"])
@pytest.mark.parametrize("command", NAMES)
def test_every_edit(cli: Cli, command: str, output: str, place: Path) -> None:
    before = by_pickle(place / "cnn-ddp.pt")["state_dict"]
    weights = ["--weights-only"] if output.endswith(".safetensors") else []
    first, *rest = (one.strip("'") for one in command.split())
    if weights:
        done = cli("convert", "cnn-ddp.pt", "--weights-only", "-o", "weights.pt")
        assert done.code == 0, done.err
    done = cli(first, "weights.pt" if weights else "cnn-ddp.pt", *rest, "-o", output)
    assert done.code == 0, done.err
    after = by_header(place / output) if weights else by_pickle(place / output)["state_dict"]
    assert after == {new: seen for old, seen in before.items() if (new := NAMES[command](old))}


def test_parts_and_shards(cli: Cli, place: Path) -> None:
    before = by_pickle(place / "cnn-ddp.pt")
    assert cli("split", "cnn-ddp.pt", "-o", "parts/").code == 0
    model, *more = sorted((place / "parts").glob("*.pt"), key=lambda one: "model" not in one.name)
    assert by_pickle(model) == before["state_dict"]
    assert more
    assert cli("convert", model, "-o", "shards/", "--max-shard-size", "30kB").code == 0
    shards = sorted((place / "shards").glob("*.safetensors"))
    assert len(shards) > 2
    joined = {name: seen for one in shards for name, seen in by_header(one).items()}
    assert joined == before["state_dict"]
    assert cli("merge", "--model", model, "--epoch", "3", "-o", "merged.pt").code == 0
    assert by_pickle(place / "merged.pt")["model"] == before["state_dict"]


@pytest.mark.parametrize(
    "argv",
    [
        ["cnn-ddp.pt", "--arch", "small_cnn.py:SmallCNN", "--input-size", "1,3,16,16"],
        ["whole-module.pt", "--trust", "--input-size", "1,3,16,16"],
    ],
)
def test_the_live_view_says_what_it_needs(cli: Cli, argv: list[str]) -> None:
    done = cli("summary", *argv)
    assert done.code == 2
    assert done.out == ""
    assert "pip install -e '.[torch]'" in done.err


def test_the_library_says_it_too() -> None:
    import modelctl as mc

    with pytest.raises(mc.errors.MissingExtraError, match=r"needs torch: pip install -e"):
        import modelctl.nn  # noqa: F401
