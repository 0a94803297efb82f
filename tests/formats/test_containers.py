"""Containers that people have: read, or named rightly with a way out."""

from __future__ import annotations

import gzip
import io
import pickle
import subprocess
import tarfile
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import modelctl as mc
from modelctl.errors import LossError, ModelctlError, UnreadableError

STATE = {"a.weight": torch.randn(3, 4), "a.bias": torch.randn(3)}


@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
def test_a_pickle_of_arrays(tmp_path: Path, protocol: int) -> None:
    arrays: dict[str, Any] = {
        "w": np.arange(6, dtype="f4").reshape(2, 3),
        "f": np.asfortranarray(np.arange(6, dtype="f8").reshape(2, 3)),
        "h": np.ones(3, "f2"),
        "n": np.int64([-1, 2]),
        "b": np.array([True, False]),
        "none": np.zeros((0, 4), "f4"),
        "scalar": np.array(2.5),
    }
    root = {"model": arrays, "__author__": "x", "names": np.array(["a", "b"])}
    path = tmp_path / "m.pkl"
    path.write_bytes(pickle.dumps(root, protocol))
    with mc.open(path) as ckpt:
        found = ckpt.state_dict()
        assert list(found) == list(arrays)
        for name, ref in found.items():
            np.testing.assert_array_equal(ref.numpy(), arrays[name])
            assert ref.numpy().dtype == arrays[name].dtype
        assert ckpt["__author__"] == "x"
        assert not ckpt.findings
    rescue = {"do": "convert", "weights-only": True}
    mc.edit(path, rescue, output=tmp_path / "m.pt")
    loaded = torch.load(tmp_path / "m.pt")
    assert all((loaded[name].numpy() == array).all() for name, array in arrays.items())
    for options in ({"in_place": True}, {"output": tmp_path / "x.pt"}):
        with pytest.raises(LossError, match="plain pickle"):
            mc.edit(path, {"do": "add-prefix", "prefix": "m"}, **options)  # type: ignore[call-overload]


def test_an_array_that_lies_about_its_shape(tmp_path: Path) -> None:
    data = pickle.dumps({"w": np.arange(6, dtype="f4")}, 2)
    assert data.count(b"K\x06\x85") == 1
    (tmp_path / "m.pkl").write_bytes(data.replace(b"K\x06\x85", b"K\x07\x85"))
    with pytest.raises(UnreadableError, match="in 24 bytes"):
        mc.open(tmp_path / "m.pkl")


def test_a_tar_of_checkpoints(tmp_path: Path) -> None:
    torch.save(STATE, tmp_path / "m.pt")
    (tmp_path / "c.yaml").write_text("a: 1")
    with tarfile.open(tmp_path / "m.nemo", "w") as tar:
        tar.add(tmp_path / "c.yaml", "./model_config.yaml")
        tar.add(tmp_path / "m.pt", "./model_weights.ckpt")
    with mc.open(tmp_path / "m.nemo") as ckpt:
        assert {k: v.shape for k, v in ckpt.state_dict().items()} == {
            name: tuple(one.shape) for name, one in STATE.items()
        }
    rescue = {"do": "convert", "weights-only": True}
    mc.edit(tmp_path / "m.nemo", rescue, output=tmp_path / "w.pt")
    loaded = torch.load(tmp_path / "w.pt")
    assert all(torch.equal(loaded[name], one) for name, one in STATE.items())
    with tarfile.open(tmp_path / "none.tar", "w") as tar:
        tar.add(tmp_path / "c.yaml", "c.yaml")
    with pytest.raises(UnreadableError, match="a tar without a checkpoint"):
        mc.open(tmp_path / "none.tar")


def zipped(*names: str) -> bytes:
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w") as made:
        for name in names:
            made.writestr(name, b"x" * 10)
    return file.getvalue()


