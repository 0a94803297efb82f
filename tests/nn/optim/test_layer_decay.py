"""param_groups(layer_decay=): which layer each parameter is in, and the lr that it really gets."""

from __future__ import annotations

import importlib.util
import warnings

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn, optim

import modelctl.nn as mnn
from modelctl.errors import AmbiguousError, NoMatchError, UsageError
from tests.nn.nets import Net


def layers_of(model, **kwargs) -> dict[str, int]:
    """The layer of each parameter, read back from the lr: 0 is the last."""
    groups = mnn.param_groups(model, lr=1.0, layer_decay=0.5, **kwargs)
    exact = {0.5**i: i for i in range(60)}
    return {name: exact[group["lr"]] for group in groups for name in group["param_names"]}


def on_meta(name: str, **kwargs) -> nn.Module:
    models = pytest.importorskip("torchvision.models")
    with torch.device("meta"):
        return models.get_model(name, weights=None, **kwargs)


# How far some parameters are from the head; the stem is among them.
TORCHVISION = {
    "resnet18": {
        "conv1.weight": 9, "bn1.bias": 9, "layer1.0.conv1.weight": 8,
        "layer2.0.downsample.1.bias": 6, "layer4.1.bn2.weight": 1, "fc.weight": 0,
    },
    "vit_b_16": {
        "class_token": 13, "conv_proj.weight": 13, "encoder.pos_embedding": 13,
        "encoder.layers.encoder_layer_0.mlp.0.weight": 12,
        "encoder.layers.encoder_layer_11.ln_1.weight": 1, "encoder.ln.weight": 1,
        "heads.head.weight": 0,
    },
    "convnext_tiny": {
        "features.0.0.weight": 19, "features.1.0.layer_scale": 18,
        "features.1.2.layer_scale": 16, "features.2.1.weight": 15, "features.3.0.layer_scale": 15,
        "features.7.2.block.0.weight": 1, "classifier.2.weight": 0,
    },
    "swin_t": {
        "features.0.0.weight": 13, "features.1.0.norm1.bias": 12, "features.2.norm.bias": 11,
        "features.5.5.norm1.bias": 3, "features.6.reduction.weight": 3,
        "features.7.1.attn.relative_position_bias_table": 1, "norm.weight": 1, "head.bias": 0,
    },
    "densenet121": {
        "features.conv0.weight": 59, "features.denseblock1.denselayer1.conv1.weight": 58,
        "features.denseblock1.denselayer6.conv1.weight": 53,
        "features.transition1.conv.weight": 53, "features.denseblock4.denselayer1.norm1.bias": 16,
        "features.norm5.weight": 1, "classifier.weight": 0,
    },
    "vgg11_bn": {
        "features.0.weight": 8, "features.1.weight": 8, "features.25.weight": 1,
        "classifier.0.weight": 0, "classifier.6.weight": 0,
    },
    "mobilenet_v3_small": {"features.0.0.weight": 12, "features.12.0.weight": 1,
                           "classifier.3.weight": 0},
    # three linear layers are as good as a row beside five convolutions, but no second tower
    "alexnet": {"features.0.weight": 5, "features.10.bias": 1, "classifier.1.weight": 0},
    "efficientnet_b0": {"features.0.0.weight": 17, "features.7.0.block.0.0.weight": 1,
                        "features.8.0.weight": 1, "classifier.1.bias": 0},
    "shufflenet_v2_x0_5": {"conv1.0.weight": 17, "stage2.0.branch1.0.weight": 16,
                           "stage4.3.branch2.0.weight": 1, "conv5.0.weight": 0, "fc.bias": 0},
}  # fmt: skip


@pytest.mark.parametrize("name", TORCHVISION)
def test_the_layers_of_torchvision_models(name):
    found = layers_of(on_meta(name))
    assert {key: found[key] for key in TORCHVISION[name]} == TORCHVISION[name]
    assert max(found.values()) == max(TORCHVISION[name].values())
    assert {*found.values()} == {*range(max(found.values()) + 1)}  # no layer is empty


def families() -> list[str]:
    """The smallest model of each file of timm that says its layers."""
    if importlib.util.find_spec("timm") is None:
        return []
    from timm.models import list_models, list_modules

    found = [sorted(list_models(module=module), key=len)[:1] for module in list_modules()]
    return [name for names in found for name in names]


