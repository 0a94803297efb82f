"""replace_head: on every classifier of torchvision, some of timm and transformers, in the middle of
a training, and refusals that change nothing."""

from __future__ import annotations

import copy
import warnings
from contextlib import ExitStack
from unittest.mock import patch

import pytest
import torch
from torch import nn, optim
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

import modelctl.nn as mnn
from modelctl.errors import AmbiguousError, NoMatchError, RefusedError, UsageError
from tests.nn.nets import Net, same

torchvision = pytest.importorskip("torchvision")
CLASSIFIERS = torchvision.models.list_models(module=torchvision.models)
SEGMENTATION = torchvision.models.list_models(module=torchvision.models.segmentation)


def shapes(model):
    return {name: tuple(value.shape) for name, value in model.state_dict().items()}


def built(name, classes, **options):
    empty = torch.empty
    with warnings.catch_warnings(), ExitStack() as stack:
        warnings.simplefilter("ignore")  # how slow an Inception's initialisation is
        if name.startswith("regnet"):  # it works out its widths with tensors: only layers on meta
            away = lambda *size, **rest: empty(*size, **{**rest, "device": "meta"})  # noqa: E731
            stack.enter_context(patch.object(torch, "empty", away))
        else:
            stack.enter_context(torch.device("meta"))
        return torchvision.models.get_model(name, num_classes=classes, **options)


@pytest.mark.parametrize("name", CLASSIFIERS)
def test_every_classifier_of_torchvision(name):
    model = built(name, 1000)
    before = {id(p) for p in model.parameters()}
    report = mnn.replace_head(model, 7)
    assert shapes(model) == shapes(built(name, 7))
    fresh = {n for n, p in model.named_parameters() if id(p) not in before}
    assert fresh == {*report.names}
    assert (report.before, report.after) == (1000, 7)


@pytest.mark.parametrize("name", SEGMENTATION)
def test_auxiliary_heads_follow(name):
    options = {"weights_backbone": None} | ({} if "lraspp" in name else {"aux_loss": True})
    model = built(name, 21, **options)
    report = mnn.replace_head(model, 3)
    assert shapes(model) == shapes(built(name, 3, **options))
    assert len(report.modules) == 2


@pytest.mark.parametrize("name", ["inception_v3", "googlenet"])
def test_auxiliary_heads_of_classifiers_are_named(name):
    report = mnn.replace_head(built(name, 1000), 7)
    assert any("aux" in module.lower() for module in report.modules)
    assert all(module in str(report) for module in report.modules)


TIMM = [
    "resnet18",
    "vit_tiny_patch16_224",
    "convnext_atto",
    "deit_tiny_distilled_patch16_224",
    "efficientnet_b0",
    "swin_tiny_patch4_window7_224",
    "levit_128s",
    "mobilenetv3_small_050",
    "resnetv2_50",
    "vgg11",
    "mixer_s16_224",
    "regnetx_002",
    "cait_xxs24_224",
    "coat_tiny",
    "poolformer_s12",
    "ghostnet_050",
    "densenet121",
    "inception_v3",
    "tresnet_m",
]


@pytest.mark.parametrize("name", TIMM)
def test_as_timm_resets_a_classifier(name):
    timm = pytest.importorskip("timm")
    with torch.device("meta"):
        model, other = timm.create_model(name), timm.create_model(name)
        mnn.replace_head(model, 7)
        other.reset_classifier(7)
    assert shapes(model) == shapes(other)
    assert model.num_classes == other.num_classes == 7


# ------------------------------------------------------------------ transformers

SMALL = {
    "hidden_size": 16,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "intermediate_size": 16,
}


def hugging_face(name, **options):
    transformers = pytest.importorskip("transformers")
    kind = {"ViT": "ImageClassification", "DeiT": "ImageClassificationWithTeacher"}
    config = getattr(transformers, f"{name}Config")
    size = {"vocab_size": 50} if name not in kind else {"image_size": 32, "patch_size": 16}
    task = kind.get(name, "SequenceClassification")
    return getattr(transformers, f"{name}For{task}")(config(**SMALL, **size, **options))


