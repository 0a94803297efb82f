from __future__ import annotations

import itertools
import warnings
from pathlib import Path

import pytest
import safetensors.torch
import torch
from torch import nn

import modelctl as mc
import modelctl.nn as mnn
from modelctl.errors import CollisionError, RefusedError, UnsupportedError, UsageError
from modelctl.nn.loading.ring import Bus
from tests.nn.nets import Net, same


def write(state, path: Path, how: str) -> Path:
    if how == "safetensors":
        safetensors.torch.save_file({k: v.contiguous() for k, v in state.items()}, path)
    else:
        torch.save(state, path, _use_new_zipfile_serialization=how == "zip")
    return path


HOW = ["zip", "legacy", "safetensors"]


@pytest.fixture
def other() -> Net:
    """A net with other weights and running statistics than the fixture's."""
    torch.manual_seed(1)
    made = Net()
    for _ in range(3):
        made(torch.randn(4, 3, 8, 8))
    return made


# ------------------------------------------------------------------ load


@pytest.mark.parametrize("how", HOW)
def test_load_equals_torch_load(other, tmp_path, how):
    path = write(other.state_dict(), tmp_path / "a", how)
    found = mnn.load(path)
    assert same(found, other.state_dict())
    assert all(found[k].dtype == v.dtype for k, v in other.state_dict().items())


@pytest.mark.parametrize("how", ["zip", "legacy"])
def test_load_keeps_ties_views_and_strides(tmp_path, how):
    base = torch.arange(24.0).reshape(4, 6)
    state = {
        "a": base,
        "tied": base,
        "row": base[1],
        "t": base.t(),
        "bf16": base.to(torch.bfloat16),
        "scalar": torch.tensor(3),
        "empty": torch.empty(0, 3),
        "bool": base > 3,
        "conj": torch.randn(3, dtype=torch.complex64).conj(),
    }
    if hasattr(torch, "float8_e4m3fn"):
        state["f8"] = base.to(torch.float8_e4m3fn)
    big = torch.zeros(10_000)
    state["slice"], state["slice2"] = big[7:17], big[9000:9010]
    found = mnn.load(write(state, tmp_path / "a.pt", how))
    for name, value in state.items():
        assert found[name].dtype == value.dtype, name
        assert (
            torch.equal(found[name].float(), value.float())
            if name != "conj"
            else torch.equal(found[name], value)
        ), name
    assert found["a"] is found["tied"]
    found["a"][1, 0] = -1
    assert found["row"][0] == -1
    assert found["t"].stride() == (1, 6)
    assert found["slice"].untyped_storage().nbytes() == 40


def test_load_reads_no_more_than_it_needs_of_a_shared_storage(tmp_path):
    big = torch.zeros(1_000_000)
    path = write({"a": big[:10], "b": big[-10:]}, tmp_path / "a.pt", "zip")
    assert {t.untyped_storage().nbytes() for t in mnn.load(path).values()} == {40}


def test_load_with_key_and_device(other, tmp_path):
    path = tmp_path / "a.pt"
    torch.save({"model": Net().state_dict(), "ema": {"inner": other.state_dict()}}, path)
    assert same(mnn.load(path, key="ema.inner"), other.state_dict())
    assert mnn.load(path, device="auto")["fc.bias"].device == mnn.choose_device("auto")
    assert mnn.load(path, device="meta")["fc.bias"].is_meta
    with pytest.raises(UsageError, match="no device"):
        mnn.load(path, device="gpu")


# ------------------------------------------------------------------ load_into


PREFIXES = ["", "module.", "_orig_mod.", "_orig_mod.module."]


