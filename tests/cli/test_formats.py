"""Every command in every format: JSON with its schema, csv of equal rows, markdown tables; and
errors, which are JSON where the report was to be."""

from __future__ import annotations

import csv
import io
import json
import re
from pathlib import Path
from typing import Any

import pytest

from modelctl.cli.commands import COMMANDS

from .files import Cli, tensor, training, write

LINES: dict[str, tuple[str, ...]] = {
    "summary": ("summary", "ddp.pt"),
    "summary of values": ("summary", "ddp.pt", "--stats"),
    "summary of no model": ("summary", "opt.pt"),
    "ls": ("ls", "ddp.pt"),
    "ls of all": ("ls", "ddp.pt", "--section", "all", "--long"),
    "show": ("show", "ddp.pt"),
    "show a part": ("show", "ddp.pt", "optimizer.param_groups"),
    "show a value": ("show", "ddp.pt", "epoch"),
    "diff": ("diff", "ddp.pt", "flat.pt"),
    "diff of the same": ("diff", "ddp.pt", "ddp.pt"),
    "identify": ("identify", "flat.pt"),
    "match": ("match", "ddp.pt", "--like", "flat.pt"),
    "match that fits": ("match", "flat.pt", "--like", "flat.pt"),
    "scan": ("scan", "ddp.pt", "flat.pt"),
    "verify": ("verify", "ddp.pt"),
    "verify of two": ("verify", "ddp.pt", "flat.pt"),
    "verify, salvage": ("verify", "ddp.pt", "--salvage", "-o", "11.pt"),
    "hash": ("hash", "ddp.pt"),
    "hash of tensors": ("hash", "ddp.pt", "--tensors"),
    "strip-prefix": ("strip-prefix", "ddp.pt", "-o", "1.pt"),
    "strip-prefix, dry": ("strip-prefix", "ddp.pt", "--dry-run"),
    "strip-prefix of two": ("strip-prefix", "ddp.pt", "flat.pt", "--dry-run"),
    "add-prefix": ("add-prefix", "flat.pt", "--prefix", "m", "-o", "2.pt"),
    "rename": ("rename", "flat.pt", "--map", "fc=head", "-o", "3.pt"),
    "keep": ("keep", "flat.pt", "--pattern", "fc", "-o", "4.pt"),
    "drop": ("drop", "flat.pt", "--pattern", "fc", "-o", "5.pt"),
    "strip-head": ("strip-head", "flat.pt", "-o", "6.pt"),
    "freeze": ("freeze", "flat.pt", "--pattern", "*", "--exclude", "fc", "-o", "7.pt"),
    "freeze, in place": ("freeze", "odd.pt", "--pattern", "*", "--in-place"),
    "unfreeze": ("unfreeze", "frozen.pt", "--pattern", "fc", "-o", "8.pt"),
    "convert": ("convert", "flat.pt", "-o", "shards/", "--max-shard-size", "700"),
    "apply": ("apply", "r.toml", "ddp.pt", "-o", "9.pt"),
    "merge": ("merge", "--model", "flat.pt", "--epoch", "3", "-o", "10.pt"),
    "split": ("split", "ddp.pt", "-o", "parts"),
    "split, dry": ("split", "ddp.pt", "--dry-run"),
}
FINDINGS = {"diff", "match", "verify", "verify of two", "verify, salvage"}  # weights of zeros
EMPTY = {"summary of no model", "diff of the same", "identify", "match that fits", "scan"}


@pytest.fixture
def inputs(cli: Cli, ddp: Path, flat: Path) -> None:
    write(Path("opt.pt"), training()["optimizer"])
    write(Path("odd.pt"), {"a|b\n.weight": tensor(2), 'c, "d".weight': tensor(3, 2)})
    assert cli("freeze", flat, "--pattern", "fc", "-o", "frozen.pt").code == 0
    Path("r.toml").write_text('[[edit]]\ndo = "strip-prefix"\n')


def test_every_command_is_shown() -> None:
    assert {line[0] for line in LINES.values()} == set(COMMANDS)


