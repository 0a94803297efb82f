"""What load_state_dict would say, against what it says; and maps, by doing them and loading."""

from __future__ import annotations

import random
import re
import time
from collections.abc import Callable, Mapping
from typing import Any

import pytest
import torch
from torch import nn

import modelctl as mc
from modelctl.core.checkpoint import Checkpoint
from modelctl.core.dtypes import BY_NAME
from modelctl.core.nodes import ordered_dict
from modelctl.core.storages import MemoryStorage
from modelctl.core.tensors import TensorRef
from modelctl.errors import UsageError
from modelctl.inspection.architectures import index as architectures
from modelctl.inspection.matching.match import match_shapes
from modelctl.inspection.matching.report import Match, fold

Shapes = dict[str, "tuple[int, ...] | None"]


def shapes_of(model: nn.Module) -> Shapes:
    return {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}


def torchvision(name: str, classes: int | None = None) -> Shapes:
    known = architectures.find_architecture(f"torchvision:{name}")
    return dict(architectures.shapes(known, classes))


def checkpoint(shapes: Mapping[str, tuple[int, ...] | None]) -> Checkpoint:
    storage, dtype = MemoryStorage(b""), BY_NAME["float32"]
    return Checkpoint(
        ordered_dict({n: TensorRef(dtype, s or (), storage) for n, s in shapes.items()})
    )


def renamed(found: Shapes, result: Match) -> Shapes:
    """The names that ``rename`` gives with the maps."""
    if not result.maps:
        return found
    out = mc.rename(checkpoint(found), [one.map for one in result.maps])
    return dict(zip(out.state_dict(), found.values(), strict=True))


# ---------------------------------------------------------------------- against torch


def said(model: nn.Module, state: dict[str, torch.Tensor]) -> tuple[set[str], set[str], set[str]]:
    """What load_state_dict(strict=True) says: missing, unexpected, mismatched."""
    try:
        model.load_state_dict(state)
    except RuntimeError as e:
        text = str(e)
    else:
        return set(), set(), set()
    lists = []
    for what in ("Missing", "Unexpected"):
        found = re.search(rf"{what} key\(s\) in state_dict: (.*)\. $", text, re.M)
        lists.append(set(re.findall(r'"([^"]+)"', found[1])) if found else set())
    return lists[0], lists[1], set(re.findall(r"size mismatch for (\S+):", text))


class Counted(nn.Module):
    """Extra state, a scalar parameter, a buffer that is not saved."""

    def __init__(self, scalar: tuple[int, ...] = ()) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.zeros(scalar))
        self.register_buffer("cache", torch.zeros(3), persistent=False)
        self.norm = nn.BatchNorm1d(3)

    def get_extra_state(self) -> dict[str, int]:
        return {"calls": 1}

    def set_extra_state(self, state: Any) -> None:
        pass


def small(width: int = 4, depth: int = 2, bias: bool = True) -> nn.Module:
    blocks = [
        nn.Sequential(nn.Linear(width, width, bias), nn.BatchNorm1d(width)) for _ in range(depth)
    ]
    return nn.Sequential(*blocks, nn.Linear(width, 3))


MODELS: dict[str, Callable[[], nn.Module]] = {
    "small": small,
    "wide": lambda: small(5),
    "deep": lambda: small(depth=4),
    "no bias": lambda: small(bias=False),
    "wrapped": lambda: nn.ModuleDict({"module": small()}),
    "lstm": lambda: nn.LSTM(4, 4, num_layers=2, bidirectional=True),
    "gru": lambda: nn.GRU(4, 4),
    "attention": lambda: nn.TransformerEncoderLayer(4, 2),
    "counted": Counted,
    "scalar as of 0.3": lambda: Counted((1,)),
    "two scalars": lambda: Counted((2,)),
    "tied": lambda: nn.ModuleDict(dict.fromkeys(("a", "b"), nn.Linear(2, 2))),
}


@pytest.mark.parametrize("source", MODELS)
def test_it_says_what_torch_says(source: str, tmp_path: Any) -> None:
    state = MODELS[source]().state_dict()
    if source == "two scalars" and not any(said(Counted(), state)):
        pytest.skip("this torch takes the first of several numbers for one")
    for change in ("whole", "cut", "no metadata"):
        given = dict(state)
        if change == "cut":
            given = {n: t for i, (n, t) in enumerate(state.items()) if i % 3}
            given |= {"0.weight.x": torch.zeros(1), "norm": torch.zeros(2)}
        torch.save(state if change == "whole" else given, tmp_path / f"{change}.pt")
        for target, make in MODELS.items():
            model = make()
            expected = said(model, state if change == "whole" else given)
            torch.save(model.state_dict(), tmp_path / "target.pt")
            with (
                mc.open(tmp_path / f"{change}.pt") as ckpt,
                mc.open(tmp_path / "target.pt") as like,
            ):
                before = mc.match(ckpt, like).before
            found = before.missing, before.unexpected, [one.name for one in before.mismatched]
            assert tuple(map(set, found)) == expected, (source, target, change)
            assert before.fits == (not any(expected))


