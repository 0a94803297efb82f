"""Where edits go: what is replaced in place, what is refused before anything is written."""

from __future__ import annotations

import json
import os
import zipfile
from pathlib import Path
from typing import Any

import pytest

import modelctl as mc
from modelctl.core.checkpoint import Checkpoint
from modelctl.core.nodes import ordered_dict
from modelctl.errors import ModelctlError, RefusedError, UsageError, WriteError
from tests.cli.files import Cli, net, tensor, write
from tests.rewrite.test_edit import names, tree

PREFIX = {"do": "add-prefix", "prefix": "m"}
RENAMED = [f"m.{name}" for name in net()]


# ------------------------------------------------------------------ the one file of a folder


@pytest.mark.parametrize(
    "name", ["weights.pt", "foo.safetensors", "x.ckpt", "adapter_model.safetensors"]
)
def test_the_file_that_was_found_in_a_folder_is_replaced(place: Path, name: str) -> None:
    os.mkdir("d")
    write(place / "d" / name, net())
    dry = mc.edit("d", PREFIX, in_place=True, dry_run=True)
    done = mc.edit("d", PREFIX, in_place=True)
    assert (dry.output, done.output) == (f"d/{name}", f"d/{name}")
    assert os.listdir("d") == [name]
    assert names(f"d/{name}") == names("d") == RENAMED


def test_it_becomes_shards_where_those_are_asked_for(place: Path) -> None:
    os.mkdir("d")
    write(place / "d" / "weights.pt", net())
    done = mc.edit("d", PREFIX, in_place=True, max_shard_size=700)
    assert done.output == "d/weights.pt.index.json"
    assert not Path("d/weights.pt").exists()
    assert len(os.listdir("d")) == done.files_written
    assert sorted(names("d")) == sorted(RENAMED)


def test_its_name_must_not_lie(place: Path) -> None:
    os.mkdir("d")
    write(place / "d" / "weights.pt", net())
    with pytest.raises(UsageError, match="would lie about safetensors"):
        mc.edit("d", PREFIX, in_place=True, to="safetensors")


# ------------------------------------------------------------------ an index keeps its name


def shards(index: str, *files: str) -> None:
    """Some tensors in each of the files, which the index names."""
    entries = list(net().items())
    weight_map = {}
    for i, file in enumerate(files):
        part = dict(entries[i :: len(files)])
        write(Path(file), part)
        weight_map.update(dict.fromkeys(part, file))
    Path(index).write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))


@pytest.mark.parametrize(
    ("index", "files"),
    [
        ("model.safetensors.index.fp16.json", ["model.fp16-{}.safetensors"]),
        ("model.safetensors.index.fp16.json", ["model-{}.fp16.safetensors"]),
        ("x.fp16.index.json", ["model-{}.safetensors"]),
        ("pytorch_model.bin.index.json", ["pytorch_model-{}.bin"]),
    ],
)
def test_shards_under_another_name(place: Path, index: str, files: list[str]) -> None:
    before = [files[0].format(f"0000{i}-of-00002") for i in (1, 2)]
    shards(index, *before)
    done = mc.edit(index, PREFIX, in_place=True)
    assert done.output == index
    assert sorted(names(index)) == sorted(RENAMED)
    assert not any(Path(name).exists() for name in before)
    assert "new shards; the old ones are gone" in done.notes[-1].text
    assert len(os.listdir()) == done.files_written
    mc.edit(index, PREFIX, in_place=True)
    assert len(os.listdir()) == done.files_written
    assert all(Path(name).exists() for name in before)  # their names were free again


def test_shards_of_other_names_stay_and_that_is_said(place: Path) -> None:
    shards("model.safetensors.index.json", "s1.safetensors", "s2.safetensors")
    done = mc.edit("model.safetensors.index.json", PREFIX, in_place=True)
    assert Path("s1.safetensors").exists()
    assert done.notes[-1].level == "warning"
    assert "the old ones stay" in done.notes[-1].text
    assert "s1.safetensors, s2.safetensors" in done.notes[-1].text
    assert sorted(names("model.safetensors.index.json")) == sorted(RENAMED)


def test_compressed_shards_stay_about_as_big(place: Path) -> None:
    shards("pytorch_model.bin.index.json", *(f"pytorch_model-0000{i}-of-00002.bin" for i in (1, 2)))
    for path in Path().glob("*.bin"):
        with zipfile.ZipFile(path) as old:
            members = {name: old.read(name) for name in old.namelist()}
        with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as new:
            for name, data in members.items():
                new.writestr(name, data)
    done = mc.edit(".", PREFIX, in_place=True)
    assert done.files_written == 3
    assert sorted(names(".")) == sorted(RENAMED)


def test_a_shard_is_not_edited_away_from_its_index(place: Path) -> None:
    files = [f"model-0000{i}-of-00002.safetensors" for i in (1, 2)]
    shards("model.safetensors.index.json", *files)
    before = tree()
    for dry_run in (True, False):
        with pytest.raises(RefusedError, match="would no longer fit") as e:
            mc.edit(files[0], PREFIX, in_place=True, dry_run=dry_run)
        assert e.value.hint is not None
        assert e.value.hint.endswith(" model.safetensors.index.json")
    assert tree() == before
    mc.edit(files[0], {"do": "freeze", "pattern": "*"}, in_place=True)  # its names stay
    assert sorted(names(".")) == sorted(net())


