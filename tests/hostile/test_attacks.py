"""The attacks are real: unpickled by who unpickles, each does what it is there for."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from .case import Case
from .cases import CASES

# Each file in a process of its own, forked where torch is loaded; in the folder where the file
# lies it creates one called ``fired``.
_VICTIM = """
import json, os, pickle, sys
import torch
for folder in json.load(sys.stdin):
    child = os.fork()
    if not child:
        os.chdir(folder)
        try:
            pickle.loads(open("attack", "rb").read())
        except BaseException as e:
            open("raised", "w").write(type(e).__name__)
        os._exit(0)
    os.waitpid(child, 0)
"""

ATTACKS = [case for case in CASES if case.attack]


@pytest.fixture(scope="session")
def victims(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The folders in which each attack was unpickled."""
    pytest.importorskip("torch")
    folder = tmp_path_factory.mktemp("victims")
    places = {}
    for i, case in enumerate(ATTACKS):
        places[case.name] = folder / str(i)
        places[case.name].mkdir()
        (places[case.name] / "attack").write_bytes(case.attack)
    done = subprocess.run(
        [sys.executable, "-c", _VICTIM],
        input=json.dumps([*map(str, places.values())]),
        capture_output=True,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        cwd=folder,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    return places


@pytest.mark.skipif(not hasattr(os, "fork"), reason="processes of POSIX")
@pytest.mark.parametrize("case", ATTACKS, ids=lambda case: case.name)
def test_it_fires(case: Case, victims: dict[str, Path]) -> None:
    raised = victims[case.name] / "raised"
    gone = ("AttributeError", "ModuleNotFoundError", "ImportError")
    if case.needs == "torch" and raised.exists() and raised.read_text() in gone:
        pytest.skip("this torch or numpy has no such function any more")
    for _ in range(200):  # some start a process and do not wait for it
        if os.path.lexists(victims[case.name] / "fired"):
            return
        time.sleep(0.02)
    pytest.fail(f"did not fire: {raised.read_text() if raised.exists() else 'no error'}")
