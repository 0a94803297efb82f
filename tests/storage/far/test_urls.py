"""What is a URL, and how it is shown."""

from __future__ import annotations

from pathlib import Path

import pytest

from modelctl.storage.far.urls import is_far, said, shown, url_of


@pytest.mark.parametrize(
    "path",
    ["https://h/x.pt", "HTTP://h/x", "s3://b/k", "hf://o/r", "memory://x", Path("hf://o/r@main/x")],
)
def test_far(path) -> None:
    assert is_far(path)


@pytest.mark.parametrize(
    "path",
    ["x.pt", "./https:/x", "/a/b://c", "C:\\x.pt", "c:/x.pt", "a b://c", "-", "", Path("c:/x"), 5],
)
def test_here(path) -> None:
    assert not is_far(path)


def test_a_path_has_its_slashes_again() -> None:
    url = url_of(Path("hf://org/repo@main/x.pt"))
    assert url is not None
    assert url.text == "hf://org/repo@main/x.pt"


@pytest.mark.parametrize(
    ("url", "name"),
    [
        ("https://u:secret@h/x.pt", "https://***@h/x.pt"),
        ("https://h/x.pt?sig=secret#y", "https://h/x.pt"),
        ("ftp://u:secret@h/x.pt", "ftp://***@h/x.pt"),
        ("hf://org/repo@main/x.pt", "hf://org/repo@main/x.pt"),
        ("s3://b/a?b/x@y.pt", "s3://b/a?b/x@y.pt"),
        ("x.pt", "x.pt"),
    ],
)
def test_shown(url: str, name: str) -> None:
    assert shown(url) == name


def test_said() -> None:
    assert said(Path("s3://bucket/x.pt")) == said("s3://bucket/x.pt") == "s3://bucket/x.pt"
    assert said(Path("a/x.pt")) == said("a/x.pt") == "a/x.pt"
