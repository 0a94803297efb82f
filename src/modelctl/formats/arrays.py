"""Plain pickles of numpy arrays, as detectron2's model zoo has them (``{"model": {name: array}}``).
Read only: each array is a tensor of its bytes, nothing is called."""

from __future__ import annotations

from ..core.checkpoint import Checkpoint, Origin
from ..core.notes import warning
from ..core.storages import CHUNK
from ..errors import UnreadableError
from ..pickles.arrays import as_tensors
from ..pickles.interpreter import unpickle
from ..storage.places import Place
from .base import Format

_NUMPY = b"numpy"


class PickledArrays(Format):
    """A pickle by itself, with numpy arrays for tensors."""

    name = "pickle"
    label = "pickle of arrays"

    def sniff(self, place: Place) -> bool:
        head = place.head
        is_pickle = head[:1] == b"\x80" and head[1:2] in (b"\2", b"\3", b"\4", b"\5")
        return is_pickle and (_NUMPY in head or self._elsewhere(place))

    def _elsewhere(self, place: Place) -> bool:
        """Whether it ends as a pickle does, and names numpy further in than its head."""
        if place.source.read(place.size - 1, 1) != b".":
            return False
        pieces = range(0, place.size, CHUNK)
        return any(
            _NUMPY in place.source.read(at, min(CHUNK + len(_NUMPY), place.size - at))
            for at in pieces
        )

    def read(self, place: Place) -> Checkpoint:
        data = place.source.read(0, place.size)
        try:
            root, end, findings = unpickle(data, persistent_load=None, on_disk=len(data))
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
