"""Processes of a test that wait for one another."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Callable
from pathlib import Path

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
