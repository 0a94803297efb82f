"""The one bar: after a while, in a terminal, for all that reads or writes much."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import modelctl as mc
from modelctl import progress
from modelctl.inspection.diffing.diff import diff
from modelctl.inspection.summary.summarize import summarize

from .cli.files import net, write


class Shown:
    """What stands in for the bar on the screen, and keeps what it was told."""

    all: list[Shown] = []  # noqa: RUF012 - emptied by the fixture

    def __init__(self, name: str, total: int, done: int) -> None:
        self.name, self.told = name, [(done, total)]
        self.stopped = False
        self.all.append(self)

    def update(self, done: int, total: int) -> None:
        assert not self.stopped
        self.told.append((done, total))

    def stop(self) -> None:
        self.stopped = True


class Clock:
    now = 0.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def shown(monkeypatch: pytest.MonkeyPatch) -> list[Shown]:
    Shown.all.clear()
    monkeypatch.setattr(progress, "Display", Shown)
    return Shown.all


@pytest.fixture
def terminal(shown: list[Shown], monkeypatch: pytest.MonkeyPatch) -> list[Shown]:
    """stderr is a terminal, and nobody waits."""
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True, raising=False)
    monkeypatch.setattr(progress, "PATIENCE", -1.0)
    monkeypatch.delenv("RANK", raising=False)
    return shown


def test_it_appears_after_a_second(shown: list[Shown]) -> None:
    clock = Clock()
    bar = progress.Bar(clock)
    bar("a.pt", 10, 100)
    clock.now = 0.9
    bar("a.pt", 10, 100)
    assert shown == []
    clock.now = 1.1
    bar("a.pt", 10, 100)
    bar("a.pt", 30, 100)
    assert [(one.name, one.told) for one in shown] == [("a.pt", [(30, 100), (60, 100)])]
    bar("a.pt", 90, 100)  # more than was said
    assert shown[0].told[-1] == (150, 150)
    bar("b.pt", 1, 5)  # the next file, at once
    assert shown[0].stopped
    assert (shown[1].name, shown[1].told) == ("b.pt", [(1, 5)])
    bar.end()
    assert shown[1].stopped


@pytest.mark.parametrize("env", [None, "0", "1"])
def test_only_in_a_terminal_and_of_the_first_rank(
    shown: list[Shown], monkeypatch: pytest.MonkeyPatch, env: str | None
) -> None:
    with progress.on_terminal() as bar:
        assert bar is None  # pytest's is none
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True, raising=False)
    if env is None:
        monkeypatch.delenv("RANK", raising=False)
    else:
        monkeypatch.setenv("RANK", env)
    with progress.on_terminal() as bar:
        assert (bar is None) == (env == "1")


def test_it_is_gone_when_something_fails(terminal: list[Shown]) -> None:
    def fails() -> None:
        with progress.on_terminal() as bar:
            assert bar is not None
            bar("x", 1, 2)
            raise ValueError

    with pytest.raises(ValueError):
        fails()
    assert terminal[0].stopped


def recorded() -> tuple[list[tuple[str, int, int]], Callable[[str, int, int], None]]:
    told: list[tuple[str, int, int]] = []
    return told, lambda *one: told.append(one)


def test_statistics_tell_every_byte(tmp_path: Path) -> None:
    write(tmp_path / "a.pt", net())
    told, tell = recorded()
    with mc.open(tmp_path / "a.pt") as ckpt:
        found = summarize(ckpt, stats=True, progress=tell)
    total = found.totals.nbytes
    assert sum(more for _, more, _ in told) == total
    assert {(name, of) for name, _, of in told} == {("a.pt", total)}
    told.clear()
    with mc.open(tmp_path / "a.pt") as ckpt:
        summarize(ckpt, progress=tell)
    assert told == []


def test_diff_tells_every_byte_that_it_compares(tmp_path: Path) -> None:
    write(tmp_path / "a.pt", net())
    write(
        tmp_path / "b.pt",
        {**net(fill=1.0), "fc.bias": net()["fc.weight"], "new": net()["bn1.bias"]},
    )
    told, tell = recorded()
    with mc.open(tmp_path / "a.pt") as a, mc.open(tmp_path / "b.pt") as b:
        diff(a, b, progress=tell)
        total = sum(ref.nbytes for name, ref in a.tensors().items() if name != "fc.bias")
    assert sum(more for _, more, _ in told) == total
    assert {(name, of) for name, _, of in told} == {("a.pt, b.pt", total)}


@pytest.mark.parametrize("more", [(), ("--quiet",), ("--color", "never")])
@pytest.mark.parametrize("command", ["summary", "overview", "diff", "drop"])
def test_commands_show_it(
    terminal: list[Shown],
    tmp_path: Path,
    command: str,
    more: tuple[str, ...],
) -> None:
    from modelctl.cli import run

    one, other = tmp_path / "a.pt", tmp_path / "b.pt"
    write(one, net())
    write(other, net(fill=2.0))
    words: dict[str, list[str]] = {
        "summary": ["summary", str(one), "--stats"],
        "overview": ["summary", str(one), str(other), "--stats"],
        "diff": ["diff", str(one), str(other)],
        "drop": ["drop", str(one), "--pattern", "fc", "-o", str(tmp_path / "c.pt")],
    }
    assert run([*words[command], *more]) in (0, 1)
    names = {
        "summary": ["a.pt"],
        "overview": ["a.pt", "b.pt"],
        "diff": ["a.pt, b.pt"],
        "drop": ["c.pt"],
    }
    assert [one.name for one in terminal] == ([] if more else names[command])
    assert all(one.stopped for one in terminal)
    assert all(one.told[-1][0] == one.told[-1][1] for one in terminal)


@pytest.mark.parametrize("shape", [(3, 5), (2000, 2000)])  # read at once, and by threads
@pytest.mark.parametrize("dtype", ["float32", "float64"])  # straight, and through a buffer
def test_loading_shows_it(terminal: list[Shown], tmp_path: Path, shape: Any, dtype: str) -> None:
    torch = pytest.importorskip("torch")
    import modelctl.nn as mnn

    model = torch.nn.Linear(*shape)
    state = {"weight": torch.ones(shape[1], shape[0]), "bias": torch.ones(shape[1])}
    torch.save(state, tmp_path / "a.pt")
    mnn.load_into(model, tmp_path / "a.pt", dtype=getattr(torch, dtype))
    (one,) = terminal
    total = 4 * (shape[0] * shape[1] + shape[1])
    assert (one.name, one.told[-1], one.stopped) == ("a.pt", (total, total), True)
    terminal.clear()
    mnn.load_into(model, tmp_path / "a.pt", progress=False)
    assert terminal == []
    assert model.weight.min() == 1


def test_the_real_one(capsys: pytest.CaptureFixture[str]) -> None:
    made = progress.Display("a\x1b.pt", 100, 10)
    made.update(50, 100)
    made.stop()
    assert capsys.readouterr().out == ""
