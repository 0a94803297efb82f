"""Commands on what is far: what they cost, and what they refuse."""

from __future__ import annotations

import json
import os
import struct
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import pytest

import modelctl
from modelctl.cli import run
from modelctl.core.storages import Source
from modelctl.errors import ModelctlError, UnreadableError, UsageError

from . import made
from .server import Server

torch = made.torch
MODELCTL = (sys.executable, "-m", "modelctl")
FORMATS = ("made.pt", "made.safetensors", "legacy.pt")


@pytest.fixture(scope="module")
def files(tmp_path_factory) -> dict[str, bytes]:
    folder = tmp_path_factory.mktemp("made")
    found = {"made.pt": made.pt(folder), "made.safetensors": made.safetensors()}
    found["legacy.pt"] = made.legacy(folder)
    with modelctl.open(folder / "made.pt") as ckpt:
        out = folder / "shards"
        modelctl.save(ckpt, f"{out}/", to="safetensors", max_shard_size="16MB")
    for one in out.iterdir():
        found[f"shards/{one.name}"] = one.read_bytes()
    return found


@pytest.fixture
def far(server: Server, files: dict[str, bytes], tmp_path, monkeypatch) -> Server:
    server.files.update(files)
    monkeypatch.chdir(tmp_path)
    return server


def said(capsys, *argv: str) -> tuple[int, str, str]:
    code = run([str(one) for one in argv])
    out, err = capsys.readouterr()
    return code, out, err


# ---------------------------------------------------------------------- what they cost


@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize("command", ["ls", "summary", "show", "identify"])
def test_looking(far: Server, capsys, name: str, command: str) -> None:
    code, out, _ = said(capsys, command, f"{far.url}/{name}")
    assert code == 0
    assert out
    assert len(far.asked) <= 3
    assert far.sent < len(far.files[name]) / 100


def test_ls_says_what_it_says_of_the_file(far: Server, capsys) -> None:
    Path("made.pt").write_bytes(far.files["made.pt"])
    here = said(capsys, "ls", "--long", "made.pt")
    assert said(capsys, "ls", "--long", f"{far.url}/made.pt") == here


def test_looking_at_shards(far: Server, capsys) -> None:
    index = f"{far.url}/shards/model.safetensors.index.json"
    shards = [name for name in far.files if name.startswith("shards/") and "-of-" in name]
    code, out, _ = said(capsys, "ls", index)
    assert code == 0
    assert len(out.splitlines()) == 320
    assert len(shards) > 3
    assert len(far.asked) <= 1 + 2 * len(shards)
    assert far.sent < sum(map(len, far.files.values())) / 20


def test_shards_are_opened_together(far: Server) -> None:
    """Each waits for its round trip while the others do: none is answered before all have asked."""
    index = f"{far.url}/shards/model.safetensors.index.json"
    shards = sorted(name for name in far.files if name.startswith("shards/") and "-of-" in name)
    all_asked = threading.Barrier(len(shards))

    def wait(handler: Any) -> bool:
        all_asked.wait(10)
        return False

    far.turns.extend([lambda handler: False, *[wait] * len(shards)])
    with modelctl.open(index) as ckpt:
        assert len(ckpt.tensors()) == 320
        read = [one.name for one in ckpt.resources if isinstance(one, Source)]
        assert read == [index, *(f"{far.url}/{name}" for name in shards)]
    assert not all_asked.broken
    assert len(far.asked) == 1 + len(shards)


def test_of_shards_that_fail_the_first_is_named(far: Server) -> None:
    shards = sorted(name for name in far.files if name.startswith("shards/") and "-of-" in name)
    for name in shards[1:]:
        del far.files[name]
    with pytest.raises(ModelctlError, match=shards[1].rpartition("/")[2]):
        modelctl.open(f"{far.url}/shards/model.safetensors.index.json")


@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize("to", ["out.pt", "out.safetensors"])
def test_keep_of_one_block(far: Server, capsys, name: str, to: str) -> None:
    code, _, err = said(
        capsys, "keep", f"{far.url}/{name}", "--pattern", "layer7.*", "-o", to, "--quiet"
    )
    assert code == 0, err
    with modelctl.open(to) as ckpt:
        kept = {name: ref.torch() for name, ref in ckpt.state_dict().items()}
    wanted = {n: t for n, t in made.state_dict().items() if n.startswith("layer7.")}
    assert kept.keys() == wanted.keys()
    assert all(torch.equal(kept[n], wanted[n]) for n in wanted)
    # the storages of a legacy file lie in no order: at most one request for each
    assert len(far.asked) <= (17 if name == "legacy.pt" else 5)
    assert far.sent < os.path.getsize(to) + 600_000


@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize("to", ["out.pt", "out.safetensors"])
def test_convert_reads_everything_once(far: Server, capsys, name: str, to: str) -> None:
    assert said(capsys, "convert", f"{far.url}/{name}", "-o", to, "--quiet")[0] == 0
    size = len(far.files[name])
    assert far.sent < size * 1.02
    assert len(far.asked) < 40
    Path(name).write_bytes(far.files[name])
    assert said(capsys, "diff", name, to)[0] == 0


