"""The shell's completion knows tensors and modules."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from .files import net, write


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ("modelctl ls m.pt lay", {"layer1"}),
        ("modelctl ls m.pt layer1.", {"layer1.0", "layer1.1"}),
        ("modelctl ls nothing.pt lay", set()),
        ("modelctl freeze m.pt --pattern f", {"fc"}),
        ("modelctl strip-h", {"strip-head"}),
        ("modelctl convert m.pt -o m", {"m.pt", "more/"}),
    ],
)
def test_names_are_completed(tmp_path: Path, line: str, expected: set[str]) -> None:
    write(tmp_path / "m.pt", net())
    (tmp_path / "more").mkdir()
    env = os.environ | {
        "_MODELCTL_COMPLETE": "complete_bash",
        "COMP_WORDS": line,
        "COMP_CWORD": str(len(line.split()) - 1),
    }
    code = "from modelctl.cli import main; main()"
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, env=env, capture_output=True, text=True
    )
    assert done.stderr == ""
    assert set(done.stdout.split()) == expected
