"""Files of the corpus, each made once, when a test first asks for it."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from tests.cli.conftest import cli, place

from .files import Found
from .made import MAKERS, Made

__all__ = ["cli", "file", "made", "place"]


@pytest.fixture(scope="session")
def made(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Made]:
    """Gives a file of our own by the name of its maker."""
    known: dict[str, Made] = {}

    def get(name: str) -> Made:
        needs = MAKERS[name].needs
        if needs is not None:
            pytest.importorskip(needs)
        if name not in known:
            known[name] = Made(name, tmp_path_factory.mktemp(name))
        return known[name]

    return get


@pytest.fixture
def file(request: pytest.FixtureRequest, made: Callable[[str], Made]) -> Made | Found:
    return made(request.param) if request.param in MAKERS else Found(request.param)
