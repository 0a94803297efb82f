"""find_head: the head of every torchvision model, by torchvision's own word; names that others use;
and refusals where a guess would be wrong."""

from __future__ import annotations

import re
from collections.abc import Callable
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path
from types import ModuleType

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file, save_model
from torch import nn
from torch.nn.utils import prune

import modelctl as mc
from modelctl.errors import AmbiguousError, ModelctlError, NoMatchError, RefusedError
from tests.conftest import ROOT

from .nets import in_memory, opened

torchvision = pytest.importorskip("torchvision")

Shapes = dict[str, tuple[int, ...]]


def _script() -> ModuleType:
    spec = spec_from_file_location("make_heads", ROOT / "docs/make_heads.py")
    assert spec is not None
    assert spec.loader is not None
    module = module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


make_heads = _script()
MAY_REFUSE = ("detection", "optical flow")


def found(shapes: Shapes, prefix: str = "") -> set[str] | None:
    """The modules of the head without the prefix; None where it is refused with a way out."""
    try:
        head = mc.find_head(in_memory({prefix + name: shape for name, shape in shapes.items()}))
    except (RefusedError, NoMatchError, AmbiguousError) as e:
        if "--head" not in (e.hint or ""):
            raise
        return None
    assert set(head.names) == {
        prefix + name for name in shapes if prefix + name.rpartition(".")[0] in head.modules
    }
    return {module.removeprefix(prefix) for module in head.modules}


def built(name: str, classes: int | None = None, **options: bool) -> Shapes:
    tensors = make_heads.state_dict(name, classes, **options)
    return {key: tuple(tensor.shape) for key, tensor in tensors.items()}


def truth(one: Shapes, other: Shapes) -> set[str]:
    """The modules whose tensors have other shapes with another number of classes."""
    assert list(one) == list(other)
    return {name.rpartition(".")[0] for name in one if one[name] != other[name]}


def resized(one: Shapes, other: Shapes, classes: int) -> Shapes:
    """The shapes with another number of classes: what differs between two of them is that."""
    return {
        name: tuple(classes if n != m else n for n, m in zip(one[name], other[name], strict=True))
        for name in one
    }


@pytest.mark.parametrize("name", torchvision.models.list_models())
def test_every_model_of_torchvision(name: str) -> None:
    plain = built(name)
    kind = make_heads.kind(name)
    try:
        single = built(name, 1)
    except TypeError:  # it knows no classes
        assert kind in MAY_REFUSE
        assert found(plain) is None
        return
    head = truth(plain, single)
    # the nasty number of classes is the width that the head reads: hidden layers have as many
    wide = built(name, max(plain[f"{module}.weight"][1] for module in head))
    assert head == truth(plain, wide)
    cases = {"plain": plain, "a hidden width": wide, "1 class": single}
    if kind not in MAY_REFUSE:
        assert resized(plain, wide, 1) == single
        cases |= {f"{n} classes": resized(plain, wide, n) for n in (2, 10)}
    answers = {case: found(shapes) for case, shapes in cases.items()}
    answers |= {p: found(plain, p) for p in ("module.", "_orig_mod.", "model.", "module.model.")}
    # as safetensors writes them
    answers |= {"sorted": found(dict(sorted(plain.items())))}
    answers |= {"sorted, a hidden width": found(dict(sorted(wide.items())))}
    wrong = {
        case: answer
        for case, answer in answers.items()
        if answer != head and not (answer is None and kind in MAY_REFUSE)
    }
    assert not wrong, f"the head is {sorted(head)}"
    # without it, whatever is left is no head, unless the rest of a Sequential looks like one
    rest = {key: shape for key, shape in plain.items() if key.rpartition(".")[0] not in head}
    for shapes in (rest, dict(sorted(rest.items()))):
        left = found(shapes)
        assert left is None or all(re.fullmatch(r"classifier\.\d", one) for one in head)