def test_against_architectures() -> None:
    vision = pytest.importorskip("torchvision")
    if vision.__version__.partition("+")[0] != architectures.index().version:
        pytest.skip(f"the index was made with torchvision {architectures.index().version}")
    with torch.device("meta"):
        model = vision.models.resnet18()
        state = vision.models.resnet34(num_classes=5).state_dict()
    shapes: Shapes = {name: tuple(tensor.shape) for name, tensor in state.items()}
    result = mc.match(checkpoint(shapes), arch="torchvision:resnet18")
    before = result.before
    found = before.missing, before.unexpected, [one.name for one in before.mismatched]
    bare = dict(state.items())  # without _metadata, as the checkpoint above
    assert tuple(map(set, found)) == said(model, bare)
    assert result.options == ["num_classes=5"]
    better = mc.match(checkpoint(shapes), arch="torchvision:resnet18", arch_arg=["num_classes=5"])
    assert not better.before.mismatched
    assert better.options == []


# ---------------------------------------------------------------------- maps


def vit(blocks: int = 3) -> Shapes:
    """A vision transformer as timm names it."""
    found: Shapes = {"cls_token": (1, 1, 8), "pos_embed": (1, 5, 8)}

    def add(name: str, *shape: int) -> None:
        found[f"{name}.weight"], found[f"{name}.bias"] = shape, shape[:1]

    add("patch_embed.proj", 8, 3, 2, 2)
    for i in range(blocks):
        add(f"blocks.{i}.norm1", 8)
        add(f"blocks.{i}.attn.qkv", 24, 8)
        add(f"blocks.{i}.attn.proj", 8, 8)
        add(f"blocks.{i}.norm2", 8)
        add(f"blocks.{i}.mlp.fc1", 32, 8)
        add(f"blocks.{i}.mlp.fc2", 8, 32)
    add("norm", 8)
    add("head", 10, 8)
    return found


def as_torchvision(name: str) -> str:
    for old, new in (
        *(("cls_token", "class_token"), ("pos_embed", "encoder.pos_embedding")),
        *(("patch_embed.proj", "conv_proj"), ("attn.qkv.", "self_attention.in_proj_")),
        *(("attn.proj", "self_attention.out_proj"), (".norm", ".ln_"), ("norm.", "encoder.ln.")),
        *(("mlp.fc1", "mlp.0"), ("mlp.fc2", "mlp.3"), ("head.", "heads.head.")),
    ):
        name = name.replace(old, new)
    return re.sub(r"blocks\.(\d+)", r"encoder.layers.encoder_layer_\1", name)


def as_detectron(name: str) -> str:
    found = re.match(r"layer(\d)\.(\d+)\.(.*)", name)
    if not found:
        return name if name.startswith("fc") else "stem." + name.replace("bn1", "conv1.norm")
    stage, block, rest = found.groups()
    rest = re.sub(r"bn(\d)", r"conv\1.norm", rest)
    rest = rest.replace("downsample.0", "shortcut").replace("downsample.1", "shortcut.norm")
    return f"res{int(stage) + 1}.{block}.{rest}"


def shifted(by: int) -> Callable[[str], str]:
    return lambda name: re.sub(r"blocks\.(\d+)", lambda m: f"blocks.{int(m[1]) + by}", name)


