"""summary of several files: a row each."""

from __future__ import annotations

import csv
import json
import os
import pickle
from pathlib import Path

import torch

from tests.cli.files import Cli, net, training, write


class Runs:
    def __reduce__(self) -> tuple[object, tuple[str]]:
        return os.mkdir, ("made",)


def test_a_row_each(cli: Cli, place: Path) -> None:
    write(place / "a.pt", training())
    write(place / "b.pt", net())
    torch.save({"w": torch.ones(2), "x": Runs()}, "c.pt")
    done = cli("summary", "a.pt", "b.pt", "c.pt", "--format", "csv")
    rows = list(csv.DictReader(done.out.splitlines()))
    assert done.code == 0
    assert [row["file"] for row in rows] == ["a.pt", "b.pt", "c.pt"]
    assert [row["epoch"] for row in rows] == ["3", "", ""]
    assert [row["lr"] for row in rows] == ["0.1", "", ""]
    for row in rows:
        alone = json.loads(cli("summary", row["file"], "--json").out)
        assert row["params"] == str(alone["totals"]["params"])
        assert row["tensors"] == str(alone["totals"]["tensors"])
        assert row["size"] == str(os.path.getsize(row["file"]))
    assert ["!" in row["findings"] for row in rows] == [False, False, True]
    assert "mkdir" in rows[2]["findings"]
    assert not Path("made").exists()


def test_one_that_cannot_be_read_hides_none(cli: Cli, place: Path) -> None:
    write(place / "a.pt", net())
    (place / "bad.pt").write_bytes(pickle.dumps({"a": 1})[:3])
    write(place / "c.pt", net())
    done = cli("summary", "a.pt", "bad.pt", "c.pt", "gone.pt")
    assert done.code == 2
    assert [line.split()[0] for line in done.out.splitlines()[-4:]] == [
        *("a.pt", "bad.pt", "c.pt", "gone.pt")
    ]
    assert "no such file" in done.out
    files = json.loads(cli("summary", "a.pt", "bad.pt", "--json").out)["files"]
    assert files[0]["error"] is None
    assert files[0]["totals"]["tensors"] == len(net())
    assert files[1]["error"]["kind"] in ("unreadable", "unsupported")


def test_values_of_several(cli: Cli, place: Path) -> None:
    torch.save({"w": torch.tensor([1.0, float("nan")])}, "nan.pt")
    write(place / "a.pt", net())
    assert cli("summary", "a.pt", "nan.pt").code == 0
    done = cli("summary", "a.pt", "nan.pt", "--stats")
    assert done.code == 1
    assert "1 tensor with NaN or Inf" in done.out
    assert cli("summary", "a.pt", "nan.pt", "--input-size", "1,3").code == 2
