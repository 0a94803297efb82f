"""How identify is printed."""

from __future__ import annotations

from collections.abc import Sequence
from textwrap import wrap
from typing import Any

from ...core.checkpoint import Checkpoint
from ...inspection.architectures.identify import Candidate, certain
from ...inspection.architectures.index import index
from ..output import Column, Output

# How many people want to read; JSON has all. And how wide their lines are.
_MOST, _WIDTH = 5, 80


def print_candidates(out: Output, ckpt: Checkpoint, found: Sequence[Candidate]) -> None:
    if out.is_json:
        path = ckpt.origin.path if ckpt.origin else None
        known = {"torchvision": index().version}
        rows = [_candidate(one) for one in found]
        sure = certain(found) is not None
        out.json("identify", {"source": path, "known": known, "certain": sure, "candidates": rows})
        return
    if not out.is_table:
        columns = [Column("arch"), Column("score", True), Column("differences")]
        out.table(
            columns,
            [[" = ".join(one.names), _score(one), "; ".join(one.differences)] for one in found],
        )
        return
    if not found:
        out.line("no known architecture")
        out.note(f"known are the {_known()} models of torchvision {index().version}")
    for one in found[:_MOST]:
        out.line(f"{_score(one)}  {' = '.join(one.names)}", "bold")
        for text in one.differences:
            out.lines(wrap(text, _WIDTH, initial_indent=" " * 7, subsequent_indent=" " * 9))
    if len(found) > _MOST:
        out.line(f"… and {len(found) - _MOST:,} more: --format json has all")
    best = certain(found)
    if best is not None:
        args = "".join(f" --arch-arg {arg}" for arg in best.args)
        out.note(f"hint: modelctl match SRC --arch {best.names[0]}{args}")
        out.note("hint: modelctl summary SRC --input-size … shows its output shapes and MACs")


def _score(one: Candidate) -> str:
    """Three digits; 1.000 only where all agrees."""
    return f"{one.score if one.score == 1 else min(one.score, 0.999):.3f}"


def _known() -> int:
    return sum(len(one.names) for one in index().architectures)


def _candidate(one: Candidate) -> dict[str, Any]:
    return {
        "arch": one.names[0],
        "score": one.score,
        "differences": list(one.differences),
        "same": list(one.names[1:]),
        "prefix": one.prefix,
        "num_classes": one.classes,
        "head": one.head,
        "aux": one.aux,
        "arch_args": list(one.args),
        "matched": one.matched,
        "missing": list(one.missing),
        "unexpected": list(one.unexpected),
        "mismatched": [
            {"name": name, "found": list(a), "expected": list(b)} for name, a, b in one.shapes
        ],
        "beside": one.beside,
    }
