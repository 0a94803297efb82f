"""identify and match on the command line: JSON, the maps as rename takes them, hostile names."""

from __future__ import annotations

import json
import stat
from pathlib import Path
from typing import Any

import pytest

import modelctl as mc
from modelctl.inspection.architectures import index as architectures
from modelctl.inspection.architectures.identify import identify_shapes
from tests.cli.files import Cli, net, tensor, write


@pytest.fixture
def squeezenet(place: Path) -> Path:
    known = architectures.find_architecture("torchvision:squeezenet1_1")
    shapes = architectures.shapes(known, classes=10)
    return write(place / "model.pt", {f"net.{n}": tensor(*s) for n, s in shapes.items()})


def as_json(cli: Cli, *argv: object) -> dict[str, Any]:
    result = cli(*argv, "--format", "json")
    assert result.code in (0, 1), result.err
    found: dict[str, Any] = json.loads(result.out)
    assert found["schema"] == f"modelctl.{argv[0]}/1"
    return found


def test_identify_as_json(cli: Cli, squeezenet: Path) -> None:
    found = as_json(cli, "identify", squeezenet)
    assert found["certain"] is True
    assert found["known"] == {"torchvision": architectures.index().version}
    best = found["candidates"][0]
    assert best["arch"] == "torchvision:squeezenet1_1"
    assert best["score"] == 1
    assert best["differences"] == ["prefix 'net.'", "head for 10 classes"]
    assert best["arch_args"] == ["num_classes=10"]
    assert (best["prefix"], best["num_classes"], best["head"], best["aux"]) == (
        "net.",
        10,
        True,
        None,
    )
    scores = [one["score"] for one in found["candidates"]]
    assert scores == sorted(scores, reverse=True)


def test_nothing_known_is_no_error(cli: Cli, flat: Path) -> None:
    found = as_json(cli, "identify", flat)
    assert (found["certain"], found["candidates"]) == (False, [])
    result = cli("identify", flat)
    assert (result.code, result.out) == (0, "no known architecture\n")


def test_a_score_below_one_is_never_shown_as_one() -> None:
    known = architectures.find_architecture("torchvision:efficientnet_v2_l")
    found = identify_shapes({**architectures.shapes(known), "one.more": (1,)})
    assert 0.999 < found[0].score < 1
    assert found.page().data.rows[0][1] == "0.999"


def test_match_as_json(cli: Cli, squeezenet: Path) -> None:
    argv = ("match", squeezenet, "--arch", "torchvision:squeezenet1_1")
    found = as_json(cli, *argv)
    assert cli(*argv).code == 1
    assert found["fits"] is False
    assert found["arch_args"] == ["num_classes=10"]
    assert [one["map"] for one in found["maps"]] == ["net.*=*"]
    assert found["maps"][0]["why"] == ["prefix"]
    assert len(found["missing"]) == len(found["unexpected"]) == 52
    assert found["missing"][0] == {"name": "features.0.weight", "shape": [64, 3, 3, 3]}
    assert [one["name"] for one in found["after"]["mismatched"]] == [
        "classifier.1.weight",
        "classifier.1.bias",
    ]
    assert found["after"]["mismatched"][1] == {
        "name": "classifier.1.bias",
        "found": [10],
        "expected": [1000],
    }
    better = as_json(cli, *argv, "--arch-arg", "num_classes=10")
    assert better["after"]["fits"] is True


def test_the_maps_mend_it(cli: Cli, ddp: Path, flat: Path) -> None:
    """The file that --write-map writes is one that rename --map-file reads; then it fits."""
    new = {
        name.replace("layer1.", "mlp.").replace("bn1", "norm"): ref for name, ref in net().items()
    }
    write(Path("new.pt"), new)
    result = cli("match", ddp, "--like", "new.pt", "--write-map", "maps.txt")
    assert result.code == 1
    assert "maps.txt: 3 maps written" in result.err
    assert cli("rename", ddp, "--map-file", "maps.txt", "-o", "out.pt").code == 0
    fits = cli("match", "out.pt", "--like", "new.pt")
    assert fits.code == 0
    assert fits.out == "fits: load_state_dict takes all 12 tensors\n"
    with mc.open("out.pt") as ckpt:
        assert list(ckpt.state_dict()) == list(new)
    again = cli("match", ddp, "--like", "new.pt", "--write-map", "maps.txt")
    assert again.code == 2
    assert "maps.txt exists" in again.err
    nothing = cli("match", "out.pt", "--like", "new.pt", "--write-map", "none.txt")
    assert "none.txt is not written: all fits" in nothing.err
    assert not Path("none.txt").exists()


def test_a_map_that_no_line_can_hold_is_not_written(cli: Cli, place: Path) -> None:
    one = {f"a\nb.{name}": ref for name, ref in net().items()}
    write(Path("one.pt"), one)
    write(Path("two.pt"), net())
    result = cli("match", "one.pt", "--like", "two.pt", "--write-map", "maps.txt")
    assert result.code == 2
    assert "a line of text can't hold" in result.err
    assert not Path("maps.txt").exists()
    found = as_json(cli, "match", "one.pt", "--like", "two.pt")
    assert [one["map"] for one in found["maps"]] == ["a\nb.*=*"]


def test_a_terminal_is_not_garbled(cli: Cli, place: Path) -> None:
    names = {f"\x1b[2J\x07\u202e{n}": ref for n, ref in net().items()}
    known = architectures.find_architecture("torchvision:squeezenet1_1")
    shapes = architectures.shapes(known)
    write(Path("bad.pt"), {**names, **{n: tensor(*s) for n, s in shapes.items()}})
    write(Path("flat.pt"), net())
    for argv in (
        ("identify", "bad.pt"),
        ("match", "bad.pt", "--like", "flat.pt"),
        ("match", "flat.pt", "--like", "bad.pt"),
        ("match", "bad.pt", "--arch", "torchvision:squeezenet1_1"),
    ):
        for options in ((), ("--format", "markdown"), ("--format", "csv"), ("--color", "always")):
            result = cli(*argv, *options)
            assert result.code in (0, 1), result
            text = (result.out + result.err).replace("\x1b[0m", "")
            assert "\x1b[2J" not in text
            assert not {"\x07", "\u202e"} & set(text)
            assert "squeezenet" in text or argv[0] == "match"


def test_lines_fit_a_terminal(cli: Cli, squeezenet: Path, flat: Path) -> None:
    for argv in (
        ("identify", squeezenet.name),
        ("match", squeezenet.name, "--arch", "torchvision:squeezenet1_1"),
        ("match", squeezenet.name, "--like", flat),
    ):
        result = cli(*argv)
        assert max(map(len, result.out.splitlines())) <= 80, result.out


def test_what_is_needed(cli: Cli, flat: Path) -> None:
    assert "what is it to be loaded into?" in cli("match", flat).err
    both = cli("match", flat, "--like", flat, "--arch", "torchvision:resnet18")
    assert (both.code, "one of them" in both.err) == (2, True)
    wrong = cli("match", flat, "--arch", "torchvision:resnet19")
    assert wrong.code == 2
    assert "hint: nearest: torchvision:resnet18" in wrong.err


def test_it_writes_nothing(cli: Cli, squeezenet: Path) -> None:
    squeezenet.chmod(stat.S_IRUSR)
    before = squeezenet.stat().st_mtime_ns, sorted(squeezenet.parent.iterdir())
    cli("identify", squeezenet)
    cli("match", squeezenet, "--arch", "torchvision:squeezenet1_1")
    assert (squeezenet.stat().st_mtime_ns, sorted(squeezenet.parent.iterdir())) == before
