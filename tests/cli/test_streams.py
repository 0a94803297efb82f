"""stdout that can't hold what is printed: the work is done, and what went wrong is said."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

import modelctl as mc

from .files import Cli, net, tensor, training, write


def run(*argv: str, out: str | None = None, **env: str) -> subprocess.CompletedProcess[bytes]:
    command = [sys.executable, "-m", "modelctl", *argv]
    stdout = subprocess.PIPE if out is None else os.open(out, os.O_WRONLY)
    try:
        return subprocess.run(
            command, stdout=stdout, stderr=subprocess.PIPE, env={**os.environ, **env}
        )
    finally:
        if out is not None:
            os.close(stdout)


@pytest.mark.parametrize("encoding", ["ascii", "ISO-8859-1", "cp1252:strict"])
def test_another_encoding(place: Path, encoding: str) -> None:
    write(place / "in.pt", {**training(), "naïve ☃": "größe", "λ": tensor(2)})
    codec = encoding.partition(":")[0]
    for words in (
        ("strip-prefix", "in.pt", "-o", "out.pt"),
        ("summary", "in.pt", "--color=always"),
        *(("summary", "in.pt", f"--format={one}") for one in ("table", "markdown", "csv", "json")),
        *(("show", "in.pt"), ("show", "in.pt", "naïve ☃"), ("ls", "in.pt", "--section", "all")),
        ("diff", "in.pt", "out.pt"),
    ):
        done = run(*words, PYTHONIOENCODING=encoding)
        assert done.returncode in (0, 1), (words, done.stderr)
        assert b"Traceback" not in done.stderr
        done.stdout.decode(codec)
    assert (
        b"... and 9 more"
        in run("strip-prefix", "in.pt", "--dry-run", PYTHONIOENCODING="ascii").stdout
    )


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="no /dev/full")
@pytest.mark.parametrize("more", [(), ("--json",), ("--format", "csv")])
def test_a_full_stdout(place: Path, more: tuple[str, ...]) -> None:
    write(place / "in.pt", training())
    done = run("strip-prefix", "in.pt", "-o", "out.pt", *more, out="/dev/full")
    assert done.returncode == 2
    said = done.stderr.decode()
    assert "error: stdout: No space left on device\n" in said
    assert "hint: written all the same: out.pt\n" in said
    with mc.open("out.pt") as ckpt:
        assert list(ckpt.state_dict()) == list(net())
    done = run("ls", "in.pt", *more, out="/dev/full")
    assert "error: stdout: No space left" in done.stderr.decode()
    assert "hint" not in done.stderr.decode()


def test_errors_are_as_the_last_format_says(cli: Cli, place: Path) -> None:
    is_json = {
        ("--format", "json"): True,
        ("--format=json",): True,
        ("--json",): True,
        ("--format", "json", "--format", "csv"): False,
        ("--format=json", "--format=table"): False,
        ("--format", "csv", "--format=json"): True,
        ("--format=csv", "--format", "json"): True,
        ("--format", "json", "--format=csv"): False,
        ("--format",): False,
    }
    for words, wanted in is_json.items():
        done = cli("ls", "missing.pt", *words)
        assert done.code == 2
        assert bool(done.out) is wanted, words
        assert bool(done.err) is not wanted, words


def test_json_has_numbers_alone(cli: Cli, place: Path) -> None:
    extremes = {
        "large": tensor(3, fill=1.7e308, dtype="float64"),
        "squares": tensor(5, fill=1e200, dtype="float64"),
    }
    write(place / "a.pt", extremes)
    done = cli("summary", "a.pt", "--stats", "--json")
    assert done.code == 0
    found = {one["name"]: one["stats"] for one in json.loads(done.out)["tensors"]}
    assert (found["large"]["mean"], found["large"]["std"]) == (1.7e308, 0.0)
    assert found["squares"]["mean"] == 1e200
