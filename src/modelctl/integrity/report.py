"""What verify found."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from ..core.notes import Note
from ..core.pages import Column, Line, Page, Table
from ..core.text import count, size, some
from ..errors import ModelctlError, RefusedError, UnreadableError
from ..inspection.printed import Printed
from .sections import Fault

_COLUMNS = (
    Column("finding"),
    Column("file", "name"),
    Column("where", "name"),
    Column("what"),
    Column("at byte", "count"),
)


class Salvaged(NamedTuple):
    """What was kept of a damaged checkpoint.

    Attributes:
        output: where it was written.
        kept: how many names of tensors.
        lost: the names of those that are not whole, and of optimizer states with such in them.
        nbytes: bytes written.
    """

    output: str
    kept: int
    lost: Sequence[str]
    nbytes: int

    @property
    def line(self) -> str:
        lost = f"{len(self.lost):,} lost: {some(self.lost, 8)}" if self.lost else "none lost"
        return f"{self.output}: {count(self.kept, 'tensor')} kept, {lost}"


@dataclass(frozen=True)
class Verified:
    """What was found in one checkpoint.

    Attributes:
        path: where it is.
        faults: what is wrong.
        notes: remarks: what could not be looked at, and more.
        tensors: how many names of tensors there are.
        nbytes: their bytes, of tied ones once.
        checksums: how many that the file records were compared.
        error: why it can't be read.
        salvaged: what was kept of it, where that was asked for.
    """

    path: str
    faults: Sequence[Fault] = ()
    notes: Sequence[Note] = ()
    tensors: int = 0
    nbytes: int = 0
    checksums: int = 0
    error: ModelctlError | None = None
    salvaged: Salvaged | None = None

    @property
    def sound(self) -> bool:
        """Whether nothing is wrong that can be known."""
        return self.error is None and not self.faults

    def rows(self) -> Iterator[tuple[Any, ...]]:
        if self.error is not None:
            offset = getattr(self.error, "offset", None)
            what = self.error.message.removeprefix(f"{self.path}: ")
            what = self.error.reason if isinstance(self.error, UnreadableError) else what
            yield "unreadable", self.path, "", what, offset
        for one in self.faults:
            yield one.id, one.path or self.path, one.where, one.text, one.offset

    @property
    def line(self) -> str:
        """The verdict."""
        if self.error is not None:
            return f"{self.path}: can't be read"
        read = f"{count(self.tensors, 'tensor')}, {size(self.nbytes)}"
        sums = f"{count(self.checksums, 'checksum')} compared" if self.checksums else "no checksums"
        found = count(len(self.faults), "finding") if self.faults else "sound"
        return f"{self.path}: {found} ({read}, {sums})"

    def as_dict(self) -> dict[str, Any]:
        return {
            "path": self.path,
            "sound": self.sound,
            "tensors": self.tensors,
            "bytes": self.nbytes,
            "checksums": self.checksums,
            "findings": [
                {
                    "id": one.id,
                    "where": one.where or None,
                    "text": one.text,
                    "path": one.path,
                    "offset": one.offset,
                }
                for one in self.faults
            ],
            "remarks": [note.as_dict() for note in self.notes],
            "error": None if self.error is None else self.error.as_dict(),
            "salvaged": None if self.salvaged is None else self.salvaged._asdict(),
        }


class Verify(list[Verified], Printed):
    """What was found in checkpoints, one after the other.

    ``modelctl.verify(path).check()`` raises where one is not sound.
    """

    @property
    def sound(self) -> bool:
        """Whether nothing is wrong with any that can be known."""
        return all(one.sound for one in self)

    @property
    def exit_code(self) -> int:
        """0: all are sound. 1: something is wrong with one. 2: one can't be read."""
        if any(one.error is not None for one in self):
            return 2
        return int(not self.sound)

    def check(self) -> None:
        """Nothing, where all are sound.

        Raises:
            RefusedError: one is not; says what is wrong first.
        """
        for one in self:
            for _, path, where, what, _ in one.rows():
                error = f"{path}, {where}: {what}" if where else f"{path}: {what}"
                raise RefusedError(error, hint="'modelctl verify' says all")

    def as_dict(self) -> dict[str, Any]:
        return {"sound": self.sound, "files": [one.as_dict() for one in self]}

    def page(self) -> Page:
        table = Table(_COLUMNS, [row for one in self for row in one.rows()], most=200)
        notes = [note for one in self for note in one.notes]
        hints = [one.error.hint for one in self if one.error is not None and one.error.hint]
        notes += [Note("hint", hint) for hint in hints]
        return Page(self._body(table), table, notes=list(dict.fromkeys(notes)))

    def _body(self, table: Table) -> Iterator[Line | Table]:
        if table.rows:
            yield table
            yield Line()
        for one in self:
            yield Line(one.line, strong=True)
            if one.salvaged is not None:
                yield Line(one.salvaged.line, strong=True)
