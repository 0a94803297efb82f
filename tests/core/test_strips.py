"""Views that are not contiguous: what lies between two strips of one is not read."""

from __future__ import annotations

import numpy as np
import pytest

from modelctl.core.dtypes import BY_NAME
from modelctl.core.storages import GAP, RunStorage, Source
from modelctl.core.tensors import STRIP, TensorRef

F4 = BY_NAME["float32"]


class Memory(Source):
    """Bytes in memory that remembers the largest read of it."""

    def __init__(self, data: bytes) -> None:
        super().__init__("memory", len(data))
        self.data, self.largest = data, 0

    def _fetch(self, offset: int, size: int) -> bytes:
        self.largest = max(self.largest, size)
        return self.data[offset : offset + size]


@pytest.mark.parametrize(
    ("shape", "part", "exact"),
    [
        ((40, 4000), (slice(None), slice(1000, 3000)), True),
        ((40, 4000), (slice(3, 9), slice(0, 1)), False),  # no strip is worth a read
        ((40, 60), (slice(None), slice(20, 40)), False),  # nothing in between is
        ((5, 30, 2000), (slice(None), slice(10, 20), slice(None)), True),
        ((5, 30, 2000), (slice(1, 4), slice(10, 20), slice(0, 500)), True),
        ((3, 2000, 30), (slice(None), slice(0, 1000), slice(10, 20)), False),
        ((1, 40, 1, 4000), (slice(None), slice(None), slice(None), slice(2000, 4000)), True),
        ((6, 3_000_000), (slice(None), slice(0, 2_500_000)), True),
    ],
)
def test_a_box_of_a_tensor_is_read_in_strips(shape, part, exact):
    whole = np.arange(np.prod(shape), dtype="<f4").reshape(shape)
    source = Memory(whole.tobytes())
    view = whole[part]
    offset = int(view.ctypes.data - whole.ctypes.data) // 4
    stride = tuple(step // 4 for step in view.strides)
    ref = TensorRef(F4, view.shape, RunStorage(source, 0, whole.nbytes), offset, stride)
    assert ref.tobytes() == view.tobytes()
    assert source.largest <= max(STRIP, GAP)
    if exact:
        assert source.bytes_read == view.nbytes
    spans = [*ref.spans()]
    assert sum(stop - start for start, stop in spans) == source.bytes_read
    assert spans == sorted(spans)


def test_rows_that_lie_between_each_other_are_read_once():
    whole = np.arange(2000 * 1500, dtype="<f4").reshape(2000, 1500)
    source = Memory(whole.tobytes())
    storage = RunStorage(source, 0, whole.nbytes)
    ref = TensorRef(F4, (1500, 2000), storage, 0, (1, 1500))
    assert ref.tobytes() == whole.T.tobytes()
    assert source.bytes_read == whole.nbytes
