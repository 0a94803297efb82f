"""The hostile set, written once, and what reading every file of it gave."""

from __future__ import annotations

import pytest

from .cases import CASES, FINE
from .reading import Reading, read_all


@pytest.fixture(scope="session")
def readings(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Reading]:
    """What reading each case gave, by the case's name."""
    folder = tmp_path_factory.mktemp("hostile")
    places = {case.name: case.write(folder / str(i)) for i, case in enumerate(CASES)}
    warm = [places[case.name] for case in FINE]
    found = read_all([*places.values()], tmp_path_factory.mktemp("copies"), warm)
    return dict(zip(places, found, strict=True))
