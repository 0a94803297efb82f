"""Content hashes: the same for the same tensors under the same names, and for nothing else."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import modelctl as mc
from modelctl.core.nodes import ordered_dict
from modelctl.errors import DamagedError, NoMatchError
from modelctl.integrity.hashing import unwritten, written

from .files import flipped, model, numbers, tensor, training, write


def by_hand(values: Any, dtype: str) -> str:
    """The hash of a tensor, as the docs have it."""
    head = f"{dtype} {','.join(map(str, values.shape))}\n".encode()
    return "sha256:" + hashlib.sha256(head + values.tobytes()).hexdigest()


def test_the_hash_of_a_tensor(tmp_path: Path) -> None:
    values = np.arange(12, dtype="<f4").reshape(3, 4)
    path = write(tmp_path / "a.pt", {"w": tensor(values), "n": tensor(3, "int64")})
    found = mc.hash(path)
    known = {one.name: one.hash for one in found.tensors}
    assert known["w"] == by_hand(values, "float32")
    assert known["n"] == by_hand(np.asarray(3, "<i8"), "int64")


def test_a_file_is_its_manifest(tmp_path: Path) -> None:
    found = mc.hash(write(tmp_path / "a.pt", model()))
    lines = found.manifest.splitlines()
    assert lines == sorted(lines)
    assert len(lines) == len(model())
    assert found.hash == "sha256:" + hashlib.sha256(found.manifest.encode()).hexdigest()
    assert str(found) == f"{found.hash}  {tmp_path / 'a.pt'}"


def test_the_same_in_every_format_and_order(tmp_path: Path) -> None:
    wanted = mc.hash(write(tmp_path / "a.pt", model())).hash
    turned = dict(reversed(model().items()))
    files = [
        write(tmp_path / "b.safetensors", model()),
        write(tmp_path / "c.pt", turned),
        write(tmp_path / "shards", turned, to="safetensors", max_shard_size=300),
        write(tmp_path / "bin", model(), to="torch", max_shard_size=300),
        write(tmp_path / "dcp", model(), to="dcp"),
        write(tmp_path / "wrapped.pt", {"state_dict": ordered_dict(turned), "epoch": 3}),
    ]
    assert {mc.hash(path).hash for path in files} == {wanted}


def test_the_same_of_torchs_own_formats(tmp_path: Path) -> None:
    torch = pytest.importorskip("torch")
    net = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.BatchNorm1d(4))
    state = net.state_dict()
    state["0.weight"] = state["0.weight"].t().contiguous().t()  # other strides, other bytes
    torch.save(state, tmp_path / "zip.pt")
    torch.save(state, tmp_path / "legacy.pt", _use_new_zipfile_serialization=False)
    torch.save(net, tmp_path / "whole.pt")
    torch.jit.script(net).save(tmp_path / "script.pt")
    found = {mc.hash(path).hash for path in tmp_path.iterdir()}
    assert len(found) == 1
    for name, values in state.items():
        dtype = str(values.dtype).removeprefix("torch.")
        (known,) = [one for one in mc.hash(tmp_path / "zip.pt").tensors if one.name == name]
        assert known.hash == by_hand(values.contiguous().numpy(), dtype)


def test_every_dtype_of_torch(tmp_path: Path) -> None:
    torch = pytest.importorskip("torch")
    names = ("float16", "bfloat16", "float64", "int8", "uint8", "bool", "complex64")
    names += ("float8_e4m3fn", "float8_e5m2")
    for name in names:
        raw = torch.arange(16, dtype=torch.uint8) % 2
        values = raw.view(getattr(torch, name))
        torch.save({"w": values}, tmp_path / "a.pt")
        head = f"{name} {values.numel()}\n".encode()
        (found,) = mc.hash(tmp_path / "a.pt").tensors
        assert found.hash == "sha256:" + hashlib.sha256(head + raw.numpy().tobytes()).hexdigest()


def test_quantized_and_sparse_values_are_in_it(tmp_path: Path) -> None:
    torch = pytest.importorskip("torch")

    def of(value: Any) -> str:
        torch.save({"w": value, "b": torch.ones(2)}, tmp_path / "a.pt")
        return mc.hash(tmp_path / "a.pt").hash

    one, other = torch.ones(3, 3), torch.eye(3)
    assert of(one.to_sparse()) != of(other.to_sparse()) == of(other.to_sparse())
    packed = [torch.quantize_per_tensor(one * k, 0.5, 0, torch.qint8) for k in (1, 2)]
    assert of(packed[0]) != of(packed[1])


@pytest.mark.parametrize(
    "change",
    [
        {"fc.bias": numbers(5, seed=9)},
        {"fc.bias": tensor(model()["fc.bias"].numpy().reshape(5, 1))},
        {"fc.bias": tensor(model()["fc.bias"].numpy(), "float64")},
        {"fc.more": numbers(5, seed=4)},
    ],
)
def test_it_changes_with_any_tensor(change: dict[str, Any], tmp_path: Path) -> None:
    before = mc.hash(write(tmp_path / "a.pt", model())).hash
    assert mc.hash(write(tmp_path / "b.pt", {**model(), **change})).hash != before
    names = {f"x.{name}": ref for name, ref in model().items()}
    assert mc.hash(write(tmp_path / "c.pt", names)).hash != before


def test_sections(tmp_path: Path) -> None:
    path = write(tmp_path / "a.pt", training())
    whole = mc.hash(path)
    assert {one.name for one in whole.tensors} >= {"fc.weight", "optimizer.state.0.exp_avg"}
    assert mc.hash(path, "model").hash == mc.hash(write(tmp_path / "b.pt", model())).hash
    assert all(one.name.startswith("optimizer.") for one in mc.hash(path, "optimizer").tensors)
    with pytest.raises(NoMatchError, match="ema"):
        mc.hash(path, "ema")


def test_of_an_edit_that_is_not_written(tmp_path: Path) -> None:
    path = write(tmp_path / "a.pt", {f"module.{name}": ref for name, ref in model().items()})
    with mc.open(path) as ckpt:
        clean = mc.strip_prefix(ckpt)
        assert mc.hash(clean).hash == mc.hash(write(tmp_path / "b.pt", model())).hash


def test_damage_is_no_content(tmp_path: Path) -> None:
    path = write(tmp_path / "a.pt", {"w": numbers(300)})
    with mc.open(path) as ckpt:
        at = ckpt.tensors()["w"].storage.runs()[0].offset
    with pytest.raises(DamagedError, match="'w'"):
        mc.hash(flipped(path, at + 100))


@given(st.text())
def test_names_are_a_line(name: str) -> None:
    line = written(name)
    assert len(line.splitlines()) <= 1
    line.encode()
    assert unwritten(line) == name
