"""``load_into(assign=True)``: parameters over the pages of a file, which stays as it is."""

from __future__ import annotations

import gc
import hashlib
import os
import shutil
import zipfile
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

import modelctl as mc
import modelctl.nn as mnn
from modelctl.errors import UnreadableError
from modelctl.nn.loading.mapped import Mapper
from tests.nn.nets import Net, same


def digest(path):
    return hashlib.sha256(Path(path).read_bytes()).hexdigest()


def mapped_files():
    """The paths of what this process has mapped."""
    maps = Path("/proc/self/maps")
    if not maps.exists():
        pytest.skip("this system does not list what is mapped")
    return maps.read_text("utf-8")


def saved(net, path):
    state = net.state_dict()
    if path.suffix == ".safetensors":
        save_file(state, path)
    else:
        torch.save(state, path)
    return path


@pytest.mark.parametrize("name", ["a.pt", "a.safetensors"])
def test_parameters_lie_in_the_file(net, tmp_path, name):
    path = saved(net, tmp_path / name)
    model = Net()
    model.conv1.weight.requires_grad_(False)
    old = dict(model.named_parameters())
    report = mnn.load_into(model, path, assign=True)
    assert same(net.state_dict(), model.state_dict())
    assert set(report.mapped) >= {name for name, _ in net.named_parameters()}
    assert f"{len(report.mapped)} of them mapped" in str(report)
    assert str(path) in mapped_files()
    for key, p in model.named_parameters():
        assert type(p) is nn.Parameter
        assert p is not old[key]
        assert p.is_leaf
        assert p.requires_grad == (key != "conv1.weight")


@pytest.mark.parametrize("name", ["a.pt", "a.safetensors"])
def test_what_is_written_to_a_parameter_never_reaches_the_file(net, tmp_path, name):
    path = saved(net, tmp_path / name)
    before = digest(path)
    one, other = Net(), Net()
    for model in (one, other):
        mnn.load_into(model, path, assign=True)
    optimizer = torch.optim.SGD(one.parameters(), lr=0.1)
    sum(p.sum() for p in one.parameters()).backward()
    optimizer.step()
    with torch.no_grad():
        for tensor in one.state_dict().values():
            tensor.add_(1)
    assert digest(path) == before
    assert same(other.state_dict(), net.state_dict())
    assert not torch.equal(one.conv1.weight, other.conv1.weight)


def test_the_mapping_lives_as_long_as_its_tensors(net, tmp_path):
    path = saved(net, tmp_path / "a.pt")
    model = Net()
    mnn.load_into(model, path, assign=True)
    kept = model.conv1.weight
    del model
    gc.collect()
    assert str(path) in mapped_files()
    os.unlink(path)
    assert torch.equal(kept, net.conv1.weight)
    del kept
    gc.collect()
    assert str(path) not in mapped_files()


def test_a_file_that_another_one_replaces_stays_what_it_was(net, tmp_path):
    path = saved(net, tmp_path / "a.pt")
    model = Net()
    mnn.load_into(model, path, assign=True)
    with mc.open(path) as ckpt:
        mc.save(mc.strip_head(ckpt), path, overwrite=True)
    assert same(net.state_dict(), model.state_dict())


class Two(nn.Module):
    def __init__(self, tied):
        super().__init__()
        self.a = nn.Linear(3, 3, bias=False)
        self.b = nn.Linear(3, 3, bias=False)
        if tied:
            self.b.weight = self.a.weight


def test_ties_are_the_models(tmp_path):
    """What only the file ties has pages of its own each."""
    tied, apart = Two(True), Two(False)
    torch.save(tied.state_dict(), tmp_path / "tied.pt")
    report = mnn.load_into(apart, tmp_path / "tied.pt", assign=True)
    assert report.mapped == ("a.weight", "b.weight")
    with torch.no_grad():
        apart.a.weight.zero_()
    assert torch.equal(apart.b.weight, tied.b.weight)
    other = Two(True)
    mnn.load_into(other, tmp_path / "tied.pt", assign=True)
    assert other.a.weight is other.b.weight
    assert same(other.state_dict(), tied.state_dict())