def test_an_averaged_copy_loads_into_the_model(net, tmp_path):
    ema = torch.optim.swa_utils.AveragedModel(Net())
    mnn.save_checkpoint(tmp_path / "a.pt", model=net, ema=ema)
    report = mnn.load_into(net, tmp_path / "a.pt", key="ema")
    assert report.unexpected == ()
    assert same(net.state_dict(), ema.module.state_dict())
    other = torch.optim.swa_utils.AveragedModel(Net())
    ema.n_averaged += 3
    mnn.save_checkpoint(tmp_path / "a.pt", model=net, ema=ema)
    mnn.load_into(other, tmp_path / "a.pt", key="ema")
    assert other.n_averaged == 3
    torch.save({"n_averaged": torch.tensor(0), **Net().state_dict()}, tmp_path / "b.pt")
    with pytest.raises(RefusedError, match="n_averaged"):  # a part of another model
        mnn.load_into(net, tmp_path / "b.pt")


@pytest.mark.parametrize(("how", "prefix"), list(itertools.product(HOW, PREFIXES)))
@pytest.mark.parametrize("wrap", [False, True])
def test_load_into_equals_load_state_dict(net, other, tmp_path, how, prefix, wrap):
    state = {prefix + name: value for name, value in other.state_dict().items()}
    path = write(state, tmp_path / "a", how)
    parameters = list(net.parameters())
    report = mnn.load_into(nn.DataParallel(net) if wrap else net, path)
    assert same(net.state_dict(), other.state_dict())
    assert set(report.loaded) == set(net.state_dict())
    assert report.missing == report.unexpected == report.mismatched == report.skipped == ()
    assert all(a is b for a, b in zip(parameters, net.parameters(), strict=True))
    assert all(p.requires_grad for p in parameters)


def test_a_compiled_part_on_either_side(net, other, tmp_path):
    other.layer1 = torch.compile(other.layer1)
    assert "layer1._orig_mod.0.weight" in other.state_dict()
    path = write(other.state_dict(), tmp_path / "a", "zip")
    mnn.load_into(net, path)
    assert torch.equal(net.layer1[0].weight, other.layer1._orig_mod[0].weight)
    net.layer2 = torch.compile(net.layer2)
    mnn.load_into(net, path)


@pytest.mark.parametrize("how", HOW)
def test_load_into_meta_materialises(other, tmp_path, how):
    path = write(other.state_dict(), tmp_path / "a", how)
    with torch.device("meta"):
        net = Net()
    net.conv1.weight.requires_grad_(False)
    mnn.load_into(net, path)
    assert same(net.state_dict(), other.state_dict())
    assert isinstance(net.fc.weight, nn.Parameter)
    assert [p.requires_grad for p in net.parameters()][:2] == [False, True]
    net(torch.randn(2, 3, 8, 8)).sum().backward()


def test_what_would_stay_on_meta_is_an_error(other, tmp_path):
    path = write(Net(3).state_dict(), tmp_path / "a", "zip")
    with torch.device("meta"):
        net = Net(5)
    with pytest.raises(RefusedError, match=r"stay on meta.*fc\.weight, fc\.bias"):
        mnn.load_into(net, path, on_mismatch="skip")
    assert net.conv1.weight.is_meta


def test_tied_on_meta_stays_tied(tmp_path):
    def make():
        model = nn.ModuleDict({"embed": nn.Embedding(7, 3), "head": nn.Linear(3, 7, bias=False)})
        model["head"].weight = model["embed"].weight
        return model

    source = make()
    safetensors.torch.save_file({"head.weight": source["head"].weight}, tmp_path / "a.safetensors")
    with torch.device("meta"):
        model = make()
    report = mnn.load_into(model, tmp_path / "a.safetensors")
    assert model["head"].weight is model["embed"].weight
    assert torch.equal(model["embed"].weight, source["head"].weight)
    assert report.loaded == ("embed.weight", "head.weight")
    assert report.missing == ()


