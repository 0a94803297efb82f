"""Editing commands: where outputs go, what stays, and that records and history are written."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
import torch

import modelctl as mc
from tests.cli.files import Cli, net, tensor, training, write


def tree(folder: Path) -> dict[str, bytes]:
    return {
        path.relative_to(folder).as_posix(): path.read_bytes()
        for path in folder.rglob("*")
        if path.is_file()
    }


EDITS = [
    ("strip-prefix", "ddp.pt"),
    ("strip-head", "ddp.pt"),
    ("freeze", "ddp.pt", "--pattern", "*conv1.*"),
    ("convert", "ddp.pt", "--weights-only"),
    ("add-prefix", "ddp.pt", "--prefix", "m"),
    ("rename", "ddp.pt", "--map", "module.*=net.*"),
    ("keep", "ddp.pt", "--pattern", "module.layer1"),
    ("drop", "ddp.pt", "--pattern", "module.layer1"),
    ("unfreeze", "frozen.pt", "--pattern", "module.layer1"),
    ("apply", "r.toml", "ddp.pt"),
]


@pytest.mark.parametrize("argv", EDITS, ids=lambda argv: argv[0])
def test_a_dry_run_writes_nothing(cli: Cli, ddp: Path, place: Path, argv: tuple[str, ...]) -> None:
    Path("r.toml").write_text('[[edit]]\ndo = "strip-prefix"\n')
    assert cli("freeze", "ddp.pt", "--pattern", "module.layer1", "-o", "frozen.pt").code == 0
    before = tree(place)
    for where in ((), ("-o", "out.pt"), ("--in-place",)):
        result = cli(*argv, "--dry-run", *where)
        assert result.code == 0, result.err
        assert "dry run, nothing written" in result.out
        assert tree(place) == before
    wet = cli(*argv, "-o", "out.pt")
    assert wet.code == 0
    refused, run = cli(*argv, "-o", "out.pt", "--dry-run"), cli(*argv, "-o", "out.pt")
    assert (refused.code, refused.err) == (run.code, run.err)
    dry = cli(*argv, "-o", "out.pt", "--dry-run", "--overwrite")
    assert dry.out.splitlines()[1:] == wet.out.splitlines()[1:]


def test_a_dry_run_refuses_what_the_run_would(cli: Cli, ddp: Path) -> None:
    assert cli("convert", ddp, "-o", "out.safetensors", "--dry-run").code == 2
    assert cli("merge", "--model", ddp, "--epoch", "4", "--dry-run").code == 0


def test_an_existing_file_needs_overwrite(cli: Cli, ddp: Path, flat: Path) -> None:
    before = flat.read_bytes()
    result = cli("strip-prefix", ddp, "-o", flat)
    assert result.code == 2
    assert "--overwrite" in result.err
    assert flat.read_bytes() == before
    assert cli("strip-prefix", ddp, "-o", flat, "--overwrite").code == 0
    assert flat.read_bytes() != before


def test_in_place(cli: Cli, ddp: Path, place: Path) -> None:
    ddp.chmod(0o604)
    Path("link.pt").symlink_to("ddp.pt")
    refused = cli("strip-prefix", "link.pt", "--in-place")
    assert (refused.code, "--follow-symlinks" in refused.err) == (2, True)
    assert cli("strip-prefix", "link.pt", "--in-place", "--follow-symlinks").code == 0
    assert Path("link.pt").is_symlink()
    assert ddp.stat().st_mode & 0o777 == 0o604
    assert sorted(os.listdir()) == ["ddp.pt", "link.pt"]
    loaded = torch.load(ddp, weights_only=True)
    assert next(iter(loaded["state_dict"])) == "conv1.weight"
    assert loaded["epoch"] == 3
    before = ddp.read_bytes()
    assert cli("strip-head", ddp, "--head", "zzz", "--in-place").code == 2
    assert ddp.read_bytes() == before


def test_in_place_keeps_the_format(cli: Cli, flat: Path) -> None:
    assert cli("convert", flat, "-o", "a.safetensors").code == 0
    assert cli("freeze", "a.safetensors", "--pattern", "fc", "--in-place").code == 0
    with mc.open("a.safetensors") as ckpt:
        assert ckpt.origin is not None
        assert ckpt.origin.format == "safetensors"
    os.rename("a.safetensors", "odd.pt")
    assert cli("freeze", "odd.pt", "--pattern", "bn1", "--in-place").code == 0
    with mc.open("odd.pt") as ckpt:
        assert ckpt.origin is not None
        assert ckpt.origin.format == "safetensors"


def test_several_sources(cli: Cli, place: Path) -> None:
    for name in ("a.pt", "b.th", "c.safetensors"):
        write(place / (name if name != "b.th" else "b.pt"), net("module."))
    os.rename("b.pt", "b.th")
    os.mkdir("out")
    assert cli("strip-prefix", "a.pt", "b.th", "c.safetensors", "-o", "out").code == 0
    assert sorted(os.listdir("out")) == ["a.pt", "b.th.pt", "c.safetensors"]
    for name in os.listdir("out"):
        with mc.open(f"out/{name}") as ckpt:
            assert list(ckpt.state_dict()) == list(net())
    to = cli("strip-prefix", "a.pt", "b.th", "-o", "out", "--to", "safetensors")
    assert to.code == 0
    assert {"a.safetensors", "b.safetensors"} < set(os.listdir("out"))
    assert cli("strip-prefix", "a.pt", "b.th", "--in-place").code == 0
    with mc.open("b.th") as ckpt:
        assert list(ckpt.state_dict()) == list(net())


def test_one_source_and_a_folder(cli: Cli, place: Path) -> None:
    """It takes the source's name there; with a size, the Hugging Face layout: shards and index."""
    write(place / "a.pt", net("module."))
    result = cli("strip-prefix", "a.pt", "-o", "out/")
    assert result.code == 0
    assert result.out.startswith("a.pt -> out/a.pt ")
    assert cli("convert", "a.pt", "-o", "out", "--to", "safetensors").code == 0
    assert sorted(os.listdir("out")) == ["a.pt", "a.safetensors"]
    result = cli("convert", "a.pt", "-o", "shards", "--max-shard-size", "700")
    assert result.code == 0
    assert result.out.startswith("a.pt -> shards/model.safetensors.index.json ")
    assert "; 3 files, " in result.out
    with mc.open("a.pt") as a, mc.open("shards") as b:
        assert not mc.diff(a, b).differs
    result = cli("rename", "shards", "--map", "module.fc=module.head", "--in-place")
    assert result.code == 0
    assert cli("convert", "shards", "-o", "whole.pt").code == 0
    with mc.open("whole.pt") as ckpt:
        assert "module.head.bias" in ckpt.state_dict()
    assert cli("convert", "a.pt", "-o", "b.pt", "--max-shard-size", "1kB").code == 2
    assert cli("convert", "a.pt", "-o", "c/", "--max-shard-size", "lots").code == 2
    assert cli("convert", "a.pt", "a.pt", "-o", "out", "--max-shard-size", "1kB").code == 2