@pytest.mark.parametrize(
    ("name", "data", "said", "way_out"),
    [
        ("a.npz", zipped("w.npy"), "a numpy .npz", "numpy.load"),
        ("a.npy", b"\x93NUMPY\1\0", "one numpy array", "numpy.load"),
        ("a.keras", zipped("config.json", "model.weights.h5"), "a Keras model", "keras"),
        ("a.mar", zipped("MAR-INF/MANIFEST.json", "x.py"), "a TorchServe archive", "unpack it"),
        ("a.onnx", b"\x08\x08\x12\x07pytorch\x1a\x052.1.0:", "an ONNX graph", "onnx"),
        ("a.gguf", b"GGUF\3\0\0\0", "a GGUF file", "gguf"),
        ("a.h5", b"\x89HDF\r\n\x1a\n", "an HDF5 file", "keras"),
        ("a.pt.gz", gzip.compress(b"PK\3\4" * 500, mtime=0), "one file, gzipped", "gunzip -k"),
        ("__0_0.distcp", b"PK\3\4", "torch.distributed.checkpoint", "name the folder"),
        (".metadata", b"\x80\4}.", "torch.distributed.checkpoint", "name the folder"),
    ],
)
def test_what_is_not_read_is_named(
    tmp_path: Path, name: str, data: bytes, said: str, way_out: str
) -> None:
    (tmp_path / name).write_bytes(data)
    with pytest.raises(ModelctlError, match=said) as e:
        mc.open(tmp_path / name)
    assert way_out in (e.value.hint or "")
    assert "damaged" not in e.value.message


def test_an_unpacked_file_is_packed_again_as_the_hint_says(tmp_path: Path) -> None:
    torch.save(STATE, tmp_path / "m.pt")
    zipfile.ZipFile(tmp_path / "m.pt").extractall(tmp_path / "out")
    with pytest.raises(UnreadableError, match="unpacked") as e:
        mc.open(tmp_path / "out" / "m")
    command = str(e.value.hint).removeprefix("pack it again: ")
    if subprocess.run(["sh", "-c", "command -v zip"], capture_output=True).returncode:
        pytest.skip("no zip here")
    subprocess.run(["sh", "-c", command], check=True, capture_output=True)
    assert list(torch.load(tmp_path / "out" / "m.pt")) == list(STATE)


def test_a_bare_tensor_has_no_name(tmp_path: Path) -> None:
    torch.save(torch.ones(2), tmp_path / "t.pt")
    with pytest.raises(LossError, match="this is a tensor") as e:
        mc.edit(tmp_path / "t.pt", "convert", output=tmp_path / "t.safetensors")
    assert "--weights-only" not in str(e.value.hint)


@pytest.mark.parametrize(
    "bare", [torch.randn(3, 4), [torch.randn(3), torch.ones(2)], (torch.ones(2),)], ids=type
)
@pytest.mark.parametrize("weights_only", [False, True])
def test_tensors_without_names_get_some(tmp_path: Path, bare: Any, weights_only: bool) -> None:
    """The way out, followed to the letter."""
    torch.save(bare, tmp_path / "bare.pt")
    convert = {"do": "convert", "weights-only": weights_only}
    mc.edit(tmp_path / "bare.pt", convert, output=tmp_path / "same.pt")  # they are all weights
    assert str(torch.load(tmp_path / "same.pt")) == str(bare)
    with pytest.raises(ModelctlError) as e:
        mc.edit(tmp_path / "bare.pt", convert, output=tmp_path / "t.safetensors")
    assert e.value.hint is not None
    way_out = e.value.hint.removeprefix("give it a name: ").removesuffix("; or write .pt")
    exec(way_out.replace("'named.pt'", repr(str(tmp_path / "named.pt"))), {"torch": torch})
    rescue = {"do": "convert"}
    mc.edit(tmp_path / "named.pt", rescue, output=tmp_path / "t.safetensors")
    with mc.open(tmp_path / "t.safetensors") as ckpt:
        found = [ref.torch() for ref in ckpt.state_dict().values()]
    wanted = [bare] if isinstance(bare, torch.Tensor) else list(bare)
    assert all(torch.equal(one, other) for one, other in zip(found, wanted, strict=True))
