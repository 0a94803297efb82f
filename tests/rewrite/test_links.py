"""Links: an edit in place changes what the user named and nothing that others may use."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import modelctl as mc
from modelctl.errors import RefusedError
from modelctl.inspection.edits import EditReport

pytestmark = pytest.mark.skipif(os.name != "posix", reason="links of POSIX")


def state() -> dict[str, torch.Tensor]:
    return {f"module.{name}": torch.arange(4.0) for name in "ab"}


def shards(folder: Path) -> None:
    """A sharded checkpoint, each tensor in its own shard."""
    folder.mkdir(parents=True)
    index = {}
    for i, (name, tensor) in enumerate(state().items(), 1):
        index[name] = f"model-{i:05}-of-00002.safetensors"
        save_file({name: tensor}, folder / index[name])
    text = json.dumps({"metadata": {"total_size": 32}, "weight_map": index})
    (folder / "model.safetensors.index.json").write_text(text)


def in_place(path: Path, **options: bool) -> EditReport:
    return mc.edit(path, "strip-prefix", in_place=True, **options)


def contents(folder: Path) -> dict[str, object]:
    """Every file and link below a folder, as it is."""
    return {
        str(path.relative_to(folder)): os.readlink(path)
        if path.is_symlink()
        else path.read_bytes()
        if path.is_file()
        else None
        for path in folder.rglob("*")
    }


# ---------------------------------------------------------------------- a cache of the hub


def snapshot(tmp_path: Path) -> Path:
    """A file in a cache of the hub, as ``hf download`` leaves it there."""
    repo = tmp_path / "hub" / "models--org--name"
    folder = repo / "snapshots" / "abc"
    folder.mkdir(parents=True)
    (repo / "blobs").mkdir()
    save_file(state(), repo / "blobs" / "f00d")
    (folder / "model.safetensors").symlink_to(Path("../../blobs/f00d"))
    return folder


def cached_shards(tmp_path: Path) -> Path:
    repo = tmp_path / "hub" / "models--org--many"
    folder = repo / "snapshots" / "abc"
    shards(folder)
    (repo / "blobs").mkdir()
    for path in list(folder.iterdir()):
        path.rename(repo / "blobs" / f"blob-{path.name}")
        path.symlink_to(Path("../../blobs") / f"blob-{path.name}")
    return folder


def from_outside(tmp_path: Path) -> Path:
    (tmp_path / "mine.safetensors").symlink_to(snapshot(tmp_path) / "model.safetensors")
    return tmp_path / "mine.safetensors"


def folder_from_outside(tmp_path: Path) -> Path:
    (tmp_path / "mine").symlink_to(snapshot(tmp_path))
    return tmp_path / "mine"


def copied(tmp_path: Path) -> Path:
    """Where there are no links, the hub puts the files themselves into the snapshot."""
    path = snapshot(tmp_path) / "model.safetensors"
    data = path.read_bytes()
    path.unlink()
    path.write_bytes(data)
    return path


IN_CACHE: dict[str, Callable[[Path], Path]] = {
    "the snapshot": snapshot,
    "a file of it": lambda tmp_path: snapshot(tmp_path) / "model.safetensors",
    "its blob": lambda tmp_path: snapshot(tmp_path).parent.parent / "blobs" / "f00d",
    "a copy": copied,
    "shards": cached_shards,
    "their index": lambda tmp_path: cached_shards(tmp_path) / "model.safetensors.index.json",
    "a link to it": from_outside,
    "a link to its folder": folder_from_outside,
    "a file behind a link": lambda tmp_path: folder_from_outside(tmp_path) / "model.safetensors",
}


@pytest.mark.parametrize("follow", [False, True])
@pytest.mark.parametrize("which", IN_CACHE)
def test_a_cache_of_the_hub_is_never_edited_in_place(
    which: str, follow: bool, tmp_path: Path
) -> None:
    path = IN_CACHE[which](tmp_path)
    before = contents(tmp_path)
    with pytest.raises(RefusedError, match="cache of the Hugging Face hub") as e:
        in_place(path, follow_symlinks=follow)
    assert (e.value.hint or "").startswith("-o ")
    assert contents(tmp_path) == before


@pytest.mark.parametrize("which", IN_CACHE)
def test_what_is_in_a_cache_is_written_elsewhere(which: str, tmp_path: Path) -> None:
    path = IN_CACHE[which](tmp_path)
    before = contents(tmp_path / "hub")
    mc.edit(path, "strip-prefix", output=tmp_path / "out.safetensors")
    assert set(load_file(tmp_path / "out.safetensors")) == {"a", "b"}
    assert contents(tmp_path / "hub") == before


def test_a_folder_that_is_called_like_a_cache_is_none(tmp_path: Path) -> None:
    path = tmp_path / "models--mine" / "run" / "f.pt"
    path.parent.mkdir(parents=True)
    torch.save(state(), path)
    in_place(path)
    assert set(torch.load(path)) == {"a", "b"}


# ---------------------------------------------------------------------- other links


@pytest.fixture
def linked(tmp_path: Path) -> Path:
    (tmp_path / "shared").mkdir()
    torch.save(state(), tmp_path / "shared" / "f.pt")
    (tmp_path / "link.pt").symlink_to("shared/f.pt")
    return tmp_path / "link.pt"


@pytest.mark.parametrize("dry_run", [False, True])
def test_in_place_on_a_link_is_refused(dry_run: bool, linked: Path) -> None:
    before = contents(linked.parent)
    with pytest.raises(RefusedError, match=f"{linked}: a link to .*/shared/f.pt") as e:
        in_place(linked, dry_run=dry_run)
    assert "--follow-symlinks" in (e.value.hint or "")
    assert contents(linked.parent) == before


def test_one_link_of_several_sources_and_nothing_is_written(linked: Path) -> None:
    torch.save(state(), linked.with_name("a.pt"))
    before = contents(linked.parent)
    with pytest.raises(RefusedError, match="a link to"):
        mc.edit([linked.with_name("a.pt"), linked], "strip-prefix", in_place=True)
    assert contents(linked.parent) == before


def test_in_place_through_a_link(linked: Path) -> None:
    report = in_place(linked, follow_symlinks=True)
    assert os.readlink(linked) == "shared/f.pt"
    assert set(torch.load(linked)) == {"a", "b"}
    assert report.output == str(linked.with_name("shared") / "f.pt")
    assert contents(linked.parent).keys() == {"shared", "shared/f.pt", "link.pt"}


def test_an_output_that_is_a_link(linked: Path) -> None:
    old = linked.read_bytes()
    report = mc.edit(linked, "strip-prefix", output=linked, overwrite=True)
    assert not linked.is_symlink()
    assert set(torch.load(linked)) == {"a", "b"}
    assert (linked.parent / "shared" / "f.pt").read_bytes() == old
    assert any("was a link to" in note.text for note in report.notes)


def test_a_folder_on_the_way_may_be_a_link(linked: Path) -> None:
    linked.with_name("way").symlink_to("shared")
    in_place(linked.parent / "way" / "f.pt")
    assert set(torch.load(linked)) == {"a", "b"}


@pytest.mark.parametrize("slash", ["", "/"])
def test_a_folder_that_is_a_link(slash: str, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    shards(tmp_path / "shared")
    (tmp_path / "link").symlink_to("shared")
    before = contents(tmp_path)
    with pytest.raises(RefusedError, match="a link to") as e:
        mc.edit(f"{tmp_path}/link{slash}", "strip-prefix", in_place=True)
    assert contents(tmp_path) == before
    hint = (e.value.hint or "").split()  # leaves what others may use as it is
    mc.edit(tmp_path / "link", "strip-prefix", output=hint[hint.index("-o") + 1], overwrite=True)
    assert {name: before[name] for name in before if name.startswith("shared/")} == {
        f"shared/{name}": one for name, one in contents(tmp_path / "shared").items()
    }
    in_place(tmp_path / "link", follow_symlinks=True)
    with mc.open(tmp_path / "shared") as ckpt:
        assert set(ckpt.state_dict()) == {"a", "b"}
    assert (tmp_path / "link").is_symlink()


@pytest.mark.parametrize("follow", [False, True])
@pytest.mark.parametrize("named", ["folder", "index"])
@pytest.mark.parametrize("which", ["model-00001-of-00002.safetensors", "model.safetensors.index.json"])  # fmt: skip # noqa: E501
def test_shards_that_are_links(which: str, named: str, follow: bool, tmp_path: Path) -> None:
    """What would new shards of other names mean to them?"""
    shards(tmp_path / "m")
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "m" / which).rename(tmp_path / "elsewhere" / which)
    (tmp_path / "m" / which).symlink_to(tmp_path / "elsewhere" / which)
    path = tmp_path / "m" if named == "folder" else tmp_path / "m" / "model.safetensors.index.json"
    before = contents(tmp_path)
    with pytest.raises(mc.ModelctlError, match="link"):
        in_place(path, follow_symlinks=follow)
    assert contents(tmp_path) == before


# ---------------------------------------------------------------------- hard links


@pytest.mark.parametrize("others", [1, 2])
def test_other_names_keep_the_old_file(others: int, tmp_path: Path) -> None:
    path = tmp_path / "f.pt"
    torch.save(state(), path)
    for i in range(others):
        os.link(path, tmp_path / f"other{i}")
    report = in_place(path)
    told = [note.text for note in report.notes if "hard links" in note.text]
    words = (
        "1 other name (hard links): keeps" if others == 1 else "2 other names (hard links): keep"
    )
    assert told == [f"{path} has {words} the old file"]
    assert set(torch.load(path)) == {"a", "b"}
    assert set(torch.load(tmp_path / "other0")) == {"module.a", "module.b"}
    assert not any("hard links" in note.text for note in in_place(path).notes)


def test_shards_with_other_names(tmp_path: Path) -> None:
    shards(tmp_path / "m")
    shard = tmp_path / "m" / "model-00001-of-00002.safetensors"
    os.link(shard, tmp_path / "other")
    report = in_place(tmp_path / "m")
    assert any(str(shard) in note.text and "hard" in note.text for note in report.notes)
    assert set(load_file(tmp_path / "other")) == {"module.a"}


def test_an_output_with_other_names(tmp_path: Path) -> None:
    torch.save(state(), tmp_path / "in.pt")
    (tmp_path / "out.pt").write_bytes(b"old")
    os.link(tmp_path / "out.pt", tmp_path / "other")
    report = mc.edit(tmp_path / "in.pt", "strip-prefix", output=tmp_path / "out.pt", overwrite=True)
    assert any("out.pt has 1 other name" in note.text for note in report.notes)
    assert (tmp_path / "other").read_bytes() == b"old"
