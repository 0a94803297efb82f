"""What reports say in passing: nothing that is not so, nothing that can't be pasted."""

from __future__ import annotations

import csv
import json
import math
import os
import re
import shlex
import struct
from pathlib import Path

import pytest

import modelctl as mc
from modelctl.core.checkpoint import Checkpoint
from modelctl.core.dtypes import BY_NAME
from modelctl.core.nodes import ordered_dict
from modelctl.core.storages import MemoryStorage
from modelctl.core.tensors import TensorRef
from modelctl.errors import UsageError

from ..files import Cli, net, tensor, write


def floats(*values: float) -> TensorRef:
    raw = struct.pack(f"<{len(values)}f", *values)
    return TensorRef(BY_NAME["float32"], (len(values),), MemoryStorage(raw))


def rows(text: str) -> list[dict[str, str]]:
    return list(csv.DictReader(text.splitlines()))


# ------------------------------------------------------------------ diff


def test_within_the_tolerance_is_not_bit_equal(cli: Cli, place: Path) -> None:
    write(place / "a.pt", {"x": floats(1, 2), "y": floats(3), "z": floats(0)})
    write(place / "b.pt", {"x": floats(1, 2.001), "y": floats(3), "z": floats(-0.0)})
    done = cli("diff", "a.pt", "b.pt", "--atol", "0.1")
    assert done.code == 0
    assert "no difference; 1 tensor bit-equal, 2 within the tolerance" in done.out
    found = json.loads(cli("diff", "a.pt", "b.pt", "--atol", "0.1", "--json").out)
    assert (found["same"], found["close"], found["differs"]) == (1, 2, False)
    found = json.loads(cli("diff", "a.pt", "b.pt", "--json").out)
    assert (found["same"], found["close"]) == (1, 0)


def test_every_column_has_a_name(cli: Cli, place: Path) -> None:
    write(place / "a.pt", {"x": floats(1), "y": floats(3)})
    write(place / "b.pt", {"x": floats(2), "z": floats(3)})
    found = rows(cli("diff", "a.pt", "b.pt", "--format", "csv").out)
    assert [(row["change"], row["name"]) for row in found] == [("-", "y"), ("+", "z"), ("~", "x")]


# ------------------------------------------------------------------ summary


def test_a_statistic_of_zero_is_zero(cli: Cli, place: Path) -> None:
    write(place / "a.pt", {"none": floats(), "zero": floats(0, 0), "nan": floats(math.nan)})
    lines = cli("summary", "a.pt", "--stats").out.splitlines()
    found = {line.split()[0]: line.split()[1:] for line in lines if line and line[0].isalpha()}
    assert found["zero"] == ["0", "0", "0", "0", "2", "0", "0"]
    assert found["none"] == ["-", "-", "-", "-", "0", "0", "0"]
    assert found["nan"] == ["-", "-", "-", "-", "0", "1", "0"]


def test_csv_has_the_statistics(cli: Cli, place: Path) -> None:
    write(place / "a.pt", {"w": floats(1, 2, 0), "b": floats(math.nan)})
    found = rows(cli("summary", "a.pt", "--stats", "--format", "csv").out)
    assert [row["name"] for row in found] == ["w", "b"]
    assert (found[0]["min"], found[0]["max"], found[0]["mean"]) == ("0.0", "2.0", "1.0")
    assert (found[0]["zeros"], found[1]["NaN"], found[1]["min"]) == ("1", "1", "")
    assert "params" in rows(cli("summary", "a.pt", "--format", "csv").out)[0]


@pytest.mark.parametrize("suffix", [".pt", ".safetensors"])
@pytest.mark.parametrize("numel", [1, 2000, 20_000])
def test_a_small_file_is_read_once(cli: Cli, place: Path, suffix: str, numel: int) -> None:
    write(place / f"a{suffix}", {"w": tensor(numel)})
    for words in ((), ("--stats",)):
        found = json.loads(cli("summary", f"a{suffix}", *words, "--json").out)["source"]
        assert 0 < found["bytes_read"] <= found["bytes_on_disk"]


# ------------------------------------------------------------------ show