# Where modules inside of a model of timm say themselves what does not decay, or it lists nothing.
OTHER_DECAY = {"edgenext_base": "temperature", "xcit_nano_12_p8_224": "temperature",
               "visformer_tiny": "pos_embed"}  # fmt: skip


@pytest.mark.parametrize("part", range(4))
def test_timm_has_the_same_scales_and_the_same_decay(part):
    timm = pytest.importorskip("timm")
    theirs = pytest.importorskip("timm.optim").param_groups_layer_decay
    compared = 0
    for name in families()[part::4]:
        with torch.device("meta"):
            try:
                model = timm.create_model(name)
            except (RuntimeError, NotImplementedError):  # not built on meta
                continue
        if not hasattr(model, "group_matcher"):
            continue
        own = model.no_weight_decay() if hasattr(model, "no_weight_decay") else ()
        expected = {
            id(p): (pytest.approx(3 * group["lr_scale"]), group["weight_decay"])
            for group in theirs(model, weight_decay=0.1, layer_decay=0.75, no_weight_decay_list=own)
            for p in group["params"]
        }
        ours = mnn.param_groups(model, lr=3.0, weight_decay=0.1, no_decay=True, layer_decay=0.75)
        for group in ours:
            for p, named in zip(group["params"], group["param_names"], strict=True):
                lr, decay = expected[id(p)]
                assert group["lr"] == lr, (name, named)
                if OTHER_DECAY.get(name, "?") not in named:
                    assert group["weight_decay"] == decay, (name, named)
        assert sum(len(group["params"]) for group in ours) == len(expected)
        compared += 1
    assert compared > 10


def test_a_wrapper_does_not_hide_what_timm_says():
    timm = pytest.importorskip("timm")
    with torch.device("meta"):
        model = timm.create_model("cait_xxs24_224")
    found = layers_of(model)
    assert found["blocks_token_only.0.attn.q.weight"] == 2  # as the last but one block
    assert layers_of(nn.DataParallel(model)) == found


# What the authors' own code gives: BEiT (optim_factory.py) and Swin (SimMIM's optimizer.py) a block
# a layer; of timm's ConvNeXt, too.
TRANSFORMERS = {
    "Beit": {"embeddings.cls_token": 13, "layers.0.lambda_1": 12, "layers.11.lambda_1": 1,
             "classifier.bias": 0},
    "Swin": {"embeddings.patch_embeddings.projection.bias": 13,
             "encoder.layers.0.blocks.1.mlp.fc1.bias": 11,
             "encoder.layers.0.downsample.norm.bias": 11,
             "encoder.layers.3.blocks.1.mlp.fc1.bias": 1, "classifier.bias": 0},
    "ConvNext": {"embeddings.layernorm.bias": 19, "encoder.stages.0.layers.0.pwconv1.bias": 18,
                 "encoder.stages.1.downsampling_layer.1.bias": 15,
                 "encoder.stages.1.layers.0.pwconv1.bias": 15,
                 "encoder.stages.3.layers.2.pwconv1.bias": 1, "classifier.bias": 0},
}  # fmt: skip


@pytest.mark.parametrize("kind", TRANSFORMERS)
def test_a_block_is_a_layer_in_transformers_models_too(kind):
    transformers = pytest.importorskip("transformers")
    if not hasattr(transformers, f"{kind}ForImageClassification"):
        pytest.skip("this transformers lacks it")
    with torch.device("meta"):
        model = getattr(transformers, f"{kind}ForImageClassification")(
            getattr(transformers, f"{kind}Config")()
        )
    found = layers_of(model)
    expected = {
        name: i for end, i in TRANSFORMERS[kind].items() for name in found if name.endswith(end)
    }
    assert len(expected) >= len(TRANSFORMERS[kind])
    assert {name: found[name] for name in expected} == expected
    assert {*found.values()} == {*range(max(found.values()) + 1)}


def block(size=2):
    return nn.Sequential(nn.Linear(size, size), nn.ReLU(), nn.Linear(size, size))


