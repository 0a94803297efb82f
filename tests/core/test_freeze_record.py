"""The freeze record: what is read of it, and what it is after an edit."""

from __future__ import annotations

from collections import OrderedDict
from typing import Any

import pytest

from modelctl.core.freeze_record import FreezeRecord
from modelctl.core.nodes import ordered_dict
from modelctl.errors import UsageError

NODE = {"version": 1, "frozen": ["a.w", "b.w"], "bn_eval": True, "patterns": ["a", "!c"]}
RECORD = FreezeRecord(("a.w", "b.w"), True, ("a", "!c"))


@pytest.mark.parametrize("node", [NODE, OrderedDict(NODE), ordered_dict(NODE)])
def test_read_and_written(node: Any) -> None:
    assert FreezeRecord.read(node) == FreezeRecord.parse(node) == RECORD
    assert RECORD.node() == NODE
    assert list(RECORD.node()) == list(NODE)


def test_what_is_not_there_is_not_said() -> None:
    assert FreezeRecord.parse({"version": 1, "frozen": []}) == FreezeRecord()
    assert not FreezeRecord().freezes
    assert FreezeRecord(("a",)).freezes
    assert not FreezeRecord(bn_eval=True).freezes
    assert FreezeRecord(bn_eval=True, patterns=("bn",)).freezes


@pytest.mark.parametrize(
    ("node", "lenient"),
    [
        (None, False),
        ("a", False),
        ([], False),
        ({}, False),
        ({"version": 1}, False),
        ({"version": 1, "frozen": "a"}, False),
        ({"version": 1, "frozen": ["a", 1]}, False),
        ({"version": 1, "frozen": [["a"]]}, False),
        ({"frozen": ["a"]}, True),
        ({"version": 2, "frozen": ["a"]}, True),
        ({"version": 1, "frozen": ["a"], "bn_eval": "yes"}, True),
    ],
)
def test_what_is_no_record(node: Any, lenient: bool) -> None:
    with pytest.raises(UsageError, match="freeze record"):
        FreezeRecord.parse(node)
    found = FreezeRecord.read(node)
    assert (found is not None) == lenient
    if found is not None:
        assert found.frozen == ("a",)
        assert found.bn_eval is False


def test_patterns_that_are_none_are_passed_over() -> None:
    assert FreezeRecord.parse({**NODE, "patterns": [1]}).patterns == ()
    assert FreezeRecord.parse({**NODE, "patterns": None}).patterns == ()


def test_a_newer_one_stays_what_it_is() -> None:
    node = {**NODE, "version": 2, "since": 7}
    record = FreezeRecord.read(node)
    assert record is not None
    assert record.renamed({"a.w": "c.w"}).node() == {**node, "frozen": ["c.w", "b.w"]}
    with pytest.raises(UsageError, match="version 2; only 1 is known") as e:
        FreezeRecord.parse(node)
    assert "upgrade" in (e.value.hint or "")


def test_edits() -> None:
    assert RECORD.renamed({"a.w": "c.w", "b.w": None, "d": "e"}).frozen == ("c.w",)
    assert RECORD.without("a.") == FreezeRecord(("w", "b.w"), True, ("a", "!c"))
    assert RECORD.without("a.", alone=True) == FreezeRecord(("w",), True, ())
    assert RECORD.without("") is RECORD
    assert FreezeRecord(("module.a.w",)).without("a.").frozen == ("w",)
    now = RECORD.now(["b.w"], ["!a"])
    assert now == FreezeRecord(("b.w",), True, ("a", "!c", "!a"))
    assert FreezeRecord().now(["a"], bn_eval=True).bn_eval
