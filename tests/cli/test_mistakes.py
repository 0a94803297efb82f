"""What is said another way: the error names what was meant, and that works."""

from __future__ import annotations

import shlex
from pathlib import Path

import pytest

from modelctl.cli.commands import COMMANDS
from modelctl.cli.mistakes import SYNONYMS

from .files import Cli, net, write

RECIPE = '[[edit]]\ndo = "strip-prefix"\n'


def test_a_file_alone_is_summary(cli: Cli, flat: Path) -> None:
    plain, said = cli(flat, "--json"), cli("summary", flat, "--json")
    assert plain.code == 0
    assert plain.out.partition('"rows"')[2] == said.out.partition('"rows"')[2] != ""
    (flat.parent / "model").write_bytes(flat.read_bytes())
    assert cli("model").code == 0  # without a suffix, too


@pytest.mark.parametrize("word", SYNONYMS)
def test_a_synonym_names_the_command(cli: Cli, flat: Path, word: str) -> None:
    done = cli(word, flat)
    assert (done.code, done.err.count("\n")) == (2, 2)
    for meant in SYNONYMS[word]:
        assert f"'modelctl {meant}'" in done.err
        name, *flags = meant.split()
        assert all(flag in cli(name, "--help").out for flag in flags)
    assert word not in COMMANDS


def test_a_pattern_in_the_place_of_a_file(cli: Cli, flat: Path) -> None:
    for words in (("keep", flat, "conv1*"), ("drop", flat, "fc*", "-o", "x.pt")):
        done = cli(*words)
        assert f"'{words[2]}' is a pattern, no file\n" in done.err
        hint = shlex.split(done.err.partition("hint: ")[2])
        assert cli(words[0], flat, *hint, "-o", "new.pt", "--overwrite").code == 0
    done = cli("keep", flat, "fc", "--pattern", "conv1", "-o", "x.pt")
    assert "fc: no such file" in done.err
    assert "--pattern fc" in done.err
    assert "--map a=b" in cli("rename", flat, "a=b", "-o", "x.pt").err


def test_values_of_options_are_no_files(cli: Cli, flat: Path) -> None:
    done = cli("keep", flat, "--exclude", "fc*", "-o", "new")
    assert "Missing option '--pattern'" in done.err


@pytest.mark.parametrize(
    ("words", "meant"),
    [
        (("sumary", "flat.pt"), "modelctl summary"),
        (("summary", "flt.pt"), "flat.pt"),
        (("diff", "flat.pt", "a/flat1.pt"), "a/flat2.pt"),
        (("strip-prefix", "flt.pt", "-o", "x.pt"), "flat.pt"),
        (("summary", "flat.pt", "--dept", "2"), "--depth"),
        (("summary", "flat.pt", "--sort", "nam"), "--sort name"),
        (("summary", "flat.pt", "--format=jsn"), "--format json"),
        (("strip-prefix", "flat.pt", "--weights-only", "-o", "x.pt"), "modelctl convert"),
    ],
)
def test_the_nearest_is_named(cli: Cli, flat: Path, words: tuple[str, ...], meant: str) -> None:
    Path("a").mkdir()
    write(Path("a/flat2.pt"), net())
    done = cli(*words)
    assert done.code == 2
    assert meant in done.err.partition("hint: ")[2]


def test_a_recipe_and_a_file_are_swapped(cli: Cli, ddp: Path) -> None:
    Path("r.toml").write_text(RECIPE)
    done = cli("apply", ddp, "r.toml", "-o", "x.pt")
    hint = shlex.split(done.err.partition("hint: ")[2])
    assert done.code == 2
    assert cli(*hint[1:], "-o", "x.pt").code == 0