@pytest.mark.parametrize("name", ["Bert", "Roberta", "Electra", "ViT", "DeiT"])
def test_heads_of_transformers_and_their_config(name, tmp_path):
    model = hugging_face(name, num_labels=3)
    model.config.id2label = {0: "cat", 1: "dog", 2: "cow"}
    report = mnn.replace_head(model, 7)
    assert shapes(model) == shapes(hugging_face(name, num_labels=7))
    assert model.config.num_labels == model.num_labels == 7
    assert model.config.id2label == {i: f"LABEL_{i}" for i in range(7)}
    assert model.config.label2id == {f"LABEL_{i}": i for i in range(7)}
    assert "config.num_labels" in report.numbers
    weight = model.get_parameter(report.names[0])
    assert weight.std() < 0.03  # initializer_range, as the model does it, and not Linear
    assert weight.std() > 0
    model.save_pretrained(tmp_path)
    again = type(model).from_pretrained(tmp_path)
    assert same(again.state_dict(), model.state_dict())


def test_a_regression_becomes_a_classification():
    model = hugging_face("Bert", num_labels=1)
    ids = torch.ones(2, 3, dtype=torch.long)
    model(ids, labels=torch.ones(2))
    assert model.config.problem_type == "regression"
    mnn.replace_head(model, 4)
    model(ids, labels=torch.tensor([0, 3]))
    assert model.config.problem_type == "single_label_classification"


def test_tokens_are_no_classes():
    transformers = pytest.importorskip("transformers")
    config = transformers.GPT2Config(
        n_embd=16, n_layer=1, n_head=2, vocab_size=50, tie_word_embeddings=False
    )
    model = transformers.GPT2LMHeadModel(config)
    with pytest.raises(RefusedError, match="'lm_head' makes a language model's tokens"):
        mnn.replace_head(model, 7)


# ------------------------------------------------------------------ in a training


def training(**options):
    torch.manual_seed(0)
    model = Net()
    groups = mnn.param_groups(model, {"fc": {"lr": 0.5}}, lr=0.1, no_decay=True, weight_decay=0.1)
    return model, optim.AdamW(groups, **options)


def backward(model, seed):
    torch.manual_seed(seed)
    model.zero_grad()
    model(torch.randn(4, 3, 8, 8)).square().mean().backward()


def test_the_next_step_of_all_else_is_what_it_would_have_been():
    plain, other = training()
    model, optimizer = training()
    for seed in range(3):
        for net, its in ((plain, other), (model, optimizer)):
            backward(net, seed)
            its.step()
    backward(plain, 9)
    backward(model, 9)
    mnn.replace_head(model, 3, optimizer=optimizer)
    start = {n: p.detach().clone() for n, p in model.named_parameters()}
    other.step()
    optimizer.step()
    for name, parameter in plain.named_parameters():
        mine = model.get_parameter(name)
        if name.startswith("fc."):
            assert torch.equal(mine, start[name])  # no gradient yet, no decay, no momentum
            assert mine not in optimizer.state
            continue
        assert torch.equal(mine, parameter), name
        assert same(optimizer.state[mine], other.state[parameter]), name
    assert len(optimizer.state) == len(other.state) - 2
    backward(model, 10)
    optimizer.step()
    assert not torch.equal(model.fc.weight, start["fc.weight"])
    assert optimizer.state[model.fc.weight]["step"] == 1


def test_the_groups_keep_their_names_and_their_order(tmp_path):
    model, optimizer = training()
    backward(model, 0)
    optimizer.step()
    old = [[*group["param_names"]] for group in optimizer.param_groups]
    settings = [{k: v for k, v in g.items() if k != "params"} for g in optimizer.param_groups]
    mnn.replace_head(model, 3, optimizer=optimizer)
    for group, names, setting in zip(optimizer.param_groups, old, settings, strict=True):
        assert group["param_names"] == names
        assert all(p is model.get_parameter(n) for n, p in zip(names, group["params"], strict=True))
        assert {k: v for k, v in group.items() if k != "params"} == setting
    backward(model, 1)
    optimizer.step()
    mnn.save_checkpoint(tmp_path / "a.pt", model=model, optimizer=optimizer)
    again = Net(3)
    made = optim.AdamW(
        mnn.param_groups(again, {"fc": {"lr": 0.5}}, lr=0.1, no_decay=True, weight_decay=0.1)
    )
    mnn.resume(tmp_path / "a.pt", model=again, optimizer=made)
    assert same(again.state_dict(), model.state_dict())


