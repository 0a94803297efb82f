"""From bytes to tensors: every format, memory, threads, staging, devices."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import warnings
import zipfile
from pathlib import Path

import pytest
import safetensors.torch
import torch
from torch import nn

import modelctl as mc
import modelctl.nn as mnn
from modelctl.core.dtypes import BY_NAME
from modelctl.core.storages import Run, SpreadStorage
from modelctl.core.tensors import TensorRef
from modelctl.errors import UnreadableError
from modelctl.nn.loading import reader as reading
from modelctl.nn.loading.reader import Reader
from modelctl.nn.loading.ring import Bus, CudaBus
from modelctl.storage.source import FileSource
from tests.nn.nets import Net, same

SAMPLES = Path(__file__).parents[3] / "sample_models"
needs_cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device here")

# ------------------------------------------------------------------ every format


class Small(nn.Module):
    """The net in sample_models/make.py."""

    def __init__(self, conv: torch.Tensor, fc: torch.Tensor) -> None:
        super().__init__()
        self.conv = nn.Conv2d(conv.shape[1], conv.shape[0], conv.shape[2], bias=False)
        self.bn = nn.BatchNorm2d(conv.shape[0])
        self.fc = nn.Linear(fc.shape[1], fc.shape[0])


@pytest.fixture(scope="module")
def weights() -> dict[str, dict[str, torch.Tensor]]:
    """As torch reads them: the same in all files but one."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        same_in_all = dict(torch.jit.load(SAMPLES / "torchscript.pt").state_dict())
    del same_in_all["steps"]
    lightning = torch.load(SAMPLES / "lightning.ckpt", weights_only=True)["state_dict"]
    return {"": same_in_all, "net.": {n.removeprefix("net."): t for n, t in lightning.items()}}


EVERY = {
    "whole-module.pt": "",
    "torchscript.pt": "",
    "exported.pt2": "",
    "sharded-safetensors": "",
    "sharded-bin/pytorch_model.bin.index.json": "",
    "torch-0.1.pt": "",
    "allennlp.tar.gz": "",
    "lightning.ckpt": "net.",
}


@pytest.mark.parametrize("place", ["meta", "cpu"])
@pytest.mark.parametrize("name", EVERY)
def test_every_format(name, place, weights):
    expected = weights[EVERY[name]]
    with torch.device(place):
        model = Small(expected["conv.weight"], expected["fc.weight"])
    report = mnn.load_into(model, SAMPLES / name, on_mismatch="skip")
    assert same(model.state_dict(), expected)
    assert report.missing == ()
    assert report.prefix == EVERY[name]
    assert report.unexpected == (("steps",) if name == "torchscript.pt" else ())
    found = mnn.load(SAMPLES / name)
    assert all(torch.equal(found[EVERY[name] + key], value) for key, value in expected.items())


def test_an_export_as_torch_reads_it():
    exported = torch.export.load(SAMPLES / "exported.pt2").state_dict
    assert same(mnn.load(SAMPLES / "exported.pt2"), exported)


@pytest.mark.parametrize("where", ["cuda:3", "mps", "xla:1"])
@pytest.mark.parametrize("zipped", [True, False])
def test_a_device_that_is_not_here(where, zipped, tmp_path, monkeypatch):
    monkeypatch.setattr(torch.serialization, "location_tag", lambda storage: where)
    state = Net().state_dict()
    torch.save(state, tmp_path / "a.pt", _use_new_zipfile_serialization=zipped)
    with mc.open(tmp_path / "a.pt") as ckpt:
        assert {ref.storage.location for ref in ckpt.tensors().values()} == {where}
    assert same(mnn.load(tmp_path / "a.pt"), state)
    net = Net()
    mnn.load_into(net, tmp_path / "a.pt", device="auto")
    assert same(net.cpu().state_dict(), state)


# ------------------------------------------------------------------ layouts


def dense(tensor: torch.Tensor) -> bool:
    return tensor.untyped_storage().nbytes() <= tensor.nbytes + 15


