"""Headers of tar files whose own size is bounded."""

from __future__ import annotations

import tarfile

# A name and a few numbers; what claims to be longer would be read whole before anybody could look.
_LONGEST = 1 << 20
_EXTENSIONS = frozenset(
    (
        *(tarfile.XHDTYPE, tarfile.XGLTYPE, tarfile.SOLARIS_XHDTYPE),
        *(tarfile.GNUTYPE_LONGNAME, tarfile.GNUTYPE_LONGLINK),
    )
)


class BoundedTarInfo(tarfile.TarInfo):
    """For ``tarfile.open(tarinfo=…)``: a header that has others before it, of no absurd length."""

    @classmethod
    def frombuf(cls, buf: bytes | bytearray, encoding: str, errors: str) -> BoundedTarInfo:
        """As :meth:`tarfile.TarInfo.frombuf`.

        Raises:
            tarfile.ReadError: an extended header that is longer than 1 MiB.
        """
        made = super().frombuf(buf, encoding, errors)
        if made.type in _EXTENSIONS and made.size > _LONGEST:
            raise tarfile.ReadError(f"a header of {made.size:,} bytes")
        return made
