"""numpy believes what the state of a dtype says: those that would have it read where nothing is."""

from __future__ import annotations

import pickle
import subprocess
import sys
from typing import Any

import pytest

from modelctl.core.checkpoint import Finding
from modelctl.errors import ModelctlError
from modelctl.pickles.interpreter import unpickle
from modelctl.pickles.writer import pickle as written

from ..hostile.build.pickles import (
    EMPTY_DICT,
    NONE,
    call,
    get,
    group,
    name,
    number,
    program,
    put,
    sequence,
    text,
    with_state,
)

np = pytest.importorskip("numpy")


class State:
    """A dtype with a state of its own, as a pickle makes it."""

    def __init__(self, code: str, *state: Any) -> None:
        self.code, self.state = code, state

    def __reduce__(self) -> Any:
        return np.dtype, (self.code, False, True), self.state


class Array:
    """An array of such a dtype."""

    def __init__(self, dtype: Any, raw: bytes) -> None:
        self.dtype, self.raw = dtype, raw

    def __reduce__(self) -> Any:
        rebuild = np.zeros(1).__reduce__()[0]
        return rebuild, (np.ndarray, (0,), b"b"), (1, (1,), self.dtype, False, self.raw)


OBJECT = np.dtype("O")


def fields(inner: Any, at: int = 0, size: int = 8, flags: int = 0) -> State:
    return State(f"V{size}", 3, "|", None, ("a",), {"a": (inner, at)}, size, 1, flags)


BROKEN = {
    "a field": fields(OBJECT),
    "a field in a field": fields(fields(OBJECT), flags=16),
    "a part": State("V8", 3, "|", (OBJECT, (1,)), None, None, 8, 8, 0),
    "itself": State("O8", 3, "|", None, None, None, -1, -1, 0),
    "a flag that is none": fields(OBJECT, flags=2),
    "a field outside": fields(np.dtype("f8"), at=4096),
    "a field before": fields(np.dtype("f8"), at=-8),
    "a part that is too long": State("V8", 3, "|", (np.dtype("f8"), (9, 9)), None, None, 8, 8, 0),
}
WHOLE = {
    "objects": OBJECT,
    "a field of objects": np.dtype([("a", "O"), ("b", "f4")]),
    "numbers": np.dtype([("a", "f4"), ("b", "U3"), ("c", ("i2", (2, 3)))]),
    "a field in a field": np.dtype([("a", [("x", "O")])]),
    "a date": np.dtype("M8[s]"),
    "text": np.dtype("U3"),
    "aligned": np.dtype([("a", "i1"), ("b", "f8")], align=True),
}


def found(value: Any, protocol: int) -> list[Finding]:
    return unpickle(pickle.dumps(value, protocol)).findings


@pytest.mark.parametrize("protocol", [2, 4])
@pytest.mark.parametrize("what", BROKEN)
def test_broken(what: str, protocol: int) -> None:
    array = Array(BROKEN[what], bytes(8))
    (finding,) = {one.id: one for one in found(array, protocol)}.values()
    assert (finding.level, finding.id) == ("dangerous", "array-dtype")
    tree = unpickle(pickle.dumps(array, protocol)).value
    with pytest.raises(ModelctlError, match="numpy"):
        written(tree, lambda storage: "0", None)


@pytest.mark.parametrize("protocol", [2, 4])
@pytest.mark.parametrize("what", WHOLE)
def test_whole(what: str, protocol: int) -> None:
    assert found(WHOLE[what], protocol) == []
    assert found(np.zeros(2, WHOLE[what]), protocol) == []


def test_a_state_that_comes_later() -> None:
    """A field's own state is set after it was put into the other's."""

    def state(inner: bytes) -> bytes:
        into = EMPTY_DICT + text("a") + group(inner, number(0)) + b"s"
        numbers = (number(8), number(1), number(16))
        return group(number(3), text("|"), NONE, group(text("a")), into, *numbers)

    def late(inner: bytes) -> list[Finding]:
        void = call(name("numpy", "dtype"), text("V8"), number(0), number(1))
        outer = with_state(void, state(get(7)))
        body = sequence(void + put(7), outer, with_state(get(7), state(inner)))
        return unpickle(program(body)).findings

    assert late(call(name("numpy", "dtype"), text("f8"))) == []
    assert {one.id for one in late(call(name("numpy", "dtype"), text("O8")))} == {"array-dtype"}


def test_dtypes_in_each_other_without_end() -> None:
    dtype: Any = OBJECT
    for _ in range(60):
        dtype = fields(dtype, flags=27)
    assert {one.id for one in found(dtype, 2)} == {"array-dtype"}


def test_numpy_believes_it() -> None:
    """Unpickled, and looked at, an address is followed: the process is gone."""
    raw = pickle.dumps(Array(BROKEN["a field"], b"\1" + bytes(7)), 2)
    script = f"import pickle, numpy; print(pickle.loads({raw!r})['a'])"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True)
    assert done.returncode not in (0, 1)
