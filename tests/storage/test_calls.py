"""What passes through this process when a checkpoint is saved: its structure, and of its tensors
only what a checksum needs.

The calls of the system are counted, so that a copy that goes through user space is seen whatever
the time that it takes.
"""

from __future__ import annotations

import mmap
import os
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import modelctl

# Names, shapes, offsets, the records of a zip: not a hundredth of the tensors.
STRUCTURE = 200_000


@pytest.fixture(scope="module")
def state() -> dict[str, torch.Tensor]:
    torch.manual_seed(0)
    return {f"layers.{i}.weight": torch.randn(1024, 1024) for i in range(8)}


@pytest.fixture(scope="module")
def payload(state: dict[str, torch.Tensor]) -> int:
    return sum(tensor.nbytes for tensor in state.values())


@pytest.fixture(autouse=True)
def _ranges(tmp_path: Path) -> None:
    if not hasattr(os, "copy_file_range"):
        pytest.skip("no copy_file_range here")
    (tmp_path / "probe").write_bytes(b"x" * 10_000)
    with open(tmp_path / "probe", "rb") as source, open(tmp_path / "probe2", "wb") as sink:
        try:
            os.copy_file_range(source.fileno(), sink.fileno(), 10_000)
        except OSError as e:
            pytest.skip(f"the file system of {tmp_path} copies no ranges: {e}")


@contextmanager
def counted() -> Iterator[Counter[str]]:
    """Bytes by call, of what is moved in the block."""
    moved: Counter[str] = Counter()
    real = {name: getattr(os, name) for name in ("read", "pread", "pwrite", "copy_file_range")}
    real_preadv = os.preadv
    real_map = mmap.mmap

    def reading(name: str) -> Any:
        def call(*args: Any) -> bytes:
            data: bytes = real[name](*args)
            moved["read"] += len(data)
            return data

        return call

    def writing(name: str) -> Any:
        def call(*args: Any) -> int:
            done: int = real[name](*args)
            moved[name] += done
            return done

        return call

    def reading_into(*args: Any) -> int:
        done = real_preadv(*args)
        moved["read"] += done
        return done

    def mapped(fd: int, length: int, **options: Any) -> mmap.mmap:
        moved["read"] += length
        return real_map(fd, length, **options)

    with pytest.MonkeyPatch.context() as patch:
        for name in ("read", "pread"):
            patch.setattr(os, name, reading(name))
        for name in ("pwrite", "copy_file_range"):
            patch.setattr(os, name, writing(name))
        patch.setattr(os, "preadv", reading_into)
        for name in ("readv", "write", "writev", "pwritev", "sendfile", "splice"):
            patch.delattr(os, name, raising=False)
        patch.setattr(mmap, "mmap", mapped)
        yield moved


def write(state: dict[str, torch.Tensor], path: Path) -> None:
    save_file(state, path) if path.suffix == ".safetensors" else torch.save(state, path)


def load(path: Path) -> dict[str, torch.Tensor]:
    if path.suffix == ".safetensors":
        return load_file(path)
    loaded: dict[str, torch.Tensor] = torch.load(path, weights_only=True)
    return loaded


@pytest.mark.parametrize("target", ["out.pt", "out.safetensors"])
@pytest.mark.parametrize("source", ["in.pt", "in.safetensors"])
def test_tensors_do_not_pass_user_space(
    source: str, target: str, state: dict[str, torch.Tensor], payload: int, tmp_path: Path
) -> None:
    write(state, tmp_path / source)
    with counted() as moved, modelctl.open(tmp_path / source) as ckpt:
        modelctl.save(ckpt, tmp_path / target)
        assert ckpt.bytes_read <= moved["read"]
    size = (tmp_path / target).stat().st_size
    signature = len(f"{os.getpid()} {os.uname().nodename}\n")  # of the lock
    assert moved["pwrite"] + moved["copy_file_range"] == size + signature
    if (source, target) == ("in.safetensors", "out.pt"):
        # there a checksum is recorded, which has to be computed: once through user space
        assert payload <= moved["read"] <= payload + STRUCTURE
    else:
        assert moved["copy_file_range"] >= payload
        assert moved["pwrite"] <= STRUCTURE
        # where the checksum is left behind it is compared, beside the copy
        compared = payload if (source, target) == ("in.pt", "out.safetensors") else 0
        assert compared <= moved["read"] <= compared + STRUCTURE
    loaded = load(tmp_path / target)
    assert all(torch.equal(loaded[name], tensor) for name, tensor in state.items())


def test_an_edit_in_place(state: dict[str, torch.Tensor], payload: int, tmp_path: Path) -> None:
    path = tmp_path / "f.pt"
    write({f"module.{name}": tensor for name, tensor in state.items()}, path)
    with counted() as moved, modelctl.open(path) as ckpt:
        modelctl.save(modelctl.strip_prefix(ckpt, "module."), path, overwrite=True)
    assert moved["copy_file_range"] >= payload
    assert moved["pwrite"] + moved["read"] <= STRUCTURE
    assert list(load(path)) == list(state)


def test_what_does_pass_is_seen(
    state: dict[str, torch.Tensor], payload: int, tmp_path: Path
) -> None:
    """A transposed tensor is gathered."""
    turned = {name: tensor.T for name, tensor in state.items()}
    write(turned, tmp_path / "in.pt")
    with counted() as moved, modelctl.open(tmp_path / "in.pt") as ckpt:
        modelctl.save(ckpt, tmp_path / "out.safetensors")
    assert moved["pwrite"] >= payload
    assert moved["read"] >= payload