def test_the_layer_stays_the_object_that_it_is():
    model = Net().to(torch.float64).eval()
    model.also = model.fc  # the same layer by another name
    layer = model.fc
    seen = []
    layer.register_forward_hook(lambda *_: seen.append(1))
    report = mnn.replace_head(model, 3)
    assert model.fc is model.also is layer
    assert report.names == ("fc.weight", "fc.bias")
    assert (layer.out_features, layer.weight.dtype, layer.training) == (3, torch.float64, False)
    assert model(torch.randn(1, 3, 8, 8).double()).shape == (1, 3)
    assert seen


def test_it_starts_as_the_layer_does():
    model, plain = Net(), nn.Linear(6, 3)
    torch.manual_seed(5)
    plain.reset_parameters()
    torch.manual_seed(5)
    mnn.replace_head(model, 3)
    assert same(model.fc.state_dict(), plain.state_dict())


def test_without_a_bias_and_as_a_convolution():
    class Convolved(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv = nn.Conv2d(3, 4, 3)
            self.classifier = nn.Sequential(nn.Dropout(), nn.Conv2d(4, 5, 1, bias=False))
            self.num_classes = 5

    model = Convolved()
    report = mnn.replace_head(model, 9)
    last = model.classifier[1]
    assert last.bias is None
    assert (last.out_channels, *last.weight.shape) == (9, 9, 4, 1, 1)
    assert model.num_classes == 9
    assert report.numbers == ("num_classes",)
    assert str(report).splitlines()[0].startswith("classifier.1: 5 -> 9 outputs (named like")


def test_numbers_of_what_the_head_is_not_in_stay():
    model = Net()
    model.metric = nn.Module()
    model.metric.num_classes = 5
    mnn.replace_head(model, 3)
    assert model.metric.num_classes == 5


def test_a_frozen_head_trains_then():
    model = Net()
    mnn.freeze(model, ["fc", "conv1"])
    mnn.replace_head(model, 3)
    assert mnn.trainable(model).frozen == ("conv1.weight",)
    assert mnn.freeze_record(model)["patterns"] == ["conv1"]


@pytest.mark.parametrize("wrap", [AveragedModel, copy.deepcopy])
def test_the_average_follows(wrap):
    model, optimizer = training()
    ema = wrap(model)
    kept = copy.deepcopy(ema.state_dict())
    mnn.replace_head(model, 3, optimizer=optimizer, ema=ema)
    inside = getattr(ema, "module", ema)
    assert same(inside.fc.state_dict(), model.fc.state_dict())
    assert inside.fc.weight.data_ptr() != model.fc.weight.data_ptr()
    for name, value in ema.state_dict().items():
        assert "fc." in name or torch.equal(value, kept[name])
    backward(model, 0)
    optimizer.step()
    if wrap is AveragedModel:
        ema = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.9))
        mnn.replace_head(model, 4, ema=ema)
        ema.update_parameters(model)
        ema.update_parameters(model)
    assert ema(torch.randn(2, 3, 8, 8)).shape == (2, 4 if wrap is AveragedModel else 3)


def test_wrapped_models_and_several_optimizers():
    model = Net()
    parts = {
        "head": optim.SGD(model.fc.parameters(), lr=0.1),
        "rest": optim.SGD([p for n, p in model.named_parameters() if "fc" not in n], lr=0.1),
    }
    report = mnn.replace_head(nn.DataParallel(model), 3, optimizer=parts)
    assert report.modules == ("fc",)
    assert parts["head"].param_groups[0]["params"] == [model.fc.weight, model.fc.bias]
    compiled = torch.compile(Net(), backend="eager")
    assert mnn.replace_head(compiled, 3).modules == ("fc",)
    assert compiled(torch.randn(2, 3, 8, 8)).shape == (2, 3)


def test_what_an_optimizer_wraps_forgets_it_too():
    timm_optim = pytest.importorskip("timm.optim")
    model, optimizer = training()
    outer = timm_optim.Lookahead(optimizer, k=1)
    backward(model, 0)
    outer.step()
    old = model.fc.weight
    assert old in optimizer.state
    mnn.replace_head(model, 3, optimizer=outer)
    assert old not in optimizer.state
    backward(model, 1)
    outer.step()
    assert model.fc.weight in optimizer.state


# ------------------------------------------------------------------ refused