@pytest.mark.parametrize("sources", [("a.pt",), ("a.pt", "b.pt")])
def test_a_folder_is_made_with_its_parents(cli: Cli, place: Path, sources: tuple[str, ...]) -> None:
    for name in sources:
        write(place / name, net("module."))
    words = "strip-prefix", *sources, "-o", "run/1/clean/"
    dry = json.loads(cli(*words, "--dry-run", "--json").out)
    assert not Path("run").exists()
    done = json.loads(cli(*words, "--json").out)
    for one, other in zip(dry.get("files", [dry]), done.get("files", [done]), strict=True):
        assert one["output"] == other["output"]
    assert sorted(os.listdir("run/1/clean")) == list(sources)
    again = cli(*words)
    assert (again.code, again.err) == (cli(*words, "--dry-run").code, cli(*words, "--dry-run").err)
    assert "exists already" in again.err


def test_shards_and_parts_make_their_folders_parents(cli: Cli, place: Path) -> None:
    write(place / "a.pt", training())
    write(place / "m.pt", net())
    words = "convert", "m.pt", "-o", "x/y/z/", "--max-shard-size", "700"
    assert cli(*words, "--dry-run").code == cli(*words).code == 0
    words = "split", "a.pt", "-o", "p/q/parts"
    assert cli(*words, "--dry-run").code == cli(*words).code == 0
    words = "merge", "--model", "m.pt", "--epoch", "3", "-o", "u/v/"
    assert cli(*words, "--dry-run").code == cli(*words).code == 0
    assert Path("u/v/m.pt").is_file()


