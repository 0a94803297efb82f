"""Values as people read them, and as programs do."""

from __future__ import annotations

from typing import Any

import pytest

from modelctl.core.pages import Column, Table
from modelctl.inspection.cells import for_people, for_programs


@pytest.mark.parametrize(
    ("column", "value", "people", "programs"),
    [
        (Column("n", "count"), 25_557_032, "25,557,032", "25557032"),
        (Column("n", "count"), 0, "0", "0"),
        (Column("n", "count", none="-"), 0, "-", "0"),
        (Column("n", "count", none="-"), None, "-", ""),
        (Column("n", "bytes"), 102_500_000, "102.5 MB", "102500000"),
        (Column("n", "bytes"), 999, "999 B", "999"),
        (Column("n", "shape"), (64, 3, 7, 7), "64x3x7x7", "64x3x7x7"),
        (Column("n", "shape"), (), "scalar", "scalar"),
        (Column("n", "shape"), ("batch", 3), "batchx3", "batchx3"),
        (Column("n", "shape"), None, "", ""),
        (Column("n", "shape"), "4 t", "4 t", "4 t"),
        (Column("n", "percent", none="-"), 48.4305, "48.43", "48.4305"),
        (Column("n", "number", none="-"), 0.123456, "0.1235", "0.123456"),
        (Column("n", "number", none="-"), None, "-", ""),
        (Column("n", "number"), "5.58 G", "5.58 G", "5.58 G"),
        (Column("n", "answer"), True, "yes", "yes"),
        (Column("n", "answer"), None, "?", "?"),
        (Column("n", "answer"), "-", "-", "-"),
        (Column("n"), 7, "7", "7"),
        (Column("n", none="(none)"), None, "(none)", ""),
        (Column("n", "name"), "a\x1b[2J\n", "a\\x1b[2J\\n", "a\\x1b[2J\\n"),
    ],
)
def test_a_value(column: Column, value: Any, people: str, programs: str) -> None:
    table = Table([column], [[value]])
    assert for_people(table) == [[people]]
    assert for_programs(table) == [[programs]]
