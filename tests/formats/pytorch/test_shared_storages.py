"""Tensors of several dtypes over one storage: as torch.load sees them."""

from __future__ import annotations

import zipfile
from pathlib import Path
from typing import Any

import pytest

import modelctl as mc

torch = pytest.importorskip("torch")

ZIP, LEGACY = True, False


def two(first: Any, second: Any) -> dict[str, Any]:
    return {"a": first, "b": second}


def sixteen() -> Any:
    return torch.tensor([1, 2, 515], dtype=torch.uint16)


def empty() -> Any:
    return torch.empty(0)


OBJECTS = {
    "untyped, then bytes": (lambda: two(x := sixteen(), x.view(torch.uint8)), ZIP),
    "bytes, then untyped": (lambda: two((x := sixteen()).view(torch.uint8), x), ZIP),
    "empty": (lambda: two(x := empty(), x.view(torch.int16)), ZIP),
    "empty, other way": (lambda: two((x := empty()).view(torch.int64), x), ZIP),
    "empty, three": (lambda: {**two(x := empty(), x.view(torch.uint16)), "c": x.view(1, 0)}, ZIP),
    "empty, legacy": (lambda: two(x := empty(), x.view(torch.int16)), LEGACY),
}


@pytest.mark.parametrize(("make", "new"), OBJECTS.values(), ids=OBJECTS)
def test_as_torch_loads_them(tmp_path: Path, make: Any, new: bool) -> None:
    path = tmp_path / "a.pt"
    torch.save(make(), path, _use_new_zipfile_serialization=new)
    expected = torch.load(path)
    written = [tmp_path / "b.pt", tmp_path / "c.pt"]
    with mc.open(path) as ckpt:
        mc.save(ckpt, written[0])
        found = {
            name: (f"torch.{ref.dtype.name}", ref.shape, ref.tobytes())
            for name, ref in ckpt.tensors().items()
        }
    mc.edit(path, {"do": "add-prefix", "prefix": "m"}, output=written[1])
    assert found == {
        name: (str(t.dtype), tuple(t.shape), t.contiguous().view(torch.uint8).numpy().tobytes())
        for name, t in expected.items()
    }
    for again in (torch.load(one) for one in written):
        for name, tensor in again.items():
            assert tensor.dtype == expected[name.removeprefix("m.")].dtype
            assert torch.equal(tensor, expected[name.removeprefix("m.")])


@pytest.mark.parametrize("numel", [524289, 262169, 786433])
def test_deflated_members_beyond_whole_mebibytes(tmp_path: Path, numel: int) -> None:
    torch.save({"a": torch.zeros(numel)}, tmp_path / "plain.pt")
    with (
        zipfile.ZipFile(tmp_path / "plain.pt") as plain,
        zipfile.ZipFile(tmp_path / "a.pt", "w", zipfile.ZIP_DEFLATED) as packed,
    ):
        for name in plain.namelist():
            packed.writestr(name, plain.read(name))
    with mc.open(tmp_path / "a.pt") as ckpt:
        assert ckpt.tensors()["a"].tobytes() == bytes(4 * numel)
