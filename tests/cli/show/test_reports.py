"""What the commands print: schemas of JSON, tables, and golden files at 80 columns.

``UPDATE_GOLDEN=1 pytest tests/cli`` writes the golden files anew; read the diff before it is
committed.
"""

from __future__ import annotations

import csv
import io
import json
import os
import re
from pathlib import Path
from typing import Any

import pytest

from modelctl.inspection.architectures import index as architectures
from tests.cli.files import Cli, net, tensor, training, write

GOLDEN = Path(__file__).with_name("golden")


def golden(name: str, text: str) -> None:
    text = re.sub(r"read\s+[\d.]+\s+k?B,\s+\d+\.\d\s+s", "read N kB, N s", text)
    path = GOLDEN / f"{name}.txt"
    if os.environ.get("UPDATE_GOLDEN"):
        path.write_text(text, "utf-8")
    assert text == path.read_text("utf-8")


CASES: dict[str, tuple[str, ...]] = {
    "summary": ("summary", "ddp.pt"),
    "summary-depth": ("summary", "flat.pt", "--depth", "all"),
    "summary-frozen": ("summary", "frozen.pt"),
    "summary-optimizer": ("summary", "opt.pt"),
    "summary-deep": ("summary", "deep.pt", "--depth", "3"),
    "ls": ("ls", "flat.pt"),
    "ls-long": ("ls", "frozen.pt", "--long"),
    "ls-all": ("ls", "ddp.pt", "--section", "all", "--long"),
    "ls-markdown": ("ls", "flat.pt", "fc", "--format", "markdown"),
    "show": ("show", "ddp.pt"),
    "show-part": ("show", "ddp.pt", "optimizer.param_groups"),
    "diff": ("diff", "ddp.pt", "other.pt"),
    "diff-stats": ("diff", "ddp.pt", "other.pt", "--stats"),
    "diff-modules": ("diff", "ddp.pt", "other.pt", "--by", "module"),
    "diff-prefix": ("diff", "ddp.pt", "flat.pt"),
    "diff-ignored": ("diff", "ddp.pt", "flat.pt", "--ignore-prefix", "--pattern", "*"),
    "diff-same": ("diff", "flat.pt", "flat.safetensors"),
    "strip-prefix": ("strip-prefix", "ddp.pt", "-o", "out.pt"),
    "strip-head": ("strip-head", "ddp.pt", "-o", "out.pt"),
    "freeze": ("freeze", "flat.pt", "--pattern", "*", "--exclude", "fc", "-o", "out.pt"),
    "freeze-all": ("freeze", "flat.pt", "--pattern", "*", "-o", "out.safetensors"),
    "convert": ("convert", "ddp.pt", "--weights-only", "-o", "out.safetensors"),
    "merge": ("merge", "--model", "flat.pt", "--optimizer", "opt.pt", "--epoch", "3", "-o", "o.pt"),
    "apply": ("apply", "r.toml", "ddp.pt", "-o", "out.pt"),
    "error-loss": ("convert", "ddp.pt", "-o", "out.safetensors"),
    "error-match": ("freeze", "flat.pt", "--pattern", "layr1", "-o", "out.pt"),
    "error-exists": ("convert", "flat.pt", "-o", "ddp.pt"),
    "error-head": ("strip-head", "opt.pt", "-o", "out.pt"),
    "error-missing": ("summary", "missing.pt"),
    "error-recipe": ("apply", "bad.toml", "ddp.pt", "-o", "out.pt"),
}

# Of known architectures, under the names that people give them.
KNOWN_CASES: dict[str, tuple[str, ...]] = {
    "identify": ("identify", "cats.pt"),
    "identify-none": ("identify", "flat.pt"),
    "identify-markdown": ("identify", "cats.pt", "--format", "markdown"),
    "match": ("match", "cats.pt", "--arch", "torchvision:squeezenet1_1"),
    "match-fits": (
        *("match", "plain.pt", "--arch", "torchvision:squeezenet1_1"),
        *("--arch-arg", "num_classes=10"),
    ),
    "match-like": ("match", "ddp.pt", "--like", "renamed.pt", "--write-map", "old-to-new.map"),
    "match-unclear": ("match", "alike.pt", "--like", "other-alike.pt"),
    "match-csv": ("match", "ddp.pt", "--like", "flat.pt", "--format", "csv"),
    "error-arch": ("match", "flat.pt", "--arch", "resnet55"),
}