def test_what_is_not_there_as_it_is_wanted_is_read(tmp_path):
    torch.manual_seed(0)
    weight = torch.randn(4, 3)
    torch.save({"weight": weight, "bias": torch.randn(4)}, tmp_path / "a.pt")
    for dtype, mapped in ((torch.float32, ("weight", "bias")), (torch.float64, ())):
        model = nn.Linear(3, 4)
        report = mnn.load_into(model, tmp_path / "a.pt", assign=True, dtype=dtype)
        assert report.mapped == mapped
        assert torch.equal(model.weight, weight.to(dtype))
    deflated = zipfile.ZipFile(tmp_path / "deflated.pt", "w", zipfile.ZIP_DEFLATED)
    with zipfile.ZipFile(tmp_path / "a.pt") as old, deflated as new:
        for info in old.infolist():
            new.writestr(info.filename, old.read(info))
    model = nn.Linear(3, 4)
    old_weight = model.weight
    assert mnn.load_into(model, tmp_path / "deflated.pt", assign=True).mapped == ()
    assert torch.equal(model.weight, weight)
    assert model.weight is not old_weight


def test_what_is_not_aligned_is_read(tmp_path):
    """A header of safetensors may leave the data where its dtype can't be."""
    state = {"weight": torch.randn(4, 3), "bias": torch.randn(4)}
    save_file(state, tmp_path / "a.safetensors")
    data = (tmp_path / "a.safetensors").read_bytes()
    length = int.from_bytes(data[:8], "little")
    odd = (length + 1).to_bytes(8, "little") + data[8 : 8 + length] + b" " + data[8 + length :]
    (tmp_path / "odd.safetensors").write_bytes(odd)
    model = nn.Linear(3, 4)
    assert mnn.load_into(model, tmp_path / "odd.safetensors", assign=True).mapped == ()
    assert torch.equal(model.weight, state["weight"])


def test_other_orders_of_memory_and_gaps(tmp_path):
    torch.manual_seed(0)
    wide = torch.randn(4, 6)
    torch.save({"weight": torch.randn(3, 4).t(), "bias": wide[:, 0]}, tmp_path / "a.pt")
    state = torch.load(tmp_path / "a.pt", weights_only=True)
    model = nn.Linear(3, 4)
    report = mnn.load_into(model, tmp_path / "a.pt", assign=True)
    assert report.mapped == ("weight",)
    assert model.weight.stride() == (1, 4)
    assert same(model.state_dict(), state)


def test_shards_and_meta(net, tmp_path):
    with mc.open(saved(net, tmp_path / "a.safetensors")) as ckpt:
        mc.save(ckpt, tmp_path / "shards", max_shard_size=200)
    with mnn.on_meta():
        model = Net()
    report = mnn.load_into(model, tmp_path / "shards", assign=True)
    assert report.mapped
    assert same(net.state_dict(), model.state_dict())


DTYPES = [
    getattr(torch, name)
    for name in (
        *("float64", "float32", "float16", "bfloat16", "int64", "int32", "int16", "int8", "uint8"),
        *("bool", "complex64", "complex128", "float8_e4m3fn", "float8_e5m2", "uint16", "uint64"),
    )
]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_every_dtype(tmp_path, dtype):
    raw = torch.arange(64, dtype=torch.uint8)
    value = (raw % 2).bool() if dtype == torch.bool else raw.view(dtype)
    torch.save({"x": value}, tmp_path / "a.pt")
    model = nn.Module()
    model.register_buffer("x", torch.zeros_like(value))
    assert mnn.load_into(model, tmp_path / "a.pt", assign=True).mapped == ("x",)
    assert torch.equal(model.x.view(torch.uint8), value.view(torch.uint8))


def test_a_file_that_was_cut_meanwhile(net, tmp_path):
    path = saved(net, tmp_path / "a.pt")
    with mc.open(path) as ckpt:
        ref = ckpt.sections.model().tensors()["conv1.weight"]
        os.truncate(path, 10)
        with pytest.raises(UnreadableError, match="can't be mapped"):
            Mapper().tensor(ref)


def test_a_copy_of_the_bytes_is_not_made(tmp_path):
    """The mapped pages are the file's: nothing was read but the structure."""
    weight = torch.randn(512, 512)
    torch.save({"weight": weight}, tmp_path / "a.pt")
    shutil.copy(tmp_path / "a.pt", tmp_path / "b.pt")
    model = nn.Linear(512, 512, bias=False)
    mnn.load_into(model, tmp_path / "b.pt", assign=True)
    at = hex(model.weight.data_ptr())
    lines = [line for line in mapped_files().splitlines() if line.endswith("b.pt")]
    ranges = [line.split()[0].split("-") for line in lines]
    assert any(int(a, 16) <= int(at, 16) < int(b, 16) for a, b in ranges)