def test_load_keeps_the_layout_of_what_has_no_gaps(tmp_path):
    base = torch.randn(4, 6, 3, 3)
    state = {
        "last": base.to(memory_format=torch.channels_last),
        "expanded": torch.arange(3.0).expand(5, 3),
        "one": torch.randn(1, 5).t(),
        "gaps": torch.randn(8, 8)[::2, 1],
        "cut": torch.arange(10.0)[3:7],
    }
    torch.save(state, tmp_path / "a.pt")
    found = mnn.load(tmp_path / "a.pt")
    assert same(found, state)
    assert found["last"].stride() == state["last"].stride()
    assert found["expanded"].stride() == (0, 1)
    assert all(dense(tensor) for tensor in found.values())


def test_a_permuted_tensor_is_read_in_place(tmp_path, monkeypatch):
    source = nn.Conv2d(4, 6, 3).to(memory_format=torch.channels_last)
    torch.save(source.state_dict(), tmp_path / "a.pt")
    seen = []
    memory = reading.memory
    monkeypatch.setattr(reading, "memory", lambda t: seen.append(t.data_ptr()) or memory(t))
    model = nn.Conv2d(4, 6, 3).to(memory_format=torch.channels_last)
    mnn.load_into(model, tmp_path / "a.pt")
    assert same(model.state_dict(), source.state_dict())
    assert seen == [model.weight.data_ptr(), model.bias.data_ptr()]


# ------------------------------------------------------------------ threads


@pytest.fixture
def pieces(monkeypatch):
    monkeypatch.setattr(reading, "PIECE", 100)
    monkeypatch.setattr(Bus, "size", 1024)


def test_reads_in_pieces(tmp_path, pieces):
    source = nn.Sequential(nn.Linear(31, 17), nn.Linear(17, 300), nn.Conv2d(4, 6, 3))
    source.to(memory_format=torch.channels_last)
    torch.save(source.state_dict(), tmp_path / "a.pt")
    model = nn.Sequential(nn.Linear(31, 17), nn.Linear(17, 300, dtype=torch.float64))
    model.append(nn.Conv2d(4, 6, 3))
    mnn.load_into(model, tmp_path / "a.pt")
    assert all(
        torch.equal(a.double(), b.double())
        for a, b in zip(model.parameters(), source.parameters(), strict=True)
    )
    assert same(mnn.load(tmp_path / "a.pt"), source.state_dict())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_file_that_becomes_shorter(tmp_path, pieces, dtype):
    path = tmp_path / "a.safetensors"
    safetensors.torch.save_file({"w": torch.randn(100, 100)}, path)
    with mc.open(path) as ckpt:
        os.truncate(path, 20_000)
        dest = torch.zeros(100, 100, dtype=dtype)
        with pytest.raises(UnreadableError, match="the file became shorter"), Reader() as reader:
            reader.read(ckpt.tensors()["w"], dest)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_tensor_in_several_files(tmp_path, pieces, dtype):
    """What ranks saved a part of each goes from their files into the one tensor."""
    values = torch.randn(60, 1000)
    runs = []
    for i, rows in enumerate(values.split([1, 24, 35])):
        (tmp_path / f"{i}").write_bytes(b"head" + rows.numpy().tobytes())
        runs.append(Run(FileSource(tmp_path / f"{i}"), 4, rows.nbytes))
    ref = TensorRef(BY_NAME["float32"], (60, 1000), SpreadStorage(runs))
    dest = torch.zeros(60, 1000, dtype=dtype)
    with Reader() as reader:
        reader.read(ref, dest)
    assert torch.equal(dest, values.to(dtype))
    assert sum(run.source.bytes_read for run in runs) == values.nbytes


def deflate(path, output):
    with (
        zipfile.ZipFile(path) as old,
        zipfile.ZipFile(output, "w", zipfile.ZIP_DEFLATED) as new,
    ):
        for member in old.infolist():
            new.writestr(member.filename, old.read(member))


def test_what_lies_deflated(tmp_path):
    state = Net().state_dict()
    torch.save(state, tmp_path / "a.pt")
    deflate(tmp_path / "a.pt", tmp_path / "b.pt")
    net = Net().double()
    mnn.load_into(net, tmp_path / "b.pt")
    assert same(net.float().state_dict(), state)


