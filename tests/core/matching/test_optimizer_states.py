"""The table of what optimizers keep, against torch's own: each is built, stepped and compared."""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import nn, optim

from modelctl.core.matching import optimizer_states
from modelctl.core.matching.optimizer_states import TABLE, TELLING, Kept, kinds, misfit, shape_shown

SHAPES = ((4, 3), (3, 3), (5,), (), (2, 3, 4), (2, 3, 1, 4))
CLASSES = {
    name: cls
    for name, cls in vars(optim).items()
    if inspect.isclass(cls) and issubclass(cls, optim.Optimizer) and cls is not optim.Optimizer
}
VARIANTS: dict[str, list[dict[str, Any]]] = {
    "SGD": [{}, {"momentum": 0.9}, {"momentum": 0.9, "nesterov": True}, {"foreach": True}],
    "Adam": [{}, {"amsgrad": True}, {"foreach": True}, {"fused": True}, {"maximize": True}],
    "AdamW": [{}, {"amsgrad": True}, {"foreach": True}, {"fused": True}],
    "NAdam": [{}, {"foreach": True}, {"decoupled_weight_decay": True}],
    "RAdam": [{}, {"foreach": True}, {"decoupled_weight_decay": True}],
    "RMSprop": [{}, {"momentum": 0.9}, {"centered": True}, {"centered": True, "momentum": 0.9}],
    "ASGD": [{}, {"foreach": True}],
    "Rprop": [{}, {"foreach": True}],
    "LBFGS": [{}, {"line_search_fn": "strong_wolfe"}],
}
EVERY = [(name, options) for name in CLASSES for options in VARIANTS.get(name, [{}])]


def stepped(name: str, options: dict[str, Any], shape: tuple[int, ...]) -> optim.Optimizer | None:
    """One that made two steps over a parameter of that shape; None where this torch, or the
    optimizer, takes no such."""
    torch.manual_seed(0)
    parameter = nn.Parameter(torch.randn(shape))
    try:
        made = CLASSES[name]([parameter], lr=0.01, **options)
    except (ValueError, RuntimeError, TypeError):  # Muon: matrices only
        return None

    def closure() -> torch.Tensor:
        made.zero_grad()
        loss = parameter.square().sum()
        loss.backward()
        if name == "SparseAdam" and parameter.grad is not None:
            parameter.grad = parameter.grad.to_sparse()
        return loss

    if name == "SparseAdam" and not shape:
        return None
    for _ in range(2):
        if name != "LBFGS":
            closure()
        made.step(closure if name == "LBFGS" else None)
    return made


def all_stepped(
    name: str, options: dict[str, Any]
) -> Iterator[tuple[tuple[int, ...], dict[str, Any], dict[str, Any]]]:
    """(shape, state of the parameter, group) over parameters of several shapes."""
    for shape in SHAPES:
        made = stepped(name, options, shape)
        if made is not None:
            (group,) = made.state_dict()["param_groups"]
            yield shape, made.state_dict()["state"].get(0, {}), group


def rows(name: str) -> list[Kept]:
    return [kept for kept in TABLE if kept.name == name]


def test_every_optimizer_of_torch_is_in_the_table() -> None:
    assert {*CLASSES} <= {kept.name for kept in TABLE}


@pytest.mark.parametrize(("name", "options"), EVERY)
def test_the_keys_and_shapes_are_torchs(name: str, options: dict[str, Any]) -> None:
    tried = list(all_stepped(name, options))
    if not tried:
        pytest.skip(f"this torch has no {name} with {options}")
    kept = next(kept for kept in rows(name) if kept.settings == TELLING & tried[0][2].keys())
    for shape, state, _ in tried:
        assert {*state} <= {*kept.shaped, *kept.scalars, *kept.others}
        for key in kept.shaped:
            assert tuple(state[key].shape) == shape if key in state else True, key
        for key in kept.scalars:
            assert torch.as_tensor(state.get(key, 0)).ndim == 0, key
        assert optimizer_states.is_flat(state) == (name == "LBFGS")
        shown = shape_shown(state)
        assert shown == (None if name == "LBFGS" or not state else shape)
        if shown is None:
            continue
        assert misfit(state, shape) is None
        for other in SHAPES:
            if other != shape:
                assert misfit(state, other) is not None, other


def test_every_key_of_the_table_is_one_of_torchs() -> None:
    """Nothing is in the table that no optimizer of this torch leaves."""
    seen: dict[str, set[str]] = {name: set() for name in CLASSES}
    for name, options in EVERY:
        for _, state, _ in all_stepped(name, options):
            seen[name] |= state.keys()
    for name in CLASSES:
        first = rows(name)[0]
        assert {*first.shaped, *first.scalars, *first.others} == seen[name], name


@pytest.mark.parametrize(("name", "options"), EVERY)
def test_each_is_recognised(name: str, options: dict[str, Any]) -> None:
    for _, state, group in all_stepped(name, options):
        pair = name in ("Adam", "AdamW") and "decoupled_weight_decay" not in group  # old torch
        assert kinds(state, group) == (["Adam", "AdamW"] if pair else [name])
        # without settings, some keys may be another's as well
        if state and name not in ("SparseAdam", "RAdam", "Muon") and "variance" not in state:
            assert name in kinds(state, {})


def test_what_does_not_tell_is_not_told() -> None:
    moments, adam = ("step", "exp_avg", "exp_avg_sq"), dict.fromkeys(("betas", "eps", "amsgrad"))
    adam["weight_decay"] = None
    assert kinds(moments, adam) == ["Adam", "AdamW"]  # before 2.6 nothing says which
    assert kinds(moments, {**adam, "decoupled_weight_decay": True}) == ["AdamW"]
    assert kinds(moments, {**adam, "decoupled_weight_decay": False}) == ["Adam"]
    without = {key: None for key in adam if key != "amsgrad"}
    assert kinds((), without) == ["Adamax", "Adam", "RAdam"]
    assert kinds((*moments, "exp_inf"), without) == ["Adamax"]
    assert kinds((), {"lr": 0.1}) == []
    assert kinds(("m", "v"), {"betas": None}) == []


def test_state_of_others_says_nothing_of_shapes() -> None:
    odd = {"m": torch.zeros(4), "v": torch.zeros(4), "absmax": torch.zeros(1)}
    assert shape_shown(odd) is None
    assert misfit(odd, (4, 4)) is None
    torn = {"exp_avg": torch.zeros(4), "exp_avg_sq": torch.zeros(5)}
    assert shape_shown(torn) is None
    assert misfit(torn, (4,)) == "exp_avg_sq"


def test_adafactor_of_transformers() -> None:
    module = pytest.importorskip("transformers.optimization")
    for shape in SHAPES:
        parameter = nn.Parameter(torch.randn(shape))
        made = module.Adafactor([parameter])
        parameter.square().sum().backward()
        made.step()
        state, group = made.state[parameter], made.state_dict()["param_groups"][0]
        assert shape_shown(state) == shape
        assert misfit(state, shape) is None
        assert kinds(state, group) == ["Adafactor"]
        assert all(misfit(state, other) for other in SHAPES if other != shape)


def test_factors_without_dimensions_show_nothing() -> None:
    scalar, row = torch.zeros(()), torch.zeros(4, 1)
    assert shape_shown({"row_var": row, "col_var": scalar}) is None
    assert misfit({"row_var": row, "col_var": scalar}, (4, 3)) == "col_var"
