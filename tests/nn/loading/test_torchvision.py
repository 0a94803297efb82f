"""load_into against ``torch.load`` + ``load_state_dict`` on torchvision's models, and the files
that torchvision's own loaders rewrite."""

from __future__ import annotations

import re
import warnings
from collections import OrderedDict
from pathlib import Path

import pytest
import safetensors.torch
import torch
from torch import nn

import modelctl as mc
import modelctl.nn as mnn
from modelctl.errors import RefusedError, UnsupportedError
from modelctl.nn.loading.plan import plan_load
from tests.nn.nets import same

torchvision = pytest.importorskip("torchvision")
from torchvision import models, ops  # noqa: E402
from torchvision.models import detection  # noqa: E402

NAMES = models.list_models(models)
# below 40 MB: these are loaded, of the others names and shapes are matched
SMALL = {n for n in NAMES if models.get_model_weights(n).DEFAULT.meta["num_params"] < 10_000_000}


def on_meta(name: str, **options) -> nn.Module:
    if name in ("googlenet", "inception_v3"):
        options["init_weights"] = False
    try:
        with torch.device("meta"):
            return models.get_model(name, **options)
    except NotImplementedError:  # regnets compute their widths with tensors
        accelerate = pytest.importorskip("accelerate")
        with accelerate.init_empty_weights():
            return models.get_model(name, **options)


def nbytes(model: nn.Module) -> int:
    return sum(t.numel() * t.element_size() for t in model.state_dict().values())