def _two() -> nn.Module:
    model = nn.Module()
    model.body = nn.Linear(4, 8)
    model.policy_head, model.value_head = nn.Linear(8, 5), nn.Linear(8, 1)
    return model


def _tied() -> nn.Module:
    model = nn.Module()
    model.embed = nn.Embedding(5, 8)
    model.body = nn.Linear(8, 8)
    model.head = nn.Linear(8, 5, bias=False)
    model.head.weight = model.embed.weight
    return model


def _parametrized() -> nn.Module:
    model = Net()
    nn.utils.parametrizations.weight_norm(model.fc)
    return model


def _grouped() -> nn.Module:
    return nn.ModuleDict({"conv": nn.Conv2d(3, 8, 1), "classifier": nn.Conv2d(8, 4, 1, groups=2)})


def _bilinear() -> nn.Module:
    return nn.ModuleDict({"body": nn.Linear(4, 8), "head": nn.Bilinear(8, 8, 3)})


REFUSED = {
    "several": (_two, {}, AmbiguousError, r"policy_head \(5 outputs\), value_head \(1 output\)"),
    "named twice": (
        _two,
        {"head": ["policy_head", "value_head"]},
        AmbiguousError,
        "layers of different size",
    ),
    "named wrong": (Net, {"head": "fcc"}, NoMatchError, "no parameter matches 'fcc'"),
    "none": (lambda: nn.ReLU(), {}, NoMatchError, "no head is found"),
    "a norm": (Net, {"head": "bn1"}, RefusedError, "'bn1' is a BatchNorm2d"),
    "tied": (_tied, {}, RefusedError, "'embed.weight' is 'head.weight'"),
    "parametrized": (_parametrized, {}, RefusedError, "'fc' is parametrized"),
    "groups": (_grouped, {}, RefusedError, "'classifier' is a convolution in 2 groups"),
    "another kind": (_bilinear, {"head": "head"}, RefusedError, "'head' is a Bilinear"),
    "lazy": (lambda: nn.Sequential(nn.LazyLinear(4)), {}, UsageError, "no shape yet"),
    "another's average": (Net, {"ema": nn.Linear(2, 2)}, RefusedError, "no copy of this model"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_refused_with_a_way_out(name):
    make, options, error, message = REFUSED[name]
    model = make()
    before = [(n, id(p)) for n, p in model.named_parameters()]
    with pytest.raises(error, match=message) as caught:
        mnn.replace_head(model, 3, **options)
    assert "--head" not in (caught.value.hint or "")
    assert [(n, id(p)) for n, p in model.named_parameters()] == before


def test_its_own_average_is_none():
    model = Net()
    with pytest.raises(RefusedError, match="no copy of this model"):
        mnn.replace_head(model, 3, ema=model)
    assert model.fc.out_features == 5


def test_detection_is_refused_unless_named():
    model = built("fasterrcnn_mobilenet_v3_large_fpn", 91, weights_backbone=None)
    with pytest.raises(RefusedError, match="looks like a detection"):
        mnn.replace_head(model, 3)
    mnn.replace_head(model, 3, head="roi_heads.box_predictor.cls_score")
    assert model.roi_heads.box_predictor.cls_score.out_features == 3


def test_an_optimizer_without_the_head_is_refused():
    model = Net()
    mnn.freeze(model, "fc")
    optimizer = optim.SGD(mnn.param_groups(model), lr=0.1)
    with pytest.raises(RefusedError, match=r"does not hold fc.weight, fc.bias") as caught:
        mnn.replace_head(model, 3, optimizer=optimizer)
    assert model.fc.out_features == 5
    assert "modelctl.nn.unfreeze(model, 'fc', optimizer=optimizer)" in caught.value.hint
    mnn.replace_head(model, 3)  # what the hint says
    joined = mnn.unfreeze(model, "fc", optimizer=optimizer).joined
    assert joined == ("fc.weight", "fc.bias")


def test_lbfgs_is_refused():
    model = Net()
    with pytest.raises(RefusedError, match="LBFGS has one flat state"):
        mnn.replace_head(model, 3, optimizer=optim.LBFGS(model.parameters()))


@pytest.mark.parametrize("odd", [0, -1, True, 2.0, "3", None])
def test_numbers_that_are_none(odd):
    with pytest.raises(UsageError, match="it must be a whole number, 1 or more"):
        mnn.replace_head(Net(), odd)