def run(cli: Cli, what: str, *options: str) -> Any:
    result = cli(*LINES[what], *options)
    assert result.code == (what in FINDINGS), result
    return result


@pytest.mark.parametrize("what", LINES)
def test_json(cli: Cli, inputs: None, what: str) -> None:
    result = run(cli, what, "--format", "json")
    found = json.loads(result.out)
    assert next(iter(found)) == "schema"
    assert found["schema"] == f"modelctl.{LINES[what][0]}/1"
    assert result.err == ""


@pytest.mark.parametrize("what", LINES)
def test_csv(cli: Cli, inputs: None, what: str) -> None:
    rows = list(csv.reader(io.StringIO(run(cli, what, "--format", "csv").out)))
    assert len(rows[0]) > 1
    assert {len(row) for row in rows} == {len(rows[0])}
    assert (len(rows) == 1) is (what in EMPTY)


@pytest.mark.parametrize("what", LINES)
def test_markdown(cli: Cli, inputs: None, what: str) -> None:
    text = run(cli, what, "--format", "markdown").out
    assert text.endswith("|\n")
    for table in text.split("\n\n"):
        lines = table.splitlines()
        assert re.fullmatch(r"\|(-+\|)+", lines[1])
        # a bar in a cell is escaped
        bars = {len(re.findall(r"(?<!\\)\|", line)) for line in lines}
        assert len(bars) == 1, table


@pytest.mark.parametrize("what", LINES)
def test_tables(cli: Cli, inputs: None, what: str) -> None:
    text = run(cli, what).out
    assert text
    assert "None" not in text or what in ("show", "show a part", "diff")  # where a file says so


@pytest.mark.parametrize("what", LINES)
def test_json_for_short(cli: Cli, inputs: None, what: str) -> None:
    assert json.loads(run(cli, what, "--json").out)["schema"] == f"modelctl.{LINES[what][0]}/1"


def test_exact_numbers_are_for_programs(cli: Cli, inputs: None) -> None:
    rows = csv.DictReader(io.StringIO(cli("split", "ddp.pt", "-o", "p", "--format", "csv").out))
    for row in rows:
        assert int(row["size"]) == Path(row["file"]).stat().st_size
    (row,) = csv.DictReader(
        io.StringIO(cli("strip-prefix", "ddp.pt", "-o", "1.pt", "--format", "csv").out)
    )
    assert int(row["size"]) == Path("1.pt").stat().st_size
    assert (row["source"], row["output"], row["renamed"]) == ("ddp.pt", "1.pt", "12")


def test_notes_are_said_beside_every_table(cli: Cli, inputs: None) -> None:
    for options in ((), ("--format", "csv"), ("--format", "markdown")):
        said = cli("freeze", "flat.pt", "--pattern", "*", "--dry-run", *options).err
        assert "warning: every parameter is frozen" in said
        assert cli("freeze", "flat.pt", "--pattern", "*", "--dry-run", *options, "-q").err == ""
    found = json.loads(cli("freeze", "flat.pt", "--pattern", "*", "--dry-run", "--json").out)
    assert found["notes"][1] == "warning: every parameter is frozen: the loss will not move"
    assert found["remarks"][1] == {
        "level": "warning",
        "text": "every parameter is frozen: the loss will not move",
        "way_out": None,
    }
    (remark,) = json.loads(cli("summary", "ddp.pt", "--json").out)["remarks"]
    assert remark["way_out"] == "modelctl strip-prefix ddp.pt -o NEW.pt"


# ---------------------------------------------------------------------- errors