@pytest.mark.parametrize(
    ("value", "text"),
    [
        ("x" * 200, "'" + "x" * 71 + "…'"),
        ('it\'s "x"' + "y" * 200, None),
        (["a" * 60, "b" * 60], "list of 2: '" + "a" * 31 + "…', '" + "b" * 31 + "…'"),
        (["a" * 60, "b", "c"], "list of 3: '" + "a" * 31 + "…', 'b', 'c'"),
        (list(range(40)), "list of 40: 0, 1, 2, …"),
        ("short", "'short'"),
    ],
)
def test_what_is_cut_says_so(cli: Cli, place: Path, value: object, text: str | None) -> None:
    write(place / "a.pt", {"value": value, "other": 1})
    line = next(line for line in cli("show", "a.pt").out.splitlines() if "value" in line)
    shown = line.removeprefix("value").strip()
    if text is not None:
        assert shown == text
    assert "…" in shown or value == "short" or isinstance(value, list)
    if isinstance(value, str):
        assert shown[0] == shown[-1]


def test_metadata_are_shown_by_their_path(cli: Cli, place: Path) -> None:
    ckpt = Checkpoint(ordered_dict({"w": tensor(2)}), metadata={"by.whom": "me", "format": "pt"})
    mc.save(ckpt, place / "a.safetensors")
    listed = [line.split()[0] for line in cli("show", "a.safetensors").out.splitlines()]
    assert {"metadata.by.whom", "metadata.format"} <= {*listed}
    assert cli("show", "a.safetensors", "metadata.by.whom").out == "me\n"
    assert cli("show", "a.safetensors", "by.whom").out == "me\n"
    assert "by.whom" in cli("show", "a.safetensors", "metadata").out
    assert cli("show", "a.safetensors", "metadata.no").code == 2
    for row in rows(cli("show", "a.safetensors", "--format", "csv").out):
        assert cli("show", "a.safetensors", row["path"]).code == 0, row


# ------------------------------------------------------------------ ls


def test_that_there_is_nothing_is_said(cli: Cli, place: Path) -> None:
    write(place / "a.pt", {"fc.weight": tensor(2), "fc.bias": tensor(2)})
    done = cli("ls", "a.pt", "--buffers")
    assert (done.code, done.out, done.err) == (0, "", "there are no buffers in a.pt\n")
    done = cli("ls", "a.pt", "--buffers", "fc")
    assert done.code == 2
    assert "no buffer matches 'fc': it matches 2 tensors" in done.err
    assert "hint: without --buffers" in done.err
    assert json.loads(cli("ls", "a.pt", "--buffers", "--json").out)["tensors"] == []


# ------------------------------------------------------------------ what unpickling would run


class _Runs:
    def __reduce__(self) -> tuple[object, tuple[str, ...]]:
        return os.system, ("true",)


@pytest.mark.parametrize(
    "words", ["ls a.pt", "ls a.pt --long", "show a.pt", "show a.pt epoch", "diff a.pt b.pt",
              "diff b.pt a.pt", "identify a.pt", "match a.pt --like b.pt",
              "match b.pt --like a.pt", "summary a.pt"]
)  # fmt: skip
def test_every_look_says_what_unpickling_would_run(cli: Cli, place: Path, words: str) -> None:
    torch = pytest.importorskip("torch")

    model = torch.nn.Linear(2, 2).state_dict()
    torch.save({"state_dict": model, "epoch": 3, "odd": _Runs()}, "a.pt")
    torch.save({"state_dict": model, "epoch": 3}, "b.pt")
    done = cli(*words.split())
    (line,) = [one for one in done.err.splitlines() if one.startswith("warning: unpickling")]
    assert re.search(r"would run code: (posix|nt)\.system\. modelctl did not\.$", line)
    assert ("a.pt" in line) == ("b.pt" in words)
    assert "unpickling" not in done.out
    assert cli(*words.split(), "-q").err == ""
    assert cli(*words.split(), "-q").out.split()[:2] == done.out.split()[:2]


def test_quiet_is_quiet(cli: Cli, place: Path) -> None:
    write(place / "a.pt", net("module."))
    for words in (
        *("strip-prefix a.pt -o b.pt", "freeze a.pt --pattern * -o c.pt"),
        *("merge --model a.pt --epoch 3 -o d.pt", "split d.pt -o parts"),
        "convert a.pt -o e.safetensors",
    ):
        done = cli(*words.split(), "-q")
        assert (done.code, done.out, done.err) == (0, "", ""), words
        assert Path(words.split()[-1]).exists()
    assert json.loads(cli("strip-prefix", "a.pt", "-o", "f.pt", "-q", "--json").out)["renamed"]
    assert cli("strip-prefix", "a.pt", "-o", "f.pt", "-q").err.startswith("error: ")