def test_rnn_on_meta_works_afterwards(tmp_path):
    source = nn.LSTM(3, 4)
    torch.save(source.state_dict(), tmp_path / "a.pt")
    with torch.device("meta"):
        model = nn.LSTM(3, 4)
    mnn.load_into(model, tmp_path / "a.pt")
    x = torch.randn(5, 2, 3)
    assert torch.equal(model(x)[0], source(x)[0])


def test_lazy_modules_get_their_size(other, tmp_path):
    source = nn.Linear(3, 4)
    torch.save(source.state_dict(), tmp_path / "a.pt")
    model = nn.LazyLinear(4)
    mnn.load_into(model, tmp_path / "a.pt")
    x = torch.randn(2, 3)
    assert torch.equal(model(x), source(x))


@pytest.mark.parametrize("device", [None, "cpu", "auto"])
@pytest.mark.parametrize("dtype", [None, torch.float64, torch.bfloat16])
def test_dtypes_are_converted_by_torch(net, other, tmp_path, dtype, device):
    path = write(other.half().state_dict(), tmp_path / "a", "zip")
    reference = Net().to(dtype)
    reference.load_state_dict(torch.load(path, weights_only=True))
    mnn.load_into(net, path, dtype=dtype, device=device)
    assert {p.dtype for p in net.parameters()} == {dtype or torch.float32}
    assert net.bn1.num_batches_tracked.dtype == torch.int64
    assert same(net.cpu().state_dict(), reference.state_dict())


def test_a_staged_copy_in_several_windows(tmp_path, monkeypatch):
    monkeypatch.setattr(Bus, "size", 64)
    source = torch.randn(13, 11)
    torch.save({"weight": source, "bias": torch.randn(13)}, tmp_path / "a.pt")
    model = nn.Linear(11, 13, dtype=torch.float64)
    mnn.load_into(model, tmp_path / "a.pt")
    assert torch.equal(model.weight, source.double())


def test_other_memory_layouts(tmp_path):
    source = nn.Conv2d(4, 6, 3).to(memory_format=torch.channels_last)
    torch.save(source.state_dict(), tmp_path / "a.pt")
    for model in (nn.Conv2d(4, 6, 3), nn.Conv2d(4, 6, 3).to(memory_format=torch.channels_last)):
        stride = model.weight.stride()
        mnn.load_into(model, tmp_path / "a.pt")
        assert torch.equal(model.weight, source.weight)
        assert model.weight.stride() == stride


def test_misfits_change_nothing_and_name_everything(net, tmp_path):
    state = Net(3).state_dict()
    state["layer1.0.wieght"] = state.pop("layer1.0.weight")
    path = write(state, tmp_path / "a", "zip")
    before = {k: v.clone() for k, v in net.state_dict().items()}
    with pytest.raises(RefusedError) as e:
        mnn.load_into(net, path)
    assert same(net.state_dict(), before)
    text = str(e.value)
    assert "missing in the file: layer1.0.weight (nearest to the first: layer1.0.wieght)" in text
    assert "not in the model: layer1.0.wieght" in text
    assert "fc.weight [3, 6] -> [5, 6]" in text
    assert "skip" in e.value.hint


def test_skip_loads_what_fits_and_reports_the_rest(net, tmp_path):
    torch.manual_seed(2)
    state = Net(3).state_dict()
    state["more"] = torch.ones(1)
    del state["bn1.bias"]
    path = write(state, tmp_path / "a", "zip")
    before = {k: v.clone() for k, v in net.state_dict().items()}
    report = mnn.load_into(net, path, on_mismatch="skip")
    assert report.mismatched == (("fc.weight", (3, 6), (5, 6)), ("fc.bias", (3,), (5,)))
    assert report.missing == ("bn1.bias",)
    assert report.unexpected == ("more",)
    assert report.skipped == ("more", "fc.weight", "fc.bias")
    for name, value in net.state_dict().items():
        expected = before if name.startswith("fc.") or name == "bn1.bias" else state
        assert torch.equal(value, expected[name]), name
    assert "fc.bias [3] -> [5]" in str(report)