# What a file calls the tensors of a model, and whether it is clear also where they are sorted.
CASES: dict[str, tuple[Shapes, Callable[[str], str], bool]] = {
    "DataParallel": (torchvision("resnet18"), lambda n: f"module.{n}", True),
    "compiled": (torchvision("resnet18"), lambda n: f"module._orig_mod.{n}", True),
    "one prefix for another": (torchvision("resnet18"), lambda n: f"student.net.{n}", True),
    "prefix away": (
        {f"backbone.body.{name}": shape for name, shape in torchvision("resnet18").items()},
        lambda n: n.removeprefix("backbone.body."),
        True,
    ),
    "old densenet": (
        torchvision("densenet121"),
        lambda n: re.sub(r"(layer\d+\.(?:norm|conv))(\d)", r"\1.\2", n),
        True,
    ),
    "old densenet, DataParallel": (
        torchvision("densenet121"),
        lambda n: "module." + re.sub(r"(layer\d+\.(?:norm|conv))(\d)", r"\1.\2", n),
        True,
    ),
    "other words": (
        torchvision("resnet50"),
        lambda n: n.replace("layer", "stage").replace("conv", "kern").replace("fc", "dense"),
        True,
    ),
    "numbered from 0": (
        torchvision("resnet50"),
        lambda n: re.sub(r"^layer(\d)", lambda m: f"stages.{int(m[1]) - 1}", n),
        True,
    ),
    "detectron": (torchvision("resnet50"), as_detectron, True),
    "short names": (
        torchvision("resnet50"),
        lambda n: n.replace("bn", "n").replace("layer", "stage").replace("downsample", "short"),
        True,
    ),
    "vit of torchvision": (vit(), as_torchvision, False),
    "numbered from 1": (vit(12), shifted(1), True),
    "numbered from 3": (vit(12), shifted(3), True),
    "gamma and beta": (
        {f"{i}.{p}": s for i in range(3) for p, s in (("weight", (i, 2)), ("bias", (i,)))},
        lambda n: n.replace("weight", "gamma").replace("bias", "beta"),
        True,
    ),
    "query": (
        {f"{i}.{p}_proj.weight": (8, 8) for i in range(3) for p in "qkv"},
        lambda n: n.replace("q_proj", "query").replace("k_proj", "key").replace("v_proj", "value"),
        True,
    ),
    "a layer in between": (
        {"net.0.weight": (4, 4), "net.1.weight": (4, 4), "net.3.weight": (4, 4)},
        lambda n: n.replace("3", "2"),
        True,
    ),
}


@pytest.mark.parametrize("reverse", [False, True], ids=["there", "back"])
@pytest.mark.parametrize("name", CASES)
def test_maps_mend_it(name: str, reverse: bool) -> None:
    model, rename, sorted_too = CASES[name]
    names = {rename(key): key for key in model}
    assert len(names) == len(model)
    if reverse:
        names = {key: other for other, key in names.items()}
    shapes = dict(zip(names, model.values(), strict=True))
    expected = {names[key]: shape for key, shape in shapes.items()}
    for found in (shapes, dict(sorted(shapes.items()))) if sorted_too else (shapes,):
        result = match_shapes(found, expected)
        assert result.after.fits, (name, result.maps, result.unclear)
        # by the names that rename gives, each tensor is the one that it was
        new = renamed(found, result)
        assert [*new] == [names[key] for key in found]
        parts = {key: torch.empty(shape or (), device="meta") for key, shape in new.items()}
        holder = nn.Module()
        for key in parts:
            module = holder
            *path, last = key.split(".")
            for step in path:
                if not hasattr(module, step):
                    module.add_module(step, nn.Module())
                module = getattr(module, step)
            module.register_buffer(last, torch.empty(expected[key] or (), device="meta"))
        holder.load_state_dict(parts, strict=True)


def test_gpt2_with_its_head() -> None:
    bare: Shapes = {"wte.weight": (9, 4), "h.0.ln_1.weight": (4,), "h.1.ln_1.weight": (4,)}
    full: Shapes = {f"transformer.{name}": shape for name, shape in bare.items()}
    full["lm_head.weight"] = (9, 4)
    result = match_shapes(full, bare)
    assert [one.map for one in result.maps] == ["transformer.*=*"]
    assert [*result.after.unexpected] == ["lm_head.weight"]
    back = match_shapes(bare, full)
    assert [one.map for one in back.maps] == ["*=transformer.*"]
    assert [*back.after.missing] == ["lm_head.weight"]


WORDS = (("conv", "kern"), ("features", "trunk"), ("layer", "stage"), ("block", "unit"))


VARIED = (
    *("convnext_tiny", "efficientnet_b0", "googlenet", "inception_v3", "mvit_v2_s", "swin_t"),
    *("regnet_x_400mf", "shufflenet_v2_x0_5", "vgg11_bn", "maxvit_t", "fcn_resnet50"),
    *("vit_b_16", "squeezenet1_0"),
)


