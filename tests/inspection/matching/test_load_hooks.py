"""What torch's own load hooks make of older names: what is said, against what torch says; and the
maps where torch has no hook."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations

import modelctl as mc
from modelctl.inspection.matching.match import match_shapes
from modelctl.inspection.matching.report import Fit

from .test_match import Shapes, renamed, said, shapes_of

pytestmark = pytest.mark.filterwarnings("ignore:.*weight_norm.*:FutureWarning")

Wrap = Callable[[nn.Module], nn.Module]


def plain(module: nn.Module) -> nn.Module:
    return module


def twice(module: nn.Module) -> nn.Module:
    """Weight and bias both."""
    return parametrizations.weight_norm(parametrizations.weight_norm(module), "bias", dim=None)


def old_twice(module: nn.Module) -> nn.Module:
    return nn.utils.weight_norm(nn.utils.weight_norm(module), "bias", dim=None)


WRAPS: dict[str, Wrap] = {
    "plain": plain,
    "weight_norm, old": nn.utils.weight_norm,
    "weight_norm": parametrizations.weight_norm,
    "weight_norm of all, old": lambda one: nn.utils.weight_norm(one, dim=None),
    "weight_norm of all": lambda one: parametrizations.weight_norm(one, dim=None),
    "weight_norm twice, old": old_twice,
    "weight_norm twice": twice,
    "spectral_norm, old": nn.utils.spectral_norm,
    "spectral_norm": parametrizations.spectral_norm,
    "orthogonal": parametrizations.orthogonal,
}


def net(wrap: Wrap) -> nn.Module:
    convs = nn.ModuleDict(
        {
            "conv_pre": wrap(nn.Conv1d(8, 16, 7)),
            "ups": nn.ModuleList([wrap(nn.Linear(16, 8)), wrap(nn.Linear(8, 4))]),
        }
    )
    return nn.ModuleDict({"head": nn.Linear(3, 2), "net": convs})


def made(name: str, single: bool = False) -> nn.Module:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return WRAPS[name](nn.Linear(4, 3)) if single else net(WRAPS[name])


def before(state: dict[str, Any], model: nn.Module, folder: Path) -> Fit:
    torch.save(state, folder / "state.pt")
    torch.save(model.state_dict(), folder / "like.pt")
    with mc.open(folder / "state.pt") as ckpt, mc.open(folder / "like.pt") as like:
        return mc.match(ckpt, like).before


def given(model: nn.Module) -> dict[str, dict[str, Any]]:
    """A state_dict as it is, and as people cut, save and mix it."""
    state = model.state_dict()
    every = dict(state)
    cases = {"whole": state, "no metadata": every}
    for i, name in enumerate(every):
        cases[f"without {name}"] = {n: t for n, t in every.items() if n != name}
        if i > 6:
            break
    if hasattr(nn, "Buffer"):  # torch 2.4 reports some of these otherwise
        cases["other shapes"] = {n: torch.zeros(*t.shape, 2) for n, t in every.items()}
    return cases


@pytest.mark.parametrize("single", [False, True], ids=["in modules", "alone"])
@pytest.mark.parametrize("target", WRAPS)
@pytest.mark.parametrize("source", WRAPS)
def test_it_says_what_torch_says(source: str, target: str, single: bool, tmp_path: Path) -> None:
    model = made(source, single)
    for case, state in given(model).items():
        other = made(target, single)
        missing, unexpected, mismatched = said(other, state)
        if target == "spectral_norm, old":
            # torch names a weight that the module does not have, too, where it wants to compute
            missing &= other.state_dict().keys()
        found = before(state, other, tmp_path)
        names = found.missing, found.unexpected, [one.name for one in found.mismatched]
        assert tuple(map(set, names)) == (missing, unexpected, mismatched), case


def test_both_spellings_in_one_file(tmp_path: Path) -> None:
    """The old one counts, and the new one is not left over."""
    both = {**made("weight_norm").state_dict(), **made("weight_norm, old").state_dict()}
    assert not any(said(made("weight_norm"), dict(both)))
    assert before(both, made("weight_norm"), tmp_path).fits


def test_spectral_norm_of_torch_0_4(tmp_path: Path) -> None:
    """It had the weight and no ``v``: torch computes that, where no version is recorded."""
    old = {**made("spectral_norm, old").state_dict()}
    for name in [name for name in old if name.endswith("_orig")]:
        module = name.removesuffix("_orig")
        u, v = old[f"{module}_u"], old.pop(f"{module}_v")
        if old[name].dim() == 2:
            sigma = torch.dot(u, old[name] @ v)
            old[module] = old[name] / sigma
        else:
            sigma = torch.dot(u, old[name].flatten(1) @ v)
            old[module] = old[name] / sigma
    assert not any(said(made("spectral_norm, old"), dict(old)))
    assert before(old, made("spectral_norm, old"), tmp_path).fits


ATTENTION: dict[str, Callable[[], nn.Module]] = {
    "plain": lambda: nn.MultiheadAttention(4, 2),
    "no bias": lambda: nn.MultiheadAttention(4, 2, bias=False),
    "other widths": lambda: nn.MultiheadAttention(4, 2, kdim=6, vdim=3),
    "the same widths, said": lambda: nn.MultiheadAttention(4, 2, kdim=4, vdim=4),
    "bias of keys": lambda: nn.MultiheadAttention(4, 2, add_bias_kv=True),
    "counted": lambda: nn.BatchNorm1d(4),
    "not tracked": lambda: nn.BatchNorm1d(4, track_running_stats=False),
    "instance": lambda: nn.InstanceNorm1d(4, affine=True, track_running_stats=True),
}


@pytest.mark.parametrize("source", ATTENTION)
def test_attention_and_norms(source: str, tmp_path: Path) -> None:
    state = ATTENTION[source]().state_dict()
    short = {name: t for name, t in state.items() if name != "num_batches_tracked"}
    for target, make in ATTENTION.items():
        for case in (state, dict(state), short):
            model = make()
            found = before(case, model, tmp_path)
            names = found.missing, found.unexpected, [one.name for one in found.mismatched]
            assert tuple(map(set, names)) == said(model, case), target


@pytest.mark.parametrize("prefix", ["", "module.", "generator."])
@pytest.mark.parametrize("way", ["there", "back"])
@pytest.mark.parametrize("kind", ["weight_norm", "weight_norm twice", "spectral_norm"])
def test_maps_where_torch_has_no_hook(kind: str, way: str, prefix: str) -> None:
    names = (f"{kind}, old", kind) if way == "there" else (kind, f"{kind}, old")
    source, target = map(made, names)
    found: Shapes = {prefix + name: shape for name, shape in shapes_of(source).items()}
    result = match_shapes(found, shapes_of(target))
    assert result.after.fits, (result.maps, result.unclear)
    # the same by what load_state_dict says of what rename makes
    state = {name: torch.zeros(shape or ()) for name, shape in renamed(found, result).items()}
    assert not any(said(target, state))
    by_torch = way == "there" and kind.startswith("weight_norm")
    maps = [one.map for one in result.maps]
    assert maps[: bool(prefix)] == [f"{prefix}*=*"][: bool(prefix)]
    if by_torch:
        assert len(maps) == bool(prefix)
    elif kind == "weight_norm":
        assert maps[bool(prefix) :] == [
            "*.parametrizations.weight.original0=*.weight_g",
            "*.parametrizations.weight.original1=*.weight_v",
        ]
    elif kind == "spectral_norm" and way == "there":
        assert maps[bool(prefix) :] == [
            "*.weight_orig=*.parametrizations.weight.original",
            "*.weight_u=*.parametrizations.weight.0._u",
            "*.weight_v=*.parametrizations.weight.0._v",
        ]


def test_of_two_that_are_no_weight_norm() -> None:
    """Two originals of other shapes are some other parametrization, which has no hook."""
    found: Shapes = {"fc.weight_g": (3, 5), "fc.weight_v": (3, 4)}
    like: Shapes = {
        "fc.parametrizations.weight.original0": (3, 5),
        "fc.parametrizations.weight.original1": (3, 4),
    }
    assert not match_shapes(found, like).before.fits