def test_a_folder_that_was_made_for_nothing_goes_again(cli: Cli, place: Path) -> None:
    write(place / "a.pt", training())
    done = cli("convert", "a.pt", "-o", "x/y/", "--to", "safetensors")
    assert done.code == 2
    assert os.listdir() == ["a.pt"]
    (place / "file").write_text("")
    for flags in ((), ("--dry-run",)):
        done = cli("convert", "a.pt", "-o", "file/y/", *flags)
        assert (done.code, "is no directory" in done.err) == (2, True)


@pytest.mark.parametrize("flags", [(), ("--overwrite",), ("--dry-run",)])
def test_sources_of_one_name_do_not_overwrite_each_other(
    cli: Cli, place: Path, flags: tuple[str, ...]
) -> None:
    for folder in ("x", "y", "out"):
        os.mkdir(folder)
    for folder in ("x", "y"):
        write(place / folder / "a.pt", net("module."))
    result = cli("strip-prefix", "x/a.pt", "y/a.pt", "-o", "out", *flags)
    assert result.code == 2
    assert "2 sources would go to out/a.pt" in result.err
    assert os.listdir("out") == []
    write(place / "x" / "a.safetensors", net("module."))
    to = ("--to", "safetensors")
    assert cli("strip-prefix", "x/a.pt", "x/a.safetensors", "-o", "out", *to).code == 2


def test_history(cli: Cli, ddp: Path) -> None:
    assert cli("strip-prefix", ddp, "-o", "1.pt").code == 0
    assert cli("strip-head", "1.pt", "--optimizer", "drop", "-o", "2.pt").code == 0
    assert cli("freeze", "2.pt", "--pattern", "conv1", "-o", "3.pt").code == 0
    assert cli("convert", "3.pt", "-o", "4.safetensors", "--weights-only").code == 0
    lines = cli("summary", "4.safetensors").out.splitlines()
    assert [line for line in lines if line.startswith(" done: ")] == [
        " done: strip-prefix",
        " done: strip-head --optimizer drop",
        " done: freeze --pattern conv1",
        " done: convert --weights-only",
    ]
    assert cli("strip-prefix", ddp, "-o", "5.pt", "--no-history").code == 0
    assert "done:" not in cli("summary", "5.pt").out
    loaded = torch.load("5.pt", weights_only=True)["state_dict"]
    assert not [key for key in getattr(loaded, "_metadata", {}).get("", {}) if "modelctl" in key]


def test_a_recipe_is_the_commands(cli: Cli, ddp: Path) -> None:
    Path("r.toml").write_text(
        '[[edit]]\ndo = "strip-prefix"\n\n[[edit]]\ndo = "strip-head"\n\n'
        '[[edit]]\ndo = "freeze"\npattern = "*"\nexclude = "layer1"\nbn-eval = true\n'
    )
    assert cli("apply", "r.toml", ddp, "-o", "one.pt").code == 0
    assert cli("strip-prefix", ddp, "-o", "1.pt").code == 0
    assert cli("strip-head", "1.pt", "-o", "2.pt").code == 0
    freeze = ("freeze", "2.pt", "--pattern", "*", "--exclude", "layer1", "--bn-eval")
    assert cli(*freeze, "-o", "3.pt").code == 0
    assert cli("diff", "one.pt", "3.pt").code == 0
    one, three = (torch.load(name, weights_only=True) for name in ("one.pt", "3.pt"))
    assert one["state_dict"]._metadata == three["state_dict"]._metadata
    for name, value in three["state_dict"].items():
        assert torch.equal(one["state_dict"][name], value)
    assert one["optimizer"]["param_groups"] == three["optimizer"]["param_groups"]


