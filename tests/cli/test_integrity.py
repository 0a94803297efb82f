"""hash and verify, as people and pipes see them."""

from __future__ import annotations

import hashlib
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import modelctl as mc
from modelctl.core.nodes import ordered_dict

from ..integrity.files import model, numbers, write
from .files import Cli


def test_hash(cli: Cli, tmp_path: Path) -> None:
    one, two = write(tmp_path / "a.pt", model()), write(tmp_path / "b.safetensors", model())
    result = cli("hash", one, two)
    known = mc.hash(one).hash
    assert result == (0, f"{known}  {one}\n{known}  {two}\n", "")
    result = cli("hash", one, "--tensors")
    assert result.out == mc.hash(one).manifest
    assert hashlib.sha256(result.out.encode()).hexdigest() == known.removeprefix("sha256:")


def test_one_of_several_that_cannot_be_read(cli: Cli, tmp_path: Path) -> None:
    one = write(tmp_path / "a.pt", model())
    result = cli("hash", one, tmp_path / "no.pt")
    assert result.code == 2
    assert result.out == f"{mc.hash(one).hash}  {one}\n"
    assert result.err.startswith("error: ")
    assert "no.pt" in result.err
    result = cli("hash", one, one, "--tensors")
    assert (result.code, result.out) == (2, "")


def test_salvage(cli: Cli, tmp_path: Path) -> None:
    path = write(tmp_path / "a.pt", model())
    data = path.read_bytes()
    path.write_bytes(data[: data.index(b"data/3") + 70])
    result = cli("verify", path)
    assert (result.code, result.out) == (2, "")
    assert "--salvage" in result.err
    result = cli("verify", path, "--salvage", "-o", tmp_path / "b.pt")
    assert result.code == 1
    assert result.out.splitlines()[-1] == (
        f"{tmp_path / 'b.pt'}: 3 tensors kept, 2 lost: fc.weight, fc.bias"
    )
    for wrong in (("--salvage",), ("-o", "x.pt"), (path, "--salvage", "-o", "x.pt")):
        assert cli("verify", path, *wrong).code == 2


def test_git_shows_what_changed(tmp_path: Path) -> None:
    """The lines of the docs, in a repository."""
    if shutil.which("git") is None:
        pytest.skip("git is not installed")
    page = (Path(__file__).parents[2] / "docs" / "safety.md").read_text("utf-8")
    (block,) = re.findall(r"^### In git\n.*?^```sh\n(.*?)^```$", page, re.M | re.S)
    program = f"{sys.executable} -m modelctl"
    env = {**os.environ, "GIT_CONFIG_GLOBAL": os.devnull, "HOME": str(tmp_path)}
    env |= {
        f"GIT_{who}_{what}": "x@y" for who in ("AUTHOR", "COMMITTER") for what in ("NAME", "EMAIL")
    }

    def sh(script: str) -> str:
        done = subprocess.run(
            ["sh", "-ec", script],
            cwd=tmp_path,
            env=env,
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode == 0, done.stderr
        return done.stdout

    path = write(tmp_path / "a.pt", {"model": ordered_dict(model()), "epoch": 1})
    sh("git init -q && " + re.sub(r"\bmodelctl (?=show|hash)", f"{program} ", block))
    sh("git add . && git commit -qm one")
    changed = {**model(), "fc.bias": numbers(5, seed=99)}
    mc.save(mc.Checkpoint({"model": ordered_dict(changed), "epoch": 2}), path, overwrite=True)
    lines = sh("git diff").splitlines()
    gone, come = (
        [one[1:] for one in lines if re.match(rf"\{sign}[^{sign}]", one)] for sign in "-+"
    )
    assert [one.split()[0] for one in gone[:1]] == ["epoch"]
    assert len(gone) == len(come) == 2
    assert gone[1].endswith(",fc.bias,float32,5")
    assert come[1].endswith(",fc.bias,float32,5")