def test_what_works_side_by_side_is_one_layer():
    """Experts and branches are numbered like blocks."""

    def layer():
        experts = nn.ModuleList(block() for _ in range(4))
        return nn.ModuleDict({"gate": nn.Linear(2, 2), "experts": experts})

    model = nn.ModuleDict({"layers": nn.ModuleList(layer() for _ in range(3))})
    assert {*layers_of(model).values()} == {2, 1, 0}
    branches = nn.ModuleDict({"branch1": block(), "branch2": block()})
    model = nn.ModuleDict(
        {
            "units": nn.ModuleList(
                [branches, nn.ModuleDict({"branch1": block(), "branch2": block()})]
            )
        }
    )
    assert {*layers_of(model).values()} == {1, 0}


def test_class_attention_is_no_head():
    model = nn.ModuleDict(
        {
            "blocks": nn.ModuleList(block() for _ in range(6)),
            "cls_attn_blocks": nn.ModuleList(block() for _ in range(2)),
            "norm": nn.LayerNorm(2),
            "head": nn.Linear(2, 2),
        }
    )
    found = layers_of(model)
    assert found["blocks.0.0.weight"] == 8
    assert found["cls_attn_blocks.0.0.weight"] == 2
    assert found["cls_attn_blocks.1.0.weight"] == found["norm.weight"] == 1
    assert found["head.weight"] == 0


def test_a_norm_within_a_head_is_the_heads():
    head = nn.Sequential(nn.LayerNorm(2), nn.Linear(2, 2))
    model = nn.ModuleDict({"blocks": nn.ModuleList(block() for _ in range(2)), "head": head})
    assert layers_of(model)["head.0.weight"] == 0


def test_positions_and_class_tokens_do_not_decay():
    models = pytest.importorskip("torchvision.models")
    with torch.device("meta"):
        nets = [models.get_model(name, weights=None) for name in ("vit_b_16", "swin_t")]
    nets.append(nn.ModuleDict({"position_embeddings": nn.Embedding(4, 2)}))
    model = nn.ModuleList(nets)
    groups = mnn.param_groups(model, no_decay=True, weight_decay=0.1)
    bare = {n for g in groups if not g["weight_decay"] for n in g["param_names"]}
    assert {"0.class_token", "0.encoder.pos_embedding"} <= bare
    assert "1.features.1.0.attn.relative_position_bias_table" in bare
    assert "2.position_embeddings.weight" not in bare


class Attention(nn.Module):
    def __init__(self):
        super().__init__()
        self.norm, self.qkv, self.proj = nn.LayerNorm(4), nn.Linear(4, 12), nn.Linear(4, 4)


class VisionTransformer(nn.Module):
    """Named as timm names."""

    def __init__(self, depth=3, classes=2):
        super().__init__()
        self.cls_token = nn.Parameter(torch.zeros(1, 1, 4))
        self.pos_embed = nn.Parameter(torch.zeros(1, 5, 4))
        self.patch_embed = nn.Conv2d(3, 4, 2, 2)
        self.blocks = nn.Sequential(*(Attention() for _ in range(depth)))
        self.norm = nn.LayerNorm(4)
        self.head = nn.Linear(4, classes) if classes else nn.Identity()

    def no_weight_decay(self):
        return {"pos_embed", "cls_token", "dist_token"}


def test_a_transformer_as_timm_names_it():
    found = layers_of(nn.DataParallel(VisionTransformer()))
    assert {name.split(".")[0] for name, i in found.items() if i == 4} == {
        "cls_token",
        "pos_embed",
        "patch_embed",
    }
    assert found["blocks.0.qkv.weight"] == 3
    assert found["blocks.2.qkv.weight"] == found["norm.weight"] == 1
    assert found["head.weight"] == 0
    assert layers_of(VisionTransformer(classes=0))["blocks.2.qkv.weight"] == 0  # a bare trunk
    inside = nn.ModuleDict({"trunk": VisionTransformer(classes=0), "mlp": nn.Linear(4, 2)})
    assert layers_of(inside)["trunk.blocks.2.qkv.weight"] == 1


def test_the_model_itself_says_what_does_not_decay():
    model = nn.ModuleDict({"trunk": VisionTransformer()})
    groups = mnn.param_groups(model, no_decay=True, weight_decay=0.1)
    bare = {n for g in groups if not g["weight_decay"] for n in g["param_names"]}
    assert {"trunk.cls_token", "trunk.pos_embed", "trunk.head.bias"} <= bare
    assert "trunk.blocks.0.norm.weight" in bare
    assert "trunk.head.weight" not in bare