@pytest.mark.parametrize("auxiliary", [True, False])
@pytest.mark.parametrize("name", ["googlenet", "inception_v3", "fcn_resnet50"])
def test_auxiliary_heads_are_part_of_it(name: str, auxiliary: bool) -> None:
    option = "aux_loss" if name.startswith("fcn") else "aux_logits"
    plain, other = (built(name, n, **{option: auxiliary}) for n in (None, 7))
    head = truth(plain, other)
    assert any("aux" in module.lower() for module in head) == auxiliary
    assert found(plain) == found(dict(sorted(plain.items()))) == head
    main = [module for module in head if "aux" not in module.lower()]
    left = {key: shape for key, shape in plain.items() if key.rpartition(".")[0] not in main}
    assert found(left) is None  # auxiliary heads alone are no head


def test_the_page_is_what_the_script_makes() -> None:
    path = ROOT / "docs/heads.md"
    made_by = re.search(r"torchvision ([\d.]+);", path.read_text("utf-8"))
    assert made_by is not None
    listed = re.findall(r"^\| ([a-z][a-z0-9_, ]+) \| (?:`|refused)", path.read_text("utf-8"), re.M)
    names = sorted(name for row in listed for name in row.split(", "))
    if torchvision.__version__.partition("+")[0] == made_by[1]:
        assert names == sorted(torchvision.models.list_models())
    # the models of a newer torchvision are those of the test above, not of the page
    page = make_heads.page(names, made_by[1])
    assert page == path.read_text("utf-8"), "run: python docs/make_heads.py"


def linear(name: str, outputs: int, inputs: int, *, bias: bool = True) -> Shapes:
    return {f"{name}.weight": (outputs, inputs)} | ({f"{name}.bias": (outputs,)} if bias else {})


def norm(name: str, width: int) -> Shapes:
    return {f"{name}.weight": (width,), f"{name}.bias": (width,)}


BODY = (
    {"embeddings.word.weight": (100, 8)}
    | linear("encoder.0.dense", 8, 8)
    | norm("encoder.0.norm", 8)
    | linear("encoder.1.dense", 8, 8)
    | norm("encoder.1.norm", 8)
)
# As the classes of timm, transformers, Lightning and others name them; small.
FOUND: dict[str, tuple[Shapes, set[str]]] = {
    "distilled": (linear("head", 5, 8) | linear("head_dist", 5, 8), {"head", "head_dist"}),
    "distilled, as wide as the model": (
        linear("head", 8, 8) | linear("head_dist", 8, 8),
        {"head", "head_dist"},
    ),
    "head.fc": (norm("head.norm", 8) | linear("head.fc", 5, 8), {"head.fc"}),
    "head.fc after pre_logits": (
        linear("head.pre_logits.fc", 8, 8) | linear("head.fc", 8, 8),
        {"head.fc"},
    ),
    "head.l": (norm("head.bn", 8) | linear("head.l", 5, 8), {"head.l"}),
    "a list of heads": (linear("heads.0", 5, 8) | linear("heads.1", 5, 6), {"heads.0", "heads.1"}),
    "a list of heads, as wide as the model": (
        linear("heads.0", 8, 8) | linear("heads.1", 8, 8) | linear("heads.2", 8, 6),
        {"heads.0", "heads.1", "heads.2"},
    ),
    "conv_head": (linear("conv_head", 32, 8) | linear("classifier", 5, 32), {"classifier"}),
    "dense, out_proj": (
        linear("classifier.dense", 8, 8) | linear("classifier.out_proj", 8, 8),
        {"classifier.out_proj"},
    ),
    "qa_outputs": (linear("pooler", 8, 8) | linear("qa_outputs", 2, 8), {"qa_outputs"}),
    "score": (linear("score", 3, 8, bias=False), {"score"}),
    "lm_head": (linear("lm_head", 100, 8, bias=False), {"lm_head"}),
    "two auxiliary ones": (
        linear("decode_head.classifier", 21, 8) | linear("auxiliary_head.classifier", 21, 4),
        {"decode_head.classifier", "auxiliary_head.classifier"},
    ),
    "fc1, fc2, fc3": (linear("fc1", 6, 8) | linear("fc2", 6, 6) | linear("fc3", 6, 6), {"fc3"}),
    "fc before head": (linear("fc", 6, 8) | linear("head", 5, 6), {"head"}),
    "no channel": ({"fc.weight": (0, 4, 1, 1)} | linear("head", 3, 4), {"head"}),
    "the weights of a loss": (linear("fc", 5, 8) | {"criterion.weight": (5,)}, {"fc"}),
}