ERRORS: dict[str, tuple[tuple[str, ...], str, str]] = {
    "no file": (("summary", "missing.pt"), "error", "missing.pt: no such file"),
    "damage": (("ls", "cut.pt"), "unreadable", "cut.pt"),
    "no match": (("ls", "flat.pt", "layr1"), "no_match", "no tensor matches 'layr1'"),
    "loss": (("convert", "ddp.pt", "-o", "x.safetensors"), "loss", "x.safetensors"),
    "no overwriting": (("convert", "flat.pt", "-o", "ddp.pt"), "write", "ddp.pt: exists"),
    "no output": (("strip-prefix", "ddp.pt"), "usage", "where does the result go?"),
    "no model": (("merge", "-o", "x.pt"), "usage", "there is no model to merge into"),
    "no argument": (("ls",), "usage", "Missing argument 'SRC'"),
    "no option": (("ls", "flat.pt", "--nonsense"), "usage", "--nonsense"),
    "no command": (("lss", "flat.pt"), "usage", "there is no command 'lss'"),
    "two formats": (("ls", "flat.pt", "--format", "csv"), "usage", "--json and --format csv"),
}


@pytest.mark.parametrize("what", ERRORS)
def test_errors(cli: Cli, inputs: None, what: str) -> None:
    argv, kind, says = ERRORS[what]
    Path("cut.pt").write_bytes(Path("flat.pt").read_bytes()[:1000])
    options = [("--json",)]
    if what != "two formats":
        options += [("--format", "json"), ("--format=json",)]
        plain = cli(*argv)
        assert (plain.code, plain.out) == (2, "")
        assert says in plain.err
        for format in ("csv", "markdown"):
            assert cli(*argv, "--format", format) == plain
    for option in options:
        result = cli(*argv, *option)
        assert (result.code, result.err) == (2, "")
        found = json.loads(result.out)
        assert list(found) == ["schema", "error"]
        assert found["schema"] == "modelctl.error/1"
        error = found["error"]
        assert list(error)[:3] == ["kind", "message", "hint"]
        assert error["kind"] == kind
        assert says in error["message"]
        if what != "two formats":
            assert plain.err.startswith(f"error: {error['message']}\n")
            assert ("hint: " in plain.err) is (error["hint"] is not None)
        if kind == "unreadable":
            assert error["path"] == "cut.pt"
            assert isinstance(error["offset"], int)
    assert not Path("x.safetensors").exists()


def test_a_bug_is_json_too(cli: Cli, flat: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: object, **__: object) -> None:
        raise ZeroDivisionError("oh")

    monkeypatch.setattr("modelctl.files.open", broken)
    error = json.loads(cli("ls", flat, "--json").out)["error"]
    assert (error["kind"], error["message"]) == ("bug", "ZeroDivisionError: oh")


def test_a_word_that_looks_like_the_option_is_none(cli: Cli, place: Path) -> None:
    assert cli("ls", "missing.pt", "--", "--json").err.startswith("error: ")


ODD = ("=1+1", "+x", "-y", "@SUM(A1)", "\tz")
ODD += ("[a](b)", "<b>", "`c`", "*d*", "_e_", "~~f~~", "g\\h|i")


def test_a_spreadsheet_computes_nothing(cli: Cli, tmp_path: Path) -> None:
    path = write(tmp_path / "odd.pt", {name: tensor(2) for name in ODD} | {"a.b_c": tensor(1)})
    rows = list(csv.reader(io.StringIO(cli("ls", path, "--format", "csv").out)))[1:]
    names = {row[0] for row in rows}
    assert {"'=1+1", "'+x", "'-y", "'@SUM(A1)", "a.b_c"} <= names
    assert not [name for name in names if name[0] in "=+-@\t\r"]


def test_markdown_shows_names_as_they_are(cli: Cli, tmp_path: Path) -> None:
    path = write(tmp_path / "odd.pt", {name: tensor(2) for name in ODD} | {"a.b_c": tensor(1)})
    text = cli("ls", path, "--format", "markdown").out
    for name in (r"\[a\](b)", r"\<b>", r"\`c\`", r"\*d\*", r"\_e\_", r"\~~f\~~", r"g\\h\|i"):
        assert f"| {name} " in text
    assert "| a.b_c " in text


def test_signs_and_numbers_stay_as_they_are(cli: Cli, inputs: None) -> None:
    rows = list(csv.reader(io.StringIO(cli("diff", "ddp.pt", "flat.pt", "--format", "csv").out)))
    assert {row[0] for row in rows[1:]} <= {"-", "+", "~"}
