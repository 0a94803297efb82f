"""What torch sees in a file is what modelctl lists, and nothing about it is called dangerous."""

from __future__ import annotations

from pathlib import Path

import pytest

import modelctl as mc

from .files import CARDS, OWN, THEIRS, Found, each
from .made import Made


def test_there_is_a_corpus() -> None:
    assert len(OWN) > 40


def test_there_is_a_corpus_of_others(shared: Path) -> None:
    assert len(THEIRS) > 50
    assert {card.id for card in OWN}.isdisjoint(card.id for card in THEIRS)


@each()
def test_its_tensors_are_those_that_torch_sees(file: Made | Found) -> None:
    with mc.open(file.path) as ckpt:
        file.check(ckpt)
        assert "dangerous" not in {one.level for one in ckpt.findings}


@each(lambda card: card in OWN)
def test_it_is_what_it_is_called(file: Made) -> None:
    with mc.open(file.path) as ckpt:
        assert ckpt.sections.kind == file.kind
        assert ckpt.warnings == ()
        if file.path.suffix != ".safetensors":  # whose reader sorts the names
            assert list(ckpt.tensors()) == list(file.seen)


if any(card.broken for card in CARDS):

    @each(lambda card: card.broken)
    def test_what_is_broken_is_refused(file: Found) -> None:
        with pytest.raises(mc.ModelctlError):
            mc.open(file.path)
