"""A folder as an output: what becomes of shards, and of their format, is said."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

import modelctl as mc
from modelctl.errors import WriteError


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


@pytest.mark.parametrize(
    ("name", "whole_folder"),
    [
        ("optimizer.pt", False),  # the folder itself takes it along
        ("optimizer_1.bin", False),
        ("optimizer_1.bin", True),
        ("policy.optimizer.pth", True),
    ],
)
def test_an_optimizer_beside_the_weights_is_named(
    tmp_path: Path, name: str, whole_folder: bool
) -> None:
    """One that an edit of the weights does not reach."""
    net = torch.nn.Linear(3, 2)
    optimizer = torch.optim.Adam(net.parameters())
    folder = tmp_path / "checkpoint-2"
    folder.mkdir()
    model = folder / "model.safetensors"
    torch.save(net.state_dict(), tmp_path / "model.pt")
    mc.edit(tmp_path / "model.pt", "convert", output=model)
    torch.save(optimizer.state_dict(), folder / name)
    source = folder if whole_folder else model

    def warned(edit: str, of: str, **where: object) -> list[tuple[str, str | None]]:
        options = {"map" if edit == "rename" else "pattern": of}
        notes = mc.edit(source, {"do": edit, **options}, **where).notes  # type: ignore[call-overload]
        return [(note.text, note.way_out) for note in notes if note.level == "warning"]

    ((text, way_out),) = warned("drop", "bias", dry_run=True)
    assert text.startswith(f"{name} beside model.safetensors is not read")
    expected = f"--model {model} --optimizer {folder / name}"
    assert (f"name the folder: {folder}" if name == "optimizer.pt" else expected) in (way_out or "")
    assert len(warned("rename", "weight=w", output=tmp_path / "o.pt")) == 1
    assert warned("keep", "*", output=tmp_path / "o.safetensors") == []
    assert len(warned("drop", "bias", in_place=True)) == 1
    (folder / name).unlink()
    assert warned("rename", "weight=w", in_place=True) == []


def test_a_checkpoint_with_its_own_optimizer_needs_none_beside(tmp_path: Path) -> None:
    net = torch.nn.Linear(3, 2)
    saved = torch.optim.Adam(net.parameters()).state_dict()
    torch.save({"model": net.state_dict(), "optimizer": saved}, tmp_path / "in.pt")
    torch.save(saved, tmp_path / "optimizer.pt")
    report = mc.edit(tmp_path / "in.pt", {"do": "drop", "pattern": "bias"}, dry_run=True)
    assert report.notes == []


@pytest.mark.parametrize("output", ["{0}", "{0}/", "memory://{1}/it", "memory://{1}/it/"])
@pytest.mark.parametrize("to", [None, "dcp"])
def test_a_dcp_folder_that_is_its_own_output_is_replaced(tmp_path, output, to) -> None:
    """Not written into itself, as a file or a folder of its name."""
    pytest.importorskip("fsspec")
    output = output.format(tmp_path / "it", tmp_path.name)
    source = output.rstrip("/")
    torch.save({"w": torch.ones(3), "v": torch.zeros(2)}, tmp_path / "in.pt")
    mc.edit(tmp_path / "in.pt", "convert", output=source, to="dcp", overwrite=True)
    keep = {"do": "keep", "pattern": "w"}
    with pytest.raises(WriteError, match="exists already"):
        mc.edit(source, keep, output=output, to=to)
    mc.edit(source, keep, output=output, to=to, overwrite=True)
    with mc.open(source) as ckpt:
        assert list(ckpt.state_dict()) == ["w"]
        assert ckpt["w"].tobytes() == torch.ones(3).numpy().tobytes()
        assert ckpt.origin is not None
        assert ckpt.origin.format == "dcp"
    mc.edit(source, "convert", output=f"{source}/", to="torch")  # another format: beside it
    with mc.open(f"{source}/it.pt") as ckpt:
        assert list(ckpt.state_dict()) == ["w"]
