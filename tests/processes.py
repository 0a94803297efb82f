"""Processes of a test that wait for one another."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import NoReturn

ROOT = Path(__file__).parents[1]


def ranks(world: int, command: Callable[[int], list[str]]) -> list[subprocess.Popen[str]]:
    """One for each rank of so many, by its command; what it prints is to be read."""
    env = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore"}
    return [
        subprocess.Popen(
            command(rank),
            cwd=ROOT,
            env=env,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for rank in range(world)
    ]


def end(code: int = 0) -> NoReturn:
    """The end of a rank, as it is: to destroy gloo's group waits for a thread that in torch 2.4 now
    and then waits for the interpreter, for ever."""
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)