def test_maps_from_a_file(cli: Cli, ddp: Path) -> None:
    Path("maps.txt").write_text("# names of the other library\nmodule.*=*\n\nlayer1=stage1\n")
    assert cli("rename", ddp, "--map-file", "maps.txt", "-o", "1.pt").code == 0
    maps = ("--map", "module.*=*", "--map", "layer1=stage1")
    assert cli("rename", ddp, *maps, "-o", "2.pt").code == 0
    Path("r.toml").write_text('[[edit]]\ndo = "rename"\nmap-file = "maps.txt"\n')
    assert cli("apply", "r.toml", ddp, "-o", "3.pt").code == 0
    for name in ("1.pt", "2.pt", "3.pt"):
        with mc.open(name) as ckpt:
            assert "stage1.0.weight" in ckpt.state_dict()
            assert "conv1.weight" in ckpt.state_dict()
    Path("maps.txt").write_text("# nothing\n")
    for argv in (("--map-file", "maps.txt"), ("--map-file", "none.txt"), ()):
        result = cli("rename", ddp, *argv, "-o", "4.pt")
        assert result.code == 2
        assert result.err.startswith("error: ")
        assert "bug" not in result.err


def test_split_and_merge(cli: Cli, ddp: Path) -> None:
    dry = cli("split", ddp, "--dry-run")
    assert (dry.code, os.listdir()) == (0, ["ddp.pt"])
    result = cli("split", ddp, "-o", "parts")
    assert result.code == 0
    assert result.err.startswith("together again: modelctl merge --model parts/model.pt ")
    assert cli("split", ddp, "-o", "parts").code == 2  # they are there already
    assert cli("split", ddp, "-o", "parts", "--overwrite").code == 0
    argv = result.err.split("modelctl ")[1].split()
    assert cli(*argv).code == 0
    assert cli("diff", ddp, "whole.pt").code == 0
    found = json.loads(cli("split", ddp, "-o", "st", "--to", "safetensors", "--format", "json").out)
    assert [one["part"] for one in found["parts"]] == ["model", "optimizer", "rest"]
    for one in found["parts"]:
        assert one["bytes_written"] == Path(one["output"]).stat().st_size
    assert found["parts"][0]["output"] == "st/model.safetensors"
    assert cli("split", ddp).code == 2
    assert cli("split", "parts/model.pt", "-o", "more").code == 2


@pytest.mark.parametrize(
    "text",
    [
        "",
        "edit = 3",
        "edit = []",
        "[edit]\ndo = 'strip-prefix'",
        "x = 1\n[[edit]]\ndo = 'strip-head'",
        "[[edit]]\n",
        "[[edit",
        "[[edit]]\ndo = 'nothing'",
        "[[edit]]\ndo = 'freeze'",
        "[[edit]]\ndo = 'rename'",
        "[[edit]]\ndo = 'rename'\nmap-file = 3",
        "[[edit]]\ndo = 'rename'\nmap = 3",
        "\udcff",
    ],
)
def test_broken_recipes(cli: Cli, ddp: Path, text: str) -> None:
    Path("r.toml").write_bytes(text.encode("utf-8", "surrogateescape"))
    result = cli("apply", "r.toml", ddp, "-o", "out.pt")
    assert result.code == 2
    assert result.err.startswith("error: r.toml: ")
    assert "bug" not in result.err
    assert len(result.err.splitlines()) <= 2
    os.mkdir("d.toml")
    assert cli("apply", "d.toml", ddp, "-o", "out.pt").code == 2


