"""Damaged files: cut off at every byte, with a wrong bit or wrong bytes: refused, or read as they
were.

A normal run takes some of all; MODELCTL_DAMAGE=all takes every cut, and every bit that is not a
tensor's.
"""

from __future__ import annotations

import os
import random
from pathlib import Path

import pytest

from modelctl.errors import ModelctlError

from .damage import MAKE, Saved, Told, cuts, flips, read, some, tell

pytest.importorskip("torch")
ALL = os.environ.get("MODELCTL_DAMAGE") == "all"
SLOWEST = 1.0  # seconds of CPU, of the whole run


@pytest.fixture(scope="module", params=MAKE)
def saved(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Saved:
    return MAKE[request.param](tmp_path_factory.mktemp("make"))


def fine(told: Told) -> Told:
    assert told.foreign == []
    assert told.refused + told.equal + len(told.silent) > 0
    assert not ALL or told.slowest < SLOWEST
    return told


def test_every_prefix_is_refused(saved: Saved, tmp_path: Path) -> None:
    told = fine(tell(saved, tmp_path, some(cuts(saved), None if ALL else 300)))
    assert told.silent == []
    assert told.equal == 0 or saved.opened.endswith(".tar")


def test_every_bit_of_the_structure(saved: Saved, tmp_path: Path) -> None:
    """Where the container has checksums, what is read is what was saved; where it has none, a wrong
    letter of a name is a name."""
    path = saved.write(tmp_path)
    told = fine(tell(saved, tmp_path, some(flips(saved, path), None if ALL else 400)))
    assert told.refused > 20
    assert told.silent == [] or not saved.checked


def test_wrong_bytes(saved: Saved, tmp_path: Path) -> None:
    """Never another exception than ours, whichever bytes are wrong."""
    path, rng = saved.write(tmp_path), random.Random(saved.opened)
    refused = 0
    for _ in range(5000 if ALL else 500):
        name = rng.choice([*saved.files])
        wrong = bytearray(saved.files[name])
        for _ in range(rng.choice((1, 1, 1, 2, 5))):
            byte = rng.choice((0, 1, 0x7F, 0x80, 0xFF, rng.randrange(256)))
            wrong[rng.randrange(len(wrong))] = byte
        (tmp_path / name).write_bytes(wrong)
        try:
            read(path)
        except ModelctlError:
            refused += 1
        (tmp_path / name).write_bytes(saved.files[name])
    assert refused > 20
