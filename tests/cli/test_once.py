"""An option that takes one value and is given two is a mistake, on every command."""

from __future__ import annotations

import inspect
from typing import Literal, get_args, get_origin

import pytest

from modelctl.cli.commands import COMMANDS
from modelctl.cli.quick import check_once, said
from modelctl.cli.signature import Option
from modelctl.errors import UsageError
from tests.cli.files import Cli


def words(kind: object) -> tuple[str, str]:
    """Two values for an option of that kind."""
    kinds = [one for one in get_args(kind) or (kind,) if one is not type(None)]
    if get_origin(kind) is Literal:
        return str(get_args(kind)[0]), str(get_args(kind)[1])
    if get_origin(kinds[0]) is Literal:
        return words(kinds[0])
    return ("1", "2") if kinds[0] in (int, float) else ("a.pt", "b.pt")


@pytest.mark.parametrize("name", COMMANDS)
def test_every_option_of_one_value(name: str) -> None:
    command = COMMANDS[name]
    looked_at = 0
    for one in inspect.signature(command).parameters.values():
        kind, info = get_args(one.annotation)[:2]
        if not isinstance(info, Option) or kind is bool or "bool" in str(kind):
            continue
        first, second = words(kind)
        for flag in info.names(one.name):
            for line in (
                ["SRC", flag, first, flag, second],
                ["SRC", f"{flag}={first}", f"{flag}={second}"],
            ):
                if "list" in str(kind):
                    check_once(command, line)
                    continue
                if flag.startswith("--") or "=" not in line[1]:
                    with pytest.raises(UsageError, match=f"{flag} twice, {first} and {second}"):
                        check_once(command, line)
                    looked_at += 1
                assert said(command, line) is None
            check_once(command, ["SRC", flag, first, flag, first])
    assert looked_at


@pytest.mark.parametrize(
    "line",
    [
        "-o a.pt -o b.pt",
        "-oa.pt -ob.pt",
        "-qo a.pt --output b.pt",
        "-o a.pt --to torch --output=b.pt",
        "--dry-run -o a.pt x y -o b.pt",
    ],
)
def test_however_it_is_spelled(line: str) -> None:
    with pytest.raises(UsageError, match=r"twice, a\.pt and b\.pt"):
        check_once(COMMANDS["strip-prefix"], line.split())


@pytest.mark.parametrize(
    "line",
    [
        "-o a.pt -o a.pt",
        "-o a.pt -- -o b.pt",
        "--prefix -o -o b.pt",  # a value that looks like a flag
        "-q -q --quiet",
        "--nothing 1 --nothing 2",
        "-xyz a -o",
    ],
)
def test_what_is_no_such_mistake(line: str) -> None:
    check_once(COMMANDS["strip-prefix"], line.split())


def test_a_switch_that_goes_both_ways(cli: Cli) -> None:
    result = cli("summary", "f.pt", "--fold", "--no-fold")
    assert (result.code, result.err.splitlines()[0]) == (
        2,
        "error: --fold and --no-fold: one of them",
    )


def test_two_models_are_not_one(cli: Cli) -> None:
    result = cli("merge", "--model", "body.pt", "--model", "head.pt", "-o", "out.pt")
    assert result.code == 2
    assert result.err == "error: --model twice, body.pt and head.pt: it takes one value\n"


def test_help_is_help(cli: Cli) -> None:
    assert cli("merge", "--model", "a", "--model", "b", "--help").code == 0
