"""What an edit did to a file: the report of every command that writes."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from shlex import quote
from typing import Any, NamedTuple

from ..core.notes import Note, info
from ..core.pages import Column, Line, Page, Table
from ..core.text import size
from .changes import Plan, fold_trains

# How many renames people read, and how many names of other changes.
_EXAMPLES, _MOST = 3, 6


@dataclass(frozen=True)
class EditReport:
    """One file, edited: from where, to where, what became of its tensors.

    Attributes:
        output: where the result is, or would be; None where no place was named.
        files_written, bytes_written: None in a dry run, 0 where there was nothing to write.
        by_hand: the lines of Python that apply a freeze record without modelctl.
    """

    source: str | None
    output: str | None
    dry_run: bool
    plan: Plan
    notes: Sequence[Note] = ()
    files_written: int | None = None
    bytes_written: int | None = None
    by_hand: Sequence[str] = ()

    @property
    def written(self) -> list[str]:
        """The output, where it was written."""
        return [str(self.output)] if self.files_written else []

    def as_dict(self) -> dict[str, Any]:
        plan = self.plan
        return {
            "source": self.source,
            "output": self.output,
            "dry_run": self.dry_run,
            "kept": plan.kept,
            "renamed": [list(pair) for pair in plan.renamed],
            "removed": plan.removed,
            "dropped": plan.dropped,
            "added": plan.added,
            "trains": [{"name": r.name, "before": r.before, "after": r.after} for r in plan.trains],
            "notes": [str(note) for note in self.notes],
            "files_written": self.files_written,
            "bytes_written": self.bytes_written,
            "remarks": [note.as_dict() for note in self.notes],
        }

    def page(self) -> Page:
        """The counts, a few names of each change, and which parameters train now."""
        trains = self._trains()
        data = Table(_COLUMNS, [self.row()])
        notes = [note for note in self.notes if note.level != "info"]
        if self.by_hand:
            notes.append(info("plain torch ignores the record; by hand it is applied so:"))
            notes += [info(f"    {line}") for line in self.by_hand]
        tables = [data, trains] if trains.rows else [data]
        return Page(self._body(trains), data, tables, notes)

    def row(self) -> tuple[Any, ...]:
        """The report in a row."""
        plan = self.plan
        changed = [len(names) for names in (plan.removed, plan.dropped, plan.added)]
        said = "; ".join(note.text for note in self.notes if note.level == "info")
        written = self.files_written, self.bytes_written
        renamed = len(plan.renamed)
        return (self.source, self.output, plan.kept, renamed, *changed, *written, said)

    def _body(self, trains: Table) -> Iterator[Line | Table]:
        plan = self.plan
        end = f"{size(self.bytes_written)} written" if self.bytes_written else "nothing to write"
        if (self.files_written or 0) > 1:
            end = f"{self.files_written} files, {end}"
        if self.dry_run:
            end = "dry run, nothing written"
        counts = f"{plan.kept} kept, {len(plan.renamed)} renamed, {len(plan.removed)} removed"
        output = self.output or "(no output named)"
        yield Line(f"{self.source} -> {output}   {counts}; {end}", strong=True)
        for note in self.notes:
            if note.level == "info":
                yield Line(f"  {note.text}")
        for i, (old, new) in enumerate(plan.renamed[:_EXAMPLES]):
            yield Line(f"  {'renamed:' if i == 0 else '        '} {old} -> {new}")
        if len(plan.renamed) > _EXAMPLES:
            yield Line(f"           … and {len(plan.renamed) - _EXAMPLES} more")
        for what, names in (
            ("removed", plan.removed),
            ("left out", plan.dropped),
            ("added", plan.added),
        ):
            if names:
                rest = ", …" if len(names) > _MOST else ""
                yield Line(f"  {what}: {', '.join(names[:_MOST])}{rest}")
        if trains.rows:
            yield Line()
            yield trains

    def _trains(self) -> Table:
        columns = [Column("parameter"), Column("tensors", "count")]
        columns += [Column("grad before", "answer"), Column("after", "answer")]
        rows = [(r.name, r.tensors, r.before, r.after) for r in fold_trains(self.plan.trains)]
        return Table(columns, rows)


_COLUMNS = (
    *(Column("source"), Column("output"), Column("kept", "count"), Column("renamed", "count")),
    *(Column("removed", "count"), Column("left out", "count"), Column("added", "count")),
    *(Column("files", "count"), Column("size", "bytes"), Column("notes")),
)


class EditReports(list[EditReport]):
    """The reports of several files."""

    @property
    def written(self) -> list[str]:
        """The outputs that were written."""
        return [path for one in self for path in one.written]

    def as_dict(self) -> dict[str, Any]:
        """One file's by itself, several as ``files``."""
        dicts = [one.as_dict() for one in self]
        return dicts[0] if len(dicts) == 1 else {"files": dicts}

    def page(self) -> Page:
        pages = [one.page() for one in self]
        if len(pages) == 1:
            return pages[0]
        body = [part for page in pages for part in page.body]
        notes = [note for page in pages for note in page.notes]
        return Page(body, Table(_COLUMNS, [one.row() for one in self]), notes=notes)


class Part(NamedTuple):
    """A part of a checkpoint, in a file of its own; None where nothing was written."""

    part: str
    output: str | None
    tensors: int
    bytes_written: int | None


@dataclass(frozen=True)
class SplitReport:
    """A checkpoint, taken apart."""

    source: str
    output: str | None
    dry_run: bool
    parts: Sequence[Part]
    notes: Sequence[Note] = ()

    @property
    def written(self) -> list[str]:
        """The files of the parts that were written."""
        return [str(one.output) for one in self.parts if one.output is not None]

    def as_dict(self) -> dict[str, Any]:
        return {
            "source": self.source,
            "output": self.output,
            "dry_run": self.dry_run,
            "notes": [str(note) for note in self.notes],
            "parts": [part._asdict() for part in self.parts],
            "remarks": [note.as_dict() for note in self.notes],
        }

    def page(self) -> Page:
        """A row a part, and what puts them together again."""
        columns = [Column("part"), Column("tensors", "count"), Column("size", "bytes")]
        rows = [(p.part, p.tensors, p.bytes_written, p.output) for p in self.parts]
        table = Table([*columns, Column("file", none="(dry run)")], rows)
        notes = list(self.notes)
        if not self.dry_run and any(part.part == "model" for part in self.parts):
            options = " ".join(f"--{one.part} {quote(str(one.output))}" for one in self.parts)
            notes.append(info(f"together again: modelctl merge {options} -o whole.pt"))
        return Page([table], table, notes=notes)