@pytest.mark.parametrize("name", FORMATS)
def test_stats_and_diff_read_everything_once(far: Server, capsys, name: str) -> None:
    assert said(capsys, "summary", "--stats", f"{far.url}/{name}")[0] == 0
    assert far.sent < len(far.files[name]) * 1.02
    assert len(far.asked) < 40
    far.forget()
    Path(name).write_bytes(far.files[name])
    assert said(capsys, "diff", name, f"{far.url}/{name}")[0] == 0
    assert far.sent < len(far.files[name]) * 1.02


@pytest.mark.parametrize("name", FORMATS)
def test_load_into(far: Server, name: str) -> None:
    import modelctl.nn as mnn

    model = torch.nn.ModuleDict()
    for block in range(20):
        layer = torch.nn.ModuleDict()
        for n in range(4):
            layer[f"conv{n}"] = torch.nn.Linear(448, 448, bias=False)
            layer[f"bn{n}"] = torch.nn.BatchNorm1d(448)
            for other in ("running_var", "num_batches_tracked"):
                delattr(layer[f"bn{n}"], other)
        model[f"layer{block}"] = layer
    mnn.load_into(model, f"{far.url}/{name}", progress=False)
    wanted = made.state_dict()
    assert all(torch.equal(value, wanted[key]) for key, value in model.state_dict().items())
    assert far.sent < len(far.files[name]) * 1.02
    assert len(far.asked) < 40


def test_to_stdout_what_is_damaged_does_not_go(far: Server) -> None:
    data = bytearray(far.files["made.pt"])
    data[len(data) // 2] ^= 1
    far.files["made.pt"] = bytes(data)
    done = subprocess.run(
        [*MODELCTL, "convert", f"{far.url}/made.pt", "-o", "-", "--to", "safetensors"],
        capture_output=True,
        check=False,
    )
    assert done.returncode == 2
    assert b"CRC-32" in done.stderr
    assert len(done.stdout) < len(data) / 2 + (1 << 20)


# ---------------------------------------------------------------------- what is presumed


def _headers(data: bytes) -> list[int]:
    found, at = [], data.find(b"PK\x03\x04")
    while at >= 0:
        found.append(at)
        at = data.find(b"PK\x03\x04", at + 1)
    return found


@pytest.mark.parametrize("where", [0, 14, 26, 31])
def test_a_local_header_is_looked_at_before_its_bytes_are_given(far: Server, where: int) -> None:
    """The padding is presumed, and nothing is given of it before it is known to be right."""
    data = bytearray(far.files["made.pt"])
    header = _headers(bytes(data))[150]
    data[header + where] ^= 1
    far.files["made.pt"] = bytes(data)
    with modelctl.open(f"{far.url}/made.pt") as ckpt:
        refs = list(ckpt.state_dict().values())
        with pytest.raises(UnreadableError, match="local header"):
            b"".join(ref.tobytes() for ref in refs)
    with (
        modelctl.open(f"{far.url}/made.pt") as ckpt,
        pytest.raises(UnreadableError, match="local header"),
    ):
        modelctl.save(ckpt, "out.safetensors")
    assert not os.path.exists("out.safetensors")


def test_the_length_of_a_legacy_storage_is_looked_at(far: Server) -> None:
    data = bytearray(far.files["legacy.pt"])
    at = data.rfind((448).to_bytes(8, "little"))
    data[at] ^= 1
    far.files["legacy.pt"] = bytes(data)
    with modelctl.open(f"{far.url}/legacy.pt") as ckpt:
        refs = list(ckpt.state_dict().values())
        with pytest.raises(UnreadableError, match="has 449 elements here, 448 in the pickle"):
            b"".join(ref.tobytes() for ref in refs)


def test_another_padding_than_torch_writes(far: Server) -> None:
    """It is looked for then: one request a member, the same answer."""
    import io
    import zipfile

    out = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(far.files["made.pt"])) as old, zipfile.ZipFile(out, "w") as new:
        for name in old.namelist():
            new.writestr(name, old.read(name))
    far.files["other.pt"] = out.getvalue()
    with modelctl.open(f"{far.url}/other.pt") as ckpt:
        found = ckpt.state_dict()
        wanted = made.state_dict()
        assert found.keys() == wanted.keys()
        for name in list(wanted)[::40]:
            assert torch.equal(found[name].torch(), wanted[name])


# ---------------------------------------------------------------------- what they refuse


def test_in_place(far: Server, capsys) -> None:
    code, out, err = said(capsys, "strip-prefix", f"{far.url}/made.pt", "--in-place")
    assert (code, out) == (2, "")
    assert err == (
        f"error: {far.url}/made.pt: what is far can't be edited in place: it is never "
        "patched\n"
        "hint: -o made.pt writes the result here\n"
    )
    assert not far.asked


