"""Which architecture a checkpoint is: all of torchvision, real files of others, hostile names."""

from __future__ import annotations

import subprocess
import sys
from functools import cache
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

import modelctl as mc
from modelctl.errors import ModelctlError, UsageError
from modelctl.inspection.architectures import index as architectures
from modelctl.inspection.architectures.identify import (
    COUNTER,
    LEAST,
    Candidate,
    compared,
    identify_shapes,
    shapes_of,
)
from tests.conftest import ROOT, SHARED

torchvision = pytest.importorskip("torchvision")

Shapes = dict[str, tuple[int, ...]]
CORPUS = SHARED / "corpus"


def _script(name: str) -> ModuleType:
    spec = spec_from_file_location(name, ROOT / f"docs/{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = module_from_spec(spec)
    sys.modules[name] = module  # make_architectures imports make_heads
    spec.loader.exec_module(module)
    return module


make_heads = _script("make_heads")
make_architectures = _script("make_architectures")


def built(name: str, classes: int | None = None, **options: bool) -> Shapes:
    tensors = make_heads.state_dict(name, classes, **options)
    return {key: tuple(tensor.shape) for key, tensor in tensors.items()}


@pytest.fixture
def same_version() -> None:
    made_by = architectures.index().version
    if torchvision.__version__.partition("+")[0] != made_by:
        pytest.skip(f"the index was made with torchvision {made_by}")


def best(shapes: Shapes) -> Candidate:
    found = identify_shapes(shapes)
    assert found
    assert all(one.score < found[0].score for one in found[1:] if one.prefix == found[0].prefix)
    return found[0]


# ---------------------------------------------------------------------- torchvision


@pytest.mark.parametrize("name", torchvision.models.list_models())
def test_every_model_of_torchvision(name: str, same_version: None) -> None:
    arch = f"torchvision:{name}"
    known = architectures.find_architecture(arch)
    plain = built(name)
    # the index, against the model itself
    assert list(architectures.shapes(known).items()) == list(plain.items())
    found = identify_shapes(plain)
    assert (found[0].names, found[0].score, found[0].differences) == (known.names, 1, ())
    assert found.certain == found[0]
    bare = {key: shape for key, shape in plain.items() if not key.endswith(COUNTER)}
    for prefix, shapes in (("module.", plain), ("model._orig_mod.backbone.", bare)):
        one = best({prefix + key: shape for key, shape in sorted(shapes.items())})
        assert (one.names, one.score, one.prefix, one.args) == (known.names, 1, prefix, ())
    try:
        ten = built(name, 10)
    except TypeError:  # it knows no classes
        assert known.classes is None
        return
    assert list(architectures.shapes(known, 10).items()) == list(ten.items())
    one = best(ten)
    assert (one.names, one.score, one.classes) == (known.names, 1, 10)
    assert one.args == ("num_classes=10",)
    headless = {key: shape for key, shape in plain.items() if shape == ten[key]}
    assert headless != plain
    one = best(headless)
    assert (one.names, one.score, one.head, one.args) == (known.names, 1, False, ())
    assert one.differences == ("without head",)


WITH_AUX = ("googlenet", "inception_v3", "fcn_resnet50", "deeplabv3_mobilenet_v3_large")


@pytest.mark.parametrize("name", WITH_AUX)
def test_auxiliary_heads(name: str, same_version: None) -> None:
    known = architectures.find_architecture(f"torchvision:{name}")
    assert known.aux is not None
    for value in (True, False):
        shapes = built(name, **{known.aux.option: value})
        assert architectures.shapes(known, aux=value) == shapes
        one = best(shapes)
        assert (one.names, one.score, one.aux) == (known.names, 1, value)
        given = () if value == known.aux.default else (f"{known.aux.option}={str(value).lower()}",)
        assert one.args == given
        options = dict(arg.split("=") for arg in one.args)
        assert built(name, **{key: text == "true" for key, text in options.items()}) == shapes


def test_the_index_is_of_this_torchvision(same_version: None) -> None:
    known = [name for one in architectures.index().architectures for name in one.names]
    assert sorted(known) == sorted(f"torchvision:{n}" for n in torchvision.models.list_models())
    made = make_architectures.make(["googlenet", "resnet18", "raft_small"])
    facts = {
        name: (one.most, one.least, one.classes, one.aux and [*one.aux])
        for one in architectures.index().architectures
        for name in one.names
    }
    for name, one in made["architectures"].items():
        aux = one.get("aux")
        aux = aux and [aux["option"], tuple(aux["modules"]), aux["default"]]
        found = (one["most"], one["least"], one.get("classes"), aux)
        assert found == facts[f"torchvision:{name}"], "run: python docs/make_architectures.py"


def test_of_models_with_the_same_tensors_the_plainest_is_first() -> None:
    known = architectures.find_architecture("torchvision:quantized_resnet50")
    assert known.names == ("torchvision:resnet50", "torchvision:quantized_resnet50")


# ---------------------------------------------------------------------- differences


def resnet18(classes: int | None = None) -> Shapes:
    return architectures.shapes(architectures.find_architecture("torchvision:resnet18"), classes)


def test_a_backbone_inside_is_found_and_not_certain() -> None:
    shapes = {f"encoder.{name}": shape for name, shape in resnet18().items()}
    shapes["decoder.weight"] = (7, 512)
    found = identify_shapes(shapes)
    assert found[0].names[0] == "torchvision:resnet18"
    assert (found[0].prefix, found[0].beside, found[0].score) == ("encoder.", 1, 1)
    assert found.certain is None


def test_two_encoders_are_two_candidates() -> None:
    shapes = {f"{p}.{name}": shape for p in ("q", "k") for name, shape in resnet18().items()}
    found = identify_shapes(shapes)
    assert [one.prefix for one in found if one.score == 1] == ["q.", "k."]
    assert found.certain is None


@pytest.mark.parametrize(
    ("change", "difference"),
    [
        ({"extra.weight": (3,)}, "1 unexpected: extra.weight"),
        ({"layer1.0.conv1.weight": None}, "1 missing: layer1.0.conv1.weight"),
        ({"fc.bias": None}, "1 missing: fc.bias"),
        (
            {"conv1.weight": (64, 3, 3, 3)},
            "1 of other shapes: conv1.weight (64x3x3x3, not 64x3x7x7)",
        ),
        ({"fc.weight": (10, 512)}, "1 of other shapes: fc.bias (1000, not 10)"),
        ({"fc.weight": (2**63, 512), "fc.bias": (2**63,)}, "2 of other shapes: fc.weight"),
    ],
)
def test_a_difference_is_named_and_not_certain(change: dict[str, Any], difference: str) -> None:
    shapes = {name: s for name, s in (resnet18() | change).items() if s is not None}
    found = identify_shapes(shapes)
    assert found[0].names[0] == "torchvision:resnet18"
    assert found[0].score < 1
    assert difference in "; ".join(found[0].differences)
    assert found.certain is None


def test_names_that_torchvision_has_given_up() -> None:
    plain = architectures.shapes(architectures.find_architecture("torchvision:densenet121"))
    old = {
        name.replace(".norm1.", ".norm.1.").replace(".conv2.", ".conv.2."): shape
        for name, shape in plain.items()
    }
    assert old.keys() != plain.keys()
    found = identify_shapes(old)
    assert (found[0].names[0], found[0].score) == ("torchvision:densenet121", 1)
    assert "given up" in found[0].differences[0]
    assert found.certain is None  # plain load_state_dict does not take it


def test_compared_with_one_architecture() -> None:
    known = architectures.find_architecture("torchvision:resnet18")
    assert compared(resnet18(10), known).args == ("num_classes=10",)
    assert compared({"x": (1,)}, known).score == 0


def test_no_such_architecture_names_the_nearest() -> None:
    with pytest.raises(UsageError, match="resnet49") as e:
        architectures.find_architecture("torchvision:resnet49")
    assert "torchvision:resnet50" in (e.value.hint or "")


# ---------------------------------------------------------------------- real files


def files() -> list[Path]:
    return [p for p in sorted(CORPUS.rglob("*")) if p.is_file() and p.parent.parent == CORPUS]


def most_of_a_model(shapes: Shapes) -> tuple[float, str]:
    """The share of a model's tensors that are in a file under any prefix, and which model that is:
    counted by names, without modelctl's trees."""
    tails = {
        (".".join(parts[start:]), shape)
        for name, shape in shapes.items()
        for parts in [name.split(".")]
        for start in range(len(parts))
    }
    return max((sum(one in tails for one in own) / len(own), name) for name, own in _models())


@cache
def _models() -> list[tuple[str, list[tuple[str, tuple[int, ...]]]]]:
    return [
        (
            known.names[0],
            [one for one in architectures.shapes(known).items() if COUNTER not in one[0]],
        )
        for known in architectures.index().architectures
    ]


def test_real_files(shared: Path) -> None:
    """What of the corpus is a model of torchvision is found, for all else nothing is claimed."""
    looked_at = 0
    for path in files():
        if path.parent.name == "facts":
            continue
        try:
            with mc.open(path) as ckpt:
                shapes, found = shapes_of(ckpt), mc.identify(ckpt)
        except ModelctlError:  # two are no checkpoints
            continue
        looked_at += 1
        share, name = most_of_a_model(shapes)
        if share >= LEAST:
            assert found[0].names[0] == name, path
        else:
            assert not found, path
    assert looked_at >= 55


def test_a_model_of_torchvision_among_real_files_is_seen(shared: Path) -> None:
    """The count that the test above relies on sees one, whatever stands around it."""
    (path,) = CORPUS.rglob("*resnet20*")
    with mc.open(path) as ckpt:
        shapes = shapes_of(ckpt)
    assert most_of_a_model(shapes)[0] < LEAST
    inside = {f"student.{name}": shape for name, shape in resnet18().items()}
    assert most_of_a_model({**shapes, **inside}) == (1, "torchvision:resnet18")
    assert identify_shapes({**shapes, **inside})[0].names[0] == "torchvision:resnet18"


# ---------------------------------------------------------------------- hostile


HOSTILE: dict[str, Shapes] = {
    "nothing": {},
    "scalars": {f"a.{i}": () for i in range(100)},
    "empty segments": {"." * i: (1,) for i in range(1, 300)},
    "deep": {"a." * 5000 + str(i): (2,) for i in range(100)},
    "wrappers only": {"module." * 500 + f"conv1.{i}": (2,) for i in range(100)},
    "huge": {name: tuple(2**62 for _ in shape) for name, shape in resnet18().items()},
    "no dimensions": dict.fromkeys(resnet18(), ()),
    "control": {f"\x1b[2J\n{name}": (3,) for name in resnet18()},
}


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_names_and_shapes(name: str) -> None:
    assert identify_shapes(HOSTILE[name]) == []


def test_a_hundred_thousand_tensors() -> None:
    small = [*resnet18().items()]
    many = {f"m.{i}.{name}": shape for i in range(400) for name, shape in small}
    many |= {f"{i}.{i}.weight": (i,) for i in range(52_000)}
    assert len(many) > 100_000
    found = identify_shapes(many)
    assert 0 < len(found) <= 200
    assert found.certain is None


def test_importing_modelctl_reads_no_index() -> None:
    code = (
        "import sys, modelctl, modelctl.inspection.architectures.identify;"
        "import modelctl.inspection.architectures.index as a;"
        "assert a.index.cache_info().currsize == 0; assert 'torch' not in sys.modules;"
        "modelctl.identify; assert a.index.cache_info().currsize == 0; a.index();"
        "assert 'torch' not in sys.modules and 'torchvision' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
