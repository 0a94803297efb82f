"""A short run of every fuzzer, and every input that once was not handled as it should be."""

from __future__ import annotations

from pathlib import Path

import pytest

from .run import fuzz, one
from .targets import TARGETS

CORPUS = Path(__file__).with_name("corpus")
INPUTS = sorted(CORPUS.iterdir()) if CORPUS.is_dir() else []


@pytest.mark.parametrize("target", TARGETS)
def test_nothing_but_our_errors(target: str) -> None:
    seeds = TARGETS[target].seeds()
    if not seeds:
        pytest.skip("torch is not installed")
    counts, found = fuzz(target, 0, 300)
    assert [one.what for one in found] == []
    assert counts["refused"] > 30
    assert counts["fine"] > 2  # what is changed gets past the first check


@pytest.mark.parametrize("target", TARGETS)
def test_what_it_begins_with_is_read(target: str) -> None:
    fine = {one(target, seed, level) for seed in TARGETS[target].seeds() for level in range(20)}
    assert "fine" in fine or not fine


@pytest.mark.parametrize("path", INPUTS, ids=lambda path: path.name)
def test_what_was_found_once(path: Path) -> None:
    target = path.name.rpartition("-")[0]
    for level in range(20):
        one(target, path.read_bytes(), level)


def test_a_fuzzer_that_finds(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(data: bytes, level: int) -> None:
        if level == 3:
            raise KeyError("x")

    target = TARGETS["pickle"]._replace(run=broken)
    monkeypatch.setitem(TARGETS, "pickle", target)  # type: ignore[arg-type]
    counts, found = fuzz("pickle", 0, 20)
    assert counts["FOUND"] == 1
    assert "KeyError" in found[0].what
