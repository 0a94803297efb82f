"""What hints name is there: every command and option that a text in the sources tells to use."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from modelctl.cli.commands import COMMANDS
from modelctl.cli.quick import flags_of, parameters_of

SOURCE = Path(__file__).resolve().parents[2] / "src" / "modelctl"
# 'modelctl convert --weights-only', and what f-strings make of it
COMMAND = re.compile(r"(?<![\w./`-])modelctl ([a-z][a-z-]+)((?: +[^\s'`,;:()]+)*)")
FLAG = re.compile(r"(?<![\w-])--[a-z][a-z-]+")
OWN = {"--help", "--version"}
# what stands behind modelctl in a sentence
PROSE = {
    "is",
    "reads",
    "does",
    "did",
    "itself",
    "needs",
    "files",
    "match",
    "has",
    "in",
    "and",
    "wrote",
    "may",
    "know",
}


def texts() -> Iterator[tuple[str, str]]:
    """(where, text) of every string in the sources, an f-string's fields as X."""
    for path in sorted(SOURCE.rglob("*.py")):
        tree = ast.parse(path.read_text("utf-8"))
        inside = {
            id(part)
            for node in ast.walk(tree)
            if isinstance(node, ast.JoinedStr)
            for part in node.values
        }
        docs = {
            id(node.body[0].value)
            for node in ast.walk(tree)
            if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef)
            and node.body
            and isinstance(node.body[0], ast.Expr)
        }
        for node in ast.walk(tree):
            where = f"{path.relative_to(SOURCE)}:{getattr(node, 'lineno', 0)}"
            if isinstance(node, ast.JoinedStr):
                parts = [
                    str(one.value) if isinstance(one, ast.Constant) else "X" for one in node.values
                ]
                yield where, "".join(parts)
            elif (
                isinstance(node, ast.Constant)
                and isinstance(node.value, str)
                and id(node) not in inside | docs
            ):
                yield where, node.value


def problems(text: str) -> list[str]:
    """What a text names that is not there."""
    found = []
    for match in COMMAND.finditer(text):
        name, rest = match[1], match[2]
        if name in PROSE and name not in COMMANDS:
            continue
        if name not in COMMANDS:
            found.append(f"modelctl {name}")
            continue
        known = flags_of(parameters_of(COMMANDS[name]))
        found += [
            f"modelctl {name} {flag}"
            for flag in FLAG.findall(rest)
            if flag not in known and flag not in OWN
        ]
    everywhere = OWN | {
        flag for command in COMMANDS.values() for flag in flags_of(parameters_of(command))
    }
    found += [flag for flag in FLAG.findall(text) if flag not in everywhere]
    return found


def test_every_command_and_option_is_there() -> None:
    named = [(where, text) for where, text in texts() if "modelctl " in text or "--" in text]
    assert len(named) > 50
    assert [(where, wrong) for where, text in named for wrong in problems(text)] == []


@pytest.mark.parametrize(
    "text",
    [
        "upgrade torch, or 'modelctl cast' the file",
        "'modelctl strip-prefix --weights-only' does it",
        "--no-such-thing replaces it",
    ],
)
def test_what_is_not_there_is_seen(text: str) -> None:
    assert problems(text)


def test_no_project_is_named_that_is_not_published() -> None:
    assert [where for where, text in texts() if re.search(r"pip install .?modelctl", text)] == []
