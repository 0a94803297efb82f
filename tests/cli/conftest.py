"""What the tests of the command line share: running it, and files to run it on."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from modelctl.cli import run

from .files import Cli, Result, net, training, write


@pytest.fixture
def cli(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Cli:
    """Runs a command in this process: ``cli("summary", path)``."""
    for name in ("MODELCTL_DEBUG", "NO_COLOR", "FORCE_COLOR", "CLICOLOR_FORCE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("COLUMNS", "80")

    def call(*argv: object) -> Result:
        capsys.readouterr()
        code = run([os.fspath(arg) if isinstance(arg, Path) else str(arg) for arg in argv])
        captured = capsys.readouterr()
        return Result(code, captured.out, captured.err)

    return call


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty folder to work in, so that messages show short names."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def ddp(place: Path) -> Path:
    """``ddp.pt``: a training checkpoint of a wrapped model."""
    write(place / "ddp.pt", training())
    return Path("ddp.pt")


@pytest.fixture
def flat(place: Path) -> Path:
    """``flat.pt``: a plain state_dict."""
    write(place / "flat.pt", net(fill=0.5))
    return Path("flat.pt")
