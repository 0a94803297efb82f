"""Recipes: several edits in one pass are the same edits one by one."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import modelctl as mc
from modelctl.errors import NoMatchError, UsageError
from modelctl.surgery.recipe import OPERATIONS, history_line, parse_recipe

from .nets import Net, in_memory, load, opened, same_tensors, train

RECIPE = [
    {"do": "strip-prefix"},
    {"do": "strip-head"},
    {"do": "freeze", "pattern": "*", "exclude": ["layer1"], "bn-eval": True, "optimizer": "drop"},
]


def test_a_recipe_is_its_edits(tmp_path: Path) -> None:
    net = nn.DataParallel(Net())
    optimizer = torch.optim.AdamW(net.named_parameters())
    train(net, optimizer, range(2))
    saved = {"model": net.state_dict(), "optimizer": optimizer.state_dict(), "epoch": 1}
    with opened(tmp_path / "in.pt", saved) as ckpt:
        one_pass = load(mc.apply(ckpt, RECIPE), tmp_path / "one.pt")
        mc.save(mc.strip_prefix(ckpt), tmp_path / "1.pt")
    with mc.open(tmp_path / "1.pt") as ckpt:
        mc.save(mc.strip_head(ckpt), tmp_path / "2.pt")
    with mc.open(tmp_path / "2.pt") as ckpt:
        frozen = mc.freeze(ckpt, "*", exclude=["layer1"], bn_eval=True, optimizer="drop")
        single = load(frozen, tmp_path / "3.pt")
    same_tensors(one_pass["model"], single["model"])
    assert one_pass["model"]._metadata == single["model"]._metadata
    assert one_pass["optimizer"]["param_groups"] == single["optimizer"]["param_groups"]
    assert one_pass["optimizer"]["param_groups"][0]["param_names"] == [
        f"layer1.{i}.{name}" for i in (0, 1) for name in ("weight", "bias")
    ]
    for id_, state in single["optimizer"]["state"].items():
        same_tensors(one_pass["optimizer"]["state"][id_], state)


@pytest.mark.parametrize(
    ("edits", "said"),
    [
        ([{}], 'edit 1 of the recipe lacks do = "…"'),
        ([{"do": 3}], "edit 1 of the recipe lacks do"),
        (["strip-prefix"], "edit 1 of the recipe lacks do"),
        ([{"do": "strip-prefix"}, {"do": "strip-hed"}], "edit 2 of the recipe: there is no edit"),
        ([{"do": "strip-prefix", "prefx": "a"}], "strip-prefix has no option 'prefx'"),
        ([{"do": "freeze", "bn_eval": True, "pattern": "*"}], "freeze has no option 'bn_eval'"),
        ([{"do": "freeze"}], "freeze needs pattern"),
        ([{"do": "freeze", "pattern": 3}], "pattern = 3 is of the wrong type"),
        ([{"do": "freeze", "pattern": ["a", 3]}], "is of the wrong type"),
        ([{"do": "freeze", "pattern": "*", "regex": "yes"}], "regex = 'yes' is of the wrong type"),
        ([{"do": "strip-prefix", "prefix": True}], "prefix = True is of the wrong type"),
        ([{"do": "strip-head", "optimizer": 1}], "optimizer = 1 is of the wrong type"),
        ([{"do": "merge"}], "there is no edit 'merge'"),
    ],
)
def test_what_is_wrong_in_a_recipe(edits: Any, said: str) -> None:
    with pytest.raises(UsageError) as e:
        parse_recipe(edits)
    assert said in e.value.message


def test_a_near_miss_is_shown() -> None:
    with pytest.raises(UsageError) as e:
        parse_recipe([{"do": "strip-hed"}])
    assert "strip-head" in (e.value.hint or "")


def test_nothing_runs_before_all_is_checked() -> None:
    with pytest.raises(UsageError):
        mc.apply(in_memory({"a.weight": (1,)}), [{"do": "freeze", "pattern": "zzz"}, {"do": "?"}])


def test_an_edit_that_fails_says_so() -> None:
    with pytest.raises(NoMatchError):
        mc.apply(in_memory({"a.weight": (1,)}), [{"do": "freeze", "pattern": "zzz"}])
    with pytest.raises(NoMatchError, match=r"^edit 2, freeze: no parameter"):
        mc.apply(
            in_memory({"a.weight": (1,)}),
            [{"do": "add-prefix", "prefix": "m"}, {"do": "freeze", "pattern": "zzz"}],
        )


def test_every_operation_is_a_function_of_the_library() -> None:
    for name, operation in OPERATIONS.items():
        assert getattr(mc, name.replace("-", "_")) is operation


@pytest.mark.parametrize(
    ("edit", "options", "line"),
    [
        ("strip-prefix", {"prefix": None}, "strip-prefix"),
        ("strip-prefix", {"prefix": "module."}, "strip-prefix --prefix module."),
        ("strip-head", {"optimizer": "keep", "head": "fc"}, "strip-head --head fc"),
        ("strip-head", {"optimizer": "drop"}, "strip-head --optimizer drop"),
        (
            "freeze",
            {"pattern": ["a", "b"], "exclude": [], "regex": False, "bn_eval": True},
            "freeze --pattern a --pattern b --bn-eval",
        ),
        ("merge", {"epoch": 0, "lr": 0.0, "step": None}, "merge --epoch 0 --lr 0.0"),
    ],
)
def test_history_lines(edit: str, options: dict[str, Any], line: str) -> None:
    assert history_line(edit, options) == line