# ------------------------------------------------------------------ mistakes, in our words


def test_no_library_speaks(cli: Cli, flat: Path) -> None:
    for words, said in {
        (
            "summary",
            flat,
            "--format",
            "xml",
        ): "csv or markdown, not 'xml'",
        ("merge", "--model", flat, "--epoch", "x"): "'--epoch': it takes a valid integer",
        ("diff", flat, flat, "--rtol", "x"): "'--rtol': it takes a valid number",
        ("merge", "--model", flat, "--epoch", "-1"): "'--epoch': it must be greater than",
    }.items():
        done = cli(*words)
        assert done.code == 2
        assert said in done.err
        assert "Value error" not in done.err
        assert "Input should" not in done.err


def test_hints_can_be_pasted(cli: Cli, place: Path) -> None:
    name = "my net's.pt"
    write(place / name, net("module."))
    done = cli("summary", name)
    (hint,) = [line for line in done.err.splitlines() if "strip-prefix" in line]
    words = shlex.split(hint.removeprefix("hint: "))
    assert words == ["modelctl", "strip-prefix", name, "-o", "NEW.pt"]
    assert cli(*words[1:]).code == 0
    done = cli("strip-prefix", name, "-o", "no such/x.pt")
    words = shlex.split(done.err.partition("hint: ")[2])
    assert words[:2] == ["mkdir", "-p"]
    assert Path(words[2]).name == "no such"
    done = cli("freeze", name, "--pattern", "module.*", "--exclude", "*fc*", "-o", "f.pt")
    (line,) = [one for one in cli("summary", "f.pt").out.splitlines() if one.startswith(" done:")]
    words = shlex.split(line.removeprefix(" done: "))
    assert words == ["freeze", "--pattern", "module.*", "--exclude", "*fc*"]


# ------------------------------------------------------------------ what torch is told


def test_known_buffers_are_no_parameters_of_the_report(cli: Cli, place: Path) -> None:
    torch = pytest.importorskip("torch")

    model = torch.nn.Sequential(torch.nn.Linear(2, 2))
    model.register_buffer("table", torch.ones(3))
    model[0].bias.requires_grad_(False)
    torch.save(model, "whole.pt")
    for words in (("convert", "whole.pt"), ("convert", "whole.pt", "--weights-only")):
        done = cli(*words, "--dry-run", "--json")
        assert done.code == 0
        assert "table" not in [one["name"] for one in json.loads(done.out)["trains"]]


@pytest.mark.parametrize("odd", [False, True])
def test_the_lines_by_hand_fit_the_file(cli: Cli, place: Path, odd: bool) -> None:
    torch = pytest.importorskip("torch")

    import argparse

    model = torch.nn.Linear(2, 2)
    state = {"state_dict": model.state_dict(), "epoch": 3}
    if odd:
        state["args"] = argparse.Namespace(lr=1)
    torch.save(state, "a.pt")
    done = cli("freeze", "a.pt", "--pattern", "bias", "-o", "b.pt")
    assert done.code == 0
    lines = [line.strip() for line in done.err.splitlines() if line.startswith("    ")]
    assert f"weights_only={not odd}" in lines[0]
    assert "map_location='cpu'" in lines[0]
    code = f"{lines[0]}\n{lines[1]}\n    {lines[2]}\n"
    exec(code, {"torch": torch, "model": model})
    assert (model.weight.requires_grad, model.bias.requires_grad) == (True, False)


def test_a_state_dict_is_no_path() -> None:
    torch = pytest.importorskip("torch")
    mnn = pytest.importorskip("modelctl.nn")

    model = torch.nn.Linear(2, 2)
    for call in (
        lambda: mnn.load_into(model, model.state_dict()),
        lambda: mnn.load(model.state_dict()),
        lambda: mc.open({}),  # type: ignore[arg-type]
        lambda: mc.open(None),  # type: ignore[arg-type]
    ):
        with pytest.raises(UsageError, match="is no path") as e:
            call()
        assert "load_state_dict" in str(e.value.hint)
    for call in (
        lambda: mnn.load_into(model, ""),
        lambda: mnn.resume("", model=model),
        lambda: mnn.save_checkpoint("", model=model),
    ):
        with pytest.raises(UsageError, match="empty path"):
            call()
