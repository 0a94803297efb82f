"""Gzipped tars, and links among shards."""

from __future__ import annotations

import gzip
import io
import json
import os
import tarfile
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

import modelctl
from modelctl.errors import ModelctlError, UnreadableError

STATE = {"encoder.weight": torch.arange(12.0).reshape(3, 4), "encoder.bias": torch.ones(3)}


def tar_gz(path: Path, members: dict[str, bytes]) -> Path:
    with tarfile.open(path, "w:gz") as tar:
        for name, data in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return path


def weights(**options: bool) -> bytes:
    buffer = io.BytesIO()
    torch.save(STATE, buffer, **options)
    return buffer.getvalue()


@pytest.mark.parametrize("new", [True, False], ids=["zip", "legacy"])
def test_an_allennlp_archive(tmp_path: Path, new: bool) -> None:
    data = weights(_use_new_zipfile_serialization=new)
    config = json.dumps({"model": {"type": "tagger"}}).encode()
    path = tar_gz(tmp_path / "model.tar.gz", {"config.json": config, "weights.th": data})
    with modelctl.open(path) as ckpt:
        assert ckpt.root["config"] == {"model": {"type": "tagger"}}
        found = ckpt.state_dict()
        assert {name: ref.tobytes() for name, ref in found.items()} == {
            name: tensor.numpy().tobytes() for name, tensor in STATE.items()
        }
        modelctl.save(modelctl.convert(ckpt, weights_only=True), tmp_path / "out.pt")
    loaded = torch.load(tmp_path / "out.pt", weights_only=True)
    assert all(torch.equal(loaded[name], tensor) for name, tensor in STATE.items())


def test_an_archive_is_cut_off_anywhere(tmp_path: Path) -> None:
    data = tar_gz(tmp_path / "a.tar.gz", {"weights.th": weights()}).read_bytes()
    for size in range(20, len(data) - 8, 97):
        (tmp_path / "cut").write_bytes(data[:size])
        with pytest.raises(ModelctlError):
            modelctl.open(tmp_path / "cut")


def test_a_bomb_is_refused_before_it_inflates(tmp_path: Path) -> None:
    path = tmp_path / "bomb.tar.gz"
    info = tarfile.TarInfo("weights.th")
    info.size = 1 << 40
    path.write_bytes(gzip.compress(info.tobuf() + bytes(1 << 20)))
    with pytest.raises(UnreadableError, match="inflates"):
        modelctl.open(path)


def test_the_checksum_of_a_gzipped_tar(tmp_path: Path) -> None:
    """It stands at the very end, behind what a tar's reader needs."""
    path = tar_gz(tmp_path / "a.tar.gz", {"weights.th": weights()})
    data = bytearray(path.read_bytes())
    data[-8] ^= 1
    path.write_bytes(data)
    with pytest.raises(UnreadableError, match="not a gzipped tar: CRC check failed"):
        modelctl.open(path)


def test_zeros_behind_a_gzipped_tar_are_not_inflated_for_ever(tmp_path: Path) -> None:
    path = tar_gz(tmp_path / "a.tar.gz", {"weights.th": weights()})
    plain = gzip.decompress(path.read_bytes())
    path.write_bytes(gzip.compress(plain + bytes(200 << 20)))
    with pytest.raises(UnreadableError, match="inflates to far more"):
        modelctl.open(path)


@pytest.mark.parametrize("members", [{}, {"README": b"hello"}, {"config.json": b"{"}])
def test_an_archive_without_a_checkpoint(tmp_path: Path, members: dict[str, bytes]) -> None:
    with pytest.raises(UnreadableError):
        modelctl.open(tar_gz(tmp_path / "a.tar.gz", members))


def sharded(folder: Path) -> Path:
    folder.mkdir(parents=True)
    save_file(STATE, folder / "model-00001-of-00001.safetensors")
    index = {"weight_map": dict.fromkeys(STATE, "model-00001-of-00001.safetensors")}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return folder


@pytest.mark.skipif(os.name != "posix", reason="links")
def test_a_link_among_shards_is_followed_only_when_asked(tmp_path: Path) -> None:
    folder = sharded(tmp_path / "model")
    shard = folder / "model-00001-of-00001.safetensors"
    shard.rename(tmp_path / "elsewhere")
    shard.symlink_to(tmp_path / "elsewhere")
    with pytest.raises(ModelctlError, match="symbolic link") as e:
        modelctl.open(folder)
    assert e.value.hint == "--follow-symlinks"
    with modelctl.open(folder, follow_symlinks=True) as ckpt:
        assert list(ckpt.state_dict()) == list(STATE)


@pytest.mark.skipif(os.name != "posix", reason="links")
def test_links_inside_one_hugging_face_cache_are_followed(tmp_path: Path) -> None:
    repo = tmp_path / "hub" / "models--org--name"
    folder = sharded(repo / "snapshots" / "abc")
    (repo / "blobs").mkdir()
    for file in list(folder.iterdir()):
        blob = repo / "blobs" / f"blob-{file.name}"
        file.rename(blob)
        file.symlink_to(Path("../../blobs") / blob.name)
    with modelctl.open(folder) as ckpt:
        assert list(ckpt.state_dict()) == list(STATE)
    (folder / "model-00001-of-00001.safetensors").unlink()
    (folder / "model-00001-of-00001.safetensors").symlink_to("/etc/hostname")
    with pytest.raises(ModelctlError, match="symbolic link"):
        modelctl.open(folder)


@pytest.mark.parametrize("names", [[], ["a.txt"], ["a.pt", "b.pt"]])
def test_a_folder_without_one_checkpoint(tmp_path: Path, names: list[str]) -> None:
    for name in names:
        (tmp_path / name).write_bytes(weights())
    with pytest.raises(UnreadableError, match="folder"):
        modelctl.open(tmp_path)


def test_a_folder_with_one_checkpoint_stands_for_it(tmp_path: Path) -> None:
    (tmp_path / "last.pt").write_bytes(weights())
    with modelctl.open(tmp_path) as ckpt:
        assert list(ckpt.state_dict()) == list(STATE)
