"""The files that the promises are tested on: the project's own, and others' where they are."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest

import modelctl as mc
from tests.conftest import SHARED

from . import make
from .made import MAKERS

FACTS = SHARED / "corpus" / "facts"
_BROKEN = {"c144", "c152"}
_TORCH = {"torch-zip", "torch-legacy-magic"}


class Card(NamedTuple):
    """What is known of a file before it is made or found: whether ``torch.load`` takes it with
    ``weights_only=True``, and whether it is no checkpoint at all."""

    id: str
    plain: bool
    broken: bool = False


class Found:
    """A file that somebody else wrote, and what torch saw in it."""

    def __init__(self, id: str) -> None:
        facts: dict[str, Any] = json.loads((FACTS / f"{id}.json").read_text())
        self.facts = facts
        self.path: Path = SHARED / "corpus" / facts["category"] / facts["file"]

    def check(self, ckpt: mc.Checkpoint) -> None:
        refs = ckpt.tensors()
        assert len(refs) == self.facts.get("n_tensors", len(refs))
        for sample in self.facts.get("samples", ()):
            ref = refs[sample["name"]]
            assert (list(ref.shape), ref.dtype.name) == (sample["shape"], sample["dtype"])
        if self.facts.get("tensors_sha256"):
            digest = hashlib.sha256()
            for name in sorted(refs):
                for piece in refs[name].chunks():
                    digest.update(piece)
            assert digest.hexdigest() == self.facts["tensors_sha256"]


def _card(path: Path) -> Card:
    facts = json.loads(path.read_text())
    plain = facts.get("weights_only") == "accepted" and facts["container"] in _TORCH
    return Card(path.stem, plain, path.stem in _BROKEN)


assert make
OWN = [Card(name, maker.plain) for name, maker in MAKERS.items()]
THEIRS = [_card(path) for path in sorted(FACTS.glob("*.json"))]
CARDS = [*OWN, *THEIRS]


def each(which: Callable[[Card], object] = lambda card: not card.broken) -> pytest.MarkDecorator:
    """Runs a test on each of these files: its argument ``file``."""
    ids = [card.id for card in CARDS if which(card)]
    return pytest.mark.parametrize("file", ids, indirect=True)
