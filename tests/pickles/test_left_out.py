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


class Told:
    """What its arguments are is not for us to change."""

    def __init__(self, *args: Any) -> None:
        self.args = args


class Stateful:
    """Neither is a state that is no mapping."""

    def __init__(self, state: Any) -> None:
        self.state = state

    def __getstate__(self) -> Any:
        return (1, self.state)

    def __setstate__(self, state: Any) -> None:
        self.state = state[1]


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


PAIR = typing.Tuple[int, str]  # noqa: UP006
FAST, OLD = Mode.FAST, Calls(getattr, Mode, "FAST")


@pytest.mark.parametrize("protocol", [2, 4])
@pytest.mark.parametrize(
    ("value", "left", "absent", "none"),
    [
        ([FAST, 1], [None, 1], [], ["0"]),
        ([OLD, 1], [None, 1], [], ["0"]),
        ((1, FAST), (1, None), [], ["1"]),
        ((FAST,), (None,), [], ["0"]),
        ([(1, (FAST, 2)), FAST], [(1, (None, 2)), None], [], ["0.1.0", "1"]),
        ((1, (2, (FAST,)), FAST), (1, (2, (None,)), None), [], ["1.1.0", "2"]),
        ({FAST, "a"}, {"a"}, [""], []),
        (frozenset({FAST, "a"}), frozenset({"a"}), [""], []),
        ({FAST}, set(), [""], []),
        ([{"a": FAST, "b": (FAST,)}], [{"b": (None,)}], ["0.a"], ["0.b.0"]),
        (collections.deque([FAST, 2]), collections.deque([None, 2]), [], ["0"]),
        (collections.OrderedDict(a=[FAST]), collections.OrderedDict(a=[None]), [], ["a.0"]),
        (argparse.Namespace(y=[FAST]), argparse.Namespace(y=[None]), [], ["y.0"]),
    ],
)
def test_in_a_sequence_nothing_else_moves(
    tmp_path: Path, value: Any, left: Any, absent: list[str], none: list[str], protocol: int
) -> None:
    """None stands for what is left out where places count; a set is without it."""
    root = {"state_dict": {"module.w": torch.ones(2)}, "args": {"x": value, "y": value, "lr": 0.1}}
    torch.save(root, tmp_path / "a.pt", pickle_protocol=protocol)
    done = mc.edit(tmp_path / "a.pt", "strip-prefix", output=tmp_path / "b.pt")
    found = torch.load(tmp_path / "b.pt", weights_only=False)
    assert found["args"] == {"x": left, "y": left, "lr": 0.1}
    assert type(found["args"]["x"]) is type(value)
    said = [note.text for note in done.notes if note.level == "warning" and "would" in note.text]
    said = [text for text in said if not text.startswith("unpickling")]
    for names, words in ((absent, "left out: "), (none, "None in the place of ")):
        told = next((text.removeprefix(words) for text in said if text.startswith(words)), "")
        shown = told.partition(": unpickling that would call ")[0]
        # y is the same object, named where it is reached first
        assert shown.split(", ")[: len(names)] == [
            f"args.x.{name}".rstrip(".") for name in names
        ] or (not names and not told)
        assert not told or told.endswith(f"{Mode.__module__}.Mode")


@pytest.mark.parametrize("value", [re.compile("a+"), logging.getLogger("x"), PAIR])
@pytest.mark.parametrize("kind", [list, tuple, set, frozenset, collections.deque])
def test_what_is_harmless_is_carried_in_a_sequence(tmp_path: Path, value: Any, kind: Any) -> None:
    done = mc.edit(saved(tmp_path / "a.pt", kind([value])), "strip-prefix",
                   output=tmp_path / "b.pt")  # fmt: skip
    assert not [note for note in done.notes if note.level == "warning"]
    assert torch.load(tmp_path / "b.pt", weights_only=False)["args"].x == kind([value])


@pytest.mark.parametrize("value", [FAST, [FAST, 1], (FAST,), {FAST}, re.compile("a")])
@pytest.mark.parametrize("output", ["b.pt", "out/", "-", None])
def test_a_dry_run_tells_the_same(tmp_path: Path, value: Any, output: str | None) -> None:
    path = saved(tmp_path / "a.pt", value)
    where = output if output in (None, "-") else f"{tmp_path}/{output}"
    dry = mc.edit(path, "strip-prefix", output=where, dry_run=True)
    name = "b.pt" if output in (None, "-") else output
    real = mc.edit(path, "strip-prefix", output=f"{tmp_path}/{name}")
    assert dry.notes == real.notes
    assert any("Mode" in note.text for note in dry.notes[1:]) == (value != re.compile("a"))
    placed = mc.edit(saved(tmp_path / "c.pt", value), "strip-prefix", in_place=True, dry_run=True)
    assert [note.text for note in placed.notes[1:]] == [note.text for note in real.notes[1:]]


def test_a_dry_run_refuses_what_would_run(tmp_path: Path) -> None:
    path = saved(tmp_path / "a.pt", Calls(os.getenv, "x"))
    with pytest.raises(RefusedError, match="getenv"):
        mc.edit(path, "strip-prefix", output=tmp_path / "b.pt", dry_run=True)


def test_split_tells_in_a_dry_run(tmp_path: Path) -> None:
    path = saved(tmp_path / "a.pt", [FAST])
    dry = mc.split_file(path, output=tmp_path / "parts", dry_run=True)
    bare = mc.split_file(path, dry_run=True)
    real = mc.split_file(path, output=tmp_path / "parts")
    assert any("None in the place of args.x.0" in note.text for note in real.notes)
    assert dry.notes == real.notes == bare.notes


@pytest.mark.parametrize(
    "value",
    [
        Calls(collections.deque, [Mode.FAST]),
        Calls(Told, [Mode.FAST]),
        Calls(Told, (1, (Mode.FAST,))),
        Calls(os.getenv, "x"),
        Calls(re.compile("a").match, "a"),
        Calls(operator.getitem, {"a": 1}, "a"),
        Calls(operator.getitem, os.environ.__class__, "a"),
        Calls(re._compile, ["a"], 0),  # type: ignore[attr-defined]
        Calls(logging.getLogger, 3),
        Stateful(Mode.FAST),
        Stateful([Mode.FAST]),
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