@pytest.fixture
def inputs(cli: Cli, ddp: Path, flat: Path) -> None:
    other = training()
    other["epoch"] = 4
    other["new"] = {"x": 1}
    model = net("module.", fill=0.25)
    del model["module.fc.bias"]
    model["module.fc.weight"] = tensor(7, 6)
    other["state_dict"] = model
    write(Path("other.pt"), other)
    write(Path("opt.pt"), training()["optimizer"])
    deep = {}
    for i in range(30):
        deep[f"model.layers.{i}.attn.in_proj_weight"] = tensor(6, 2)
        deep[f"model.layers.{i}.mlp.fc1.weight"] = tensor(4, 2, fill=i)
    deep["lm_head.weight"] = deep["model.embed.weight"] = tensor(9, 2)
    write(Path("deep.pt"), deep)
    assert cli("convert", flat, "-o", "flat.safetensors").code == 0
    assert cli("freeze", flat, "--pattern", "*", "--exclude", "fc", "-o", "frozen.pt").code == 0
    Path("r.toml").write_text(
        '[[edit]]\ndo = "strip-prefix"\n[[edit]]\ndo = "strip-head"\n'
        '[[edit]]\ndo = "freeze"\npattern = "*"\nexclude = "layer1"\n'
    )
    Path("bad.toml").write_text('[[edit]]\ndo = "strip-hed"\n')


@pytest.mark.parametrize("name", CASES)
def test_golden(cli: Cli, inputs: None, name: str) -> None:
    check_golden(cli, name, CASES[name])


def check_golden(cli: Cli, name: str, argv: tuple[str, ...]) -> None:
    result = cli(*argv)
    text = f"$ modelctl {' '.join(argv)}\n{result.out}"
    if result.err:
        text += f"--- stderr\n{result.err}"
    golden(name, text + f"--- exit {result.code}\n")


@pytest.fixture
def known(inputs: None) -> None:
    shapes = architectures.shapes(
        architectures.find_architecture("torchvision:squeezenet1_1"), classes=10
    )
    plain = {name: tensor(*shape) for name, shape in shapes.items()}
    write(Path("plain.pt"), plain)
    write(Path("cats.pt"), {f"module.{name}": ref for name, ref in plain.items()})
    renamed = {
        name.replace("layer1", "mlp").replace("fc", "head"): ref for name, ref in net().items()
    }
    renamed["head.weight"], renamed["head.bias"] = tensor(7, 6), tensor(7)
    write(Path("renamed.pt"), renamed)
    deep = {}
    for i in range(30):
        deep[f"blocks.{i}.a.weight"] = tensor(6, 2)
        deep[f"blocks.{i}.b.weight"] = tensor(6, 2)
    write(Path("other-alike.pt"), deep)
    deep = {name.replace(".a.", ".x.").replace(".b.", ".y."): ref for name, ref in deep.items()}
    write(Path("alike.pt"), deep)


@pytest.mark.parametrize("name", KNOWN_CASES)
def test_golden_of_known_architectures(cli: Cli, known: None, name: str) -> None:
    check_golden(cli, name, KNOWN_CASES[name])


def test_no_golden_file_is_left_over() -> None:
    at_widths = {path.stem for path in GOLDEN.glob("*-[0-9]*")}  # of test_widths
    assert {path.stem for path in GOLDEN.glob("*.txt")} - at_widths == {*CASES, *KNOWN_CASES}