# ------------------------------------------------------------------ a GPU


@needs_cuda
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("size", [1024, 4 << 20])
def test_onto_a_real_gpu(tmp_path, monkeypatch, dtype, size):
    monkeypatch.setattr(CudaBus, "size", size)
    source = nn.Sequential(nn.Linear(300, 400), Net(), nn.Conv2d(4, 6, 3))
    source[2].to(memory_format=torch.channels_last)
    torch.save(source.state_dict(), tmp_path / "a.pt")
    model = nn.Sequential(nn.Linear(300, 400), Net(), nn.Conv2d(4, 6, 3))
    mnn.load_into(model, tmp_path / "a.pt", device="cuda", dtype=dtype)
    assert all(p.is_cuda for p in model.parameters())
    assert same(model.cpu().state_dict(), source.to(dtype).state_dict())
    found = mnn.load(tmp_path / "a.pt", device="cuda")
    expected = torch.load(tmp_path / "a.pt", map_location="cuda", weights_only=True)
    assert same(found, expected)


@needs_cuda
def test_what_lies_deflated_onto_a_real_gpu(tmp_path):
    source = Net()
    torch.save(source.state_dict(), tmp_path / "a.pt")
    deflate(tmp_path / "a.pt", tmp_path / "b.pt")
    model = Net()
    mnn.load_into(model, tmp_path / "b.pt", device="cuda")
    assert same(model.cpu().state_dict(), source.state_dict())


# ------------------------------------------------------------------ memory

PEAK = """
import json
import sys
import torch
from torch import nn
from modelctl.nn import load, load_into

plain, turned, small = sys.argv[1:]
torch.set_num_threads(1)

def status(key):
    for line in open("/proc/self/status"):
        if line.startswith(key + ":"):
            return int(line.split()[1]) * 1024

def net(device, count=4):
    make = lambda: nn.utils.skip_init(nn.Linear, 5000, 5000, bias=False, device=device)
    return nn.Sequential(*(make() for _ in range(count)))

def peak(call, model_bytes):
    open("/proc/self/clear_refs", "w").write("5")  # the peak starts again from here
    before = status("VmRSS")
    kept = call()
    return (status("VmHWM") - before - model_bytes) / 100e6

def load_small(**options):  # what is imported late, threads and buffers
    load_into(nn.Linear(2, 2, **options), small, dtype=torch.bfloat16)

load_small(), load_small(device="meta")
model = net("cpu")
for parameter in model.parameters():
    parameter.data.fill_(1)
found = {"cpu": peak(lambda: load_into(model, plain), 0)}
del parameter, model
found["meta"] = peak(lambda: load_into(net("meta"), plain), 400e6)
found["bfloat16"] = peak(lambda: load_into(net("meta"), plain, dtype=torch.bfloat16), 200e6)
found["load"] = peak(lambda: load(plain), 400e6)
found["turned"] = peak(lambda: load_into(net("meta", 1), turned), 100e6)
print(json.dumps(found))
"""


@pytest.mark.skipif(not os.access("/proc/self/clear_refs", os.W_OK), reason="no /proc/self here")
def test_peak_memory_above_the_model_in_largest_tensors(tmp_path):
    tensors = {f"{i}.weight": torch.zeros(5000, 5000) for i in range(4)}
    files = [tmp_path / name for name in ("plain.safetensors", "turned.pt", "small.pt")]
    safetensors.torch.save_file(tensors, files[0])
    torch.save({"0.weight": tensors["0.weight"].t()}, files[1])
    torch.save(nn.Linear(2, 2).state_dict(), files[2])
    command = [sys.executable, "-c", PEAK, *map(str, files)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    found = json.loads(done.stdout)
    assert found.pop("turned") < 1.2  # turned round in a temporary tensor
    assert found.pop("bfloat16") < 0.4  # the staging buffer
    assert max(found.values()) < 0.2
    assert set(found) == {"cpu", "meta", "load"}