def test_stages_within_stages_and_other_rows():
    stages = nn.Sequential(*(nn.Sequential(block(), block(), block()) for _ in range(2)))
    model = nn.ModuleDict({"stem": nn.Linear(2, 2), "stages": stages, "head": nn.Linear(2, 2)})
    assert [*dict.fromkeys(layers_of(model).values())] == [7, 6, 5, 4, 3, 2, 1, 0]
    # a pair in which one is nearly all of the model is a wrapper, and its inside counts
    assert layers_of(nn.Sequential(model, nn.Linear(2, 2)))["0.stages.0.0.0.weight"] == 6
    # a few linear layers after the blocks are the head, not a second tower
    wide = nn.ModuleDict({"trunk": stages, "head": nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))})
    assert layers_of(wide)["trunk.0.0.0.weight"] == 6
    assert layers_of(wide)["head.0.weight"] == layers_of(wide)["head.1.weight"] == 0


def test_a_neck_and_a_small_head_are_no_second_tower():
    trunk = [nn.Sequential(nn.Conv2d(2, 2, 1), nn.Conv2d(2, 2, 1)) for _ in range(3)]
    neck = [nn.Sequential(nn.Conv2d(2, 2, 1), nn.BatchNorm2d(2)) for _ in range(2)]
    model = nn.ModuleDict({"trunk": nn.Sequential(*trunk), "neck": nn.Sequential(*neck)})
    assert layers_of(model)["trunk.0.0.weight"] == 3
    assert layers_of(model)["neck.1.1.weight"] == 0
    deep = [nn.Sequential(*(nn.Linear(2, 2) for _ in range(9))) for _ in range(2)]
    few = [nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2)) for _ in range(2)]
    model = nn.ModuleDict({"trunk": nn.Sequential(*deep), "head": nn.Sequential(*few)})
    assert layers_of(model)["head.0.0.weight"] == 0


def test_where_no_layers_are_found_they_can_be_said():
    model = nn.Transformer(8, 2, 2, 2, 8, batch_first=True)
    with pytest.raises(AmbiguousError, match=r"decoder\.layers\.0.* and 'encoder\.layers\.0") as e:
        layers_of(model)
    assert "layers=" in e.value.hint
    with pytest.raises(NoMatchError, match="no numbered siblings") as e:
        layers_of(nn.Linear(2, 2))
    assert "layers=" in e.value.hint
    said = layers_of(model, layers=["encoder.layers.0", ["encoder"], "decoder"])
    assert {name: i for name, i in said.items() if name.endswith("linear1.bias")} == {
        "encoder.layers.0.linear1.bias": 2,
        "encoder.layers.1.linear1.bias": 1,
        "decoder.layers.0.linear1.bias": 0,
        "decoder.layers.1.linear1.bias": 0,
    }
    # what none of them matches is one more layer, the head
    assert layers_of(Net(), layers=["conv1", "layer1"])["fc.weight"] == 0
    assert layers_of(Net(), layers=["conv1", "layer1"])["conv1.weight"] == 2
    groups = mnn.param_groups(Net(), lr=1.0, layer_decay=0.5, layers=["fc", "conv1"])
    assert [group["lr"] for group in groups] == [0.25, 0.5, 1.0]  # from the input on, as said
    with pytest.raises(NoMatchError, match="layer7"):
        layers_of(Net(), layers=["layer7"])


def test_arguments_that_mean_nothing(net):
    with pytest.raises(UsageError, match=r"'conv1\.weight' gets none"):
        mnn.param_groups(net, {"fc": {"lr": 1.0}}, layer_decay=0.5)
    for decay in (0, -1, 1.5):
        with pytest.raises(UsageError, match="above 0 and at most 1"):
            mnn.param_groups(net, lr=1.0, layer_decay=decay)
    with pytest.raises(UsageError, match="layer_decay="):
        mnn.param_groups(net, lr=1.0, layers=["conv1"])


