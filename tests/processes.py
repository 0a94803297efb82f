"""Processes of a test that wait for one another."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NoReturn

ROOT = Path(__file__).parents[1]
_APART, _LATE = "connectFullMesh failed", "a rank did not end in"


def run(world: int, command: Callable[[int], list[str]], seconds: float) -> list[tuple[int, str]]:
    """The exit code and what is printed, of each of so many ranks. Where one fails the others,
    which would wait for it, are ended. In torch 2.4 gloo's ranks now and then don't find each
    other, or wait for ever: they are started once more, with ``TRY`` told, for a store of its
    own."""
    found: list[tuple[int, str]] = []
    for again in "012":
        found = _ended(_started(world, command, again), seconds)
        if not any(said in text for said in (_APART, _LATE) for _, text in found):
            break
    return found


def _started(
    world: int, command: Callable[[int], list[str]], again: str
) -> list[subprocess.Popen[str]]:
    env = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore", "TRY": again}
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


def _ended(started: list[subprocess.Popen[str]], seconds: float) -> list[tuple[int, str]]:
    def wait(one: subprocess.Popen[str]) -> tuple[int, str]:
        try:
            said = one.communicate(timeout=seconds)[0]
        except subprocess.TimeoutExpired:
            one.kill()
            said = f"{one.communicate()[0]}\n{_LATE} {seconds} s"
        if one.returncode:
            for other in started:
                other.kill()
        return one.returncode, said

    with ThreadPoolExecutor(len(started)) as threads:
        return list(threads.map(wait, started))


def end(code: int = 0) -> NoReturn:
    """The end of a rank, as it is: to destroy gloo's group waits for a thread that in torch 2.4 now
    and then waits for the interpreter, for ever."""
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)