def filled(model: nn.Module, seed: int = 0) -> OrderedDict:
    """A state_dict like the model's, with values: random ones, drawn once and cut up."""
    torch.manual_seed(seed)
    state = model.state_dict()
    values = torch.randn(nbytes(model) // 4 + 8 * len(state))
    at = 0
    for name, tensor in state.items():
        n = tensor.numel()
        cut = values[at : at + n].reshape(tensor.shape)
        state[name] = cut.clone() if tensor.is_floating_point() else (cut * 100).to(tensor.dtype)
        at += n
    return state


@pytest.mark.parametrize("name", NAMES)
def test_a_classification_model(name, tmp_path):
    model, path = on_meta(name), tmp_path / "a.pth"
    if name not in SMALL:
        match_only(model, path)
        return
    torch.save(filled(model), path)
    reference = on_meta(name).to_empty(device="cpu")
    reference.load_state_dict(torch.load(path, weights_only=True))
    expected = reference.state_dict()
    report = mnn.load_into(model, path)
    assert same(model.state_dict(), expected)
    assert report.loaded == tuple(expected)
    safe = tmp_path / "a.safetensors"
    safetensors.torch.save_file(expected, safe)
    with torch.no_grad():
        for tensor in model.state_dict().values():
            tensor.zero_()
    mnn.load_into(model, safe)
    assert same(model.state_dict(), expected)


def test_there_are_all_of_them():
    assert len(NAMES) >= 80
    assert len(SMALL) >= 20


def match_only(model: nn.Module, path: Path) -> None:
    """A file with all names and shapes, and a single value behind each."""
    state = model.state_dict()
    names = tuple(state)
    for name, tensor in state.items():
        state[name] = torch.zeros((), dtype=tensor.dtype).expand(tensor.shape)
    torch.save(state, path)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # copying to meta does nothing
        model.load_state_dict(torch.load(path, weights_only=True))
    with mc.open(path) as ckpt:
        plan = plan_load(model, ckpt.sections.model())
    plan.check(str(path), strict=True)
    assert plan.report.loaded == names


@pytest.mark.parametrize("name", ["resnet18", "densenet121", "mobilenet_v3_small", "vit_b_16"])
def test_another_number_of_classes(name, tmp_path):
    path = tmp_path / "a.pth"
    state = on_meta(name).state_dict()
    torch.save({n: torch.zeros((), dtype=t.dtype).expand(t.shape) for n, t in state.items()}, path)
    model = on_meta(name, num_classes=7).to_empty(device="cpu")
    with pytest.raises(RefusedError, match=r"\[1000"):
        mnn.load_into(model, path)
    report = mnn.load_into(model, path, on_mismatch="skip")
    assert [own[0] for _, _, own in report.mismatched] == [7, 7]
    assert report.missing == report.unexpected == ()
    assert len(report.loaded) == len(state) - 2


# ------------------------------------------------------------------ as they are downloaded


class Weights:
    """What torchvision's loaders take; gives the file as it is."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def get_state_dict(self, **_):
        return torch.load(self.path, weights_only=True)


@pytest.mark.parametrize(
    ("how", "wrapper"), [("legacy", ""), ("zip", "module."), ("safetensors", "")]
)
def test_old_densenets(tmp_path, how, wrapper):
    """The published ones: from before names could have no dots, counters and versions."""

    def build() -> nn.Module:
        with torch.device("meta"):
            return models.DenseNet(4, (2, 3), 8, num_classes=5)

    path = tmp_path / "a.pth"
    old = OrderedDict(
        (re.sub(r"(denselayer\d+\.(?:norm|conv))(\d)", r"\1.\2", name), tensor)
        for name, tensor in filled(build()).items()
        if not name.endswith("num_batches_tracked")
    )
    assert "features.denseblock1.denselayer1.norm.1.weight" in old
    torch.save(old, path, _use_new_zipfile_serialization=how != "legacy")
    expected = build().to_empty(device="cpu")
    for name, buffer in expected.named_buffers():
        if name.endswith("num_batches_tracked"):
            buffer.zero_()
    models.densenet._load_state_dict(expected, Weights(path), progress=False)
    ours = {wrapper + name: tensor for name, tensor in old.items()}
    if how == "safetensors":
        safetensors.torch.save_file(ours, path)
    else:
        torch.save(ours, path, _use_new_zipfile_serialization=how == "zip")
    model = build()
    report = mnn.load_into(model, path)
    assert same(model.state_dict(), expected.state_dict())
    assert report.missing == report.unexpected == ()


def test_a_dot_that_belongs_there_stays(tmp_path):
    model = nn.Module()
    model.norm = nn.ModuleList([nn.LayerNorm(2), nn.LayerNorm(2)])
    model.norm1 = nn.LayerNorm(2)
    state = {"norm.0.weight": 1, "norm.0.bias": 2, "norm.1.weight": 3, "norm.1.bias": 4}
    torch.save({n: torch.full((2,), float(v)) for n, v in state.items()}, tmp_path / "a.pt")
    report = mnn.load_into(model, tmp_path / "a.pt", on_mismatch="skip")
    assert report.missing == ("norm1.weight", "norm1.bias")
    assert model.norm[1].weight[0] == 3


def test_a_name_without_the_dot_comes_first(tmp_path):
    model = nn.ModuleDict({"norm1": nn.LayerNorm(2)})
    state = {"norm1.weight": 1, "norm1.bias": 2, "norm.1.weight": 3, "norm.1.bias": 4}
    torch.save({n: torch.full((2,), float(v)) for n, v in state.items()}, tmp_path / "a.pt")
    report = mnn.load_into(model, tmp_path / "a.pt", on_mismatch="skip")
    assert report.unexpected == ("norm.1.weight", "norm.1.bias")
    assert model["norm1"].weight[0] == 1


def old_style(model: nn.Module, renames: dict[str, str]) -> tuple[OrderedDict, OrderedDict]:
    """The model's state_dict with values, as it is and under an older version's names."""
    state = filled(model)
    old = OrderedDict()
    for name, tensor in state.items():
        for pattern, to in renames.items():
            name = re.sub(pattern, to, name)
        old[name] = tensor
    assert list(old) != list(state)
    return state, old


RENAMED = {
    "rpn": (lambda: detection.rpn.RPNHead(8, 3), {r"conv\.0\.0\.": "conv."}),
    "fpn": (
        lambda: ops.FeaturePyramidNetwork([4, 8], 6),
        {r"_blocks\.(\d)\.0\.": r"_blocks.\1."},
    ),
    "mask": (
        lambda: detection.mask_rcnn.MaskRCNNHeads(4, [6, 8], 1),
        {r"^0\.0\.": "mask_fcn1.", r"^1\.0\.": "mask_fcn2."},
    ),
    "retinanet": (
        lambda: detection.retinanet.RetinaNetClassificationHead(8, 3, 4),
        {r"conv\.(\d)\.0\.": lambda m: f"conv.{2 * int(m[1])}."},
    ),
    "vit": (
        lambda: models.vision_transformer.MLPBlock(4, 8, 0.0),
        {r"^0\.": "linear_1.", r"^3\.": "linear_2."},
    ),
}


@pytest.mark.parametrize("prefix", ["", "inner.part.", "module."])
@pytest.mark.parametrize("which", RENAMED)
def test_renamed_by_the_modules_themselves(which, prefix, tmp_path):
    build, renames = RENAMED[which]
    state, old = old_style(build(), renames)
    expected = build()
    expected.load_state_dict(old)  # no versions are recorded
    assert same(expected.state_dict(), state)
    torch.save({prefix + name: tensor for name, tensor in old.items()}, tmp_path / "a.pt")
    inner, model = build(), nn.Module()
    model.inner = nn.Module()
    model.inner.part = inner
    for one in (model, inner) if "inner" in prefix else (inner,):
        inner.load_state_dict(filled(inner, seed=9))
        part = prefix if one is inner and prefix != "module." else None
        report = mnn.load_into(one, tmp_path / "a.pt", prefix=part)
        assert same(inner.state_dict(), state)
        assert report.missing == report.unexpected == ()


def test_a_file_of_the_current_version_is_not_rewritten(tmp_path):
    build, renames = RENAMED["rpn"]
    _, old = old_style(build(), renames)
    old._metadata = {"": {"version": 2}}
    torch.save(old, tmp_path / "a.pt")
    with pytest.raises(RuntimeError, match="Missing key"):
        build().load_state_dict(torch.load(tmp_path / "a.pt", weights_only=True))
    with pytest.raises(RefusedError, match=r"missing in the file: conv\.0\.0\.weight"):
        mnn.load_into(build(), tmp_path / "a.pt")


def test_batchnorm_into_frozen_batchnorm(tmp_path):
    source = nn.BatchNorm2d(4)
    source.running_mean.uniform_()
    torch.save(source.state_dict(), tmp_path / "a.pt")
    model = ops.FrozenBatchNorm2d(4)
    report = mnn.load_into(model, tmp_path / "a.pt")
    assert torch.equal(model.running_mean, source.running_mean)
    assert report.unexpected == ()  # the module itself drops the counter


def test_mnasnet_of_version_1(tmp_path):
    """Its loader builds another stem."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        old = models.mnasnet0_5()
        bare = old.state_dict()
        bare._metadata[""]["version"] = 1
        wide = models.mnasnet.MNASNet(1.0).layers
        for i in range(8):  # the stem of version 1 is that of alpha 1
            for name, tensor in wide[i].state_dict().items():
                bare[f"layers.{i}.{name}"] = tensor
        for name, tensor in models.mnasnet._stack(16, 16, 3, 2, 3, 3, 0.1).state_dict().items():
            bare[f"layers.8.{name}"] = tensor
        torch.save(bare, tmp_path / "a.pt")
        expected, model = models.mnasnet0_5(), on_meta("mnasnet0_5")
        expected.load_state_dict(torch.load(tmp_path / "a.pt", weights_only=True))
        mnn.load_into(model, tmp_path / "a.pt")
    assert same(model.state_dict(), expected.state_dict())
    model.eval()(torch.zeros(1, 3, 64, 64))


def test_load_gives_load_state_dict_the_versions(tmp_path):
    state = filled(on_meta("mnasnet0_5"))
    torch.save(state, tmp_path / "a.pt")
    found = mnn.load(tmp_path / "a.pt")
    assert found._metadata == state._metadata
    model = on_meta("mnasnet0_5").to_empty(device="cpu")
    model.load_state_dict(found)
    assert same(model.state_dict(), state)


# ------------------------------------------------------------------ other modules' rules


class Splitting(nn.Module):
    """Older files had q and k in one, laid out the other way round."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.k = nn.Parameter(torch.zeros(2, 3)), nn.Parameter(torch.zeros(2, 3))
        self.register_load_state_dict_pre_hook(self.split)

    @staticmethod
    def split(module, state, prefix, *rest):
        if prefix + "qk" in state:
            state[prefix + "q"], state[prefix + "k"] = state.pop(prefix + "qk").t().chunk(2)


class Shifting(nn.Module):
    """Older files mean something else by the same name."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("var", torch.ones(3))

    def _load_from_state_dict(self, state, prefix, *rest):
        if prefix + "var" in state:
            state[prefix + "var"] -= 0.5
        super()._load_from_state_dict(state, prefix, *rest)


class Taking(nn.Module):
    """Sets an attribute from the file by itself."""

    def __init__(self) -> None:
        super().__init__()
        self.total = torch.zeros(2)
        self.weight = nn.Parameter(torch.zeros(2))

    def _load_from_state_dict(self, state, prefix, *rest):
        if prefix + "total" in state:
            self.total = state.pop(prefix + "total")
        super()._load_from_state_dict(state, prefix, *rest)


class Adding(nn.Module):
    """Older files lack an entry."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(2))
        self.register_buffer("scale", torch.zeros(1))

    def _load_from_state_dict(self, state, prefix, *rest):
        state.setdefault(prefix + "scale", torch.tensor([7.0]))
        super()._load_from_state_dict(state, prefix, *rest)


@pytest.mark.parametrize("transposed", [False, True])
def test_a_hook_that_cuts_up_a_tensor(tmp_path, transposed):
    whole = torch.arange(12.0).reshape(4, 3).t() if transposed else torch.randn(3, 4)
    torch.save({"0.qk": whole}, tmp_path / "a.pt")
    model, expected = nn.Sequential(Splitting()), nn.Sequential(Splitting())
    expected.load_state_dict({"0.qk": whole})
    report = mnn.load_into(model, tmp_path / "a.pt")
    assert same(model.state_dict(), expected.state_dict())
    assert report.loaded == ("0.q", "0.k")


def test_an_entry_that_the_module_adds(tmp_path):
    torch.save({"weight": torch.ones(2)}, tmp_path / "a.pt")
    for model in (Adding(), Adding().to("meta")):
        report = mnn.load_into(model, tmp_path / "a.pt", dtype=torch.float64)
        assert model.scale.item() == 7
        assert model.scale.dtype == torch.float64
        assert report.loaded == ("weight", "scale")


def test_values_that_a_module_computes_are_refused(tmp_path):
    torch.save({"0.var": torch.ones(3)}, tmp_path / "a.pt")
    model = nn.Sequential(Shifting())
    with pytest.raises(UnsupportedError, match=r"'0\.var' is computed .* by Shifting's own code"):
        mnn.load_into(model, tmp_path / "a.pt")
    assert torch.equal(model[0].var, torch.ones(3))
    model.load_state_dict(mnn.load(tmp_path / "a.pt"))  # the way out that the hint names
    assert torch.equal(model[0].var, torch.full((3,), 0.5))


def test_attributes_that_a_module_takes_are_given_back(tmp_path):
    torch.save({"total": torch.ones(2), "weight": torch.ones(2)}, tmp_path / "a.pt")
    model = Taking()
    with pytest.raises(RefusedError, match=r"Taking.* sets 'total' from the file by itself"):
        mnn.load_into(model, tmp_path / "a.pt")
    assert not model.total.is_meta
    assert model.weight.sum() == 0


@pytest.mark.filterwarnings("ignore:.*weight_norm:FutureWarning")
def test_weight_norm_of_the_old_kind(tmp_path):
    source = nn.utils.weight_norm(nn.Linear(3, 2))
    torch.save(source.state_dict(), tmp_path / "a.pt")
    model, expected = (nn.utils.parametrizations.weight_norm(nn.Linear(3, 2)) for _ in "ab")
    expected.load_state_dict(torch.load(tmp_path / "a.pt", weights_only=True))
    mnn.load_into(model, tmp_path / "a.pt")
    assert same(model.state_dict(), expected.state_dict())
    assert torch.allclose(model.weight, source.weight)


def test_post_hooks_are_run(tmp_path):
    torch.save({"weight": torch.ones(2, 2), "more": torch.ones(1)}, tmp_path / "a.pt")
    model, seen = nn.Linear(2, 2), []
    model.register_load_state_dict_post_hook(lambda module, keys: seen.append((module, *keys)))
    mnn.load_into(model, tmp_path / "a.pt", on_mismatch="skip")
    assert seen == [(model, ["bias"], ["more"])]
