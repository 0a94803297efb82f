from __future__ import annotations

import collections
import dataclasses
import os
import subprocess
import sys
import types
from typing import NamedTuple

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn.utils.rnn import pack_sequence

import modelctl.nn as mnn
from modelctl.errors import UsageError
from modelctl.nn import devices

needs_cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device here")
needs_mps = pytest.mark.skipif(not torch.backends.mps.is_available(), reason="no MPS device here")


@pytest.fixture(autouse=True)
def no_launcher(monkeypatch):
    for name in ("LOCAL_RANK", "CUDA_VISIBLE_DEVICES", "CUDA_DEVICE_ORDER"):
        monkeypatch.delenv(name, raising=False)


@pytest.fixture
def gpus(monkeypatch):
    """Pretend GPUs by their free bytes; None is one that another process has for itself."""

    def pretend(*free: int | None) -> None:
        def info(index: int) -> tuple[int, int]:
            found = free[index]
            if found is None:
                raise RuntimeError("CUDA error: CUDA-capable device(s) is/are busy or unavailable")
            return found, 80 << 30

        monkeypatch.setattr(torch.cuda, "is_available", lambda: bool(free))
        monkeypatch.setattr(torch.cuda, "device_count", lambda: len(free))
        monkeypatch.setattr(torch.cuda, "mem_get_info", info)
        monkeypatch.setattr(torch.backends.mps, "is_available", lambda: False)

    return pretend


# ------------------------------------------------------------------ one


@pytest.mark.parametrize("name", ["auto", "cuda"])
@pytest.mark.parametrize(
    ("free", "best"), [((5, 9, 7), 1), ((5, None, 7), 2), ((5, 5), 0), ((None,), 0), ((3,), 0)]
)
def test_the_gpu_with_the_most_free_memory(gpus, name, free, best):
    gpus(*free)
    assert mnn.choose_device(name) == torch.device("cuda", best)
    assert mnn.choose_device(torch.device("cuda")) == torch.device("cuda", best)


def test_one_gpu_is_not_asked(gpus, monkeypatch):
    gpus(1)
    monkeypatch.setattr(torch.cuda, "mem_get_info", None)
    assert mnn.choose_device() == torch.device("cuda", 0)


def test_by_number(gpus):
    gpus(5, 9, 7)
    assert mnn.choose_device(2) == mnn.choose_device("cuda:2") == torch.device("cuda", 2)
    assert mnn.choose_device(torch.device("cuda", 0)) == torch.device("cuda", 0)


def test_a_process_of_torchrun_takes_its_own(gpus, monkeypatch):
    gpus(5, 9, 7)
    current = []
    monkeypatch.setattr(torch.cuda, "set_device", current.append)
    assert mnn.choose_device("cuda:1") == torch.device("cuda", 1)
    assert not current  # another one, for once
    monkeypatch.setenv("LOCAL_RANK", "2")
    assert mnn.choose_device("cuda:0") == torch.device("cuda", 0)
    assert not current
    assert mnn.choose_device("auto") == torch.device("cuda", 2)
    assert mnn.choose_device("cuda") == torch.device("cuda", 2)
    assert current == [torch.device("cuda", 2)] * 2  # NCCL takes the current one
    gpus(5)  # a launcher that shows each process one
    assert mnn.choose_device("auto") == torch.device("cuda", 0)
    assert current[2:] == [torch.device("cuda", 0)]


def test_what_is_not_there_is_an_error(gpus, monkeypatch):
    gpus(5, 9)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "4,5")
    with pytest.raises(UsageError, match=r"are 0 to 1 \(CUDA_VISIBLE_DEVICES=4,5\)"):
        mnn.choose_device("cuda:4")
    with pytest.raises(UsageError, match="0 to 1"):
        mnn.choose_device(2)
    with pytest.raises(UsageError, match="no MPS"):
        mnn.choose_device("mps")
    gpus()
    for device in ("cuda", "cuda:0", 0, torch.device("cuda", 1)):
        with pytest.raises(UsageError, match="no CUDA device"):
            mnn.choose_device(device)
    with pytest.raises(UsageError, match="'gpu' is no device"):
        mnn.choose_device("gpu")
    with pytest.raises(UsageError, match="is no device"):
        mnn.choose_device(-2)


def test_without_a_gpu(gpus, monkeypatch):
    gpus()
    assert mnn.choose_device("auto") == mnn.choose_device("cpu") == torch.device("cpu")
    assert mnn.choose_device("meta") == torch.device("meta")
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: True)
    assert mnn.choose_device("auto") == mnn.choose_device("mps") == torch.device("mps")