@pytest.mark.parametrize("command", ["convert", "split", "keep"])
def test_a_far_output(far: Server, capsys, command: str) -> None:
    Path("made.pt").write_bytes(far.files["made.pt"])
    more = ["--pattern", "layer1"] if command == "keep" else []
    code, _, err = said(capsys, command, "made.pt", *more, "-o", f"{far.url}/x.pt?sig=hunter2")
    assert code == 2
    assert f"{far.url}/x.pt: a web server is read, not written to" in err
    assert "hunter2" not in err
    assert not far.asked
    assert os.listdir() == ["made.pt"]


def test_a_training_is_not_saved_far() -> None:
    import modelctl.nn as mnn

    with pytest.raises(UsageError, match="a training saves to this machine"):
        mnn.save_checkpoint("s3://bucket/x.pt", model=torch.nn.Linear(1, 1))


def test_into_a_folder_it_keeps_its_name(far: Server, capsys) -> None:
    url = f"{far.url}/made.pt?token=hunter2"
    code, out, err = said(capsys, "keep", url, "--pattern", "layer1", "-o", "new/", "--json")
    assert code == 0, err
    assert os.listdir("new") == ["made.pt"]
    assert "hunter2" not in out + err
    assert json.loads(out)["source"] == f"{far.url}/made.pt"
    assert b"hunter2" not in Path("new/made.pt").read_bytes()


def test_what_is_not_there(far: Server, capsys) -> None:
    code, out, err = said(capsys, "ls", f"{far.url}/mode.pt?token=hunter2")
    assert (code, out) == (2, "")
    assert err == f"error: {far.url}/mode.pt: no such file there (404 Not Found)\n"


def test_several_and_one_is_missing(far: Server, capsys) -> None:
    urls = [f"{far.url}/{name}.pt?t=hunter2" for name in ("made", "no")]
    code, out, _ = said(capsys, "summary", *urls)
    assert code == 2
    assert "no such file there" in out
    assert "hunter2" not in out


def test_a_folder_over_http_has_no_listing(far: Server, capsys) -> None:
    code, _, err = said(capsys, "ls", f"{far.url}/shards/")
    assert code == 2
    assert "no such file there" in err


def test_a_url_alone_is_summarized(far: Server, capsys) -> None:
    assert said(capsys, f"{far.url}/made.pt")[0] == 0


@pytest.mark.parametrize(
    ("url", "says", "hint"),
    [
        ("htps://h/x.pt", "nothing reads htps://", "https://?"),
        ("file:///x.pt", "is named by its path", "without file://"),
    ],
)
def test_a_kind_that_nobody_knows(capsys, url: str, says: str, hint: str) -> None:
    code, _, err = said(capsys, "ls", url)
    assert code == 2
    assert says in err
    assert f"hint: {hint}" in err


def test_a_folder_of_that_name_is_not_meant(far: Server, capsys, tmp_path) -> None:
    """A URL is never a path of this machine."""
    folder = tmp_path / "http:" / far.url.partition("//")[2]
    folder.mkdir(parents=True)
    (folder / "made.pt").write_bytes(b"something else")
    assert said(capsys, "ls", f"{far.url}/made.pt")[0] == 0


def test_safetensors_that_lie_of_their_length(far: Server) -> None:
    far.files["x.safetensors"] = struct.pack("<Q", 1 << 40) + b"{" + bytes(5000)
    with pytest.raises(UnreadableError):
        modelctl.open(f"{far.url}/x.safetensors")


def test_ctrl_c_while_a_server_is_silent(far: Server) -> None:
    import signal

    over = threading.Event()
    far.turns.extend([lambda handler: over.wait(30)] * 9)
    process = subprocess.Popen(
        [*MODELCTL, "ls", f"{far.url}/made.pt"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
    )
    until = time.monotonic() + 20
    while not far.asked and time.monotonic() < until:
        time.sleep(0.01)
    begun = time.monotonic()
    process.send_signal(signal.SIGINT)
    out, _ = process.communicate(timeout=10)
    over.set()
    assert process.returncode == 130
    assert not out
    assert time.monotonic() - begun < 3


# ---------------------------------------------------------------------- what is here costs nothing

_IMPORTED = """
import sys
from modelctl.cli import run
run(["ls", "made.safetensors"])
far = [name for name in sys.modules if name.startswith("modelctl.storage.far.")]
bad = {"http.client", "urllib.request", "ssl", "fsspec", "email"} & set(sys.modules)
print(sorted(far), sorted(bad), file=sys.stderr)
"""


def test_a_file_that_is_here_imports_nothing_of_it(far: Server) -> None:
    Path("made.safetensors").write_bytes(far.files["made.safetensors"])
    done = subprocess.run(
        [sys.executable, "-c", _IMPORTED], capture_output=True, text=True, check=True
    )
    assert done.stderr.strip() == "['modelctl.storage.far.urls'] []"
