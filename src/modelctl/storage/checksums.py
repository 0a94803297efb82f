"""Checksums of what comes in pieces: put together, and compared."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import cache

from ..core.storages import Slice, Storage, fastest_crc32
from ..errors import DamagedError

_POLYNOMIAL = 0xEDB88320  # of CRC-32, its bits reflected


def crc32_of_pieces(found: Iterable[tuple[int, int]]) -> int:
    """The checksum of all bytes, given (checksum, bytes) of the pieces in their order."""
    crc, combine = 0, _fastest_combine()
    for more, nbytes in found:
        crc = combine(crc, more, nbytes)
    return crc


@cache
def _fastest_combine() -> Callable[[int, int, int], int]:
    try:
        from isal import isal_zlib
    except ImportError:
        return combined
    combine: Callable[[int, int, int], int] = isal_zlib.crc32_combine
    return combine


def combined(first: int, second: int, nbytes: int) -> int:
    """The checksum of two pieces, given theirs and the bytes of the second one, as zlib's
    ``crc32_combine``: the first one's, moved over as many zeros, and the second one's."""
    return _product(_zeros(nbytes), first) ^ second


@cache
def _zeros(nbytes: int) -> int:
    """What a checksum is multiplied by when zeros follow: x to the power of their bits."""
    power, square = 1 << 31, 1 << 23  # 1, and x ** 8
    while nbytes:
        if nbytes & 1:
            power = _product(square, power)
        square = _product(square, square)
        nbytes >>= 1
    return power


def _product(a: int, b: int) -> int:
    """Of two polynomials, modulo that of CRC-32."""
    found = 0
    for bit in range(31, -1, -1):
        if a >> bit & 1:
            found ^= b
        b = b >> 1 ^ (_POLYNOMIAL if b & 1 else 0)
    return found


class Passed:
    """Storages whose bytes pass in slices, in any order, and are not read again to be compared."""

    def __init__(self) -> None:
        self._seen: dict[int, _Seen] = {}

    def add(self, part: Slice, crc: int, of: Storage) -> None:
        """A slice that passed, given its checksum; ``of`` is what errors are to name.

        Raises:
            DamagedError: its storage is not what was saved, if that is known by now.
        """
        if part.storage.compared:
            return
        seen = self._seen.setdefault(id(part.storage), _Seen(part.storage, of))
        if seen.add(part, crc):
            del self._seen[id(part.storage)]

    def finish(self) -> None:
        """Read what did not pass of storages of which some did.

        Raises:
            DamagedError: one is not what was saved.
        """
        while self._seen:
            self._seen.popitem()[1].finish()


class _Seen:
    """What passed of a storage."""

    def __init__(self, storage: Storage, of: Storage) -> None:
        self.storage, self.of = storage, of
        self._found: dict[int, tuple[int, int]] = {}  # by its start: the stop, the checksum
        self._left = storage.nbytes

    def add(self, part: Slice, crc: int) -> bool:
        """Whether all of it is compared."""
        if part.start not in self._found:
            self._left -= part.nbytes
        self._found[part.start] = part.stop, crc
        if self._left <= 0:
            self.finish()
        return self._left <= 0

    def finish(self) -> None:
        """Compare it, by way of what has not passed."""
        if self.storage.compared:
            return
        try:
            pieces = None if self.storage.crc32 is None else self._pieces()
            if pieces is None:
                self.storage.check()
            else:
                self.storage.compare(crc32_of_pieces(pieces))
        except DamagedError as e:
            raise DamagedError(self.of, e.path, e.offset) from None

    def _pieces(self) -> list[tuple[int, int]] | None:
        """The checksum and the bytes of each piece of it; None where slices overlap."""
        at, end = 0, self.storage.nbytes
        pieces = []
        for start, (stop, crc) in [*sorted(self._found.items()), (end, (end, 0))]:
            if start < at:
                return None
            pieces += [(self._between(at, start), start - at), (crc, stop - start)]
            at = stop
        return pieces

    def _between(self, start: int, stop: int) -> int:
        crc, crc32 = 0, fastest_crc32()
        for piece in self.storage.chunks(start, stop):
            crc = crc32(piece, crc)
        return crc
