"""The commands that take a prefix away or give one, as they are printed: they are run."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest

import modelctl as mc

from .files import Cli, tensor, write


def hinted(text: str) -> list[str]:
    """The commands in what was printed."""
    return re.findall(r"modelctl ((?:strip|add)-prefix [^;]*? -o NEW\.pt)", text.replace("\n", " "))


PREFIXES = ("module.", "model.", "backbone.body.", "student net.")


@pytest.mark.parametrize("prefix", PREFIXES)
@pytest.mark.parametrize("command", ["diff {0} {1}", "match {0} --like {1}"])
@pytest.mark.parametrize("longer", [0, 1])
def test_the_prefix_goes_or_comes(
    cli: Cli, tmp_path: Path, command: str, longer: int, prefix: str
) -> None:
    """What is printed makes the names of one the other's, whichever has the prefix."""
    own = {"a.weight": tensor(3, 2), "b.weight": tensor(2, 3)}
    under = {prefix + name: tensor for name, tensor in own.items()}
    files = [tmp_path / "one file.pt", tmp_path / "other.pt"]
    for path, state in zip(files, (own, under) if longer else (under, own), strict=True):
        write(path, state)
    said = cli(*(part.format(*files) for part in command.split()))
    found = hinted(said.out + said.err)
    assert [one.split()[0] for one in found] == (
        ["strip-prefix", "add-prefix"]
        if command.startswith("diff")
        else [["strip-prefix", "add-prefix"][longer]]
    )
    for one in found:
        assert cli(*shlex.split(one.replace("NEW.pt", str(tmp_path / "NEW.pt")))).code == 0
        with mc.open(tmp_path / "NEW.pt") as ckpt:
            new = {*ckpt.state_dict()}
        assert new == ({*own} if one.startswith("strip") else {*under})
        (tmp_path / "NEW.pt").unlink()


def test_two_prefixes_are_no_one_command(cli: Cli, tmp_path: Path) -> None:
    """One for another is a rename."""
    for name in ("student", "teacher"):
        state = {f"{name}.{i}.weight": tensor(i + 2, 3) for i in range(3)}
        write(tmp_path / f"{name}.pt", state)
    said = cli("match", tmp_path / "student.pt", "--like", tmp_path / "teacher.pt")
    assert hinted(said.out + said.err) == []
    assert "--write-map" in said.err
