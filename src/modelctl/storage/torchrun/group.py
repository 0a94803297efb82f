"""Files that several ranks write together: one has them, all fill them.

Each rank has the same layout. The first makes the files, writes what was made for them and, at the
end, puts them in place; what is copied is shared out, each rank a stretch of each file. No tensor
goes from rank to rank: all see the same file system.
"""

from __future__ import annotations

import os
import zlib
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from ...errors import WriteError
from ..layout import FileLayout, Layout, Made, Piece, Segment
from ..locks import Lock
from ..sink import Checker, Progress, Sink
from ..source import FileSource
from ..staging import FileGroup, staged_file, staged_files
from ..targets import PathLike, resolve_target
from .ranks import LostRankError, Ranks


@contextmanager
def shared(
    ranks: Ranks,
    path: PathLike,
    *,
    is_folder: bool,
    overwrite: bool = False,
    sources: Iterable[FileSource] = (),
) -> Iterator[SharedGroup]:
    """Files that the ranks write together; they stand once the block ends without an error for
    all of them.

    Raises:
        WriteError: as :func:`staged_file` and :func:`staged_files`, on the first rank.
        LostRankError: one has gone. Nothing is left of what it was writing.
    """
    if ranks.is_first:
        stage = staged_files if is_folder else staged_file
        with stage(path, overwrite=overwrite, sources=sources) as group:
            yield SharedGroup(ranks, group)
        ranks.exchange()  # they stand
        return
    written: list[str] = []
    try:
        yield SharedGroup(ranks, None, written)
        ranks.exchange()
    except (LostRankError, KeyboardInterrupt):
        target = resolve_target(path, is_folder=is_folder)
        places = [(target.parent, target.name)]
        if is_folder:
            places += [(target, name) for name in ("", *written)]
        for folder, name in places:
            Lock(folder, name, path).remove_of_dying()
        raise


class SharedGroup:
    """Files on their way into one folder, as :class:`FileGroup`, of several ranks.

    Attributes:
        names: what the folder holds already.
    """

    def __init__(self, ranks: Ranks, own: FileGroup | None, written: list[str] | None = None):
        """``own`` is the group itself, which the first rank has; ``written`` gets the names of
        its files."""
        self._ranks, self._own = ranks, own
        self._written = [] if written is None else written
        self.names: list[str] = ranks.exchange(None if own is None else own.names)[0]

    def carry_out(self, layout: Layout, progress: Progress | None = None) -> None:
        """Write all files of a layout.

        Args:
            progress: called with the number of bytes that were written since the last call, as
                far as one rank can tell.

        Raises:
            UnreadableError: what they are made from can't be read.
            WriteError: there is no room for them; the layout is wrong, or another one elsewhere.
        """
        if self._own is not None:
            self._own.check(layout)
        if len({*self._ranks.exchange(_sum(layout))}) > 1:
            raise WriteError(
                "the ranks see different files: nothing was written",
                hint="all of them need the same sources and the same output folder, on a shared "
                "file system",
            )
        with Checker() as checker:
            for file in layout.files:
                self._carry_out(file, checker, progress)
        self._ranks.exchange()  # all is compared
        if self._own is not None:
            self._own.remove_after(layout.superseded)

    def _carry_out(self, file: FileLayout, checker: Checker, progress: Progress | None) -> None:
        ranks = self._ranks
        share = [*_share(file, ranks.rank, ranks.size)]
        sums: dict[int, int] = {}
        if self._own is None:
            self._written.append(file.name)
            path = ranks.exchange()[0]
            fd = os.open(path, os.O_WRONLY | getattr(os, "O_BINARY", 0))
            try:
                Sink(fd, Path(path)).put_segments(share, sums, checker)
                os.fsync(fd)  # what another machine wrote, the first can't bring to the disk
            finally:
                os.close(fd)
            ranks.exchange(_by_position(file, share, sums))
            return
        ahead = None if progress is None else _Ahead(progress, ranks.size, file.nbytes)
        with self._own.open(file.name, ahead) as sink:
            os.ftruncate(sink.fd, file.nbytes)
            sink.begin(file.nbytes)
            ranks.exchange(str(sink.path))
            waiting = sink.put_segments(share, sums, checker)
            for found in ranks.exchange(_by_position(file, share, sums)):
                for number, crc in found.items():
                    segment = file.segments[number]
                    assert isinstance(segment, Piece)
                    sums[id(segment.storage)] = crc
            sink.put_late(waiting, sums)
            sink.position = file.nbytes
        if ahead is not None:
            ahead.end()


def _share(file: FileLayout, rank: int, size: int) -> Iterator[Segment]:
    """What a rank writes of a file: pieces that are one after the other, about as many bytes for
    each rank; what is made, the first."""
    whole = max(1, file.nbytes)
    for one in file.segments:
        whose = 0
        if isinstance(one, Piece):
            whose = min(size - 1, (2 * one.offset + one.nbytes) * size // (2 * whole))
        if whose == rank:
            yield one


def _by_position(
    file: FileLayout, share: Sequence[Segment], sums: dict[int, int]
) -> dict[int, int]:
    """The checksums that were made of a share, by the number of a segment of that storage."""
    mine = {id(one.storage) for one in share if isinstance(one, Piece)}
    return {
        number: sums[id(one.storage)]
        for number, one in enumerate(file.segments)
        if isinstance(one, Piece) and id(one.storage) in sums and id(one.storage) in mine
    }


def _sum(layout: Layout) -> int:
    """A checksum of where everything in a layout stands, and of what it is, as far as that is
    known before it is read: of copies of a source on several machines one may be older."""
    crc = 0
    for file in layout.files:
        said = [f"{file.name!r} {file.nbytes}"]
        for one in file.segments:
            what: object = None
            if isinstance(one, Made):
                what = zlib.crc32(one.data)
            elif isinstance(one, Piece):
                what = one.storage.crc32
            said.append(f"{type(one).__name__} {one.offset} {one.nbytes} {what}")
        crc = zlib.crc32("\n".join(said).encode(errors="surrogatepass"), crc)
    return crc


class _Ahead:
    """Progress of several ranks, told by one: what it has done, the others have as well."""

    def __init__(self, progress: Progress, size: int, nbytes: int) -> None:
        self._progress, self._size, self._left = progress, size, nbytes

    def __call__(self, done: int) -> None:
        more = min(done * self._size, self._left)
        self._left -= more
        self._progress(more)

    def end(self) -> None:
        """All are done."""
        if self._left:
            self._progress(self._left)