def test_merge(cli: Cli, ddp: Path, flat: Path) -> None:
    result = cli(
        *("merge", "--model", flat, "--optimizer", ddp, "--epoch", "12", "--lr", "1e-3"),
        *("--set", "note=hello", "--set", 'cfg={"a": [1, 2]}', "--set", "seed=7", "-o", "out.pt"),
    )
    assert result.code == 0, result.err
    loaded = torch.load("out.pt", weights_only=True)
    assert list(loaded) == ["model", "optimizer", "epoch", "note", "cfg", "seed", "lr"]
    assert (loaded["epoch"], loaded["note"], loaded["cfg"], loaded["seed"]) == (
        *(12, "hello", {"a": [1, 2]}, 7),
    )
    assert loaded["optimizer"]["param_groups"][0]["lr"] == loaded["lr"] == 1e-3
    like = cli("merge", "--model", flat, "--optimizer", ddp, "--like", ddp, "-o", "like.pt")
    assert like.code == 0
    assert list(torch.load("like.pt", weights_only=True)) == ["state_dict", "optimizer"]
    update = cli("merge", "--model", ddp, "--epoch", "0", "-o", "up.pt")
    assert update.code == 0
    assert torch.load("up.pt", weights_only=True)["epoch"] == 0
    assert "--epoch 0" in cli("summary", "up.pt").out


def test_a_wrong_optimizer_is_left_out_on_request(cli: Cli, place: Path) -> None:
    saved = training()
    state = saved["optimizer"]["state"]
    state[0], state[7] = state[7], state[0]  # in another order than the model
    write(place / "odd.pt", saved)
    kept = cli("strip-head", "odd.pt", "--head", "*fc.*", "-o", "out.pt")
    assert kept.code == 2
    assert "--optimizer drop" in kept.err
    dropped = cli("strip-head", "odd.pt", "--head", "*fc.*", "--optimizer", "drop", "-o", "out.pt")
    assert dropped.code == 0, dropped.err
    assert "optimizer" not in torch.load("out.pt", weights_only=True)


def test_diff_exit_codes(cli: Cli, ddp: Path, flat: Path) -> None:
    assert cli("diff", flat, flat).code == 0
    assert cli("diff", ddp, flat).code == 1
    assert cli("diff", flat, "missing.pt").code == 2
    assert cli("diff", flat, flat, "--format", "json").code == 0


def test_shards_in_place_stay_as_big_as_they_are(cli: Cli, place: Path) -> None:
    write(place / "a.pt", net("module."))
    assert cli("convert", "a.pt", "-o", "sh/", "--max-shard-size", "700").code == 0
    shards = len(os.listdir("sh"))
    result = cli("strip-prefix", "sh", "--in-place")
    assert "new shards; the old ones are gone" in result.out
    assert len(os.listdir("sh")) == shards > 2
    with mc.open("sh") as ckpt:
        assert list(ckpt.state_dict()) == list(net())


def test_what_other_readers_make_of_it_is_told(cli: Cli, place: Path) -> None:
    shared = tensor(3)
    write(place / "a.pt", {"embed": shared, "head": shared, "b": tensor(2)})
    assert "tied names: 1" in cli("convert", "a.pt", "-o", "sh/", "--max-shard-size", "1GB").out
    where = "-o", "sh/", "--max-shard-size", "1GB"
    beside = cli("convert", "a.pt", *where, "--to", "torch")
    assert "warning: model.safetensors beside it is what most readers take first" in beside.err
    assert "tied" not in beside.out


def test_a_dry_run_has_no_lines_to_apply_by_hand(cli: Cli, flat: Path) -> None:
    assert "by hand" not in cli("freeze", flat, "--pattern", "fc", "--dry-run").err
    assert "by hand" in cli("freeze", flat, "--pattern", "fc", "-o", "out.pt").err