def test_nothing_that_fits_is_an_error_even_with_skip(net, tmp_path):
    path = write({"x": torch.ones(2)}, tmp_path / "a", "zip")
    with pytest.raises(RefusedError, match="does not fit"):
        mnn.load_into(net, path, on_mismatch="skip")
    with pytest.raises(UsageError, match="on_mismatch"):
        mnn.load_into(net, path, on_mismatch="ignore")


def test_two_names_for_one_tensor_collide(net, tmp_path):
    state = net.state_dict()
    state["module.fc.bias"] = torch.zeros(5)
    with pytest.raises(CollisionError, match=r"fc\.bias"):
        mnn.load_into(net, write(state, tmp_path / "a", "zip"))


def test_a_removed_head_is_explained(net, other, tmp_path):
    state = other.state_dict()
    del state["fc.weight"], state["fc.bias"]
    state._metadata[""]["modelctl.removed"] = [
        {"name": "module.fc.weight", "shape": [5, 6], "dtype": "float32"}
    ]
    path = write(state, tmp_path / "a", "zip")
    report = mnn.load_into(net, path, on_mismatch="skip")
    assert report.missing == ("fc.weight", "fc.bias")
    assert report.removed == ("fc.weight",)
    assert "removed from the file earlier: fc.weight" in str(report)
    assert "missing in the file: fc.bias" in str(report)


def test_the_freeze_record_is_applied_and_nothing_thawed(net, other, tmp_path):
    mnn.freeze(other, "layer1", bn_eval=True)
    mnn.save_checkpoint(tmp_path / "a.pt", model=other)
    net.conv1.weight.requires_grad_(False)
    report = mnn.load_into(net, tmp_path / "a.pt")
    assert report.frozen.batchnorms == ("layer1.1",)
    assert "freeze record applied" in str(report)
    assert not net.train().layer1[1].training
    assert {n for n, p in net.named_parameters() if not p.requires_grad} == {
        "conv1.weight",
        *(f"layer1.{n}" for n, _ in net.layer1.named_parameters()),
    }


def test_batchnorm_of_before_version_2_may_lack_its_counter(net, other, tmp_path):
    state = other.state_dict()
    for name in [n for n in state if n.endswith("num_batches_tracked")]:
        del state[name]
    path = write(state, tmp_path / "a", "zip")
    with pytest.raises(RefusedError, match="num_batches_tracked"):
        mnn.load_into(net, path)  # as load_state_dict: version 2 is recorded
    del state._metadata
    path = write(state, tmp_path / "b", "zip")
    Net().load_state_dict(torch.load(path, weights_only=True))
    mnn.load_into(net, path)
    with torch.device("meta"):
        on_meta = Net()
    mnn.load_into(on_meta, path)
    assert on_meta.bn1.num_batches_tracked.item() == 0
    assert torch.equal(on_meta.bn1.running_var, other.bn1.running_var)


def test_extra_state_and_scalars_of_before_0_4(tmp_path):
    class WithState(nn.Module):
        def __init__(self):
            super().__init__()
            self.w = nn.Parameter(torch.tensor(0.0))
            self.seen = 0

        def get_extra_state(self):
            return {"seen": self.seen}

        def set_extra_state(self, state):
            self.seen = state["seen"]

    source = WithState()
    source.seen = 7
    state = source.state_dict()
    state["w"] = torch.tensor([2.5])
    path = write(state, tmp_path / "a", "zip")
    model = nn.ModuleDict({"inner": WithState()})
    torch.save({f"inner.{k}": v for k, v in state.items()}, path)
    report = mnn.load_into(model, path)
    assert model["inner"].seen == 7
    assert model["inner"].w.item() == 2.5
    assert report.loaded == ("inner.w", "inner._extra_state")
    assert report.missing == ()


