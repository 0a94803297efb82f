"""Plain pickles of numpy arrays, as detectron2's model zoo has them (``{"model": {name: array}}``).
Read only: each array is a tensor of its bytes, nothing is called."""

from __future__ import annotations

from ..core.checkpoint import Checkpoint, Origin
from ..core.notes import warning
from ..errors import UnreadableError, UnsupportedError
from ..pickles.arrays import as_tensors
from ..pickles.interpreter import MAX_SIZE, unpickle
from ..storage.places import Place
from .base import Format


class PickledArrays(Format):
    """A pickle by itself, with numpy arrays for tensors."""

    name = "pickle"
    label = "pickle of arrays"

    def sniff(self, place: Place) -> bool:
        head = place.head
        is_pickle = head[:1] == b"\x80" and head[1:2] in (b"\2", b"\3", b"\4", b"\5")
        return is_pickle and (b"numpy" in head or self._elsewhere(place))

    def _elsewhere(self, place: Place) -> bool:
        """Whether it ends as a pickle does, and names numpy further in than its head."""
        if place.size > MAX_SIZE or place.source.read(place.size - 1, 1) != b".":
            return False
        return b"numpy" in place.source.read(0, place.size)

    def read(self, place: Place) -> Checkpoint:
        if place.size > MAX_SIZE:
            raise UnsupportedError(f"{place.name}: a plain pickle of more than {MAX_SIZE:,} bytes")
        data = place.source.read(0, place.size)
        try:
            root, end, findings = unpickle(data, persistent_load=None)
        except UnreadableError as e:
            raise e.located(place.name) from None
        after = len(data) - end
        return Checkpoint(
            as_tensors(root),
            Origin(place.name, self.name, self.label, place.size),
            outside="the plain pickle, whose arrays are read as tensors,",
            warnings=(warning(f"{after:,} bytes after the pickle"),) if after else (),
            findings=tuple(findings),
        )
