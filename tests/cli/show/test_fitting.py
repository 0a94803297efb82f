"""Tables on narrow terminals: names are cut, numbers never are."""

from __future__ import annotations

import pytest

from modelctl.cli.show.fitting import widths, without_spare
from modelctl.core.pages import Column

COLUMNS = [
    Column("name", "name"),
    Column("type", spare=6),
    Column("output", spare=5),
    Column("params", "number"),
    Column("%", "number", spare=2),
    Column("buffers", "number", spare=3),
    Column("MACs", "number"),
    Column("%", "number", spare=1),
]


@pytest.mark.parametrize("width", [36, 48, 64, 80, 100, 140])
def test_names_are_cut_and_numbers_left_out_or_whole(width: int) -> None:
    rest = ["1x197x768", "28,348,416", "32.7", "1,234", "5.58 G", "31.8"]
    kind = "12 x NonDynamicallyQuantizableLinear"
    rows = [[f"encoder.layers.block_{i}.attention.out", kind, *rest] for i in range(3)]
    columns, cells = without_spare(COLUMNS, rows, width)
    heads = [column.name for column in columns]
    assert sum(max(map(len, column)) + 2 for column in zip(heads, *cells, strict=True)) - 2 <= width
    assert all("28,348,416" in row and "5.58 G" in row for row in cells)
    assert heads[0] == "name"
    if width == 140:
        assert columns == COLUMNS
    assert rows[0][0] == "encoder.layers.block_0.attention.out"


def test_the_least_of_two_that_can_be_spared_goes_first() -> None:
    rows = [["a", "b", "c", "1", "2", "3", "4", "5"]]
    width = sum(len(column.name) + 2 for column in COLUMNS) - 2
    assert without_spare(COLUMNS, rows, width)[0] == COLUMNS
    assert without_spare(COLUMNS, rows, width - 1)[0] == COLUMNS[:-1]


def test_texts_give_way_before_names_and_numbers_never() -> None:
    columns = [Column("name", "name"), Column("how"), Column("size", "bytes")]
    rows = [["n" * 30, "h" * 40, "123,456,789"]]
    assert widths(columns, rows, 100) == [30, 40, 11]
    assert widths(columns, rows, 60) == [30, 15, 11]
    assert widths(columns, rows, 40) == [24, 10, 11]
