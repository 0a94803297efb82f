"""A folder as an output: what becomes of shards, and of their format, is said."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

import modelctl as mc


@pytest.fixture
def shards(tmp_path: Path) -> Path:
    """Four shards of torch's."""
    torch.save({f"t{i}": torch.ones(2000) for i in range(4)}, tmp_path / "in.pt")
    folder = tmp_path / "four"
    mc.edit(tmp_path / "in.pt", "convert", output=f"{folder}/", to="torch", max_shard_size="9kB")
    assert len(list(folder.glob("*.bin"))) == 4
    return folder


def told(source: Path, output: Path | str, **options: str) -> list[str]:
    report = mc.edit(source, "convert", output=output, overwrite=True, **options)  # type: ignore[call-overload]
    return [note.text for note in report.notes if "became" in note.text]


def test_shards_become_one_file(shards: Path, tmp_path: Path) -> None:
    one = "4 shards became one file: --max-shard-size says how large"
    assert told(shards, tmp_path / "out.pt") == [one]
    assert told(shards, f"{tmp_path}/out/", to="torch") == [one]


def test_four_become_two(shards: Path, tmp_path: Path) -> None:
    (line,) = told(shards, f"{tmp_path}/out/", to="torch", max_shard_size="17kB")
    assert line.startswith("4 shards became 2 shards")


def test_as_many_as_before(shards: Path, tmp_path: Path) -> None:
    assert told(shards, f"{tmp_path}/out/", to="torch", max_shard_size="9kB") == []


def test_a_folder_stays_what_it_is(shards: Path, tmp_path: Path) -> None:
    assert told(shards, f"{tmp_path}/out/") == []
    names = {one.name for one in Path(shards).iterdir()}
    assert {one.name for one in (tmp_path / "out").iterdir()} == names


def test_another_format(shards: Path, tmp_path: Path) -> None:
    (line,) = told(shards, f"{tmp_path}/out/", max_shard_size="9kB")
    assert line == "torch zip became safetensors, which a folder takes: --to torch keeps it"
    assert told(shards, f"{tmp_path}/named/", to="safetensors", max_shard_size="9kB") == []


def test_a_file_that_goes_into_a_folder(tmp_path: Path) -> None:
    torch.save({"a": torch.ones(3)}, tmp_path / "in.pt")
    assert told(tmp_path / "in.pt", f"{tmp_path}/out/") == []
    (line,) = told(tmp_path / "in.pt", f"{tmp_path}/shards/", max_shard_size="1GB")
    assert "--to torch" in line
    assert told(tmp_path / "in.pt", tmp_path / "out.safetensors") == []
