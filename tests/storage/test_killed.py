"""A writer that is killed, wherever it is: the old or the new, whole, and the next run tidies up.

A normal run kills a few hundred; MODELCTL_KILL_RUNS=5000 kills so many more at random moments.
"""

from __future__ import annotations

import os
import random
import shutil
import signal
import time
from functools import partial
from pathlib import Path

import pytest

from .faults import ended, forked, killed_before, leftovers
from .writers import CASES, AFile, AFolder, Case, Files, InPlace

pytestmark = pytest.mark.skipif(os.name != "posix", reason="signals of POSIX")
RUNS = int(os.environ.get("MODELCTL_KILL_RUNS", "120"))


@pytest.fixture(autouse=True)
def _no_disk(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is killed loses nothing that the kernel has: the disk may be left out."""
    monkeypatch.setattr(os, "fsync", lambda fd: None)


# ---------------------------------------------------------------------- when


@pytest.mark.parametrize("case", CASES)
def test_before_each_call(case: Case, tmp_path: Path) -> None:
    seen = []
    for nth in range(1, 1000):
        folder = tmp_path / "here"
        folder.mkdir()
        tried = case(folder)
        tried.prepare()
        killed = killed_before(nth, partial(tried.run, "new"))
        seen.append(tried.state())
        tried.run("newer")
        assert tried.state() == "newer"
        assert leftovers(folder) == []
        shutil.rmtree(folder)
        if not killed:
            break
    # once it is the new one it stays so
    assert seen == sorted(seen, reverse=True)
    assert set(seen) == {"old", "new"}
    assert len(seen) > 15


@pytest.mark.parametrize("case", [AFile, InPlace, AFolder, Files])
def test_at_any_moment(case: Case, tmp_path: Path) -> None:
    rng = random.Random(0)
    folder = tmp_path / "here"
    folder.mkdir()
    tried = case(folder)
    tried.prepare()

    def forever() -> None:
        os.write(writes, b"x")
        while True:
            tried.again()

    for _ in range(RUNS // 4):
        reads, writes = os.pipe()
        child = forked(forever)
        os.read(reads, 1)
        until = time.perf_counter() + rng.random() * 0.01
        while time.perf_counter() < until:
            pass
        os.kill(child, signal.SIGKILL)
        assert ended(child) == -signal.SIGKILL
        os.close(reads)
        os.close(writes)
        tried.state()
        shutil.rmtree(folder / "gone", ignore_errors=True)
        tried.run("newer")
        assert tried.state() == "newer"
        assert leftovers(folder) == []
        if case is AFolder:
            shutil.rmtree(folder / "m")