@pytest.mark.parametrize("name", VARIED)
def test_no_tensor_ever_gets_another_ones_place(name: str) -> None:
    """Names changed by words and by numbers: what is proposed is right, or nothing is."""
    model = torchvision(name)
    for change in (
        lambda n: re.sub(r"\d+", lambda m: str(int(m[0]) + 1), n),
        lambda n: re.sub(r"[a-z]+", lambda m: dict(WORDS).get(m[0], m[0]), n),
        lambda n: re.sub(r"\.(\d+)\.", r".m\1.", n),
    ):
        names = {change(key): key for key in model}
        if len(names) < len(model):
            continue
        found = dict(zip(names, model.values(), strict=True))
        for shapes in (found, dict(sorted(found.items()))):
            result = match_shapes(shapes, model)
            for old, new in zip(shapes, renamed(shapes, result), strict=True):
                # without maps names are the file's, and load_state_dict goes by them
                if result.maps:
                    assert new == names[old] or new not in model, (old, new)


# ---------------------------------------------------------------------- not clear


@pytest.mark.parametrize(("names", "others"), [("abc", "xyz"), ("qam", "zbk")])
def test_alike_side_by_side_is_not_clear(names: str, others: str) -> None:
    def model(names: str, path: str) -> Shapes:
        return {
            f"{path}.{i}.{name}.{last}": shape
            for i in range(3)
            for name in names
            for last, shape in (("weight", (8, 8)), ("bias", (8,)))
        }

    result = match_shapes(model(names, "layers"), model(others, "blocks"))
    assert result.maps == []
    assert result.after == result.before
    (one,) = result.unclear
    assert one.found == tuple(f"layers.*.{name}" for name in names)
    assert one.expected == tuple(f"blocks.*.{name}" for name in others)


def block(first: str, middle: str, last: str) -> Shapes:
    return {f"{first}.weight": (8,), f"{middle}.weight": (24, 8), f"{last}.weight": (8,)}


def test_places_say_nothing_where_names_are_sorted() -> None:
    expected = block("one", "mid", "end")
    given = block("zeta", "mid", "alpha")
    in_order = match_shapes(given, expected)
    assert [one.map for one in in_order.maps] == ["zeta=one", "alpha=end"]
    assert match_shapes(dict(sorted(given.items())), expected).maps == []


def test_a_norm_alone_is_no_evidence() -> None:
    same: Shapes = {f"{name}.weight": (3, 4) for name in "abcd"}
    result = match_shapes(
        {**same, "e_norm.weight": (8,)}, {**same, "f_norm2.weight": (8,), "g": (1,)}
    )
    assert [one.why for one in result.maps] == [("name",)]
    assert match_shapes({**same, "e.weight": (8,)}, {**same, "f.weight": (8,)}).maps == []
    matrix = match_shapes({**same, "e.weight": (8, 9)}, {**same, "f.weight": (8, 9)})
    assert [one.why for one in matrix.maps] == [("shape",)]


def test_a_sorted_vit_leaves_its_last_norm() -> None:
    found = {as_torchvision(name): shape for name, shape in vit().items()}
    result = match_shapes(dict(sorted(found.items())), vit())
    assert [*result.after.missing] == ["norm.weight", "norm.bias"]
    assert [(one.found, one.expected) for one in result.unclear] == [(("encoder.ln",), ("norm",))]
    assert result.as_dict()["unclear"] == [{"found": ["encoder.ln"], "expected": ["norm"]}]


def test_what_is_right_stays() -> None:
    trunk = {name: s for name, s in torchvision("resnet18").items() if not name.startswith("fc")}
    head: Shapes = {"fc.weight": (3, 512), "fc.bias": (3,)}
    expected = {f"backbone.{name}": shape for name, shape in trunk.items()} | head
    result = match_shapes({**trunk, **head}, expected)
    assert result.after.fits
    assert all("fc" not in one.map and one.map != "*=backbone.*" for one in result.maps)
    new = renamed({**trunk, **head}, result)
    assert new.keys() == expected.keys()


def test_what_has_no_place_keeps_its_own_name() -> None:
    found: Shapes = {f"blk.{i}.n1.weight": (i + 2, 3) for i in range(3)}
    expected = {name.replace("n1", "bn1"): shape for name, shape in found.items()}
    new = renamed(
        {**found, "blk.0.num": (1,)}, match_shapes({**found, "blk.0.num": (1,)}, expected)
    )
    assert [*new] == [*expected, "blk.0.num"]


def test_two_prefixes_are_not_clear() -> None:
    model = torchvision("resnet18")
    both: Shapes = {f"{p}.{name}": s for p in ("query", "key") for name, s in model.items()}
    for result in (match_shapes(both, model), match_shapes(model, both)):
        assert result.maps == []
        (one,) = result.unclear
        assert ("query.", "key.") in one


