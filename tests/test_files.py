"""open and save: what is no checkpoint, what is refused, what is left behind."""

from __future__ import annotations

import os
import pickle
import subprocess
import sys
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch

import modelctl
from modelctl.core.checkpoint import Checkpoint
from modelctl.core.dtypes import BY_NAME
from modelctl.core.nodes import ordered_dict
from modelctl.core.storages import Run, SpreadStorage
from modelctl.core.tensors import TensorRef
from modelctl.errors import ModelctlError, RefusedError, UsageError, WriteError
from modelctl.files import save
from modelctl.storage.source import FileSource

LOOKALIKES = {
    b"": "empty",
    b"version https://git-lfs.github.com/spec/v1\noid": "LFS",
    b"<!DOCTYPE html><html>": "web page",
    b"\n<HTML>": "web page",
    b"7z\xbc\xaf'\x1c1234567": "7z",
    b"\x1f\x8b\x08rest": "gzip",
    b"GGUF\x03\0\0\0": "GGUF",
    b"\x89HDF\r\n\x1a\n": "HDF5",
    b"random noise": "not a checkpoint",
    pickle.dumps({"w": 1}): "plain pickle",
}


@pytest.mark.parametrize("data", LOOKALIKES, ids=LOOKALIKES.values())
def test_what_is_no_checkpoint(data: bytes, tmp_path: Path) -> None:
    (tmp_path / "f.pt").write_bytes(data)
    with pytest.raises(ModelctlError, match=LOOKALIKES[data]) as caught:
        modelctl.open(tmp_path / "f.pt")
    assert "f.pt" in str(caught.value)


@pytest.mark.skipif(os.name != "posix", reason="fifos")
@pytest.mark.parametrize("what", ["none", "fifo", "device"])
def test_what_is_no_file(what: str, tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "fifo")
    path = Path("/dev/zero") if what == "device" else tmp_path / what
    with pytest.raises(ModelctlError):
        modelctl.open(path)


def test_content_decides(tmp_path: Path) -> None:
    torch.save({"w": torch.ones(2)}, tmp_path / "a.safetensors")
    with modelctl.open(tmp_path / "a.safetensors") as ckpt:
        assert ckpt.origin is not None
        assert ckpt.origin.format == "torch"


def test_an_unknown_suffix(tmp_path: Path) -> None:
    torch.save({"w": torch.ones(2)}, tmp_path / "a.pt")
    with modelctl.open(tmp_path / "a.pt") as ckpt, pytest.raises(UsageError):
        save(ckpt, tmp_path / "b.xyz")
    assert sorted(os.listdir(tmp_path)) == ["a.pt"]


def test_overwrite(tmp_path: Path) -> None:
    torch.save({"w": torch.ones(2)}, tmp_path / "a.pt")
    with modelctl.open(tmp_path / "a.pt") as ckpt:
        with pytest.raises(WriteError, match="exists"):
            save(ckpt, tmp_path / "a.pt")
        saved = save(ckpt, tmp_path / "a.pt", overwrite=True)
    assert saved.bytes_written == os.path.getsize(tmp_path / "a.pt")


class Evil:
    def __init__(self, marker: str) -> None:
        self.marker = marker

    def __reduce__(self) -> object:
        return os.mkdir, (self.marker,)


def test_a_dangerous_file_is_read_but_not_written_again(tmp_path: Path) -> None:
    marker = tmp_path / "marker"
    torch.save({"w": torch.ones(2), "evil": Evil(str(marker))}, tmp_path / "a.pt")
    with modelctl.open(tmp_path / "a.pt") as ckpt:
        assert [one.level for one in ckpt.findings] == ["dangerous"]
        assert ckpt.tensors()["w"].shape == (2,)
        with pytest.raises(RefusedError, match="mkdir"):
            save(ckpt, tmp_path / "b.pt")
    assert sorted(os.listdir(tmp_path)) == ["a.pt"]


class Passed:
    """A call that hides in the arguments of a harmless one."""

    def __init__(self, marker: str) -> None:
        self.marker = marker

    def __reduce__(self) -> object:
        from torch._tensor import _rebuild_from_type_v2

        return _rebuild_from_type_v2, (os.mkdir, dict, (self.marker,), {})


def test_a_call_in_the_arguments_is_not_written_again(tmp_path: Path) -> None:
    marker = tmp_path / "marker"
    torch.save({"evil": Passed(str(marker))}, tmp_path / "a.pt")
    with pytest.raises(AttributeError):  # it does run, in a reader that runs what it reads
        torch.load(tmp_path / "a.pt", weights_only=False)
    assert marker.is_dir()
    marker.rmdir()
    with modelctl.open(tmp_path / "a.pt") as ckpt:
        assert [one.level for one in ckpt.findings] == ["dangerous"]
        with pytest.raises(RefusedError, match="mkdir"):
            save(ckpt, tmp_path / "b.pt")
    assert not marker.exists()


def test_torch_is_not_imported(tmp_path: Path) -> None:
    torch.save({"w": torch.ones(2).t(), "v": torch.ones(2, 3).t()}, tmp_path / "a.pt")
    script = (
        "import sys, modelctl\n"
        "with modelctl.open(sys.argv[1]) as c:\n"
        "    [ref.tobytes() for ref in c.tensors().values()]\n"
        "    modelctl.save(c, sys.argv[2]); modelctl.save(c, sys.argv[3])\n"
        "assert not {'torch', 'safetensors', 'pickle'} & (set(sys.modules) - before), sys.modules\n"
    )
    script = "import numpy, sys\nbefore = set(sys.modules)\n" + script
    names = [str(tmp_path / name) for name in ("a.pt", "b.pt", "b.safetensors")]
    subprocess.run([sys.executable, "-c", script, *names], check=True)


def test_a_closed_file_says_so(tmp_path: Path) -> None:
    torch.save({"w": torch.ones(2)}, tmp_path / "a.pt")
    ckpt = modelctl.open(tmp_path / "a.pt")
    ckpt.close()
    ckpt.close()
    with pytest.raises(ModelctlError):
        ckpt.tensors()["w"].tobytes()


# ------------------------------------------------------------------ over several files


@pytest.mark.parametrize("out", ["out.pt", "out.safetensors"])
def test_a_tensor_in_several_files_is_one_tensor(out: str, tmp_path: Path) -> None:
    """As ranks save it: rows in turn; large pieces and small ones, and one that is turned."""
    values = np.arange(300_000, dtype="<f4").reshape(300, 1000)
    cuts = [0, 1, 100, 101, 300]
    for name, halves in (("a", values[:101]), ("b", values[101:])):
        (tmp_path / name).write_bytes(b"head" + halves.tobytes())
    sources = [FileSource(tmp_path / "a"), FileSource(tmp_path / "b")]
    row = 4 * 1000
    runs = [
        Run(sources[begin >= 101], 4 + (begin - 101 * (begin >= 101)) * row, (end - begin) * row)
        for begin, end in pairwise(cuts)
    ]
    storage = SpreadStorage(runs)
    weight = TensorRef(BY_NAME["float32"], (300, 1000), storage)
    turned = TensorRef(BY_NAME["float32"], (1000, 300), SpreadStorage(runs), stride=(1, 1000))
    ckpt = Checkpoint(ordered_dict({"w": weight, "t": turned}), resources=tuple(sources))
    modelctl.save(ckpt, tmp_path / out)
    ckpt.close()
    with modelctl.open(tmp_path / out) as again:
        found = again.state_dict()
        assert found["w"].tobytes() == values.tobytes()
        assert found["t"].tobytes() == values.T.tobytes()
