"""What an edit changes in which parameters train, folded for people."""

from __future__ import annotations

import pytest

from modelctl.inspection.changes import Trains, fold_trains


def rows(names: list[str], frozen: str) -> list[Trains]:
    return [Trains(name, None, frozen not in name) for name in names]


LAYER = ("attn.q.weight", "attn.k.weight", "norm.weight")
NAMES = [
    "embed.weight",
    *(f"layers.{i}.{name}" for i in range(12) for name in LAYER),
    "head.weight",
]


def test_modules_that_agree_are_one_row() -> None:
    folded = fold_trains(rows(NAMES, "head"))
    assert [(row.name, row.tensors, row.after) for row in folded] == [
        ("embed", 1, True),
        ("layers", 36, True),
        ("head", 1, False),
    ]


def test_a_module_whose_tensors_are_apart_is_one_row() -> None:
    """As in safetensors, which sorts them by dtype."""
    names = ["a.norm.weight", "b.norm.weight", "a.fc.weight", "b.fc.weight"]
    found = [Trains(name, None, not name.startswith("a.")) for name in names]
    assert [(row.name, row.tensors) for row in fold_trains(found)] == [("a", 2), ("b", 2)]


def test_numbers_fold() -> None:
    folded = fold_trains(rows(NAMES, "norm"))
    assert [(row.name, row.tensors, row.after) for row in folded] == [
        ("embed", 1, True),
        ("layers.{0-11}.attn", 24, True),
        ("layers.{0-11}.norm", 12, False),
        ("head", 1, True),
    ]


def test_all_but_the_last_layer() -> None:
    folded = fold_trains(rows(NAMES, "layers.11"))
    assert [(row.name, row.tensors) for row in folded] == [
        ("embed", 1),
        ("layers.{0-10}", 33),
        ("layers.11", 3),
        ("head", 1),
    ]
    assert sum(row.tensors for row in folded) == len(NAMES)


def test_gaps_are_no_range() -> None:
    names = [f"a.{i}.{j}.w" for i in (0, 2) for j in (0, 1)] + ["a.1.x.w"]
    folded = fold_trains(rows(names, "x"))
    assert [row.name for row in folded] == ["a.{0,2}", "a.1"]
    assert sum(row.tensors for row in folded) == len(names)


@pytest.mark.parametrize(
    ("frozen", "expected"),
    [
        (["enc.0"], ["enc.0", "enc.{1-3}"]),
        (["enc.0", "enc.2"], ["enc.{0,2}", "enc.{1,3}"]),
        (["enc.1"], ["enc.{0,2-3}", "enc.1"]),
    ],
)
def test_rows_stand_for_nothing_that_another_one_does(
    frozen: list[str], expected: list[str]
) -> None:
    names = [f"enc.{i}.{part}" for i in range(4) for part in ("weight", "bias")]
    folded = fold_trains([Trains(n, True, n.rpartition(".")[0] not in frozen) for n in names])
    assert [row.name for row in folded] == expected
    assert sum(row.tensors for row in folded) == len(names)


def test_what_no_numbers_say_is_not_folded() -> None:
    names = ["a.0.b.1.w", "a.1.b.0.w", "a.0.b.0.v", "a.1.b.1.v"]
    folded = fold_trains([Trains(name, True, name.endswith("w")) for name in names])
    assert sorted(row.name for row in folded) == ["a.0.b.0", "a.0.b.1", "a.1.b.0", "a.1.b.1"]
