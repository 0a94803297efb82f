"""Outputs on a server that speaks S3: parts, and that none is left."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
from typing import Any

import pytest

import modelctl
from modelctl.cli import run
from modelctl.errors import WriteError
from modelctl.storage.far import uploads

from .moto import serving_s3

torch = pytest.importorskip("torch")
sync_wrapper = pytest.importorskip("fsspec.asyn").sync_wrapper
SIZE = 40 << 20


@pytest.fixture(scope="module")
def source(tmp_path_factory) -> str:
    path = tmp_path_factory.mktemp("made") / "made.pt"
    torch.save({f"module.l{n}": torch.rand(SIZE // 16) for n in range(4)}, path)
    return str(path)


@pytest.fixture(scope="module")
def server():
    with serving_s3() as fs:
        yield fs


@pytest.fixture
def s3(server):
    yield server
    server.invalidate_cache()
    for path in server.find("bucket"):
        server.rm_file(path)
    server.invalidate_cache()


@pytest.fixture
def calls(s3, monkeypatch) -> list[str]:
    asked: list[str] = []
    plain = type(s3)._call_s3

    async def count(self, method, *args, **options):
        asked.append(method)
        return await plain(self, method, *args, **options)

    monkeypatch.setattr(type(s3), "_call_s3", count)
    monkeypatch.setattr(type(s3), "call_s3", sync_wrapper(count))
    return asked


def unfinished(s3) -> list[Any]:
    return s3.call_s3("list_multipart_uploads", Bucket="bucket").get("Uploads") or []


def there(s3) -> set[str]:
    s3.invalidate_cache()
    return set(s3.find("bucket"))


def test_a_file(s3, source: str, calls: list[str]) -> None:
    assert run(["convert", source, "-o", "s3://bucket/x.pt", "-q"]) == 0
    sent = [method for method in calls if method.startswith(("upload_part", "put_object"))]
    assert len(sent) == -(-os.path.getsize(source) // uploads.PART)
    assert len(calls) <= len(sent) + 14
    assert run(["diff", source, "s3://bucket/x.pt", "-q"]) == 0
    assert not unfinished(s3)


def test_parts_go_at_once(s3, source: str, monkeypatch) -> None:
    lock, now, most = threading.Lock(), [0], [0]
    both = threading.Event()
    plain = uploads.S3Upload._send

    def send(self, number, part):
        with lock:
            now[0] += 1
            most[0] = max(most[0], now[0])
            if now[0] > 1:
                both.set()
        assert both.wait(20)
        plain(self, number, part)
        with lock:
            now[0] -= 1

    monkeypatch.setattr(uploads.S3Upload, "_send", send)
    assert run(["convert", source, "-o", "s3://bucket/x.pt", "-q"]) == 0
    assert 1 < most[0] <= uploads._AT_ONCE


def test_shards_in_place_of_others(s3, source: str) -> None:
    argv = ["convert", source, "-o", "s3://bucket/run/", "-q", "--overwrite", "--max-shard-size"]
    assert run([*argv, "11MB"]) == 0
    assert len(there(s3)) == 5
    assert run([*argv, "22MB"]) == 0
    assert len(there(s3)) == 3
    assert run(["diff", source, "s3://bucket/run", "-q"]) == 0
    assert not unfinished(s3)


def test_its_own_source(s3, source: str) -> None:
    assert run(["convert", source, "-o", "s3://bucket/x.pt", "-q"]) == 0
    argv = ["strip-prefix", "s3://bucket/x.pt", "-o", "s3a://bucket/x.pt", "-q"]
    assert run(argv) == 2
    assert run([*argv, "--overwrite"]) == 0
    with modelctl.open("s3://bucket/x.pt") as ckpt:
        assert next(iter(ckpt.state_dict())) == "l0"


@pytest.mark.parametrize("error", [KeyboardInterrupt, ValueError])
def test_nothing_is_left(s3, source: str, error: type[BaseException]) -> None:
    s3.pipe_file("bucket/run/model.safetensors", b"old")
    begun: list[Any] = []

    def stop(n: int, of: int) -> None:
        done.append(n)
        if sum(done) > of // 2:
            begun.extend(unfinished(s3))
            raise error

    for url, size in (("s3://bucket/run/model.safetensors", None), ("s3://bucket/run/", "11MB")):
        done: list[int] = []
        with modelctl.open(source) as ckpt, pytest.raises(error):
            modelctl.save(ckpt, url, overwrite=True, max_shard_size=size, progress=stop)
    assert begun
    assert not unfinished(s3)
    assert there(s3) == {"bucket/run/model.safetensors"}
    assert s3.cat_file("bucket/run/model.safetensors") == b"old"


@pytest.mark.skipif(os.name != "posix", reason="signals")
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal(s3, source: str, number: signal.Signals) -> None:
    code = (
        "import os, sys, modelctl.storage.far.uploads as u; plain = u.S3Upload._send\n"
        "def send(self, number, part):\n"
        "    plain(self, number, part)\n"
        f"    if number == 2: os.kill(os.getpid(), {int(number)})\n"
        "u.S3Upload._send = send\n"
        "from modelctl.cli import main; main()"
    )
    argv = [sys.executable, "-c", code, "convert", source, "-o", "s3://bucket/x.pt"]
    done = subprocess.run(argv, capture_output=True, text=True, timeout=60)
    assert done.returncode not in (0, 1, 2), done.stderr
    assert not unfinished(s3)
    assert not there(s3)


def test_no_bucket(s3, source: str, capsys) -> None:
    for url in ("s3://nosuch/x.pt", "s3://nosuch/run/"):
        for more in ([], ["--dry-run"]):
            assert run(["convert", source, "-o", url, *more]) == 2
            out, err = capsys.readouterr()
            assert "there is no bucket nosuch" in err
            assert len(err.splitlines()) == 2
            assert "hunter" not in out + err


@pytest.mark.parametrize("method", ["upload_part", "create_multipart_upload"])
def test_it_may_not_be_written(s3, source: str, monkeypatch, capsys, method: str) -> None:
    plain = type(s3)._call_s3

    async def refuse(self, name, *args, **options):
        if name == method:
            raise PermissionError("Access Denied")
        return await plain(self, name, *args, **options)

    monkeypatch.setattr(type(s3), "call_s3", sync_wrapper(refuse))
    assert run(["convert", source, "-o", "s3://bucket/x.pt"]) == 2
    err = capsys.readouterr().err
    assert "s3://bucket/x.pt: it may not be written (Access Denied)" in err
    assert "environment, profile, login" in err
    monkeypatch.undo()


def test_nothing_is_left_of_what_may_not_be_finished(s3, source: str, monkeypatch) -> None:
    def refuse(self) -> None:
        raise OSError("the store went away")

    monkeypatch.setattr(uploads.S3Upload, "commit", refuse)
    with modelctl.open(source) as ckpt, pytest.raises(WriteError, match="the store went away"):
        modelctl.save(ckpt, "s3://bucket/x.pt")
    assert not unfinished(s3)
    assert not there(s3)


def test_the_store_goes_away(source: str, monkeypatch) -> None:
    monkeypatch.setenv("AWS_MAX_ATTEMPTS", "1")
    with serving_s3() as fs:
        monkeypatch.setattr(type(fs), "retries", 1)

        def stop(n: int, of: int) -> None:
            fs.server.kill()
            fs.server.wait()

        with modelctl.open(source) as ckpt, pytest.raises(WriteError) as caught:
            modelctl.save(ckpt, "s3://bucket/x.pt", progress=stop)
        assert "s3://bucket/x.pt: not written: " in str(caught.value)
        assert "hunter" not in str(caught.value)


_MEMORY = """
import re, sys
from modelctl.cli import run
run(["convert", sys.argv[1], "-o", "s3://bucket/" + sys.argv[2], "-q"])
print(int(re.search(r"VmHWM:\\s*(\\d+)", open("/proc/self/status").read())[1]) * 1024)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="how memory is counted")
def test_memory(s3, source: str, tmp_path) -> None:
    large = tmp_path / "large.pt"
    torch.save({f"l{n}": torch.zeros(8 << 20) for n in range(8)}, large)
    small = tmp_path / "small.pt"
    torch.save({"l": torch.zeros(100_000)}, small)
    used = []
    for path in (small, large):
        argv = [sys.executable, "-c", _MEMORY, str(path), path.name]
        done = subprocess.run(argv, capture_output=True, text=True, timeout=100)
        used.append(int(done.stdout))
    assert used[1] - used[0] < 120 << 20