def test_rules_and_decay_compose_with_layers(net):
    groups = mnn.param_groups(
        net,
        {"fc": {"lr": 8.0}, "layer1": {"lr": 4.0, "weight_decay": 0.3}},
        lr=1.0,
        weight_decay=0.1,
        no_decay=True,
        layer_decay=0.5,
    )
    assert [(g["param_names"], g["lr"], g["weight_decay"]) for g in groups] == [
        (["fc.weight"], 8.0, 0.1),
        (["fc.bias"], 8.0, 0.0),
        (["layer1.0.weight"], 1.0, 0.3),
        (["layer1.0.bias", "layer1.1.weight", "layer1.1.bias"], 1.0, 0.0),
        (["conv1.weight"], 0.125, 0.1),
        (["bn1.weight", "bn1.bias"], 0.125, 0.0),
        (["layer2.0.weight"], 0.5, 0.1),
        (["layer2.0.bias", "layer2.1.weight", "layer2.1.bias"], 0.5, 0.0),
    ]
    mnn.freeze(net, "fc")
    assert mnn.param_groups(net, lr=1.0, layer_decay=0.5)[-1]["lr"] == 0.5  # frozen layers count


def test_groups_do_not_share_a_tensor_lr(net):
    groups = mnn.param_groups(net, {"fc": {}}, lr=torch.tensor(1.0))
    optimizer = optim.SGD(groups, foreach=False)
    plateau = optim.lr_scheduler.ReduceLROnPlateau(optimizer, factor=0.5, patience=0)
    plateau.step(1.0)
    plateau.step(1.0)
    assert [float(group["lr"]) for group in optimizer.param_groups] == [0.5, 0.5]


LAYER = {"conv1": 0, "bn1": 0, "layer1": 1, "layer2": 2, "fc": 3}


@settings(max_examples=80, deadline=None)
@given(
    rules=st.lists(
        st.tuples(
            st.sampled_from(["fc", "*.bias", "layer1", "layer?.0.*", "*.weight", "conv1", "*"]),
            st.sampled_from([0.0, 0.25, 3.0]),
            st.sampled_from([None, 0.0, 0.5]),
        ),
        max_size=4,
        unique_by=lambda rule: rule[0],
    ),
    frozen=st.lists(st.sampled_from(["fc", "layer1", "bn1", "layer2.0", "conv1"]), max_size=3),
    no_decay=st.sampled_from([False, True, "*.bias"]),
    layer_decay=st.sampled_from([None, 1.0, 0.75, 0.1]),
)
def test_the_update_of_each_parameter_is_what_the_rules_say(rules, frozen, no_decay, layer_decay):
    """One step of SGD with gradients of 1: it moves by lr·(1 + weight_decay·value), exactly once,
    and what is frozen does not move."""
    from fnmatch import fnmatchcase

    net = Net().double()
    if frozen:
        mnn.freeze(net, frozen)
    given_rules = {
        pattern: {"lr": lr} if wd is None else {"lr": lr, "weight_decay": wd}
        for pattern, lr, wd in rules
    }
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        groups = mnn.param_groups(
            net, given_rules, no_decay=no_decay, layer_decay=layer_decay, lr=0.5, weight_decay=0.1
        )
    optimizer = optim.SGD(groups)
    before = {name: p.detach().clone() for name, p in net.named_parameters()}
    for p in net.parameters():
        p.grad = torch.ones_like(p)
    optimizer.step()
    order = [name for group in groups for name in group["param_names"]]
    assert len(order) == len(set(order))
    for name, p in net.named_parameters():
        if not p.requires_grad:
            assert name not in order
            assert torch.equal(p, before[name])
            continue
        first = next(
            (r for q, r in given_rules.items() if fnmatchcase(name, q) or name.startswith(q + ".")),
            {},
        )
        lr = first.get("lr", 0.5) * (layer_decay or 1.0) ** (3 - LAYER[name.split(".")[0]])
        bare = no_decay == "*.bias" or no_decay is True
        bare = bare and (name.endswith("bias") or (no_decay is True and p.ndim < 2))
        wd = 0.0 if bare else first.get("weight_decay", 0.1)
        expected = before[name] - lr * (1 + wd * before[name])
        torch.testing.assert_close(p.detach(), expected, rtol=0, atol=1e-12)
