"""What scanning found: a verdict for each file, and where what it rests on lies."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from ..core.pages import Column, Line, Page, Table
from ..core.text import count
from ..errors import RefusedError
from ..inspection.printed import Printed
from .rules import RULES
from .walk import Problem, Sighting

Verdict = Literal["dangerous", "malformed", "unscanned", "suspicious", "clean"]
VERDICTS: tuple[Verdict, ...] = ("dangerous", "malformed", "unscanned", "suspicious", "clean")
_SARIF = {"dangerous": "error", "malformed": "error", "unscanned": "warning", "suspicious": "note"}
_COLUMNS = (
    Column("verdict"),
    Column("file", "name"),
    Column("member", "name"),
    Column("finding"),
    Column("what"),
    Column("at byte", "count"),
)


@dataclass(frozen=True)
class Scanned:
    """What was found in one file.

    Attributes:
        path: the file.
        sightings: what its pickles would do, by the member that they are.
        problems: what could not be looked at.
        pickles: how many were read.
    """

    path: str
    sightings: Sequence[Sighting] = ()
    problems: Sequence[Problem] = ()
    pickles: int = 0

    @property
    def verdict(self) -> Verdict:
        """The worst that there is to say of it."""
        levels: set[str] = {one.finding.level for one in self.sightings}
        levels.update(one.kind for one in self.problems)
        return next((one for one in VERDICTS if one in levels), "clean")

    def rows(self) -> Iterator[tuple[Any, ...]]:
        """A row for each finding and problem, the worst first."""
        found: list[tuple[Any, ...]] = [
            (
                one.finding.level,
                self.path,
                one.member,
                one.finding.id,
                one.finding.what + (f" ({one.finding.times:,}x)" if one.finding.times > 1 else ""),
                one.finding.offset,
            )
            for one in self.sightings
        ]
        found += [
            (one.kind, self.path, one.member, one.kind, one.text, one.offset)
            for one in self.problems
        ]
        return iter(sorted(found, key=lambda row: VERDICTS.index(row[0])))

    def as_dict(self) -> dict[str, Any]:
        return {
            "path": self.path,
            "verdict": self.verdict,
            "pickles": self.pickles,
            "findings": [
                {
                    "level": one.finding.level,
                    "id": one.finding.id,
                    "member": one.member or None,
                    "offset": one.finding.offset,
                    "opcode": one.finding.opcode or None,
                    "global": one.finding.name or None,
                    "text": one.finding.what,
                    "times": one.finding.times,
                }
                for one in self.sightings
            ],
            "problems": [
                {
                    "kind": one.kind,
                    "member": one.member or None,
                    "offset": one.offset,
                    "text": one.text,
                }
                for one in self.problems
            ],
        }


class Scan(list[Scanned], Printed):
    """What was found in files, one after the other.

    ``scan(path).check()`` before ``torch.load`` raises for what is not to be loaded.
    """

    @property
    def verdict(self) -> Verdict:
        """The worst of all of them."""
        levels = {one.verdict for one in self}
        return next((one for one in VERDICTS if one in levels), "clean")

    @property
    def findings(self) -> list[Sighting]:
        """Those of all files."""
        return [sighting for one in self for sighting in one.sightings]

    def exit_code(self, *, strict: bool = False) -> int:
        """1 where something is dangerous (or, to be ``strict``, suspicious), 2 where something is
        malformed or was not scanned, else 0 (docs/safety.md#verdicts)."""
        if self.verdict == "dangerous":
            return 1
        if self.verdict in ("malformed", "unscanned") or not self:
            return 2
        return int(strict and self.verdict == "suspicious")

    def check(self, *, strict: bool = False) -> None:
        """Nothing, where nothing speaks against loading these files.

        Raises:
            RefusedError: unpickling one would run something, or one can't be read for sure; with
                ``strict`` also where one builds somebody's own classes.
        """
        if self.exit_code(strict=strict):
            row = next((row for one in self for row in one.rows()), None)
            what = f"{row[1]}: {row[0]}: {row[4]}" if row else "nothing was scanned"
            raise RefusedError(what, hint="'modelctl scan' says where")

    def as_dict(self) -> dict[str, Any]:
        return {"verdict": self.verdict, "files": [one.as_dict() for one in self]}

    def page(self) -> Page:
        rows = [row for one in self for row in one.rows()]
        table = Table(_COLUMNS, rows, most=200)
        return Page(self._body(table), table)

    def _body(self, table: Table) -> Iterator[Line | Table]:
        if table.rows:
            yield table
            yield Line()
        read = f"{count(len(self), 'file')}, {count(sum(one.pickles for one in self), 'pickle')}"
        bad = {level: sum(one.verdict == level for one in self) for level in VERDICTS[:-1]}
        said = ", ".join(f"{number:,} {level}" for level, number in bad.items() if number)
        yield Line(f"{read}: {said or 'no finding'}", strong=True)

    def as_sarif(self, version: str) -> dict[str, Any]:
        """As SARIF 2.1.0 (OASIS), which code hosts show beside the files."""
        results = []
        for one in self:
            for level, _, member, id, what, offset in one.rows():
                place: dict[str, Any] = {"artifactLocation": {"uri": one.path}}
                if offset is not None and not member:
                    place["region"] = {"byteOffset": offset, "byteLength": 1}
                where = f"{one.path}, {member}" if member else one.path
                results.append(
                    {
                        "ruleId": id,
                        "level": _SARIF[level],
                        "message": {"text": f"{where}: {what}"},
                        "locations": [{"physicalLocation": place}],
                        "properties": {"verdict": level, "member": member, "offset": offset},
                    }
                )
        rules = [
            {
                "id": rule.id,
                "shortDescription": {"text": rule.short},
                "defaultConfiguration": {"level": _SARIF[rule.level]},
            }
            for rule in RULES
        ]
        driver = {"name": "modelctl", "version": version, "rules": rules}
        return {
            "$schema": "https://json.schemastore.org/sarif-2.1.0.json",
            "version": "2.1.0",
            "runs": [{"tool": {"driver": driver}, "results": results}],
        }