@pytest.mark.parametrize("case", FOUND)
@pytest.mark.parametrize("order", ["the model's", "sorted"])
def test_names_of_other_frameworks(case: str, order: str) -> None:
    layers, head = FOUND[case]
    shapes = BODY | layers
    if order == "sorted":
        shapes = dict(sorted(shapes.items()))
    assert found(shapes) == head
    assert found(shapes, "module.") == head


REFUSED: dict[str, tuple[Shapes, type[ModelctlError], str]] = {
    "a policy and a value": (
        BODY | linear("policy_head", 4, 8) | linear("value_head", 1, 8),
        AmbiguousError,
        r"several layers could be the head: policy_head \(4 outputs\), value_head \(1 output\)",
    ),
    "detection with transformers": (
        BODY | linear("class_embed", 5, 8) | linear("bbox_embed.layers.2", 4, 8),
        RefusedError,
        r"'bbox_embed\.layers\.2\.weight'",
    ),
    "anchors": (
        BODY | {"model.24.anchors": (3, 3, 2)} | linear("model.24.m", 255, 8),
        RefusedError,
        "detection",
    ),
    "tied, and not in the file": (
        BODY | {"cls.predictions.bias": (100,)} | linear("cls.predictions.transform.dense", 8, 8),
        RefusedError,
        r"'cls\.predictions' is not in the file: it is tied to 'embeddings\.word\.weight'",
    ),
    "a norm at the end": (BODY, NoMatchError, r"its last parameters, 'encoder\.1\.norm'"),
    "a norm after the head": (
        linear("conv1", 6, 3) | linear("fc2", 5, 6) | norm("norm2", 5),
        NoMatchError,
        "its last parameters, 'norm2'",
    ),
    "many alike": (BODY | linear("last", 8, 8), NoMatchError, "one of several alike"),
    "more than it reads": (BODY | linear("tail", 32, 8), NoMatchError, "more than the 8 inputs"),
    "features": (BODY | linear("conv_head", 6, 8), NoMatchError, "what comes before one"),
    "side by side": (
        BODY | linear("pi", 2, 8) | linear("value", 1, 8),
        AmbiguousError,
        "'pi' and 'value' both end a branch",
    ),
    "twins": (
        linear("actor.0", 6, 4)
        | linear("actor.2", 2, 6)
        | linear("critic.0", 6, 4)
        | linear("critic.2", 1, 6),
        AmbiguousError,
        r"'actor\.2' and 'critic\.2' both end a branch",
    ),
    "sorted, unnamed": (
        dict(sorted((BODY | linear("zeta", 5, 8)).items())),
        NoMatchError,
        "sorted by name",
    ),
    "sorted, which feeds which": (
        dict(sorted((BODY | linear("fc", 6, 8) | linear("head", 8, 6)).items())),
        AmbiguousError,
        "several layers could be the head",
    ),
    "no layer": (norm("norm", 4), NoMatchError, "no linear layer or convolution"),
    "more heads than can be": (
        {f"heads.{i}.weight": (i + 1, 1) for i in range(2_000)},
        AmbiguousError,
        "2000 layers could be the head: .* and 1994 more",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_is_unclear_refuses(case: str) -> None:
    shapes, error, match = REFUSED[case]
    with pytest.raises(error, match=match) as e:
        mc.find_head(in_memory(shapes))
    assert "\n" not in f"{e.value}{e.value.hint}"
    assert "--head" in (e.value.hint or "")
    for name in re.findall(r"--head '([^']+)'", e.value.hint or ""):  # what it offers works
        assert mc.find_head(in_memory(shapes), name).confidence == "certain"


@pytest.mark.parametrize(
    ("shapes", "modules", "confidence"),
    [
        (linear("0", 6, 4) | linear("2", 3, 6), ("2",), "medium"),  # by place alone
        (linear("a.0", 6, 4) | linear("b.0", 6, 6) | linear("c.0", 3, 6), ("c.0",), "medium"),
        ({"cnn.0.weight": (4, 3, 3, 3)} | linear("net.0", 2, 36), ("net.0",), "medium"),
        (BODY | linear("fc", 5, 8), ("fc",), "high"),
        (BODY | linear("fc", 6, 8) | linear("head", 8, 6), ("head",), "high"),  # fc is before it
        # the weights of a loss stand outside the model, and come last
        (
            linear("model.body", 8, 8) | linear("model.fc", 5, 8) | {"loss.weight": (5,)},
            ("model.fc",),
            "medium",
        ),
        (BODY | linear("fc", 8, 8), ("fc",), "high"),  # named, and the last
        (dict(sorted((BODY | linear("fc", 5, 8)).items())), ("fc",), "high"),  # named, and alone
        (dict(sorted((BODY | linear("fc", 8, 8)).items())), ("fc",), "medium"),
        # what is left of a Sequential is its last layer, too
        (linear("classifier.0", 6, 6) | linear("classifier.3", 6, 6), ("classifier.3",), "medium"),
    ],
)
def test_confidence(shapes: Shapes, modules: tuple[str, ...], confidence: str) -> None:
    head = mc.find_head(in_memory(shapes))
    assert (head.modules, head.confidence) == (modules, confidence)


def test_a_bias_that_stands_above_belongs_to_the_head(tmp_path: Path) -> None:
    class LMHead(nn.Module):  # as RoBERTa's
        def __init__(self) -> None:
            super().__init__()
            self.dense, self.decoder = nn.Linear(8, 8), nn.Linear(8, 100)
            self.bias = nn.Parameter(torch.zeros(100))
            self.decoder.bias = self.bias

    net = nn.ModuleDict({"embed": nn.Embedding(100, 8), "lm_head": LMHead()})
    with opened(tmp_path / "untied.pt", net.state_dict()) as ckpt:
        head = mc.find_head(ckpt)
    assert head.modules == ("lm_head.decoder",)
    assert head.names == ("lm_head.bias", "lm_head.decoder.weight", "lm_head.decoder.bias")
    net["lm_head"].decoder.weight = net["embed"].weight
    with (
        opened(tmp_path / "tied.pt", net.state_dict()) as ckpt,
        pytest.raises(RefusedError, match=r"'lm_head\.decoder\.weight' is tied to 'embed\.weight'"),
    ):
        mc.find_head(ckpt)


@pytest.mark.parametrize(
    "change",
    [
        nn.utils.parametrizations.weight_norm,
        nn.utils.parametrizations.spectral_norm,
        nn.utils.weight_norm,
        nn.utils.spectral_norm,
        lambda layer: prune.l1_unstructured(layer, "weight", 0.5),
    ],
    ids=["weight_norm", "spectral_norm", "old weight_norm", "old spectral_norm", "pruned"],
)
@pytest.mark.filterwarnings("ignore:.*weight_norm:FutureWarning")
def test_a_weight_in_parts(change: Callable[[nn.Module], object]) -> None:
    net = nn.ModuleDict({"body": nn.Linear(8, 6), "fc": nn.Linear(6, 5)})
    change(net["fc"])
    head = mc.find_head(in_memory(net.state_dict()))
    assert head.modules == ("fc",)
    assert set(head.names) == {name for name in net.state_dict() if name.startswith("fc.")}


def test_a_safetensors_file(tmp_path: Path) -> None:
    model = torchvision.models.squeezenet1_1(num_classes=3)
    save_file(model.state_dict(), tmp_path / "squeezenet.safetensors")
    with mc.open(tmp_path / "squeezenet.safetensors") as ckpt:
        head = mc.find_head(ckpt)
    assert (head.modules, head.confidence) == (("classifier.1",), "high")
    assert "last layer" not in head.evidence  # the file does not say which is


def test_a_tied_head_that_safetensors_keeps_under_one_name(tmp_path: Path) -> None:
    net = nn.ModuleDict({"lm_head": nn.Linear(8, 100, bias=False), "wte": nn.Embedding(100, 8)})
    net["lm_head"].weight = net["wte"].weight
    save_model(net, str(tmp_path / "tied.safetensors"))
    with safe_open(tmp_path / "tied.safetensors", "pt") as file:
        assert file.keys() == ["lm_head.weight"]
    with (
        mc.open(tmp_path / "tied.safetensors") as ckpt,
        pytest.raises(RefusedError, match=r"'lm_head\.weight' is tied to 'wte\.weight'"),
    ):
        mc.find_head(ckpt)


def test_the_record_counts_until_the_head_is_there_again(tmp_path: Path) -> None:
    net = nn.ModuleDict({"body": nn.Linear(8, 6), "fc": nn.Linear(6, 5)})
    with opened(tmp_path / "net.pt", net.state_dict()) as ckpt:
        mc.save(mc.strip_head(ckpt), tmp_path / "stripped.pt")
    with (
        mc.open(tmp_path / "stripped.pt") as ckpt,
        pytest.raises(NoMatchError, match=r"removed already: fc\.weight, fc\.bias"),
    ):
        mc.find_head(ckpt)
    state = torch.load(tmp_path / "stripped.pt", weights_only=True)
    state |= nn.ModuleDict({"fc": nn.Linear(6, 3)}).state_dict()  # keeps the record
    assert "modelctl.removed" in state._metadata[""]
    with opened(tmp_path / "grown.pt", state) as ckpt:
        assert mc.find_head(ckpt).modules == ("fc",)


CORPUS = {
    "akamaster__pytorch_resnet_cifar10__resnet20-12fca82f.th": "module.linear",
    "uvipen__Tetris-deep-Q-learning-pytorch__tetris": "conv3.0",
    "locuslab__convex_adversarial__mnist.pth": "7",
    "udacity__deep-reinforcement-learning__solution__checkpoint.pth": "fc3",
    "txie-93__cgcnn__band-gap.pth.tar": "fc_out",
    "analogdevicesinc__ai8x-synthesis__ai85-mnist-extrasmall-qat8.pth.tar": "fc.op",
    "mmaitre314__picklescan__pytorch_model.bin": "qa_outputs",
    "tracel-ai__burn__mnist.safetensors": "fc2",
    "snakers4__silero-vad__silero_vad_16k.safetensors": "final_conv",
    "chemprop__chemprop__example_model_v1_regression_mol.pt": "readout.4",
    "materialsvirtuallab__matgl__MEGNet-MP-2018.6.1-Eform__state.pt": "model.output_proj.layers.4",
    # boxes and landmarks, twins, two models in one, a norm after the last layer, an autoencoder
    "biubug6__Face-Detector-1MB-with-landmark__mobilenet0.25_Final.pth": None,
    "cleardusk__3DDFA_V2__FaceBoxesProd.pth": None,
    "analogdevicesinc__ai8x-synthesis__ai85-svhn-tinierssd-qat8.pth.tar": None,
    "timesler__facenet-pytorch__pnet.pt": None,
    "nikhilbarhate99__PPO-PyTorch__PPO_CartPole-v1_0_0.pth": None,
    "DLR-RM__rl-trained-agents__ppo-CartPole-v1__policy.pth": None,
    "DLR-RM__rl-trained-agents__sac-Pendulum-v1__policy.pth": None,
    "snakers4__silero-vad__silero_vad.jit": None,
    "tracel-ai__burn__mnist.pt": None,
    "uhlmanngroup__bioimage_embed__models__model.pt": None,
}


@pytest.mark.parametrize("name", CORPUS)
def test_real_files(name: str, shared: Path) -> None:
    (path,) = (shared / "corpus").rglob(name)
    with mc.open(path) as ckpt:
        if CORPUS[name] is None:
            with pytest.raises((NoMatchError, AmbiguousError, RefusedError)):
                mc.find_head(ckpt)
        else:
            assert mc.find_head(ckpt).modules == (CORPUS[name],)
