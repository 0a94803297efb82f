"""Values that are calls: carried where they are harmless, left out by name, or refused."""

from __future__ import annotations

import argparse
import collections
import enum
import logging
import operator
import os
import re
import typing
from pathlib import Path
from typing import Any

import pytest
import torch

import modelctl as mc
from modelctl.errors import RefusedError


class Mode(enum.Enum):
    FAST = "fast"


class Calls:
    """Pickles as a call."""

    def __init__(self, function: Any, *args: Any) -> None:
        self.call = function, args

    def __reduce__(self) -> Any:
        return self.call


def saved(path: Path, value: Any) -> Path:
    root = {
        "epoch": 3,
        "state_dict": {"module.w": torch.ones(2)},
        "args": argparse.Namespace(x=value, lr=0.1),
    }
    torch.save(root, path)
    return path


@pytest.mark.parametrize(
    "value",
    [
        *(re.compile("a+", re.I), re.compile(b"x"), logging.getLogger("x"), logging.getLogger()),
        *(typing.Tuple[int, str], typing.Optional[int], typing.Dict[str, typing.List[int]]),  # noqa: UP006, UP045
    ],
)
def test_what_is_harmless_is_carried(tmp_path: Path, value: Any) -> None:
    done = mc.edit(saved(tmp_path / "a.pt", value), "strip-prefix", output=tmp_path / "b.pt")
    assert not [note for note in done.notes if note.level == "warning"]
    root = torch.load(tmp_path / "b.pt", weights_only=False)
    assert root["args"] == argparse.Namespace(x=value, lr=0.1)
    assert list(root["state_dict"]) == ["w"]


@pytest.mark.parametrize("value", [Mode.FAST, Calls(getattr, Mode, "FAST")], ids=["now", "3.11.2"])
def test_an_enum_is_left_out_by_name(value: Any, tmp_path: Path) -> None:
    path = saved(tmp_path / "a.pt", value)
    done = mc.edit(path, "strip-prefix", output=tmp_path / "b.pt")
    (said,) = [note.text for note in done.notes if "left out" in note.text]
    assert "args.x" in said
    assert "Mode" in said
    root = torch.load(tmp_path / "b.pt", weights_only=False)
    assert root["args"] == argparse.Namespace(lr=0.1)
    assert (root["epoch"], list(root["state_dict"])) == (3, ["w"])
    with mc.open(tmp_path / "b.pt") as ckpt:
        assert not ckpt.findings
    assert mc.split_file(path, output=tmp_path / "parts").parts
    with mc.open(path) as ckpt:  # what was read is as it was
        saved_again = mc.save(ckpt, tmp_path / "c.pt")
        assert [note.text for note in saved_again.notes] == [said]
        assert mc.show(ckpt, "args").as_dict() == mc.show(path, "args").as_dict()


@pytest.mark.parametrize(
    "value",
    [
        [Mode.FAST],
        (1, Mode.FAST),
        Calls(collections.deque, [Mode.FAST]),
        Calls(os.getenv, "x"),
        Calls(re.compile("a").match, "a"),
        Calls(operator.getitem, {"a": 1}, "a"),
        Calls(operator.getitem, os.environ.__class__, "a"),
        Calls(re._compile, ["a"], 0),  # type: ignore[attr-defined]
        Calls(logging.getLogger, 3),
        torch.relu,
    ],
)
def test_the_rest_is_refused_with_a_way_out(tmp_path: Path, value: Any) -> None:
    path = saved(tmp_path / "a.pt", value)
    with pytest.raises(RefusedError) as e:
        mc.edit(path, "strip-prefix", output=tmp_path / "b.pt")
    assert "'modelctl convert --weights-only'" in str(e.value.hint)
    rescue = {"do": "convert", "weights-only": True}
    mc.edit(path, rescue, output=tmp_path / "b.pt")
    assert list(torch.load(tmp_path / "b.pt")) == ["module.w"]


@pytest.mark.parametrize("root", [{"w": torch.ones(2)}, {"model": {"w": torch.ones(2)}}])
def test_weights_beside_an_unsafe_value_are_rescued(tmp_path: Path, root: Any) -> None:
    torch.save({**root, "x": Calls(os.getenv, "x")}, tmp_path / "a.pt")
    rescue = {"do": "convert", "weights-only": True}
    mc.edit(tmp_path / "a.pt", rescue, output=tmp_path / "b.pt")
    assert list(torch.load(tmp_path / "b.pt")) == ["w"]
