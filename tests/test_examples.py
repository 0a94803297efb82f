"""examples/finetune.py: it learns, and what is resumed equals what was never stopped."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

torch = pytest.importorskip("torch")

SCRIPT = Path(__file__).parents[1] / "examples" / "finetune.py"
EPOCHS = 3  # the trunk thaws after the first


def finetune(*args: str | Path) -> str:
    """What the script prints, in a process of its own, on one thread; it must not warn."""
    done = subprocess.run(
        [sys.executable, "-W", "error", str(SCRIPT), "--device", "cpu", *map(str, args)],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def short(out: Path, *args: str | Path) -> str:
    """A short training: 10 batches an epoch, so that the last window has one of three."""
    return finetune("--out", out, "--epochs", str(EPOCHS), "--images", "320", *args)


@pytest.fixture(scope="module")
def straight(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """A training that was never stopped: its folder and what it printed."""
    out = tmp_path_factory.mktemp("straight")
    return out, short(out)


def test_resuming_before_the_first_checkpoint_starts(tmp_path: Path) -> None:
    for _ in range(2):  # the second time with what the first one left before its first epoch
        printed = finetune("--out", tmp_path, "--resume", "--epochs", "1", "--images", "32")
        assert "resumed" not in printed
        assert "epoch 1: loss" in printed
        for path in tmp_path.glob("*.pt"):
            path.unlink()


def test_the_schedule_of_a_run_is_not_made_longer(straight: tuple[Path, str]) -> None:
    command = [sys.executable, SCRIPT, "--out", straight[0], "--resume", "--epochs", "4"]
    done = subprocess.run([*command, "--images", "320"], capture_output=True, text=True)
    assert done.returncode == 1
    assert "a training of 3 epochs; go on with --epochs 3" in done.stderr
    assert "epoch 4" not in done.stdout


def load(path: Path) -> Any:
    return torch.load(path, weights_only=True)


def same(a: Any, b: Any) -> bool:
    """Equal to the bit, at any depth."""
    if isinstance(a, torch.Tensor):
        return isinstance(b, torch.Tensor) and a.dtype == b.dtype and torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[key], b[key]) for key in a)
    if isinstance(a, list | tuple):
        return len(a) == len(b) and all(same(x, y) for x, y in zip(a, b, strict=True))
    return bool(a == b)


def test_it_learns_first_the_head_and_then_the_trunk(straight: tuple[Path, str]) -> None:
    out, printed = straight
    start, *_, end = accuracy = load(out / "epoch-3.pt")["extra"]["accuracy"]
    assert len(accuracy) == EPOCHS + 1
    assert end > start + 0.3
    assert f"accuracy {end:.1%}" in printed
    backbone = load(out / "pretrained" / "backbone.pt")["state_dict"]
    first, second = (load(out / f"epoch-{i}.pt")["model"] for i in (1, 2))
    assert all(torch.equal(first[name], value) for name, value in backbone.items())
    assert not any(torch.equal(second[n], v) for n, v in backbone.items() if v.ndim == 4)
    assert first["fc.weight"].shape == (24, 32)


def test_the_optimizer_makes_a_step_of_the_short_window_too(straight: tuple[Path, str]) -> None:
    out, _ = straight
    for epoch in range(1, EPOCHS + 1):
        ckpt = load(out / f"epoch-{epoch}.pt")
        steps = ckpt["optimizer"]["state"][0]["step"]
        assert steps == ckpt["scheduler"]["last_epoch"] == 4 * epoch  # 10 batches: 3, 3, 3, 1


@pytest.mark.parametrize("epoch", [1, 2])
def test_resumed_equals_never_stopped(
    straight: tuple[Path, str], tmp_path: Path, epoch: int
) -> None:
    """On either side of the thaw; another seed, so that nothing comes from the start."""
    out, _ = straight
    shutil.copy(out / f"epoch-{epoch}.pt", tmp_path / "latest.pt")
    printed = short(tmp_path, "--resume", "--seed", "99")
    assert f"epoch {epoch}:" not in printed
    assert f"epoch {epoch + 1}:" in printed
    ours, theirs = load(tmp_path / "epoch-3.pt"), load(out / "epoch-3.pt")
    assert ours.keys() == theirs.keys() >= {"model", "optimizer", "scheduler", "rng", "extra"}
    assert [key for key in ours if not same(ours[key], theirs[key])] == []
    assert not same(ours["model"], load(out / "epoch-2.pt")["model"])