@needs_cuda
def test_a_real_gpu():
    found = mnn.choose_device("auto")
    assert found.type == "cuda"
    assert torch.zeros(1, device=found).device == found


# ------------------------------------------------------------------ which are seen


def test_visible_devices(monkeypatch):
    monkeypatch.setattr(devices, "_cuda_is_up", lambda: False)
    mnn.visible_devices(2, 0)
    assert os.environ["CUDA_VISIBLE_DEVICES"] == "2,0"
    assert os.environ["CUDA_DEVICE_ORDER"] == "PCI_BUS_ID"
    mnn.visible_devices(0)  # fewer of them
    assert os.environ["CUDA_VISIBLE_DEVICES"] == "0"
    with pytest.raises(UsageError, match="GPU 2 is hidden from this process: CUDA_VISIBLE_DEV"):
        mnn.visible_devices(0, 2)
    mnn.visible_devices()
    assert os.environ["CUDA_VISIBLE_DEVICES"] == ""


def test_their_order_is_nvidia_smis_also_where_they_are_set_already(monkeypatch):
    monkeypatch.setattr(devices, "_cuda_is_up", lambda: False)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "2,0")
    monkeypatch.delenv("CUDA_DEVICE_ORDER", raising=False)
    for odd in ([2, 0], True, -1, None):
        with pytest.raises(UsageError, match="is no GPU"):
            mnn.visible_devices(odd)
    assert "CUDA_DEVICE_ORDER" not in os.environ
    mnn.visible_devices("2,0")
    assert os.environ["CUDA_VISIBLE_DEVICES"] == "2,0"
    assert os.environ["CUDA_DEVICE_ORDER"] == "PCI_BUS_ID"


def test_a_scheduler_that_set_them_is_not_overruled(monkeypatch):
    monkeypatch.setattr(devices, "_cuda_is_up", lambda: False)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "GPU-1a, GPU-2b")
    monkeypatch.setenv("CUDA_DEVICE_ORDER", "FASTEST_FIRST")
    mnn.visible_devices("GPU-2b")
    assert os.environ["CUDA_VISIBLE_DEVICES"] == "GPU-2b"
    assert os.environ["CUDA_DEVICE_ORDER"] == "FASTEST_FIRST"
    with pytest.raises(UsageError, match="hidden"):
        mnn.visible_devices(0)


def test_once_cuda_is_up_it_is_too_late(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    with pytest.raises(UsageError, match="CUDA is up already"):
        mnn.visible_devices(1)
    assert "CUDA_VISIBLE_DEVICES" not in os.environ
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "1")
    with pytest.warns(UserWarning, match="its GPU 1 need not be nvidia-smi's"):
        mnn.visible_devices(1)  # as it is, if it is what it was meant to be
    monkeypatch.setenv("CUDA_DEVICE_ORDER", "PCI_BUS_ID")
    mnn.visible_devices(1)


@pytest.mark.skipif(not hasattr(os, "RTLD_NOLOAD"), reason="libcuda is looked for on Linux")
@pytest.mark.parametrize(("status", "up"), [(0, True), (3, False)])
def test_a_driver_that_torch_does_not_know_of(monkeypatch, status, up):
    """``torch.cuda.is_available()`` starts the driver, and leaves ``is_initialized()`` False."""
    fake = types.SimpleNamespace(cuDeviceGetCount=lambda count: status)
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: False)
    monkeypatch.setattr("ctypes.CDLL", lambda name, mode: fake)
    assert devices._cuda_is_up() is up


@needs_cuda
@pytest.mark.parametrize("start", ["torch.cuda.is_available()", "torch.zeros(1).cuda()", "None"])
def test_real_visible_devices(start):
    code = f"""
import torch, modelctl.nn as mnn
{start}
try:
    mnn.visible_devices(0)
    assert torch.cuda.device_count() == 1
    print("set")
except mnn.devices.UsageError:
    print("late")
"""
    code = code.replace("mnn.devices.UsageError", "__import__('modelctl').errors.UsageError")
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == ("set" if start == "None" else "late")


# ------------------------------------------------------------------ batches


class Pair(NamedTuple):
    image: object
    label: object


@dataclasses.dataclass(frozen=True)
class Sample:
    image: object
    name: str
    mask: object = None


class Slotted:
    """Something with a ``.to`` of its own."""

    def __init__(self) -> None:
        self.device = None

    def to(self, device, non_blocking=False):
        self.device = (device, non_blocking)
        return self


