"""numpy arrays in files of ``torch.save``: seen as tensors, written back as arrays."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import modelctl as mc
import modelctl.nn as mnn
from modelctl.errors import UnreadableError

ARRAYS: dict[str, Any] = {
    "a.weight": np.arange(6, dtype="f4").reshape(2, 3),
    "a.bias": np.float32([1, -2]),
    "fortran": np.asfortranarray(np.arange(24, dtype="f8").reshape(2, 3, 4)),
    "half": np.ones(3, "f2"),
    "big": np.arange(4, dtype=">f4"),
    "big.complex": np.array([1 + 2j, -3j], dtype=">c8"),
    "ints": np.int64([-1, 2]),
    "mask": np.array([[True, False]]),
    "none": np.zeros((0, 4), "f4"),
    "zero-dim": np.array(2.5),
    "scalar": np.float32(4.25),
    "flag": np.bool_(True),
}
WAYS = [
    {},
    {"pickle_protocol": 4},
    {"pickle_protocol": 5},
    {"_use_new_zipfile_serialization": False},
]


def same(one: Any, other: Any) -> bool:
    """The same object: type, dtype (its byte order, too), order in memory, values."""
    if isinstance(one, torch.Tensor):
        return isinstance(other, torch.Tensor) and torch.equal(one, other)
    if isinstance(one, np.ndarray):
        return (
            type(one) is type(other)
            and one.dtype.str == other.dtype.str
            and one.shape == other.shape
            and one.flags.f_contiguous == other.flags.f_contiguous
            and one.flags.writeable == other.flags.writeable
            and one.tobytes() == other.tobytes()
        )
    return type(one) is type(other) and one == other


@pytest.mark.parametrize("how", WAYS, ids=str)
def test_they_are_the_model(tmp_path: Path, how: dict[str, Any]) -> None:
    path = tmp_path / "m.pt"
    torch.save({"model": ARRAYS, "epoch": np.int64(3), "names": np.array(["a", "b"])}, path, **how)
    with mc.open(path) as ckpt:
        assert ckpt.sections.kind == "checkpoint"
        found = ckpt.state_dict()
        assert list(found) == list(ARRAYS)
        for name, ref in found.items():
            wanted = np.asarray(ARRAYS[name])
            assert ref.shape == wanted.shape
            np.testing.assert_array_equal(ref.numpy(), wanted)
            assert ref.numpy().dtype == wanted.dtype.newbyteorder("<")
        assert ckpt["epoch"] == 3
        assert mc.summary(ckpt).as_dict()["totals"]["tensors"] == len(ARRAYS)


@pytest.mark.parametrize("how", WAYS, ids=str)
def test_they_stay_arrays(tmp_path: Path, how: dict[str, Any]) -> None:
    saved = {
        "model": {**ARRAYS, "t": torch.ones(2)},
        "epoch": np.int64(3),
        "names": np.array(["a", "b"]),
        "rng": np.random.get_state(),
    }
    torch.save(saved, tmp_path / "m.pt", **how)
    # what numpy makes of it: of big-endian ones mostly little-endian ones
    saved = torch.load(tmp_path / "m.pt", weights_only=False)
    edits: list[dict[str, Any]] = [
        {"do": "drop", "pattern": ["ints"]},
        {"do": "rename", "map": ["a.*=b.*"]},
        {"do": "add-prefix", "prefix": "m"},
    ]
    mc.edit(tmp_path / "m.pt", edits, output=tmp_path / "n.pt")
    loaded = torch.load(tmp_path / "n.pt", weights_only=False)
    kept = {k: v for k, v in saved["model"].items() if k != "ints"}
    names = ["m." + name.replace("a.", "b.") if name[:2] == "a." else f"m.{name}" for name in kept]
    assert list(loaded["model"]) == names
    for was, now in zip(kept.values(), loaded["model"].values(), strict=True):
        assert same(was, now), (was, now)
    assert same(loaded["epoch"], saved["epoch"])
    assert same(loaded["names"], saved["names"])
    assert same(loaded["rng"][1], saved["rng"][1])


def test_tied_arrays_stay_tied(tmp_path: Path) -> None:
    one = np.ones(3, "f4")
    torch.save({"model": {"a.w": one, "b.w": one}}, tmp_path / "m.pt")
    mc.edit(tmp_path / "m.pt", {"do": "add-prefix", "prefix": "m"}, in_place=True)
    loaded = torch.load(tmp_path / "m.pt", weights_only=False)["model"]
    assert loaded["m.a.w"] is loaded["m.b.w"]


def test_to_safetensors_and_back(tmp_path: Path) -> None:
    torch.save({"model": ARRAYS}, tmp_path / "m.pt")
    rescue = {"do": "convert", "weights-only": True}
    mc.edit(tmp_path / "m.pt", rescue, output=tmp_path / "m.safetensors")
    mc.edit(tmp_path / "m.safetensors", {"do": "convert"}, output=tmp_path / "back.pt")
    loaded = torch.load(tmp_path / "back.pt")
    assert loaded.keys() == ARRAYS.keys()
    for name, value in ARRAYS.items():
        np.testing.assert_array_equal(loaded[name].numpy(), np.asarray(value))


def test_a_model_takes_them(tmp_path: Path) -> None:
    model = torch.nn.Linear(3, 2)
    torch.save({n: p.detach().numpy() for n, p in model.named_parameters()}, tmp_path / "m.pt")
    other = torch.nn.Linear(3, 2)
    mnn.load_into(other, tmp_path / "m.pt")
    assert torch.equal(other.weight, model.weight)
    assert torch.equal(other.bias, model.bias)


def test_the_states_of_generators_are_no_models(tmp_path: Path) -> None:
    states = [np.random.get_state(legacy=False), np.random.get_state(), random.getstate()]
    torch.save({"net": {"w": np.ones(2)}, "states": states}, tmp_path / "m.pt")
    with mc.open(tmp_path / "m.pt") as ckpt:
        assert [one.path for one in ckpt.sections.models] == [("net",)]
    torch.save({"rng": states[0]}, tmp_path / "m.pt")
    with mc.open(tmp_path / "m.pt") as ckpt:
        assert not ckpt.sections.models
    mc.edit(tmp_path / "m.pt", {"do": "convert"}, output=tmp_path / "n.pt")
    loaded = torch.load(tmp_path / "n.pt", weights_only=False)["rng"]
    assert same(loaded["state"]["key"], states[0]["state"]["key"])  # type: ignore[call-overload]


def test_scalars_beside_no_array_are_numbers(tmp_path: Path) -> None:
    torch.save({"w": torch.ones(2), "lr": np.float64(0.5)}, tmp_path / "m.pt")
    with mc.open(tmp_path / "m.pt") as ckpt:
        assert ckpt["lr"] == 0.5
        assert list(ckpt.state_dict()) == ["w"]
    torch.save({"w": np.ones(2), "epoch": np.int64(7)}, tmp_path / "m.pt")
    with mc.open(tmp_path / "m.pt") as ckpt:  # a tensor, and a number still
        assert ckpt["epoch"] == 7


def test_one_that_lies_about_its_shape(tmp_path: Path) -> None:
    path = tmp_path / "m.pt"
    torch.save({"w": np.arange(6, dtype="f4")}, path, _use_new_zipfile_serialization=False)
    data = path.read_bytes()
    assert data.count(b"K\x06\x85") == 1
    path.write_bytes(data.replace(b"K\x06\x85", b"K\x07\x85"))
    with pytest.raises(UnreadableError, match="in 24 bytes"):
        mc.open(path)