# ------------------------------------------------------------------ refused before


@pytest.mark.parametrize("dry_run", [True, False])
def test_a_file_is_not_edited_twice_at_once(place: Path, dry_run: bool) -> None:
    os.mkdir("d")
    write(place / "d" / "x.pt", net())
    os.symlink("d/x.pt", "link.pt")
    before = tree()
    for other in ("d/x.pt", "./d/../d/x.pt", "d", "link.pt"):
        with pytest.raises(UsageError, match="are one file"):
            mc.edit(["d/x.pt", other], PREFIX, in_place=True, dry_run=dry_run, follow_symlinks=True)
    assert tree() == before


def test_all_outputs_are_free_before_the_first_is_written(place: Path) -> None:
    for name in ("a.pt", "b.pt"):
        write(place / name, net())
    os.mkdir("out")
    write(place / "out" / "b.pt", net())
    before = tree()
    for dry_run in (True, False):
        with pytest.raises(WriteError, match=r"out/b\.pt: exists already"):
            mc.edit(["a.pt", "b.pt"], PREFIX, output="out", dry_run=dry_run)
    assert tree() == before


def test_what_was_written_before_an_error_is_said(
    place: Path, monkeypatch: pytest.MonkeyPatch, cli: Cli
) -> None:
    for name in ("a.pt", "b.pt"):
        write(place / name, net())
    os.mkdir("out")
    from modelctl.storage import staging

    whole = staging._Output.place

    def fails(self: Any) -> None:
        if self.target.name == "b.pt":
            raise OSError(5, "the disk is gone")
        whole(self)

    monkeypatch.setattr(staging._Output, "place", fails)
    with pytest.raises(ModelctlError) as e:
        mc.edit(["a.pt", "b.pt"], PREFIX, output="out")
    assert e.value.written == ["out/a.pt"]
    os.unlink("out/a.pt")
    done = cli("add-prefix", "a.pt", "b.pt", "--prefix", "m", "-o", "out", "--json")
    assert done.code == 2
    assert json.loads(done.out)["error"]["written"] == ["out/a.pt"]


@pytest.mark.parametrize(
    ("output", "there"),
    [
        ("out/", "out/model.safetensors"),
        ("out", "out/model.safetensors.index.json"),
        ("out/model.safetensors.index.json", "out/model.safetensors"),
        ("out.pt", "out.pt"),
        ("no/such/out.pt", ""),
        ("no/such/", ""),
        ("file/", "file"),
        ("free/", "free/other.txt"),
        ("new/model.safetensors.index.json", ""),
    ],
)
@pytest.mark.parametrize("size", [None, "700", ""])
def test_a_dry_run_says_what_the_run_says(
    place: Path, cli: Cli, output: str, there: str, size: str | None
) -> None:
    write(place / "a.pt", net())
    if there:
        Path(there).parent.mkdir(exist_ok=True)
        Path(there).write_text("{}")
    words = ["convert", "a.pt", "-o", output]
    words += [] if size is None else [f"--max-shard-size={size}"]
    dry = cli(*words, "--dry-run")
    wet = cli(*words)
    assert dry.code == wet.code
    if wet.code:
        assert dry.err == wet.err


def test_split_too(place: Path, cli: Cli, ddp: Path) -> None:
    os.mkdir("parts")
    Path("parts/optimizer.pt").touch()
    dry, wet = (cli("split", ddp, "-o", "parts", *more) for more in (["--dry-run"], []))
    assert (dry.code, dry.err) == (wet.code, wet.err)
    assert "parts/optimizer.pt: exists already" in wet.err


def test_a_size_of_many_digits(place: Path) -> None:
    write(place / "a.pt", net())
    with pytest.raises(UsageError, match="is no size"):
        mc.edit("a.pt", PREFIX, output="out/", max_shard_size="9" * 400 + "GB")
    mc.edit("a.pt", PREFIX, output="out/", max_shard_size="9" * 25 + "TB")
    assert os.listdir("out") == ["model.safetensors"]


def test_an_empty_path_is_none(place: Path, cli: Cli) -> None:
    write(place / "m.pt", net())
    before = tree()
    where = "m.pt", "-o", ""
    for words in (
        *(("ls", ""), ("summary", ""), ("show", ""), ("diff", "", "m.pt"), ("diff", "m.pt", "")),
        *(("convert", *where), ("convert", "m.pt", "--output="), ("split", *where)),
        ("strip-head", "", "--in-place"),
        ("add-prefix", "m.pt", "", "--prefix", "p", "--in-place"),
        *(("merge", "--model", "", "-o", "x.pt"), ("merge", "--model=", "-o", "x.pt")),
        *(("merge", "--model", *where), ("match", "m.pt", "--like", "")),
    ):
        done = cli(*words)
        assert done.code == 2, words
        assert "empty path" in done.err, (words, done.err)
    for call in (
        lambda: mc.open(""),
        lambda: mc.save(Checkpoint(ordered_dict({"a": tensor(2)})), ""),
        lambda: mc.edit("", PREFIX, in_place=True),
        lambda: mc.edit("m.pt", PREFIX, output=""),
        lambda: mc.merge_files("m.pt", output=""),
        lambda: mc.split_file("m.pt", output=""),
    ):
        with pytest.raises(UsageError, match="empty path"):
            call()
    assert tree() == before