class Plain:
    """One without ``non_blocking``, as many are."""

    def to(self, device):
        self.device = device
        return self


class Twin(collections.namedtuple("Twin", "a b")):
    def __new__(cls, a):
        return super().__new__(cls, a, a)


def test_a_nested_batch():
    cpu = torch.ones(2)
    array = np.ones(2)
    batch = {
        "tensor": cpu,
        "list": [cpu, "text", 3, None],
        "tuple": (cpu, b"bytes"),
        "pair": Pair(cpu, [cpu]),
        "twin": Twin(cpu),
        "sample": Sample(cpu, "a.png", {"m": cpu}),
        "array": array,
        "ordered": collections.OrderedDict(a=cpu),
        "default": collections.defaultdict(list, a=cpu),
        "user": collections.UserDict(a=cpu),
        "frozen": types.MappingProxyType({"a": cpu}),
        "deque": collections.deque([cpu], maxlen=3),
        "packed": pack_sequence([torch.ones(3), torch.ones(2)]),
        "kind": Slotted,
        "set": {1, 2},
    }
    moved = mnn.to_device(batch, "meta")

    def on_meta(*tensors):
        return all(isinstance(t, torch.Tensor) and t.is_meta for t in tensors)

    assert on_meta(moved["tensor"], moved["list"][0], moved["tuple"][0], *moved["pair"].label)
    assert moved["list"][1:] == ["text", 3, None]
    assert moved["tuple"][1] == b"bytes"
    assert type(moved["pair"]) is Pair
    assert type(moved["twin"]) is Twin
    assert on_meta(*moved["twin"])
    assert on_meta(moved["sample"].image, moved["sample"].mask["m"])
    assert moved["sample"].name == "a.png"
    assert moved["array"] is array
    for name in ("ordered", "default", "user", "frozen"):
        assert type(moved[name]) is type(batch[name])
        assert on_meta(moved[name]["a"])
    assert moved["default"]["new"] == []
    assert moved["deque"].maxlen == 3
    assert on_meta(moved["deque"][0], moved["packed"].data)
    assert type(moved["packed"]) is type(batch["packed"])
    assert moved["kind"] is Slotted
    assert moved["set"] is batch["set"]
    # the batch that came in is as it was
    assert batch["tensor"] is batch["list"][0] is batch["sample"].mask["m"] is cpu
    assert batch["ordered"]["a"] is batch["deque"][0] is batch["default"]["a"] is cpu
    assert not cpu.is_meta


def test_a_batch_of_transformers():
    generic = pytest.importorskip("transformers.utils.generic")

    @dataclasses.dataclass
    class Output(generic.ModelOutput):
        logits: object = None
        states: object = None

    moved = mnn.to_device(Output(logits=torch.ones(1), states=(torch.ones(2),)), "meta")
    assert type(moved) is Output
    assert moved.logits.is_meta
    assert moved["logits"].is_meta
    assert moved.states[0].is_meta


def test_non_blocking_is_passed_on_and_the_loss_moves():
    thing = Slotted()
    mnn.to_device([thing], "cpu", non_blocking=True)
    assert thing.device == (torch.device("cpu"), True)
    mnn.to_device(thing, torch.device("meta"))
    assert thing.device == (torch.device("meta"), False)
    plain = Plain()
    assert mnn.to_device(plain, "meta", non_blocking=True) is plain
    assert plain.device == torch.device("meta")
    model, loss = nn.Linear(2, 3), nn.CrossEntropyLoss(weight=torch.ones(3))
    moved = mnn.to_device((model, loss), "meta")
    assert moved == (model, loss)
    assert loss.weight.is_meta
    assert model.weight.is_meta


def test_the_device_of_a_batch_is_chosen_before():
    with pytest.raises(UsageError, match="another one for each batch"):
        mnn.to_device(torch.ones(1), "auto")
    for odd in ("gpu", None, True, 1.5):
        for call in (mnn.choose_device, lambda device: mnn.to_device(torch.ones(1), device)):
            with pytest.raises(UsageError, match="no device"):
                call(odd)


@needs_cuda
def test_a_real_batch():
    batch = {"x": torch.arange(6.0).pin_memory(), "y": [torch.ones(2)]}
    moved = mnn.to_device(batch, "cuda", non_blocking=True)
    torch.cuda.synchronize()
    assert moved["x"].is_cuda
    assert torch.equal(moved["x"].cpu(), batch["x"])


@needs_mps
def test_a_real_mps_batch():
    assert mnn.to_device([torch.ones(2)], "mps")[0].device.type == "mps"