def test_colour_and_width_never_change_what_a_pipe_gets(
    cli: Cli, inputs: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    def stable(text: str) -> str:
        return re.sub(r"read .*? s,", "", text)

    for name in ("summary", "ls-long", "show", "diff", "ls"):
        plain = cli(*CASES[name])
        for key, value in (
            ("COLUMNS", "40"),
            ("NO_COLOR", "1"),
            ("TERM", "dumb"),
            ("FORCE_COLOR", "1"),
        ):
            with monkeypatch.context() as patch:
                patch.setenv(key, value)
                again = cli(*CASES[name])
            assert stable(again.out) == stable(plain.out), (name, key)
        assert "\x1b" not in plain.out
        assert stable(cli(*CASES[name], "--color", "never").out) == stable(plain.out)


def test_colour_always_is_the_same_words(cli: Cli, inputs: None, monkeypatch) -> None:
    monkeypatch.setenv("COLUMNS", "200")

    def words(text: str) -> list[str]:
        return re.sub(r"\x1b\[[\d;]*m", "", re.sub(r"read .*? s,", "", text)).split()

    for name in ("summary", "ls-long", "diff"):
        coloured = cli(*CASES[name], "--color", "always")
        assert "\x1b[" in coloured.out
        assert words(coloured.out) == words(cli(*CASES[name]).out)
        with monkeypatch.context() as patch:
            patch.setenv("NO_COLOR", "1")
            bold = cli(*CASES[name], "--color", "always").out
            assert not re.search(r"\x1b\[[\d;]*3\dm", bold)


# ---------------------------------------------------------------------- JSON

SUMMARY: dict[str, Any] = {
    "schema": str,
    "source": {"path": str, "format": str, "kind": str, "bytes_on_disk": int, "bytes_read": int},
    "totals": {
        **dict.fromkeys(("tensors", "params", "params_unique", "buffers"), int),
        **dict.fromkeys(("trainable", "frozen"), (int, None)),
        **dict.fromkeys(("bytes", "bytes_stored"), int),
        "by_dtype": dict,
        "devices": dict,
        "macs": (int, None),
        "quantization": (dict, None),
    },
    "rows": [
        {
            "path": str,
            "level": int,
            "type": (str, None),
            "kind": (str, None),
            "inferred": bool,
            "repeat": int,
            "tensors": int,
            "params": int,
            "buffers": int,
            "bytes": int,
            "trainable": (int, None),
            "out_shape": (list, None),
            "macs": (int, None),
            "quantization": (dict, None),
        }
    ],
    "tensors": [
        {
            "name": str,
            "shape": list,
            "dtype": str,
            "role": str,
            "requires_grad": (bool, None),
            "bytes": int,
            "tied_to": (str, None),
            "stats": (dict, None),
        }
    ],
    "tied": list,
    "training": {
        "epoch": (int, None),
        "step": (int, None),
        "lr": list,
        "optimizer": (str, None),
        "best": (dict, None),
    },
    "metadata": dict,
    "warnings": list,
}
LS: dict[str, Any] = {
    "schema": str,
    "tensors": [
        {
            "name": str,
            "dtype": str,
            "shape": list,
            "bytes": int,
            "section": (str, None),
            "role": (str, None),
            "requires_grad": (bool, None),
        }
    ],
}
DIFF: dict[str, Any] = {
    "schema": str,
    "a": str,
    "b": str,
    "differs": bool,
    "same": int,
    "close": int,
    "added": list,
    "removed": list,
    "changed": [
        {
            "name": str,
            "what": str,
            "before": str,
            "after": str,
            "elements": (int, None),
            "numel": (int, None),
            "max_abs": (float, str, None),
            "relative": (float, str, None),
            "mean_abs": (float, str, None),
            "max_rel": (float, None),
            "mean_rel": (float, None),
            "cosine": (float, None),
            "nan_a": (int, None),
            "nan_b": (int, None),
        }
    ],
    "values": [{"path": str, "before": (str, None), "after": (str, None)}],
    "under": (dict, None),
    "tensors": int,
    "numel": int,
    "elements": int,
    "modules": [
        {
            "module": str,
            "what": str,
            "tensors": int,
            "elements": (int, None),
            "numel": (int, None),
            "max_abs": (float, str, None),
            "relative": (float, str, None),
            "mean_abs": (float, str, None),
            "max_rel": (float, None),
            "mean_rel": (float, None),
            "cosine": (float, None),
            "nan_a": (int, None),
            "nan_b": (int, None),
        }
    ],
}
EDIT: dict[str, Any] = {
    "schema": str,
    "source": str,
    "output": (str, None),
    "dry_run": bool,
    "kept": int,
    "renamed": list,
    "removed": list,
    "dropped": list,
    "added": list,
    "trains": list,
    "notes": list,
    "files_written": (int, None),
    "bytes_written": (int, None),
}


def fits(value: Any, schema: Any, at: str = "") -> None:
    if isinstance(schema, dict):
        assert list(value)[: len(schema)] == list(schema), at  # keys may be added, never changed
        for key, inner in schema.items():
            fits(value[key], inner, f"{at}.{key}")
    elif isinstance(schema, list):
        assert value, at
        for one in value:
            fits(one, schema[0], at + "[]")
    else:
        kinds = schema if isinstance(schema, tuple) else (schema,)
        assert type(value) in [type(None) if kind is None else kind for kind in kinds], (at, value)


def as_json(cli: Cli, *argv: object, code: int = 0) -> Any:
    result = cli(*argv, "--format", "json")
    assert result.code == code
    found = json.loads(result.out)
    assert found["schema"] == f"modelctl.{argv[0]}/1"
    return found


def test_summary_json(cli: Cli, inputs: None) -> None:
    found = as_json(cli, "summary", "ddp.pt")
    fits(found, SUMMARY)
    known = {"epoch": 3, "step": None, "lr": [0.1], "optimizer": "SGD"}
    assert found["training"] == {**known, "best": None, "loss": None}
    assert found["totals"]["by_dtype"] == {"float32": 108 + 16 + 30 + 42 + 35, "int64": 1}
    # full rows whatever is displayed
    assert (
        as_json(cli, "summary", "deep.pt", "--depth", "1")["rows"]
        == (as_json(cli, "summary", "deep.pt", "--depth", "9")["rows"])
    )
    assert len(as_json(cli, "summary", "deep.pt")["rows"]) == 62
    tied = [t for t in as_json(cli, "summary", "deep.pt")["tensors"] if t["tied_to"]]
    assert [(t["name"], t["tied_to"]) for t in tied] == [("model.embed.weight", "lm_head.weight")]
    assert as_json(cli, "summary", "flat.pt")["training"] is None
    assert as_json(cli, "summary", "opt.pt")["tensors"] == []


def test_integers_are_exact(cli: Cli, place: Path) -> None:
    write(Path("big.pt"), {**training(), "step": 2**60 + 1})
    assert as_json(cli, "summary", "big.pt")["training"]["step"] == 2**60 + 1
    assert as_json(cli, "show", "big.pt")["value"]["step"] == 2**60 + 1
    assert cli("show", "big.pt", "step").out == f"{2**60 + 1}\n"


def test_ls_json(cli: Cli, inputs: None) -> None:
    found = as_json(cli, "ls", "ddp.pt", "--section", "all")
    fits(found, LS)
    assert {row["section"] for row in found["tensors"]} == {"model", "optimizer"}
    grads = [row["requires_grad"] for row in as_json(cli, "ls", "frozen.pt")["tensors"]]
    assert grads == [False] * 3 + [None] * 3 + [False] * 4 + [True] * 2
    (row,) = as_json(cli, "ls", "flat.pt", "bn1.num*")["tensors"]
    assert (row["name"], row["dtype"], row["shape"]) == ("bn1.num_batches_tracked", "int64", [])
    assert (row["bytes"], row["role"], row["requires_grad"]) == (8, "buffer", None)


def test_diff_json(cli: Cli, inputs: None) -> None:
    found = as_json(cli, "diff", "ddp.pt", "other.pt", code=1)
    fits(found, DIFF)
    assert found["differs"] is True
    assert found["removed"] == ["module.fc.bias"]
    assert {"path": "epoch", "before": "3", "after": "4"} in found["values"]
    same = as_json(cli, "diff", "flat.pt", "flat.safetensors")
    assert (same["differs"], same["same"], same["changed"]) == (False, 12, [])


def test_edit_json(cli: Cli, inputs: None) -> None:
    for command in (
        *(("strip-prefix",), ("strip-head",), ("freeze", "--pattern", "*")),
        ("convert", "--weights-only"),
    ):
        found = as_json(cli, command[0], "ddp.pt", *command[1:], "-o", f"{command[0]}.pt")
        fits(found, EDIT)
        assert found["output"] == f"{command[0]}.pt"
        assert found["bytes_written"] == Path(f"{command[0]}.pt").stat().st_size
        dry = as_json(cli, command[0], "ddp.pt", *command[1:], "--dry-run")
        assert (dry["dry_run"], dry["bytes_written"], dry["output"]) == (True, None, None)
        for key in ("kept", "renamed", "removed", "dropped", "added"):
            assert dry[key] == found[key]
    found = as_json(cli, "freeze", "flat.pt", "--pattern", "*", "--exclude", "fc", "--dry-run")
    assert found["trains"][0] == {"name": "conv1.weight", "before": None, "after": False}
    assert [one["name"] for one in found["trains"] if one["after"]] == ["fc.weight", "fc.bias"]
    found = as_json(cli, "strip-prefix", "ddp.pt", "--dry-run")
    assert found["trains"] == []
    assert found["renamed"][0] == ["module.conv1.weight", "conv1.weight"]
    assert (found["kept"], len(found["renamed"])) == (0, 12)
    found = as_json(cli, "strip-head", "ddp.pt", "--dry-run")
    assert found["removed"] == ["module.fc.weight", "module.fc.bias"]
    found = as_json(cli, "convert", "ddp.pt", "--weights-only", "--dry-run")
    assert found["dropped"] == ["epoch", "arch", "lr", "optimizer", "best"]


def test_csv(cli: Cli, inputs: None) -> None:
    rows = list(csv.reader(io.StringIO(cli("ls", "flat.pt", "--long", "--format", "csv").out)))
    assert rows[0] == ["name", "dtype", "shape", "bytes", "role", "grad"]
    assert len(rows) == 13
    rows = list(csv.reader(io.StringIO(cli("diff", "ddp.pt", "other.pt", "--format", "csv").out)))
    assert {len(row) for row in rows} == {13}
    assert rows[0][:4] == ["change", "name", "what", "how"]


def test_show_a_value_bare(cli: Cli, inputs: None) -> None:
    assert cli("show", "ddp.pt", "epoch").out == "3\n"
    assert cli("show", "ddp.pt", "arch").out == "net\n"
    assert cli("show", "ddp.pt", "best.2").out == "(1, 'two')\n"
    assert cli("show", "ddp.pt", "optimizer.param_groups.0.lr").out == "0.1\n"
    assert as_json(cli, "show", "ddp.pt", "best")["value"] == [0.5, None, [1, "two"]]
    assert as_json(cli, "show", "ddp.pt")["value"]["epoch"] == 3


@pytest.mark.parametrize("columns", ["30", "50", "70"])
def test_a_narrow_terminal_cuts_no_number(
    cli: Cli, inputs: None, monkeypatch: pytest.MonkeyPatch, columns: str
) -> None:
    monkeypatch.setenv("COLUMNS", columns)
    rows = json.loads(cli("summary", "ddp.pt", "--format", "json").out)["totals"]
    shown = re.sub(r"\x1b\[[0-9;]*m", "", cli("summary", "ddp.pt", "--color", "always").out)
    table = re.split(r"\n *\n", shown)[1].splitlines()
    head = next(i for i, line in enumerate(table) if line.startswith("name "))
    assert head == 0 or table[0] == "names under 'module.':"
    names = table[head].split()
    column = names.index("params") - len(names)  # after it only the size is two words
    found = [line.split()[column - 1] for line in table[head + 1 :]]
    numbers = [int(text.replace(",", "").replace("-", "0")) for text in found]
    assert sum(numbers) == rows["params_unique"]
    assert all(re.search(r"\d (?:B|kB)$", line.rstrip()) for line in table[head + 1 :])
