"""What is whole of a torn file is kept, what is lost is named; whatever byte it was cut at."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

import modelctl as mc
from modelctl.errors import ModelctlError, RefusedError, UnreadableError
from modelctl.integrity.salvage import salvage

from .files import flipped, model, numbers, training, write


def contents(path: Path) -> dict[str, bytes]:
    with mc.open(path) as ckpt:
        return {name: ref.tobytes() for name, ref in ckpt.tensors().items()}


def kept(path: Path, out: Path) -> tuple[dict[str, bytes], list[str]] | None:
    """What salvage keeps, and the names that it says are lost; None where it refuses."""
    try:
        (found,) = salvage(path, out, overwrite=True)
    except ModelctlError:
        return None
    assert found.salvaged is not None
    return contents(out), list(found.salvaged.lost)


@pytest.mark.parametrize("name", ["a.pt", "a.safetensors"])
def test_cut_off_anywhere(name: str, tmp_path: Path) -> None:
    whole = write(tmp_path / name, model())
    data, truth = whole.read_bytes(), contents(whole)
    torn, out = tmp_path / f"torn-{name}", tmp_path / f"out-{name}"
    most = 0
    for end in range(0, len(data), 7):
        torn.write_bytes(data[:end])
        found = kept(torn, out)
        if found is None:
            assert not most  # once there was something to keep, there always is
            continue
        there, lost = found
        assert there.items() <= truth.items()
        assert there.keys() | {*lost} == truth.keys()
        assert not there.keys() & {*lost}
        assert len(there) >= most
        most = len(there)
    assert most == len(truth) - (name == "a.safetensors")


@pytest.mark.parametrize("new", [True, False])
def test_torchs_own_files(new: bool, tmp_path: Path) -> None:
    torch = pytest.importorskip("torch")
    net = torch.nn.Sequential(torch.nn.Linear(30, 40), torch.nn.BatchNorm1d(40))
    optimizer = torch.optim.Adam(net.parameters())
    net(torch.randn(5, 30)).sum().backward()
    optimizer.step()
    state = {"model": net.state_dict(), "optimizer": optimizer.state_dict(), "epoch": 3}
    torch.save(state, tmp_path / "a.pt", _use_new_zipfile_serialization=new)
    data, truth = (tmp_path / "a.pt").read_bytes(), contents(tmp_path / "a.pt")
    lengths = set()
    for end in range(0, len(data), 101):
        (tmp_path / "torn.pt").write_bytes(data[:end])
        found = kept(tmp_path / "torn.pt", tmp_path / "out.pt")
        if found is None:
            continue
        there, lost = found
        assert there.items() <= truth.items()
        lengths.add(len(there))
        read = torch.load(tmp_path / "out.pt", weights_only=True)
        assert read["epoch"] == 3
        assert read["optimizer"]["param_groups"] == optimizer.state_dict()["param_groups"]
        for values in read["optimizer"]["state"].values():
            assert values.keys() == {"step", "exp_avg", "exp_avg_sq"}  # all of it, or nothing
        net.load_state_dict(read["model"], strict=False)
        optimizer.load_state_dict(read["optimizer"])
        assert all(name in there or name in lost or "optimizer" in name for name in truth)
    assert len(lengths) > 3


def test_a_whole_module(tmp_path: Path) -> None:
    torch = pytest.importorskip("torch")
    net = torch.nn.Sequential(torch.nn.Linear(30, 40), torch.nn.Linear(40, 10))
    torch.save(net, tmp_path / "a.pt")
    data = (tmp_path / "a.pt").read_bytes()
    (tmp_path / "torn.pt").write_bytes(data[: data.index(b"/data/2") + 200])
    (found,) = salvage(tmp_path / "torn.pt", tmp_path / "out.pt")
    assert found.salvaged is not None
    assert set(found.salvaged.lost) == {"1.weight", "1.bias"}
    read = torch.load(tmp_path / "out.pt", weights_only=False)
    assert torch.equal(read[0].weight, net[0].weight)
    assert read[1].weight is None


def test_bytes_that_were_changed(tmp_path: Path) -> None:
    path = write(tmp_path / "a.pt", training())
    truth = contents(path)
    with mc.open(path) as ckpt:
        refs = ckpt.tensors()
        at = [
            refs[n].storage.runs()[0].offset
            for n in ("model.fc.weight", "optimizer.state.1.exp_avg")
        ]
    for one in at:
        flipped(path, one)
    there, lost = kept(path, tmp_path / "out.pt") or ({}, [])
    assert lost == ["model.fc.weight", "optimizer.state.1"]
    gone = {"model.fc.weight", *(f"optimizer.state.1.{n}" for n in ("exp_avg", "exp_avg_sq"))}
    assert there == {name: raw for name, raw in truth.items() if name not in gone}


def test_a_sound_file_is_kept_whole(tmp_path: Path) -> None:
    path = write(tmp_path / "a.pt", model())
    (found,) = salvage(path, tmp_path / "b.pt")
    assert found.sound
    assert found.salvaged is not None
    assert (found.salvaged.kept, found.salvaged.lost) == (5, [])
    assert mc.hash(tmp_path / "b.pt").hash == mc.hash(path).hash


def test_nothing_whole(tmp_path: Path) -> None:
    path = write(tmp_path / "a.pt", {"w": numbers(300)})
    data = path.read_bytes()
    path.write_bytes(data[: data.index(b"data/0") + 100])
    with pytest.raises(RefusedError, match="no tensor of it is whole"):
        salvage(path, tmp_path / "b.pt")
    path.write_bytes(data[:80])
    with pytest.raises(UnreadableError, match="cut off in its structure"):
        salvage(path, tmp_path / "b.pt")
    path.write_bytes(b"no checkpoint at all")
    with pytest.raises(UnreadableError):
        salvage(path, tmp_path / "b.pt")
    assert not (tmp_path / "b.pt").exists()


def test_what_is_not_torn_is_said(tmp_path: Path) -> None:
    path = write(tmp_path / "a.pt", training())
    found: Any = salvage(path, tmp_path / "b.pt")
    assert found.as_dict()["files"][0]["salvaged"]["lost"] == []
