"""Recipes: several edits in one pass are the same edits one by one."""

from __future__ import annotations

import inspect
import re
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
        ([{"do": "freeze", "pattern": 3}], "pattern is a text, or a list of texts, not 3"),
        ([{"do": "freeze", "pattern": ["a", 3]}], "a list of texts, not ['a', 3]"),
        ([{"do": "freeze", "pattern": {"a": 3}}], "a list of texts, not {'a': 3}"),
        (
            [{"do": "freeze", "pattern": "*", "regex": "yes"}],
            "edit 1 of the recipe: regex is true or false, not 'yes'",
        ),
        ([{"do": "freeze", "pattern": "*", "bn-eval": 1}], "bn-eval is true or false, not 1"),
        ([{"do": "strip-prefix", "prefix": True}], "prefix is a text, not True"),
        ([{"do": "strip-prefix", "prefix": ["a"]}], "prefix is a text, not ['a']"),
        ([{"do": "strip-head", "optimizer": 1}], "optimizer is 'keep' or 'drop', not 1"),
        (
            [{"do": "strip-prefix"}, {"do": "keep", "pattern": "*", "optimizer": "sell"}],
            "edit 2 of the recipe: optimizer is 'keep' or 'drop', not 'sell'",
        ),
        ([{"do": "merge"}], "there is no edit 'merge'"),
    ],
)
def test_what_is_wrong_in_a_recipe(edits: Any, said: str) -> None:
    with pytest.raises(UsageError) as e:
        parse_recipe(edits)
    assert said in e.value.message


@pytest.mark.parametrize(
    "edit",
    [
        {"do": "strip-prefix", "prefix": None},
        {"do": "freeze", "pattern": ("a", "b"), "exclude": []},
        {"do": "strip-head", "optimizer": "drop", "rename-head": "old"},
        {"do": "convert", "weights-only": True},
        {"do": "rename", "map": "a=b", "regex": False},
    ],
)
def test_what_is_right_in_a_recipe(edit: dict[str, Any]) -> None:
    ((name, options),) = parse_recipe([edit])
    assert name == edit["do"]
    assert [*options.values()] == [value for key, value in edit.items() if key != "do"]


def test_every_option_of_every_edit_can_be_checked() -> None:
    """No parameter has a type that a recipe does not know: each says what it wants."""
    for name, operation in OPERATIONS.items():
        for option in [*inspect.signature(operation).parameters][1:]:
            with pytest.raises(UsageError) as e:
                parse_recipe([{"do": name, option.replace("_", "-"): object()}])
            assert re.search(
                r" is (a text(, or a list of texts)?|true or false|'\w+' or '\w+'), not <object",
                e.value.message,
            )


def scaled(ckpt: mc.Checkpoint, by: float, times: int | None = None) -> mc.Checkpoint:
    return ckpt


def test_numbers_in_a_recipe(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(OPERATIONS, "scaled", scaled)
    for by, times in ((0.5, 2), (2, None)):
        edit = {"do": "scaled", "by": by, "times": times}
        assert parse_recipe([edit]) == [("scaled", {"by": by, "times": times})]
    for key, value, wanted in (
        ("by", True, "a number"),
        ("by", "2", "a number"),
        ("times", True, "a whole number"),
        ("times", 2.0, "a whole number"),
    ):
        with pytest.raises(UsageError, match=f"{key} is {wanted}, not {value!r}"):
            parse_recipe([{"do": "scaled", "by": 1.0, key: value}])


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
        function = getattr(mc, name.replace("-", "_"))
        assert getattr(function, "__wrapped__", function) is operation


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
