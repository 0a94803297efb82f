"""The quick way reads a command line as typer does, or leaves it to typer."""

from __future__ import annotations

import inspect
import random
import re
import shlex
from collections.abc import Sequence
from pathlib import Path
from types import NoneType
from typing import Any, Literal, get_args, get_origin

import pytest

from modelctl.cli.app import make_app
from modelctl.cli.commands import COMMANDS
from modelctl.cli.quick import said
from modelctl.cli.signature import Argument, Command

DOCS = Path(__file__).parents[2] / "docs" / "cli.md"


def typers(monkeypatch: pytest.MonkeyPatch, argv: Sequence[str]) -> dict[str, Any] | None:
    """What typer makes of a command line; None where it is wrong, or asks for help."""
    got: list[dict[str, Any]] = []
    with monkeypatch.context() as patch:
        patch.setattr(Command, "__call__", lambda self, **options: got.append(options))
        try:
            make_app(argv[0])(list(argv), prog_name="modelctl", standalone_mode=False)
        except Exception:
            return None
    return got[0] if got else None


def words_of(kind: Any, picked: random.Random) -> str:
    """A word for a parameter: mostly a good one."""
    kinds = [one for one in get_args(kind) if one is not NoneType] if "|" in str(kind) else [kind]
    (kind,) = kinds
    if get_origin(kind) is list:
        (kind,) = get_args(kind)
    good, bad = ["a.pt", "b", "x=y", "dir/", "layer4.*", "a b"], ["-", "", "-x", "--long"]
    if get_origin(kind) is Literal:
        good = list(get_args(kind))
        bad = ["nothing", good[0].upper()]
    elif kind in (int, float):
        good = ["0", "7", "12", "1234567", *(["0.5", "1e-3", "12.50"] * (kind is float))]
        bad = [
            "-1",
            "1_000",
            " 3",
            "x",
            "0.5",
            "9" * 30,
            "1.",
            ".5",
            "inf",
            "nan",
            "1e400",
            "\u0663",
        ]
    return picked.choice(good if picked.random() < 0.9 else bad)


def a_line(command: Command, picked: random.Random) -> list[str]:
    """A command line, right or wrong."""
    parts: list[list[str]] = []
    for one in inspect.signature(command).parameters.values():
        kind, info = get_args(one.annotation)[:2]
        needed = one.default is one.empty
        if isinstance(info, Argument):
            several = get_origin(kind) is list or "list" in str(kind)
            many = picked.choice([1, 1, 1, 2, 3] if several else [1]) if needed else 0
            many += picked.choice([0] * 8 + [-many, 1])
            parts += [[words_of(kind, picked)] for _ in range(many)]
            continue
        if picked.random() > (0.95 if needed else 0.15):
            continue
        flag = picked.choice(picked.choice(info.names(one.name)).split("/"))
        if "bool" in str(kind):
            parts.append([picked.choice([flag] * 18 + [f"{flag}=1", f"{flag}x"])])
            continue
        for _ in range(picked.choice([1, 1, 1, 1, 1, 2])):
            value = words_of(kind, picked)
            spelled = [[flag, value]] * 9 + [[f"{flag}={value}"]] * 9 + [[flag + value], [flag]]
            parts.append(picked.choice(spelled))
    order = parts[:]
    if picked.random() < 0.5:
        picked.shuffle(order)
    line = [word for part in order for word in part]
    if picked.random() < 0.05:
        line.insert(picked.randrange(len(line) + 1), picked.choice(["--", "--help", "-h", "-lq"]))
    return line


@pytest.mark.parametrize("name", COMMANDS)
def test_what_is_read_is_read_as_typer_reads_it(
    name: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    command, picked = COMMANDS[name], random.Random(name)
    read = 0
    for _ in range(150):
        line = a_line(command, picked)
        options = said(command, line)
        if options is not None:
            read += 1
            assert options == typers(monkeypatch, [name, *line]), line
    assert read > 20  # it is no use if typer reads them all


def test_plain_lines_are_read(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every example of the docs is."""
    examples = re.findall(r"^(?:Example: )?modelctl (.+)$", DOCS.read_text("utf-8"), re.M)
    lines = [shlex.split(example) for example in examples]
    assert {line[0] for line in lines} >= set(COMMANDS) - {"show"}
    for name, *words in [*lines, ["show", "last.pt", "epoch"]]:
        options = said(COMMANDS[name], words)
        assert options is not None, words
        assert options == typers(monkeypatch, [name, *words])


@pytest.mark.parametrize(
    "line",
    [
        *("a.pt --help", "-h", "", "a.pt b.pt c.pt -x", "a.pt --lon", "a.pt --section=none"),
        *("a.pt --key", "a.pt --key=", "a.pt --key --long", "-lq a.pt", "a.pt --long=yes"),
        *("-- a.pt", "a.pt --format JSON", "a.pt --section"),
    ],
)
def test_the_rest_is_left_to_typer(line: str) -> None:
    assert said(COMMANDS["ls"], line.split()) is None
