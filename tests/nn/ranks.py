"""Several ranks of a test, each a process that runs the functions of a module: ``python -m
tests.nn.ranks MODULE WORLD RANK FOLDER``. What came of each goes to FOLDER / RANK.json."""

from __future__ import annotations

import json
import os
import sys
import traceback
from datetime import timedelta
from importlib import import_module
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from tests import processes

MOST_SECONDS = 200  # of ranks that wait for each other


def check(factory: pytest.TempPathFactory, module: str, world: int, name: str) -> None:
    """Raises AssertionError with what ranks say of a function of a module, ``on_WORLD_…``. All of
    them are run at once, for all processes that run tests, in FOLDER/MODULE-WORLD: first those of
    two ranks, whose folder others may read."""
    if not dist.is_available() or not dist.is_gloo_available():
        pytest.skip("this torch has no gloo")
    filelock = pytest.importorskip("filelock")
    base = factory.getbasetemp()
    shared = base.parent if os.environ.get("PYTEST_XDIST_WORKER") else base
    with filelock.FileLock(f"{shared / module}.lock"):
        for count in sorted({2, world}):
            folder = shared / f"{module}-{count}"
            if not folder.exists():
                folder.mkdir()
                (folder / "said").write_text(run(module, count, folder))
    found = [folder / f"{rank}.json" for rank in range(world)]
    assert all(one.exists() for one in found), (folder / "said").read_text()
    said = [json.loads(one.read_text())[name] for one in found]
    assert not any(said), "\n".join(said)


def run(module: str, world: int, folder: Path) -> str:
    """What the ranks print, each of which runs the functions of a module."""
    command = [sys.executable, "-m", "tests.nn.ranks", module, str(world)]
    ran = processes.run(world, lambda rank: [*command, str(rank), str(folder)], MOST_SECONDS)
    return "\n".join(text for _, text in ran)


def named(module: str, world: int) -> list[str]:
    """The functions of a module for so many ranks."""
    text = (processes.ROOT / f"{module.replace('.', '/')}.py").read_text("utf-8")
    start = f"def on_{world}_"
    lines = [line for line in text.splitlines() if line.startswith(start)]
    return [line[len("def ") :].partition("(")[0] for line in lines]


def main(module: str, world: int, rank: int, folder: Path) -> None:
    torch.set_num_threads(1)
    store = dist.FileStore(str(folder / f"store-{os.environ['TRY']}"), world)
    dist.init_process_group(
        "gloo", store=store, rank=rank, world_size=world, timeout=timedelta(seconds=30)
    )
    functions = import_module(module)
    said = {}
    for name in named(module, world):
        inside = folder / name
        inside.mkdir(exist_ok=True)
        try:
            getattr(functions, name)(inside, rank)
            dist.barrier()
            said[name] = ""
        except BaseException:  # the others, too, or they wait until they give up
            said[name] = f"rank {rank}: {traceback.format_exc()}"
            print(name, said[name], flush=True)
    (folder / f"{rank}.json").write_text(json.dumps(said))
    processes.end()


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]), int(sys.argv[3]), Path(sys.argv[4]))
