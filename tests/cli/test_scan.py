"""scan, as people and code hosts see it."""

from __future__ import annotations

import json
from pathlib import Path

from modelctl.scanning.rules import RULES
from modelctl.scanning.scan import scan

from ..hostile.build.containers import STATE_DICT, torch_zip
from ..hostile.build.pickles import POP, call, name, program, text
from .files import Cli

ATTACK = call(name("os", "system"), text("echo > fired"))
EVIL_FILE = torch_zip(program(ATTACK, POP, STATE_DICT))


def test_what_the_command_prints(cli: Cli, tmp_path: Path) -> None:
    (tmp_path / "evil.pt").write_bytes(EVIL_FILE)
    result = cli("scan", tmp_path / "evil.pt")
    assert result.code == 1
    assert result.err == ""
    lines = result.out.splitlines()
    assert lines[1].split()[0] == "dangerous"
    assert "calls os.system" in lines[1]
    assert lines[-1] == "1 file, 1 pickle: 1 dangerous"


def test_dangerous_wins_over_malformed(cli: Cli, tmp_path: Path) -> None:
    (tmp_path / "evil.pt").write_bytes(torch_zip(b"\x80\x02" + ATTACK + b"\xff"))
    found = scan(tmp_path / "evil.pt")
    assert {row[0] for row in found[0].rows()} == {"dangerous", "malformed"}
    assert cli("scan", tmp_path / "evil.pt").code == 1


def test_sarif(cli: Cli, tmp_path: Path) -> None:
    (tmp_path / "evil.pt").write_bytes(EVIL_FILE)
    result = cli("scan", tmp_path / "evil.pt", "--format", "sarif")
    assert result.code == 1
    document = json.loads(result.out)
    assert document["version"] == "2.1.0"
    (run,) = document["runs"]
    rules = {rule["id"] for rule in run["tool"]["driver"]["rules"]}
    assert rules == {rule.id for rule in RULES}
    (found,) = run["results"]
    assert found["ruleId"] in rules
    assert found["level"] == "error"
    location = found["locations"][0]["physicalLocation"]
    assert location["artifactLocation"]["uri"].endswith("evil.pt")
    assert cli("ls", tmp_path / "evil.pt", "--format", "sarif").code == 2