def test_a_whole_module_is_loaded_without_its_class(net, other, tmp_path):
    torch.save(other, tmp_path / "a.pt")
    assert same(mnn.load(tmp_path / "a.pt"), other.state_dict())
    mnn.load_into(net, tmp_path / "a.pt")
    assert same(net.state_dict(), other.state_dict())


def test_a_sparse_tensor_is_refused(net, tmp_path):
    state = net.state_dict()
    state["more"] = torch.eye(3).to_sparse()
    path = write(state, tmp_path / "a", "zip")
    with pytest.raises(UnsupportedError, match=r"'more' is a sparse_coo tensor"):
        mnn.load(path)
    assert mnn.load_into(net, path, on_mismatch="skip").unexpected == ("more",)
    state["fc.weight"] = state["fc.weight"].to_sparse()
    with pytest.raises(UnsupportedError, match=r"'fc\.weight' is a sparse_coo"):
        mnn.load_into(net, write(state, tmp_path / "a", "zip"), on_mismatch="skip")


def test_no_more_memory_than_the_largest_tensor(tmp_path):
    """A float32 file into a float32 model reads into place; nothing of tensor size is made."""
    import tracemalloc

    torch.save({f"{i}.weight": torch.randn(1000, 1000) for i in range(4)}, tmp_path / "a.pt")
    model = nn.Sequential(*(nn.Linear(1000, 1000, bias=False) for _ in range(4)))
    torch.save(model.state_dict(), tmp_path / "warm.pt")
    mnn.load_into(model, tmp_path / "warm.pt")
    tracemalloc.start()
    mnn.load_into(model, tmp_path / "a.pt")
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 1 << 20


def test_resnet18_of_torchvision(tmp_path):
    torchvision = pytest.importorskip("torchvision")
    torch.manual_seed(3)
    source = torchvision.models.resnet18(num_classes=10)
    path = tmp_path / "a.pt"
    torch.save(source.state_dict(), path)
    mc.save(mc.open(path), tmp_path / "a.safetensors")
    with torch.device("meta"):
        model = torchvision.models.resnet18(num_classes=10)
    mnn.load_into(model, tmp_path / "a.safetensors")
    assert same(model.state_dict(), source.state_dict())
    wider = torchvision.models.resnet18(num_classes=11)
    report = mnn.load_into(wider, path, on_mismatch="skip")
    assert [name for name, _, _ in report.mismatched] == ["fc.weight", "fc.bias"]


# ------------------------------------------------------------------ a real file


class Block(nn.Module):
    def __init__(self, inside: int, out: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inside, out, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(out)
        self.conv2 = nn.Conv2d(out, out, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(out)


class ResNet20(nn.Module):
    """The CIFAR-10 network of He et al. 2016 with option A shortcuts, which have no tensors."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 16, 3, 1, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(16)
        self.layer1 = nn.Sequential(*(Block(16, 16, 1) for _ in range(3)))
        self.layer2 = nn.Sequential(Block(16, 32, 2), Block(32, 32, 1), Block(32, 32, 1))
        self.layer3 = nn.Sequential(Block(32, 64, 2), Block(64, 64, 1), Block(64, 64, 1))
        self.linear = nn.Linear(64, 10)


def test_a_real_dataparallel_checkpoint(shared):
    path = shared / "corpus/dataparallel/akamaster__pytorch_resnet_cifar10__resnet20-12fca82f.th"
    if not path.is_file():
        pytest.skip(f"there is no {path}")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        whole = torch.load(path, map_location="cpu", weights_only=True)
    expected = {k.removeprefix("module."): v for k, v in whole["state_dict"].items()}
    model, reference = ResNet20(), ResNet20()
    reference.load_state_dict(expected)
    reference.bn1.num_batches_tracked.zero_()
    report = mnn.load_into(model, path)
    for name, value in expected.items():
        assert torch.equal(model.state_dict()[name], value), name
    assert set(report.loaded) >= set(expected)
