"""The commands that look, on every file: an answer, or an error in one line."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

import modelctl as mc
from modelctl.errors import AmbiguousError, NoMatchError, RefusedError
from tests.cli.files import Cli
from tests.conftest import SHARED

from .files import OWN, Found, each
from .made import Made

THEIRS = [
    path
    for path in sorted((SHARED / "corpus").rglob("*"))
    if path.is_file() and path.parent.name != "facts"
]


def look(cli: Cli, path: Path) -> list[int]:
    codes = []
    for argv in (("summary", path), ("ls", path, "--section", "all"), ("show", path)):
        for options in ((), ("--format", "json")):
            result = cli(*argv, *options)
            codes.append(result.code)
            assert result.code in (0, 2), result
            assert "bug in modelctl" not in result.err
            if options:
                document = json.loads(result.out)
                assert ("error" in document) == (result.code == 2)
            elif result.code == 2:
                assert result.err.startswith("error: ")
                assert len(result.err.splitlines()) <= 2
    return codes


@each(lambda card: card in OWN)
def test_every_file_of_our_own(file: Made, cli: Cli) -> None:
    assert set(look(cli, file.path)) == {0}


@pytest.mark.parametrize("path", THEIRS, ids=lambda path: path.name[-40:])
def test_looking_never_fails_badly(path: Path, cli: Cli) -> None:
    look(cli, path)


HEADS = {
    "resnet": "linear",
    "resnet_legacy": "linear",
    "data_parallel": "module.linear",
    "safe": "linear",
    "whole_resnet": "linear",
    "imagenet": "module.linear",
    "timm_saver": "linear",
    "lightning_trainer": "net.linear",
    "transformers_pretrained": "classifier",
    "tagger": "out",
    # its output layer is its embedding; two models; a value and an action
    "language": None,
    "two_nets": None,
    "strided": None,
    "one_tensor": None,
    "adam": None,
}


@each(lambda card: card.id in HEADS)
def test_the_head_is_found_or_not_guessed(
    file: Made | Found, request: pytest.FixtureRequest
) -> None:
    head = HEADS[request.node.callspec.params["file"]]
    with mc.open(file.path) as ckpt:
        if head is None:
            with pytest.raises((NoMatchError, AmbiguousError, RefusedError)):
                mc.find_head(ckpt)
        else:
            assert mc.find_head(ckpt).modules == (head,)


@each(lambda card: card in OWN)
def test_no_architecture_is_claimed(file: Made) -> None:
    """None of these is a model of torchvision, however it calls its layers."""
    with mc.open(file.path) as ckpt:
        try:
            assert mc.identify(ckpt) == []
        except (NoMatchError, AmbiguousError):
            assert not ckpt.sections.models or not ckpt.sections.certain
