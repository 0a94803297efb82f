"""How things read."""

from __future__ import annotations

import pytest

from modelctl.core import text


def test_shapes_and_counts() -> None:
    assert text.shape((64, 3, 7, 7)) == "64x3x7x7"
    assert text.shape(("batch", 3)) == "batchx3"
    assert text.shape(()) == "scalar"
    assert text.shape(None) == ""
    assert [text.count(n, "tensor") for n in (0, 1, 97_000)] == [
        "0 tensors",
        "1 tensor",
        "97,000 tensors",
    ]


@pytest.mark.parametrize(
    ("nbytes", "size", "short"),
    [
        (0, "0 B", "0 B"),
        (999, "999 B", "999 B"),
        (1000, "1.0 kB", "1.00 kB"),
        (9_996, "10.0 kB", "10.0 kB"),
        (102_400_000, "102.4 MB", "102 MB"),
        (999_949, "999.9 kB", "1.00 MB"),
        (999_950, "1.0 MB", "1.00 MB"),
        (5 * 10**18, "5000.0 PB", "5000 PB"),
    ],
)
def test_sizes(nbytes: int, size: str, short: str) -> None:
    assert text.size(nbytes) == size
    assert text.short(nbytes, "B") == short


def test_short() -> None:
    assert [text.short(n) for n in (999, 4_089_184, 25_557_032)] == ["999", "4.09 M", "25.6 M"]


def test_some() -> None:
    assert text.some("abc") == "a, b, c"
    assert text.some("abcdefg") == "a, b, c, d, e and 2 more"
    assert text.some(["a", "b"], 1) == "a and 1 more"
    assert text.some([]) == ""


def test_printable() -> None:
    assert text.printable("a\x1b[2J\u202e\ud800b") == "a\\x1b[2J\\u202e\\ud800b"
    assert text.printable("größe") == "größe"
