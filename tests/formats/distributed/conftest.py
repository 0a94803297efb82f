"""Folders that ranks of torch wrote, each number of them once for all tests."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from tests import processes

MODULE = "tests.formats.distributed.ranks"


def run_ranks(folder: Path, world: int, *to_read: Path) -> None:
    """All ranks of :mod:`.ranks`; raises AssertionError with what the first that failed says."""
    command = [sys.executable, "-m", MODULE, str(folder)]
    places = [*map(str, to_read)]
    ran = processes.run(world, lambda rank: [*command, str(rank), str(world), *places], 90)
    failed = [text for code, text in ran if code > 0] or [text for code, text in ran if code]
    assert not failed, failed[0]


@pytest.fixture(scope="session")
def written(tmp_path_factory: pytest.TempPathFactory) -> Callable[[int], Path]:
    """The folder that so many ranks wrote."""
    torch = pytest.importorskip("torch")
    if not torch.distributed.is_available() or not torch.distributed.is_gloo_available():
        pytest.skip("this torch has no gloo")
    from filelock import FileLock

    # one for all processes that run tests
    base = tmp_path_factory.getbasetemp()
    shared = base.parent if os.environ.get("PYTEST_XDIST_WORKER") else base

    def of(world: int) -> Path:
        folder = shared / f"ranks-{world}"
        with FileLock(str(shared / "ranks.lock")):
            if not (folder / "done").exists():
                folder.mkdir(exist_ok=True)
                run_ranks(folder, world)
                (folder / "done").touch()
        return folder

    return of
