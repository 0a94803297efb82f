"""What people see of files as they have them, at three widths: no line is wider than the terminal,
no number is broken, and golden files to be read."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

pytest.importorskip("torch")
pytest.importorskip("torchvision")
pytest.importorskip("safetensors")

from ..files import Cli
from .people import FILES, written
from .test_reports import golden
from .test_widths import WIDTHS, check, plain

COMMANDS = {
    "summary": 40,
    "ls --long": 6,
    "show": 6,
    "diff": 8,
    "strip-head --dry-run": 6,
}


def commands(path: Path) -> list[tuple[list[str], int]]:
    """Each command on a file, and how many lines of it are kept."""
    return [
        ([command.split()[0], path.name, *other(command, path), *command.split()[1:]], most)
        for command, most in COMMANDS.items()
    ]


def other(command: str, path: Path) -> list[str]:
    return [f"edited/{path.name}"] if command == "diff" else []


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("people")
    found = {}
    for name in FILES:
        found[name] = written(name, folder / name)
        written(name, folder / name / "edited", every=50 if name not in ("gan", "lightning") else 3)
    return found


@pytest.mark.parametrize("name", FILES)
def test_screens(
    cli: Cli, made: dict[str, Path], monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    path = made[name]
    monkeypatch.chdir(path.parent)
    for argv, _ in commands(path):
        check(cli, monkeypatch, argv)
    for width in WIDTHS:
        monkeypatch.setenv("COLUMNS", str(width))
        text = ""
        for argv, most in commands(path):
            shown = cli(*argv, "--color", "always")
            lines = [line.rstrip() for line in plain(shown.out + shown.err).splitlines()]
            more = ["…"] if len(lines) > most else []
            text += "\n".join([f"$ modelctl {' '.join(argv)}", *lines[:most], *more, ""])
        golden(f"people/{name}-{width}", text)


@pytest.mark.parametrize("name", FILES)
def test_a_pipe_gets_whole_names(cli: Cli, made: dict[str, Path], name: str) -> None:
    """Whatever the width: a line a tensor, each name as it is in the file."""
    names = [one["name"] for one in json.loads(cli("ls", made[name], "--json").out)["tensors"]]
    lines = [line.split()[0] for line in cli("ls", "--long", made[name]).out.splitlines() if line]
    assert len(names) > 10
    assert [line for line in lines if line in {*names}] == names
    assert cli("ls", made[name]).out.splitlines() == names
