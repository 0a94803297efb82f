"""The blocks of a far object that are kept: what is given is what lies there, in whatever order it
is asked for."""

from __future__ import annotations

import random

import pytest

from modelctl.storage.far import blocks
from modelctl.storage.far.blocks import BLOCK, FarObject, FarSource


class InMemory(FarObject):
    def __init__(self, data: bytes) -> None:
        self.name, self.size, self.head = "memory", len(data), data[:100]
        self.data = data

    def fetch(self, start: int, stop: int) -> bytes:
        return self.data[start:stop]


@pytest.mark.parametrize("seed", range(8))
def test_a_cache_that_is_full_gives_what_was_there(
    seed: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(blocks, "_MOST_BLOCKS", 120)
    rng = random.Random(seed)
    data = rng.randbytes(400 * BLOCK + 77)
    source = FarSource("memory", lambda: InMemory(data))
    for _ in range(300):
        start = rng.randrange(len(data))
        size = min(rng.choice((1, 100, BLOCK, 20 * BLOCK)), len(data) - start)
        assert source.read(start, size) == data[start : start + size]
