"""git diff of checkpoints, as docs/comparing.md sets it up, in a real repository."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from modelctl.cli.commands import COMMANDS

from ..files import net, write

ROOT = Path(__file__).parents[3]
PAGE = (ROOT / "docs" / "comparing.md").read_text("utf-8")
SECTION = PAGE.partition("## In git")[2]

pytestmark = pytest.mark.skipif(shutil.which("git") is None, reason="git is not installed")


class Repository:
    """A repository of one checkpoint, in two versions."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        bin_ = folder / "bin"
        bin_.mkdir()
        command = bin_ / "modelctl"
        command.write_text(f'#!/bin/sh\nexec "{sys.executable}" -m modelctl "$@"\n')
        command.chmod(0o755)
        self.env = {
            **os.environ,
            "PATH": f"{bin_}{os.pathsep}{os.environ['PATH']}",
            "PYTHONPATH": str(ROOT / "src"),
            "GIT_CONFIG_GLOBAL": os.devnull,
            "GIT_CONFIG_NOSYSTEM": "1",
            "HOME": str(folder),
        }
        self.git("init", "-q")
        self.git("config", "user.name", "A")
        self.git("config", "user.email", "a@example.org")
        attributes = re.search(r"```text title=\"\.gitattributes\"\n(.*?)```", SECTION, re.S)
        assert attributes is not None
        (folder / ".gitattributes").write_text(attributes[1])

    def git(self, *argv: str) -> str:
        return self._run("git", *argv)

    def shell(self, script: str) -> str:
        return self._run("bash", "-euc", script)

    def _run(self, *argv: str) -> str:
        done = subprocess.run(
            argv, cwd=self.folder, env=self.env, capture_output=True, text=True, timeout=120
        )
        assert done.returncode == 0, done.stderr
        return done.stdout

    def commit(self) -> None:
        """One version; another one, of which one tensor and the epoch changed, stands there."""
        write(self.folder / "model.pt", {"model": net(), "epoch": 3})
        self.git("add", ".gitattributes", "model.pt")
        self.git("commit", "-qm", "a model")
        other = net() | {"fc.weight": net(fill=2.0)["fc.weight"]}
        (self.folder / "model.pt").unlink()
        write(self.folder / "model.pt", {"model": other, "epoch": 4})

    def changed(self) -> list[str]:
        """The lines that git diff shows as gone and come."""
        lines = self.git("diff", "--no-color").splitlines()
        return [one for one in lines if re.match(r"[+-](?![+-]{2} )", one)]


@pytest.fixture
def repository(tmp_path: Path) -> Repository:
    return Repository(tmp_path)


def test_git_diff_shows_values(repository: Repository) -> None:
    """What needs no hash."""
    repository.git("config", "diff.modelctl.textconv", 'f() { modelctl show "$1"; }; f')
    repository.commit()
    gone, come = repository.changed()
    assert gone.split() == ["-epoch", "3"]
    assert come.split() == ["+epoch", "4"]


@pytest.mark.skipif("hash" not in COMMANDS, reason="there is no command hash yet")
def test_git_diff_as_the_page_says(repository: Repository) -> None:
    (script,) = re.findall(r"```sh\n(.*?)```", SECTION, re.S)
    repository.shell(script)
    repository.commit()
    values, hashes = repository.changed()[:2], repository.changed()[2:]
    assert [one.split() for one in values] == [["-epoch", "3"], ["+epoch", "4"]]
    assert [one[0] for one in hashes] == ["-", "+"]
    assert all(re.fullmatch(r"[+-]sha256:[0-9a-f]{64}  fc\.weight", one) for one in hashes)
    assert hashes[0][1:] != hashes[1][1:]


def test_of_two_commits(repository: Repository) -> None:
    """How much it changed, as the page says it."""
    command = re.search(r"`(git show HEAD~1:model\.pt \| modelctl diff - model\.pt)`", SECTION)
    assert command is not None
    repository.commit()
    repository.git("commit", "-qam", "another")
    said = repository.shell(f"{command[1]} || test $? = 1")
    assert "fc.weight  values" in said
    assert "1 of 12 tensors changed" in said
