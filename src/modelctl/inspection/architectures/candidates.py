"""What an unknown file may be: the report of ``identify``."""

from __future__ import annotations

from collections.abc import Iterator
from shlex import quote
from typing import Any, NamedTuple

from ...core.notes import Note, info
from ...core.pages import Column, Line, Page, Table
from ..printed import Printed
from .index import Shape, index

# How many people want to read; JSON has all. And how wide their lines are.
_MOST, _WIDTH = 5, 80


class OtherShape(NamedTuple):
    """A tensor that both have, with other shapes."""

    name: str
    found: Shape
    expected: Shape


class Candidate(NamedTuple):
    """An architecture that the tensors under ``prefix`` may be.

    ``names`` are those of all models with these very tensors. ``score`` is ``matched`` (tensors
    that agree in name and shape) by all that are under the prefix or are missing there. What may
    well be otherwise is not missing: the head (``head`` is False where all of it is), auxiliary
    heads (``aux``), and ``num_batches_tracked``, which doesn't count at all. ``classes`` is the
    number of classes that the head is for. All three are None where the architecture has no such
    thing. ``args`` are the options with which torchvision builds it so (``num_classes=10``). Names
    are without the prefix; ``beside`` counts the tensors that are not under it. ``old``: the file
    has names that torchvision has given up, and plain ``load_state_dict`` knows them no more.
    """

    names: tuple[str, ...]
    score: float
    prefix: str
    classes: int | None
    head: bool | None
    aux: bool | None
    matched: int
    missing: tuple[str, ...]
    unexpected: tuple[str, ...]
    shapes: tuple[OtherShape, ...]
    beside: int
    old: bool
    args: tuple[str, ...]
    differences: tuple[str, ...]

    @property
    def shown_score(self) -> str:
        """Three digits; 1.000 only where all agrees."""
        return f"{self.score if self.score == 1 else min(self.score, 0.999):.3f}"

    @property
    def options(self) -> str:
        """What names it on the command line."""
        return "".join([f"--arch {self.names[0]}", *(f" --arch-arg {arg}" for arg in self.args)])

    def as_dict(self) -> dict[str, Any]:
        return {
            "arch": self.names[0],
            "score": self.score,
            "differences": list(self.differences),
            "same": list(self.names[1:]),
            "prefix": self.prefix,
            "num_classes": self.classes,
            "head": self.head,
            "aux": self.aux,
            "arch_args": list(self.args),
            "matched": self.matched,
            "missing": list(self.missing),
            "unexpected": list(self.unexpected),
            "mismatched": [
                {"name": name, "found": list(a), "expected": list(b)} for name, a, b in self.shapes
            ],
            "beside": self.beside,
        }


class Candidates(Printed, list[Candidate]):
    """The report of ``identify``: candidates, best first. ``source`` is the file, or None."""

    source: str | None = None

    @property
    def certain(self) -> Candidate | None:
        """The candidate that the file is without doubt, or None.

        All its tensors agree and none is missing, up to a prefix, the number of classes, a head
        or auxiliary heads that are not there, and BatchNorm's counters; nothing is beside it, and
        no other architecture agrees as well. Of models with the same tensors ``names[0]`` is the
        plainest, with floating weights; ``args`` are its options.
        """
        sure = [one for one in self if one.score == 1]
        return sure[0] if len(sure) == 1 and not (sure[0].beside or sure[0].old) else None

    def as_dict(self) -> dict[str, Any]:
        return {
            "source": self.source,
            "known": {"torchvision": index().version},
            "certain": self.certain is not None,
            "candidates": [one.as_dict() for one in self],
        }

    def page(self) -> Page:
        """The best, each with what differs, and what can be done with one that is certain."""
        columns = [Column("arch"), Column("score", "number"), Column("differences")]
        rows = [(" = ".join(c.names), c.shown_score, "; ".join(c.differences)) for c in self]
        return Page(self._lines(), Table(columns, rows), notes=list(self._notes()))

    def _lines(self) -> Iterator[Line]:
        from textwrap import wrap

        if not self:
            yield Line("no known architecture")
        for one in self[:_MOST]:
            yield Line(f"{one.shown_score}  {' = '.join(one.names)}", strong=True)
            for text in one.differences:
                folded = wrap(text, _WIDTH, initial_indent=" " * 7, subsequent_indent=" " * 9)
                yield from map(Line, folded)
        if len(self) > _MOST:
            yield Line(f"… and {len(self) - _MOST:,} more: --format json has all")

    def _notes(self) -> Iterator[Note]:
        if not self:
            known = sum(len(one.names) for one in index().architectures)
            yield info(f"known are the {known} models of torchvision {index().version}")
        best = self.certain
        if best is not None:
            source = "SRC" if self.source is None else quote(self.source)
            yield Note("hint", f"modelctl match {source} {best.options}")
            more = f"modelctl summary {source} --input-size … shows its output shapes and MACs"
            yield Note("hint", more)
