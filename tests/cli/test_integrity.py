"""hash and verify, as people and pipes see them."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import modelctl as mc

from ..integrity.files import model, write
from .files import Cli


def test_hash(cli: Cli, tmp_path: Path) -> None:
    one, two = write(tmp_path / "a.pt", model()), write(tmp_path / "b.safetensors", model())
    result = cli("hash", one, two)
    known = mc.hash(one).hash
    assert result == (0, f"{known}  {one}\n{known}  {two}\n", "")
    result = cli("hash", one, "--tensors")
    assert result.out == mc.hash(one).manifest
    assert hashlib.sha256(result.out.encode()).hexdigest() == known.removeprefix("sha256:")


def test_one_of_several_that_cannot_be_read(cli: Cli, tmp_path: Path) -> None:
    one = write(tmp_path / "a.pt", model())
    result = cli("hash", one, tmp_path / "no.pt")
    assert result.code == 2
    assert result.out == f"{mc.hash(one).hash}  {one}\n"
    assert result.err.startswith("error: ")
    assert "no.pt" in result.err
    made = json.loads(cli("hash", one, tmp_path / "no.pt", "--json").out)["files"]
    assert [(Path(one["path"]).name, one["error"] is None) for one in made] == [
        ("a.pt", True),
        ("no.pt", False),
    ]
    result = cli("hash", one, one, "--tensors")
    assert (result.code, result.out) == (2, "")


def test_salvage(cli: Cli, tmp_path: Path) -> None:
    path = write(tmp_path / "a.pt", model())
    data = path.read_bytes()
    path.write_bytes(data[: data.index(b"data/3") + 70])
    result = cli("verify", path)
    assert (result.code, result.out) == (2, "")
    assert "--salvage" in result.err
    result = cli("verify", path, "--salvage", "-o", tmp_path / "b.pt")
    assert result.code == 1
    assert result.out.splitlines()[-1] == (
        f"{tmp_path / 'b.pt'}: 3 tensors kept, 2 lost: fc.weight, fc.bias"
    )
    for wrong in (("--salvage",), ("-o", "x.pt"), (path, "--salvage", "-o", "x.pt")):
        assert cli("verify", path, *wrong).code == 2


def test_a_pattern_in_the_place_of_a_file(cli: Cli, tmp_path: Path) -> None:
    one = write(tmp_path / "a.pt", model())
    for command in ("verify", "hash", "scan", "summary"):
        result = cli(command, "*.weight")
        assert (result.code, result.out) == (2, "")
        assert "is it a pattern of tensors?" in result.err
    result = cli("verify", one, "*.weight")
    assert result.code == 2
    assert "is it a pattern of tensors?" in result.out
    assert "--pattern" in result.err
