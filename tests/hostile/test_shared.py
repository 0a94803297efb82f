"""The same promises on a set that others generate, where there is a folder ``shared``."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from .cases import FINE
from .reading import Reading, read_all

# Their shards are cases of ours; a pickle beside a clean one is found only by who looks at all.
_INDEX, _BESIDE = "index.json", "z10-side-pickle"


class Set(NamedTuple):
    """What their manifest says of each file, and what reading it gave."""

    all: list[tuple[dict[str, Any], Reading]]
    markers: Path

    def expected(self, what: str) -> list[tuple[str, Reading]]:
        found = [
            (one["id"], seen)
            for one, seen in self.all
            if one["expect"] == what and not one["path"].endswith(_INDEX)
        ]
        assert found
        return found


@pytest.fixture(scope="session")
def theirs(shared: Path, tmp_path_factory: pytest.TempPathFactory) -> Set:
    folder, markers = (tmp_path_factory.mktemp(name) for name in ("theirs", "markers"))
    maker = [
        sys.executable,
        str(shared / "hostile" / "make_hostile.py"),
        "--out",
        str(folder / "f"),
    ]
    command = [*maker, "--marker-dir", str(markers), "--no-torch"]
    subprocess.run(command, check=True, capture_output=True)
    manifest = json.loads((folder / "f" / "manifest.json").read_text())
    warm = [case.write(folder / str(i)) for i, case in enumerate(FINE)]
    seen = read_all([folder / "f" / one["path"] for one in manifest], folder / "out", warm)
    return Set([*zip(manifest, seen, strict=True)], markers)


def test_no_error_but_ours(theirs: Set) -> None:
    odd = [(one["id"], seen.error) for one, seen in theirs.all if "not ours" in (seen.error or "")]
    assert odd == []


def test_nothing_is_imported_or_run(theirs: Set) -> None:
    assert [(one["id"], seen.heard) for one, seen in theirs.all if seen.heard] == []
    assert [*theirs.markers.iterdir()] == []


def test_refused(theirs: Set) -> None:
    assert [id for id, seen in theirs.expected("refuse") if seen.error is None] == []


def test_dangerous_files_are_refused_or_found(theirs: Set) -> None:
    silent = [
        id
        for id, seen in theirs.expected("dangerous")
        if id != _BESIDE
        and not seen.error
        and "dangerous" not in {level for level, *_ in seen.findings}
    ]
    assert silent == []


def test_clean_files_open(theirs: Set) -> None:
    clean = theirs.expected("ok")
    assert [(id, seen.error) for id, seen in clean if seen.error] == []
    assert [id for id, seen in clean if "dangerous" in str(seen.findings)] == []


def test_few_bytes_are_read_as_tensors(theirs: Set) -> None:
    assert max(seen.bytes for _, seen in theirs.all) < 1 << 20
