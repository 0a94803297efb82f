"""Outputs that are far: whole or not at all, on file systems of fsspec in memory."""

from __future__ import annotations

import importlib
import json
import subprocess
import sys
import zipfile
from pathlib import Path
from typing import Any

import pytest

import modelctl
from modelctl.cli import run
from modelctl.errors import DamagedError, ModelctlError, UsageError, WriteError
from modelctl.storage.far import uploads

fsspec = pytest.importorskip("fsspec")
torch = pytest.importorskip("torch")
from fsspec.implementations.memory import MemoryFile, MemoryFileSystem  # noqa: E402
from fsspec.spec import AbstractBufferedFile  # noqa: E402


def tensors() -> dict[str, Any]:
    generator = torch.Generator().manual_seed(1)
    return {f"module.l{n}.weight": torch.randn(64, 64, generator=generator) for n in range(6)}


@pytest.fixture
def fs(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(MemoryFileSystem, "store", {})
    monkeypatch.setattr(MemoryFileSystem, "pseudo_dirs", [""])
    torch.save(tensors(), "made.pt")
    model = torch.nn.Linear(4, 4)
    optimizer = torch.optim.Adam(model.parameters())
    model(torch.ones(4)).sum().backward()
    optimizer.step()
    whole = {"model": model.state_dict(), "optimizer": optimizer.state_dict(), "epoch": 3}
    torch.save(whole, "whole.pt")
    return fsspec.filesystem("memory")


def written(fs) -> set[str]:
    return {name.removeprefix("/bucket/") for name in fs.store}


def is_made(url: str, prefix: str = "module.") -> None:
    with modelctl.open(url) as ckpt:
        found = {name: ref.torch() for name, ref in ckpt.state_dict().items()}
    wanted = {name.replace("module.", prefix): tensor for name, tensor in tensors().items()}
    assert found.keys() == wanted.keys()
    assert all(torch.equal(found[name], wanted[name]) for name in wanted)


# ---------------------------------------------------------------------- what is written


@pytest.mark.parametrize("name", ["x.pt", "x.safetensors", "deep/in/it/x.bin"])
def test_a_file(fs, capsys, name: str) -> None:
    assert run(["strip-prefix", "made.pt", "-o", f"memory://bucket/{name}"]) == 0
    assert f"made.pt -> memory://bucket/{name}" in capsys.readouterr().out
    assert written(fs) == {name}
    is_made(f"memory://bucket/{name}", "")


def test_it_is_what_a_file_here_would_be(fs) -> None:
    assert run(["convert", "made.pt", "-o", "x.pt", "-q"]) == 0
    assert run(["convert", "made.pt", "-o", "memory://bucket/x.pt", "-q"]) == 0
    assert fs.cat_file("/bucket/x.pt") == Path("x.pt").read_bytes()


@pytest.mark.parametrize("folder", ["run/", "run"])
def test_into_a_folder(fs, folder: str) -> None:
    fs.pipe_file("/bucket/run/notes.txt", b"notes")
    assert run(["convert", "made.pt", "whole.pt", "-o", f"memory://bucket/{folder}", "-q"]) == 0
    assert written(fs) == {"run/notes.txt", "run/made.pt", "run/whole.pt"}


def test_shards(fs) -> None:
    argv = ["convert", "made.pt", "-o", "memory://bucket/run/", "--max-shard-size", "40KB"]
    assert run([*argv, "-q"]) == 0
    assert len(written(fs)) == 4
    is_made("memory://bucket/run/")
    assert run([*argv, "-q"]) == 2
    first = written(fs)
    assert run([*argv[:-1], "20KB", "-q", "--overwrite"]) == 0
    is_made("memory://bucket/run/")
    assert written(fs) & first == {"run/model.safetensors.index.json"}
    assert len(written(fs)) == 7


def test_by_an_index(fs) -> None:
    index = "memory://bucket/run/weights.safetensors.index.json"
    argv = ["convert", "made.pt", "-q", "--max-shard-size"]
    assert run([*argv, "40KB", "-o", index]) == 0
    assert run([*argv, "20KB", "-o", index, "--overwrite"]) == 0
    assert all(name.startswith("run/weights") for name in written(fs))
    is_made(index)


def test_a_folder_of_several_kinds(fs, capsys) -> None:
    from safetensors.torch import save_file

    Path("run").mkdir()
    save_file(tensors(), "run/model.safetensors")
    torch.save({"state": {}, "param_groups": []}, "run/optimizer.pt")
    Path("run/trainer_state.json").write_text('{"epoch": 1.0}')
    Path("run/config.json").write_text("{}")
    Path("run/empty").write_bytes(b"")
    assert run(["strip-prefix", "run", "-o", "memory://bucket/new/"]) == 0
    names = ("model.safetensors", "optimizer.pt", "trainer_state.json", "config.json", "empty")
    assert written(fs) == {f"new/{name}" for name in names}
    assert fs.cat_file("/bucket/new/empty") == b""
    with modelctl.open("memory://bucket/new") as ckpt:
        assert "l0.weight" in ckpt.state_dict()
    # what is far is its own source, too: all of it is written anew
    argv = ["add-prefix", "memory://bucket/new", "--prefix", "module."]
    argv += ["-o", "memory://bucket/new"]
    capsys.readouterr()
    assert run(argv) == 2
    assert "exists already" in capsys.readouterr().err
    assert run([*argv, "--overwrite"]) == 0, capsys.readouterr()
    assert len(written(fs)) == 5
    with modelctl.open("memory://bucket/new") as ckpt:
        assert "module.l0.weight" in ckpt.state_dict()


def test_dcp(fs) -> None:
    assert run(["convert", "made.pt", "--to", "dcp", "-o", "memory://bucket/dcp", "-q"]) == 0
    assert written(fs) == {"dcp/.metadata", "dcp/__0_0.distcp"}
    is_made("memory://bucket/dcp")


def test_parts(fs, capsys) -> None:
    assert run(["split", "whole.pt", "-o", "memory://bucket/parts/", "--json"]) == 0
    said = json.loads(capsys.readouterr().out)
    assert {part["output"] for part in said["parts"]} == {
        f"memory://bucket/parts/{name}.pt" for name in ("model", "optimizer", "rest")
    }
    assert run(["split", "whole.pt", "-o", "memory://bucket/parts"]) == 2
    assert "exists already" in capsys.readouterr().err
    model, optimizer = (f"memory://bucket/parts/{name}.pt" for name in ("model", "optimizer"))
    argv = ["merge", "--model", model, "--optimizer", optimizer, "-o", "memory://bucket/one.pt"]
    assert run(argv) == 0, capsys.readouterr()
    with modelctl.open("memory://bucket/one.pt") as ckpt:
        assert ckpt.sections.optimizers


def test_python(fs) -> None:
    done: list[int] = []
    with modelctl.open("made.pt") as ckpt:
        saved = modelctl.save(
            ckpt, Path("memory://bucket/x.pt"), progress=lambda n, of: done.append(n)
        )
    assert saved.path == "memory://bucket/x.pt"
    assert sum(done) == saved.bytes_written == fs.size("/bucket/x.pt")
    report = modelctl.edit(
        Path("memory://bucket/x.pt"), "strip-prefix", output=Path("memory://bucket/y.pt")
    )
    assert report.output == "memory://bucket/y.pt"
    is_made("memory://bucket/y.pt", "")


def test_what_goes_through_memory_is_not_imported() -> None:
    code = (
        "import sys, modelctl.cli, modelctl.rewrite.edit; "
        "print([n for n in sys.modules if 'far.outputs' in n or 'far.uploads' in n])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout == "[]\n"


# ---------------------------------------------------------------------- what is refused


@pytest.mark.parametrize(
    ("url", "says", "hint"),
    [
        ("https://u:hunter2@h/x.pt?sig=hunter2", "a web server is read", "upload that"),
        ("hf://org/repo@main/x.pt", "the hub is read", "then hf upload org/repo x.pt"),
        ("file:///x.pt", "a file of this machine", "without file://"),
        ("nosuch://b/x.pt", "nothing reads nosuch://", "s3://"),
    ],
)
def test_nothing_is_written_to(fs, capsys, url: str, says: str, hint: str) -> None:
    for command in ("convert", "split"):
        assert run([command, "whole.pt", "-o", url]) == 2
        said, way_out = capsys.readouterr().err.splitlines()
        assert says in said
        assert hint in way_out
        assert "hunter2" not in said + way_out
    with modelctl.open("made.pt") as ckpt, pytest.raises(UsageError, match=says):
        modelctl.save(ckpt, url)


def test_what_stands_there(fs, capsys) -> None:
    fs.pipe_file("/bucket/x.pt", b"old")
    argv = ["convert", "made.pt", "-o", "memory://bucket/x.pt"]
    for more in ([], ["--dry-run"]):
        assert run([*argv, *more]) == 2
        assert "memory://bucket/x.pt: exists already" in capsys.readouterr().err
    assert fs.cat_file("/bucket/x.pt") == b"old"
    assert run([*argv, "--overwrite"]) == 0
    is_made("memory://bucket/x.pt")


def test_a_file_is_in_the_way_of_a_folder(fs, capsys) -> None:
    fs.pipe_file("/bucket/run", b"old")
    argv = ["convert", "made.pt", "--to", "dcp", "-o", "memory://bucket/run"]
    assert run(argv) == 2
    assert "memory://bucket/run: exists already, and is no folder" in capsys.readouterr().err


def test_a_dry_run(fs, capsys) -> None:
    assert run(["convert", "made.pt", "-o", "memory://bucket/x.pt", "--dry-run"]) == 0
    assert run(["convert", "made.pt", "-o", "memory://bucket/run/", "--dry-run"]) == 0
    assert run(["split", "whole.pt", "-o", "memory://bucket/run/", "--dry-run"]) == 0
    assert not fs.store


def test_in_place(fs, capsys) -> None:
    fs.pipe_file("/bucket/x.pt", Path("made.pt").read_bytes())
    assert run(["strip-prefix", "memory://bucket/x.pt", "--in-place"]) == 2
    err = capsys.readouterr().err
    assert "it is never patched" in err
    way_out = "-o memory://bucket/x.pt --overwrite"
    assert way_out in err
    assert run(["strip-prefix", "memory://bucket/x.pt", *way_out.split(), "-q"]) == 0
    is_made("memory://bucket/x.pt", "")


# ---------------------------------------------------------------------- whole or not at all


def old(fs) -> dict[str, bytes]:
    fs.pipe_file("/bucket/run/model.safetensors", b"old")
    return {name: file.getvalue() for name, file in fs.store.items()}


def is_as_it_was(fs, before: dict[str, bytes]) -> None:
    assert {name: file.getvalue() for name, file in fs.store.items()} == before


SHARDS = ("--max-shard-size", "40KB", "--overwrite", "-o", "memory://bucket/run/")
FILE = ("--overwrite", "-o", "memory://bucket/run/model.safetensors")


@pytest.mark.parametrize("to", [SHARDS, FILE])
def test_a_damaged_source(fs, monkeypatch, capsys, to: tuple[str, ...]) -> None:
    before = old(fs)
    data = bytearray(Path("made.pt").read_bytes())
    with zipfile.ZipFile("made.pt") as file:
        last = max(file.infolist(), key=lambda one: one.file_size * one.header_offset)
    data[last.header_offset + 512] ^= 1
    Path("made.pt").write_bytes(data)
    assert run(["convert", "made.pt", *to]) == 2
    assert "made.pt" in capsys.readouterr().err
    is_as_it_was(fs, before)
    with modelctl.open("made.pt") as ckpt, pytest.raises(DamagedError):
        modelctl.save(ckpt, to[-1], overwrite=True)


@pytest.mark.parametrize("to", ["memory://bucket/run/model.safetensors", "memory://bucket/run/"])
@pytest.mark.parametrize("error", [KeyboardInterrupt, ValueError])
def test_it_is_interrupted(fs, to: str, error: type[BaseException]) -> None:
    before = old(fs)
    done: list[int] = []

    def stop(n: int, of: int) -> None:
        done.append(n)
        if sum(done) > of // 2:
            raise error

    size = "40KB" if to.endswith("/") else None
    with modelctl.open("made.pt") as ckpt, pytest.raises(error):
        modelctl.save(ckpt, to, overwrite=True, max_shard_size=size, progress=stop)
    is_as_it_was(fs, before)


def test_the_index_comes_last_and_nothing_before_all_is_written(fs, monkeypatch) -> None:
    moved: list[tuple[str, int]] = []
    plain = MemoryFileSystem.cp_file

    def cp_file(self, path, to, **options):
        moved.append((to, sum(".tmp" in name for name in self.store)))
        plain(self, path, to, **options)

    monkeypatch.setattr(MemoryFileSystem, "cp_file", cp_file)
    assert run(["convert", "made.pt", *SHARDS, "-q"]) == 0
    assert [waiting for _, waiting in moved] == [4, 3, 2, 1]
    assert moved[-1][0].endswith("model.safetensors.index.json")


def test_one_of_several_fails_to_appear(fs, monkeypatch, capsys) -> None:
    before = old(fs)
    plain = MemoryFileSystem.cp_file

    def cp_file(self, path, to, **options):
        if "00002" in to:
            raise OSError("the store went away")
        plain(self, path, to, **options)

    monkeypatch.setattr(MemoryFileSystem, "cp_file", cp_file)
    assert run(["convert", "made.pt", *SHARDS]) == 2
    assert "not written: the store went away" in capsys.readouterr().err
    is_as_it_was(fs, before)


def test_one_that_was_replaced_is_named(fs, monkeypatch, capsys) -> None:
    for name in ("model", "optimizer", "rest"):
        fs.pipe_file(f"/bucket/parts/{name}.pt", b"old")
    plain = MemoryFileSystem.cp_file

    def cp_file(self, path, to, **options):
        if to.endswith("optimizer.pt"):
            raise PermissionError("no")
        plain(self, path, to, **options)

    monkeypatch.setattr(MemoryFileSystem, "cp_file", cp_file)
    assert run(["split", "whole.pt", "-o", "memory://bucket/parts/", "--overwrite"]) == 2
    err = capsys.readouterr().err
    assert "optimizer.pt: it may not be written (no); new already: " in err
    assert "memory://bucket/parts/model.pt; the rest is as it was" in err
    assert written(fs) == {"parts/model.pt", "parts/optimizer.pt", "parts/rest.pt"}
    assert fs.cat_file("/bucket/parts/optimizer.pt") == b"old"


def test_somebody_else_writes_it_meanwhile(fs, capsys) -> None:
    def come(n: int, of: int) -> None:
        fs.pipe_file("/bucket/x.pt", b"theirs")

    with modelctl.open("made.pt") as ckpt, pytest.raises(WriteError, match="exists already"):
        modelctl.save(ckpt, "memory://bucket/x.pt", progress=come)
    assert written(fs) == {"x.pt"}
    assert fs.cat_file("/bucket/x.pt") == b"theirs"


def test_the_source_changes(fs) -> None:
    fs.pipe_file("/bucket/x.pt", Path("made.pt").read_bytes())
    with modelctl.open("memory://bucket/x.pt") as ckpt:
        for ref in ckpt.state_dict().values():
            ref.tobytes()
        fs.pipe_file("/bucket/x.pt", b"theirs")
        with pytest.raises(ModelctlError, match=r"x\.pt: (it )?changed while it was"):
            modelctl.save(ckpt, "memory://bucket/x.pt", overwrite=True)
    assert written(fs) == {"x.pt"}
    assert fs.cat_file("/bucket/x.pt") == b"theirs"


def test_the_source_changes_after_it_was_read(fs) -> None:
    fs.pipe_file("/bucket/x.pt", Path("made.pt").read_bytes())

    def come(n: int, of: int) -> None:
        done.append(n)
        if sum(done) == of:
            fs.pipe_file("/bucket/x.pt", b"theirs")

    done: list[int] = []
    changed = pytest.raises(WriteError, match=r"x\.pt: changed while it was edited")
    with modelctl.open("memory://bucket/x.pt") as ckpt, changed:
        modelctl.save(ckpt, "memory://bucket/x.pt", overwrite=True, progress=come)
    assert fs.cat_file("/bucket/x.pt") == b"theirs"


# ---------------------------------------------------------------------- parts


@pytest.mark.parametrize("nbytes", [0, 1, 8 << 20, 80_000 << 20, (80_000 << 20) + 1, 5 << 40])
def test_the_size_of_a_part(nbytes: int) -> None:
    size = uploads.part_size(nbytes)
    assert size * 10_000 >= nbytes
    assert size == 8 << 20 or size < nbytes // 10_000 + (2 << 20)


class _Blocks(AbstractBufferedFile):
    """As the files of gcsfs and adlfs: sent as they are flushed, there when they are closed."""

    def _initiate_upload(self) -> None:
        self.fs.staged[self.path] = []

    def _upload_chunk(self, final: bool = False) -> None:
        self.fs.staged[self.path].append(self.buffer.getvalue())
        if final:
            data = b"".join(self.fs.staged.pop(self.path))
            self.fs.store[self.path] = MemoryFile(self.fs, self.path, data)


class Blocks(MemoryFileSystem):
    protocol = "az"
    staged: dict[str, list[bytes]] = {}  # noqa: RUF012

    @classmethod
    def _strip_protocol(cls, path: str) -> str:
        return "/" + path.rpartition("://")[2].strip("/")

    def _open(self, path, mode="rb", block_size=None, **options):
        if mode != "wb":
            return super()._open(path, mode, block_size, **options)
        return _Blocks(self, path, mode, block_size)


@pytest.fixture
def blocks(fs, monkeypatch):
    registry = importlib.import_module("fsspec.registry")
    monkeypatch.setitem(registry._registry, "az", Blocks)
    monkeypatch.setattr(uploads, "part_size", lambda nbytes: 10_000)
    monkeypatch.setattr(Blocks, "staged", {})
    fs.mkdir("/bucket")
    return fs


def test_an_object_that_appears_when_it_is_closed(blocks) -> None:
    seen: set[str] = set()

    def look(n: int, of: int) -> None:
        seen.update(written(blocks))

    with modelctl.open("made.pt") as ckpt:
        modelctl.save(ckpt, "az://bucket/run/", max_shard_size="40KB", progress=look)
    assert not seen
    assert not Blocks.staged
    assert len(written(blocks)) == 4
    is_made("az://bucket/run/")


def test_parts_are_sent_as_they_come(blocks) -> None:
    staged: list[list[int]] = []

    def look(n: int, of: int) -> None:
        staged.append([len(part) for parts in Blocks.staged.values() for part in parts])

    with modelctl.open("made.pt") as ckpt:
        modelctl.save(ckpt, "az://bucket/x.pt", progress=look)
    assert len(staged[-1]) > 5
    assert set(staged[-1]) == {10_000}


def test_an_object_that_is_given_up_does_not_appear(blocks) -> None:
    import gc

    def stop(n: int, of: int) -> None:
        if Blocks.staged:
            raise KeyboardInterrupt

    with modelctl.open("made.pt") as ckpt, pytest.raises(KeyboardInterrupt):
        modelctl.save(ckpt, "az://bucket/x.pt", progress=stop)
    gc.collect()
    assert not written(blocks)


def test_no_such_bucket(blocks, capsys) -> None:
    for more in ([], ["--dry-run"]):
        assert run(["convert", "made.pt", "-o", "az://nosuch/x.pt", *more]) == 2
        assert "az://nosuch/x.pt: there is no bucket nosuch" in capsys.readouterr().err


def test_what_is_left_is_said(blocks, monkeypatch, capsys) -> None:
    def fail(self, *args, **options):
        raise OSError("the store went away")

    plain = _Blocks._upload_chunk

    def send(self, final: bool = False) -> None:
        plain(self, final)
        if len(Blocks.staged[self.path]) == 3:
            fail(self)

    monkeypatch.setattr(_Blocks, "_upload_chunk", send)
    monkeypatch.setattr(_Blocks, "discard", fail, raising=False)
    assert run(["convert", "made.pt", "-o", "az://bucket/x.pt"]) == 2
    said, way_out = capsys.readouterr().err.splitlines()
    assert said == "error: az://bucket/x.pt: not written: the store went away"
    assert "az://bucket/x.pt: parts that were sent may be left" in way_out
    assert not written(blocks)
