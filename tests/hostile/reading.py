"""Files read in a process of their own (:mod:`.reader`), and what came of each."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

READER = Path(__file__).with_name("reader.py")


class Reading(NamedTuple):
    """What reading a file gave: an error and its place, or findings and warnings; how many bytes
    its tensors had; what was heard that should not be; and the folder with copies of it."""

    opened: Path
    copies: Path
    error: str | None
    text: str
    path: str | None
    member: str | None
    offset: int | None
    findings: list[list[str]]
    warnings: list[str]
    bytes: int
    heard: list[str]


def read_all(
    files: Sequence[Path], out: Path, warm: Sequence[Path] = (), script: str | None = None
) -> list[Reading]:
    """What reading each of ``files`` gave; copies of what can be written lie in ``out``. ``warm``
    are read before, so that what the reader itself needs is loaded."""
    command = [sys.executable, *(("-c", script) if script else (str(READER),)), str(out)]
    job = {"warm": [*map(str, warm)], "files": [*map(str, files)]}
    done = subprocess.run(command, input=json.dumps(job), capture_output=True, text=True)
    lines = done.stdout.splitlines()
    at = str(files[len(lines)]) if len(lines) < len(files) else ""
    assert done.returncode == 0, f"{at}: exit code {done.returncode}: {done.stderr[-2000:]}"
    return [
        Reading(path, out / str(i), **json.loads(line))
        for i, (path, line) in enumerate(zip(files, lines, strict=True))
    ]