def test_two_of_a_kind_in_one_module_go_by_their_names() -> None:
    weights = {f"weight_{k}_l{i}": (16, 4) for i in range(2) for k in ("ih", "hh")}
    lstm: Shapes = {f"rnn.{name}": shape for name, shape in weights.items()}
    result = match_shapes({f"core.{name}": shape for name, shape in weights.items()}, lstm)
    assert [one.map for one in result.maps] == ["core=rnn"]
    other: Shapes = {f"core.weight_{name}": (16, 4) for name in "abcd"}
    assert match_shapes(other, lstm).maps == []


def test_other_models_get_no_maps() -> None:
    for one, other in (
        ("resnet50", "vit_b_16"),
        ("resnet18", "vgg11"),
        ("alexnet", "squeezenet1_0"),
    ):
        assert match_shapes(torchvision(one), torchvision(other)).maps == []


def test_a_deeper_model_is_missing_layers() -> None:
    result = match_shapes(torchvision("resnet18"), torchvision("resnet34"))
    assert result.maps == []
    assert result.before.matched == 122


def test_a_swap_is_left_alone() -> None:
    found: Shapes = {"a.weight": (2, 3), "b.weight": (4, 5), "c.weight": (9, 9)}
    expected: Shapes = {"a.weight": (4, 5), "b.weight": (2, 3), "c.weight": (9, 9)}
    result = match_shapes(found, expected)
    assert result.maps == []
    assert result.more == 2


def test_too_many_maps_are_not_proposed() -> None:
    random_names = random.Random(0)
    found: Shapes = {f"l{i}.weight": (i, 3) for i in range(300)}
    expected: Shapes = {
        f"{random_names.random()}x.weight".replace(".", "a", 1): (i, 3) for i in range(300)
    }
    result = match_shapes(found, expected)
    assert result.maps == []
    assert result.more == 300


# ---------------------------------------------------------------------- hostile


@pytest.mark.parametrize(
    "name",
    ["a*b", "a?[b]", "a=b", "\x1b[2J", "", ".", "..", "a\nb", "module.module.", "\ud800", "١٢"],
)
def test_hostile_names(name: str) -> None:
    model: Shapes = {"l.weight": (3, 4), "m.weight": (5, 6), "n.1.weight": (2**62, 7)}
    for old in ("l", "n.1"):
        other = {key.replace(old, name, 1): shape for key, shape in model.items()}
        for found, expected in ((other, model), (model, other)):
            result = match_shapes(found, expected)
            renamed(found, result)  # rename takes every map
            assert result.after.problems <= result.before.problems


def test_ten_thousand_tensors_are_bounded() -> None:
    """Ten times the tensors are about ten times the work: no bound in seconds holds everywhere."""
    rng = random.Random(0)

    def many(n: int) -> Shapes:
        return {f"m.{i}.{j}.weight": (j % 7 + 1, 2) for i in range(n // 10) for j in range(10)}

    def took(n: int) -> float:
        model = many(n)
        started = time.process_time()
        for change in (
            lambda key: key.replace("m.", "blocks.x"),
            lambda key: re.sub(r"m\.(\d+)", lambda m: f"m.{int(m[1]) + 1}", key),
            lambda key: f"{rng.random()}".replace(".", "x") + key[-9:],
        ):
            match_shapes({change(key): shape for key, shape in model.items()}, model)
        return time.process_time() - started

    took(100)
    assert took(10_000) < 40 * took(1_000)


# ---------------------------------------------------------------------- the rest


def test_wrong_arguments() -> None:
    one = checkpoint(torchvision("alexnet"))
    for arguments in ({}, {"like": one, "arch": "torchvision:alexnet"}):
        with pytest.raises(UsageError, match=r"like|loaded into"):
            mc.match(one, **arguments)
    for arg, text in (
        ("classes=3", "no option 'classes'"),
        ("num_classes=0", "number from 1"),
        ("num_classes=x", "number from 1"),
        ("=", "is no option"),
    ):
        with pytest.raises(UsageError, match=text):
            mc.match(one, arch="torchvision:alexnet", arch_arg=[arg])
    with pytest.raises(UsageError, match="true or false"):
        mc.match(one, arch="torchvision:googlenet", arch_arg=["aux_logits=1"])
    with pytest.raises(UsageError, match="arch_arg"):
        mc.match(one, one, arch_arg=["num_classes=3"])


def test_fold() -> None:
    names = ["a.0.w", "a.0.b", "a.1.w", "b.w", "c.x.w"]
    assert fold(names, [*names, "c.y.w"]) == [("a", 3), ("b", 1), ("c.x", 1)]
    assert fold(["a.0.w", "a.1.w"], ["a.0.w", "a.1.w", "a.z"]) == [("a.*", 2)]
    assert fold([], ["a"]) == []
