"""Pickles that hold much beside tensors: what they may take grows with the bytes that hold them."""

from __future__ import annotations

import os
import pickle
import tracemalloc
import zipfile
from pathlib import Path
from typing import Any

import pytest
import torch

import modelctl as mc
from modelctl.errors import UnreadableError
from modelctl.pickles import interpreter, machine, writer

MODEL = {"fc.weight": torch.ones(3, 4), "fc.bias": torch.ones(3)}
HELD: dict[str, Any] = {
    "numbers": {i: i / 7 for i in range(3000)},
    "texts": [f"line {i}" for i in range(3000)],
    "pairs": [[i, i + 1] for i in range(3000)],
    "replay": [(0.5, i, [0.5, 0.25], {"done": False}) for i in range(3000)],
    "blobs": [os.urandom(5000) for _ in range(3)],
}


@pytest.fixture(autouse=True)
def low(monkeypatch: pytest.MonkeyPatch) -> None:
    """The limits of a pickle of any size, as low as such a one of a few kB passes them."""
    monkeypatch.setattr(interpreter, "MAX_SIZE", 2_000)
    monkeypatch.setattr(interpreter, "MAX_OPCODES", 900)
    for limit in ("MAX_MEMO", "MAX_CONTAINERS", "MAX_TUPLES", "CONTAINERS", "TUPLES"):
        monkeypatch.setattr(machine, limit, 100)


@pytest.mark.parametrize("zip", [True, False])
@pytest.mark.parametrize("what", HELD)
def test_what_is_beside_the_weights_is_read_and_written(
    tmp_path: Path, what: str, zip: bool
) -> None:
    saved = {"model": MODEL, what: HELD[what]}
    torch.save(saved, tmp_path / "m.pt", _use_new_zipfile_serialization=zip)
    with mc.open(tmp_path / "m.pt") as ckpt:
        assert list(ckpt.state_dict()) == list(MODEL)
        assert [one.path for one in ckpt.sections.models] == [("model",)]
    mc.edit(tmp_path / "m.pt", {"do": "add-prefix", "prefix": "m"}, output=tmp_path / "n.pt")
    loaded = torch.load(tmp_path / "n.pt", weights_only=False)
    assert loaded[what] == HELD[what]
    assert list(loaded["model"]) == ["m.fc.weight", "m.fc.bias"]


@pytest.mark.parametrize("what", ["numbers", "texts", "pairs"])
def test_what_is_compressed_gets_no_more_for_less(tmp_path: Path, what: str) -> None:
    held = {"numbers": [0.5] * 3000, "texts": ["ab"] * 3000, "pairs": [[] for _ in range(3000)]}
    torch.save({"model": MODEL, what: held[what]}, tmp_path / "m.pt")
    with (
        zipfile.ZipFile(tmp_path / "m.pt") as was,
        zipfile.ZipFile(tmp_path / "n.pt", "w", zipfile.ZIP_DEFLATED) as new,
    ):
        for entry in was.infolist():
            new.writestr(entry.filename, was.read(entry))
    with pytest.raises(UnreadableError, match="more than"):
        mc.open(tmp_path / "n.pt")


@pytest.mark.parametrize("one", [b"]", b"}", b")\x85", b"N\x85"], ids=repr)
def test_cheap_containers_are_refused(tmp_path: Path, one: bytes) -> None:
    """Where each takes a byte or two and fifty of memory, however many bytes there are."""
    data = b"\x80\x02](" + one * 5000 + b"e."
    with zipfile.ZipFile(tmp_path / "m.pt", "w") as made:
        made.writestr("m/data.pkl", data)
        made.writestr("m/version", "3\n")
    with pytest.raises(UnreadableError, match=r"more than .* (containers|tuples)"):
        mc.open(tmp_path / "m.pt")


@pytest.mark.parametrize("kind", [bytes, str])
def test_a_large_blob_is_not_copied_over_and_over(kind: type) -> None:
    size = 64 << 20
    blob = bytes(size) if kind is bytes else "x" * size
    tracemalloc.start()
    pieces = writer.pickle({"blob": blob}, lambda storage: "")
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 1.8 * size
    assert pickle.loads(b"".join(pieces)) == {"blob": blob}
