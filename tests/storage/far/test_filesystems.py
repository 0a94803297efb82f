"""What is read through fsspec: its file system in memory, and s3 on a server of moto's."""

from __future__ import annotations

import builtins
import sys
import time
from pathlib import Path

import pytest

import modelctl
from modelctl.cli import run
from modelctl.errors import MissingExtraError, ModelctlError, UnreadableError, UsageError
from modelctl.storage.far import filesystems

from . import made
from .moto import serving_s3

fsspec = pytest.importorskip("fsspec")


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory) -> dict[str, bytes]:
    folder = tmp_path_factory.mktemp("made")
    data = made.pt(folder)
    with modelctl.open(folder / "made.pt") as ckpt:
        modelctl.save(ckpt, f"{folder}/shards/", to="safetensors", max_shard_size="20MB")
    shards = {f"shards/{one.name}": one.read_bytes() for one in (folder / "shards").iterdir()}
    return {"made.pt": data, **shards}


@pytest.fixture
def memory(checkpoints: dict[str, bytes], tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    fs = fsspec.filesystem("memory")
    for name, data in checkpoints.items():
        fs.pipe_file(f"/bucket/{name}", data)
    yield fs
    fs.rm("/bucket", recursive=True)


def _is_made(url: str) -> None:
    with modelctl.open(url) as ckpt:
        found = ckpt.state_dict()
        wanted = made.state_dict()
        assert found.keys() == wanted.keys()
        for name in list(wanted)[::53]:
            assert made.torch.equal(found[name].torch(), wanted[name])


@pytest.mark.parametrize(
    "path", ["made.pt", "shards", "shards/", "shards/model.safetensors.index.json"]
)
def test_reading(memory, path: str) -> None:
    _is_made(f"memory://bucket/{path}")


def test_names(memory) -> None:
    with modelctl.open("memory://bucket/shards") as ckpt:
        assert ckpt.origin is not None
        assert ckpt.origin.path == "memory://bucket/shards/model.safetensors.index.json"


def test_it_changes(memory) -> None:
    with modelctl.open("memory://bucket/made.pt") as ckpt:
        ref = ckpt.state_dict()["layer9.conv0.weight"]
        memory.pipe_file("/bucket/made.pt", memory.cat_file("/bucket/made.pt"))
        with pytest.raises(UnreadableError, match=r"made\.pt: it changed while it was read"):
            ref.tobytes()
        memory.rm_file("/bucket/made.pt")
        with pytest.raises(UnreadableError, match=r"made\.pt: it was removed while it was read"):
            ref.tobytes()


def test_a_file_of_a_like_name(memory) -> None:
    with pytest.raises(ModelctlError, match=r"bucket/mode\.pt: no such file or folder") as caught:
        modelctl.open("memory://bucket/mode.pt")
    assert caught.value.hint == "memory://bucket/made.pt?"


def test_editing(memory, capsys) -> None:
    argv = ["keep", "memory://bucket/made.pt", "--pattern", "layer3", "-o", "new/", "-q"]
    assert run(argv) == 0, capsys.readouterr()
    assert [one.name for one in Path("new").iterdir()] == ["made.pt"]


def test_shards_become_one_file(memory, capsys) -> None:
    assert run(["convert", "memory://bucket/shards", "-o", "one.safetensors"]) == 0
    assert "4 shards became one file" in capsys.readouterr().out


def test_a_folder_of_several(memory, capsys) -> None:
    memory.pipe_file("/bucket/run/step-1.pt", memory.cat_file("/bucket/made.pt"))
    memory.pipe_file("/bucket/run/step-2.pt", memory.cat_file("/bucket/made.pt"))
    assert run(["ls", "memory://bucket/run"]) == 2
    err = capsys.readouterr().err
    assert "memory://bucket/run: a folder with several checkpoints: step-1.pt, step-2.pt" in err
    assert "memory://bucket/run/step-2.pt" in err
    assert run(["summary", "memory://bucket/run"]) == 0
    out = capsys.readouterr().out
    assert "step-1.pt" in out
    assert "step-2.pt" in out


def test_a_folder_without_any(memory, capsys) -> None:
    memory.pipe_file("/bucket/none/readme.txt", b"nothing")
    assert run(["ls", "memory://bucket/none"]) == 2
    assert "a folder without a checkpoint in it" in capsys.readouterr().err


def test_it_fails(memory, monkeypatch) -> None:
    def fail(*args, **options):
        raise OSError("the disk is on fire\nand more")

    monkeypatch.setattr(type(memory), "cat_file", fail)
    with pytest.raises(ModelctlError, match=r"made\.pt: can't be read: the disk is on fire$"):
        modelctl.open("memory://bucket/made.pt")


def test_it_takes_too_long(memory, monkeypatch) -> None:
    monkeypatch.setattr(filesystems, "TIMEOUT", 0.05)
    monkeypatch.setattr(type(memory), "cat_file", lambda *args, **options: time.sleep(1))
    with pytest.raises(ModelctlError, match="no answer in 0 seconds"):
        modelctl.open("memory://bucket/made.pt")


def test_fewer_bytes(memory, monkeypatch) -> None:
    monkeypatch.setattr(type(memory), "cat_file", lambda *args, **options: b"few")
    with pytest.raises(UnreadableError, match="3 bytes came where"):
        modelctl.open("memory://bucket/made.pt")


def test_nobody_knows_it() -> None:
    with pytest.raises(UsageError, match="nothing reads nosuch://") as caught:
        modelctl.open("nosuch://bucket/x.pt")
    assert "s3://" in str(caught.value.hint)


@pytest.mark.parametrize(
    ("url", "lacks", "hint"),
    [
        ("s3://b/x.pt", "fsspec", "pip install fsspec s3fs"),
        ("s3://b/x.pt", "s3fs", "pip install fsspec s3fs"),
        ("gs://b/x.pt", "gcsfs", "pip install fsspec gcsfs"),
    ],
)
def test_what_is_not_installed(monkeypatch, url: str, lacks: str, hint: str) -> None:
    plain = builtins.__import__

    def without(name, *rest):
        if name.partition(".")[0] == lacks:
            raise ImportError(lacks)
        return plain(name, *rest)

    for name in [one for one in sys.modules if one.partition(".")[0] == lacks]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(MissingExtraError, match="not installed") as caught:
        modelctl.open(url)
    assert caught.value.hint == hint


# ---------------------------------------------------------------------- s3


@pytest.fixture(scope="module")
def s3(checkpoints: dict[str, bytes]):
    with serving_s3() as fs:
        for name, data in checkpoints.items():
            fs.pipe_file(f"bucket/run/{name}", data)
        yield fs


@pytest.mark.parametrize("path", ["run/made.pt", "run/shards", "run/shards/"])
def test_s3(s3, path: str) -> None:
    _is_made(f"s3://bucket/{path}")


def test_s3_changes(s3) -> None:
    s3.pipe_file("bucket/x.pt", s3.cat_file("bucket/run/made.pt"))
    with modelctl.open("s3://bucket/x.pt") as ckpt:
        ref = ckpt.state_dict()["layer9.conv0.weight"]
        s3.pipe_file("bucket/x.pt", s3.cat_file("bucket/run/made.pt")[:-1] + b"x")
        with pytest.raises(UnreadableError, match="it changed while it was read"):
            ref.tobytes()


def test_s3_lacks_it(s3, capsys) -> None:
    assert run(["ls", "s3://bucket/run/mode.pt"]) == 2
    out, err = capsys.readouterr()
    assert "s3://bucket/run/mode.pt: no such file or folder" in err
    assert "s3://bucket/run/made.pt?" in err
    assert run(["ls", "s3://nosuchbucket/x.pt"]) == 2
    assert "hunter" not in out + err + capsys.readouterr().err
