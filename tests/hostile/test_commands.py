"""The commands on hostile files: an answer or one line of error, and nothing a terminal obeys."""

from __future__ import annotations

from pathlib import Path

import pytest

from modelctl.cli import run

from .case import Case, Refused
from .cases import CASES

COMMANDS = (["summary"], ["ls", "--section", "all", "--long"], ["show"])
NAMES = [case for case in CASES if "a name of" in case.name]
# They share what opens a file: one command a case. (A tree of 10^40 paths is no matter for ls and
# summary, which go by tensors; all of it is more than anybody can be shown.)
EACH = [(case, COMMANDS[0 if "10^40" in case.name else i % 3]) for i, case in enumerate(CASES)]


@pytest.mark.parametrize(
    ("case", "command"),
    [*EACH, *((case, command) for case in NAMES for command in COMMANDS[:2])],
    ids=lambda value: value.name if isinstance(value, Case) else value[0],
)
def test_an_answer_or_an_error(
    case: Case,
    command: list[str],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.delenv("MODELCTL_DEBUG", raising=False)
    path = case.write(tmp_path / "case")
    code = run([command[0], str(path), *command[1:]])
    out, err = capsys.readouterr()
    assert code == (2 if isinstance(case.expect, Refused) and not case.expect.late else 0), err
    assert bool(out) is (code == 0)
    assert "bug in modelctl" not in err
    if code:
        assert err.startswith("error: ")
        assert len(err.splitlines()) <= 2
    for line in (out + err).split("\n"):
        assert line.isprintable(), line
