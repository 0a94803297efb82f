"""A damaged file never becomes a live model's weights without a word."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn

import modelctl as mc
import modelctl.nn as mnn
from modelctl.core.dtypes import BY_NAME
from modelctl.core.tensors import TensorRef
from modelctl.errors import DamagedError
from modelctl.nn.loading import reader as reading
from modelctl.storage.chunked import Chunk, ChunkedStorage
from tests.formats.pytorch.test_damaged_storages import flip


def net(width: int) -> nn.Sequential:
    return nn.Sequential(nn.Linear(4, 3), nn.Linear(width, 1024, bias=False))


@pytest.fixture(params=[4, 1024])
def width(request: pytest.FixtureRequest) -> int:
    """Of a tensor that is read in one piece, and of one that threads share."""
    made: int = request.param
    assert (made * 1024 * 4 > reading.PIECE) == (made == 1024)
    return made


@pytest.fixture
def path(width: int, tmp_path: Path) -> Path:
    path = tmp_path / "f.pt"
    torch.save(net(width).state_dict(), path)
    mnn.load_into(net(width), path)
    flip(path, "1.weight")
    return path


@pytest.mark.parametrize("dtype", [None, torch.float64])
def test_load_into(dtype: torch.dtype | None, path: Path, width: int) -> None:
    with pytest.raises(DamagedError, match=rf"{path}, at byte .*'1\.weight' is damaged"):
        mnn.load_into(net(width), path, dtype=dtype)


def test_load_into_what_lies_otherwise(path: Path, width: int) -> None:
    model = net(width)
    model[1].weight = nn.Parameter(torch.zeros(width, 1024).t())
    with pytest.raises(DamagedError):
        mnn.load_into(model, path)


def test_load(path: Path) -> None:
    with pytest.raises(DamagedError, match=r"'1\.weight' is damaged"):
        mnn.load(path)


def test_what_is_not_loaded_is_not_looked_at(path: Path) -> None:
    mnn.load_into(nn.Sequential(nn.Linear(4, 3)), path, on_mismatch="skip")


@pytest.mark.parametrize("apart", [1, 600 << 10])
def test_views_of_one_storage(apart: int, tmp_path: Path) -> None:
    flat = torch.arange(float(1 << 20))
    torch.save({"a": flat[: 100 << 10], "b": flat[-apart:]}, tmp_path / "f.pt")
    assert torch.equal(mnn.load(tmp_path / "f.pt")["b"], flat[-apart:])
    flip(tmp_path / "f.pt", "a")
    with pytest.raises(DamagedError):
        mnn.load(tmp_path / "f.pt")


def test_resume(tmp_path: Path) -> None:
    model = net(4)
    optimizer = torch.optim.Adam(model.parameters())
    model[0](torch.randn(2, 4)).sum().backward()
    optimizer.step()
    path = tmp_path / "f.pt"
    mnn.save_checkpoint(path, model=model, optimizer=optimizer, epoch=1)
    flip(path, "optimizer.state.0.exp_avg")
    with pytest.raises(DamagedError, match=r"'optimizer\.state\.0\.exp_avg' is damaged"):
        mnn.resume(path, model=model, optimizer=optimizer)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_parts_of_several_files(width: int, dtype: torch.dtype, tmp_path: Path) -> None:
    """Of a tensor whose parts have checksums, and of one that is cut out of a flat vector."""
    values = torch.rand(width, 1024)
    two = [values[: width // 2].clone(), values[width // 2 :].clone()]
    for rank, part in enumerate(two):
        torch.save(part, tmp_path / f"{rank}.pt")
        torch.save(torch.cat([torch.ones(3), part.view(-1)]), tmp_path / f"flat-{rank}.pt")

    def load(names: list[str]) -> torch.Tensor:
        files = [mc.open(tmp_path / name) for name in names]
        chunks = [
            Chunk.of((at,), _end(file.root, part.numel()), "there")
            for at, part, file in zip((0, two[0].numel()), two, files, strict=True)
        ]
        storage = ChunkedStorage(BY_NAME["float32"], (values.numel(),), chunks)
        dest = torch.empty(values.shape, dtype=dtype)
        with reading.Reader() as reader:
            reader.read(TensorRef(BY_NAME["float32"], tuple(values.shape), storage), dest)
        return dest

    for names in (["0.pt", "1.pt"], ["flat-0.pt", "flat-1.pt"]):
        assert torch.equal(load(names), values.to(dtype))
        path = tmp_path / names[1]
        data = bytearray(path.read_bytes())
        at = data.index(two[1].numpy().tobytes()[-1024:])
        data[at + 100] ^= 16
        path.write_bytes(data)
        with pytest.raises(DamagedError):
            load(names)


def _end(vector: TensorRef, numel: int) -> TensorRef:
    """The last elements of a tensor, as a vector."""
    return vector.replace(shape=(numel,), stride=(1,), offset=vector.numel - numel)
