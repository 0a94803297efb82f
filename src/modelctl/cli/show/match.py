"""How match is printed, and its maps written."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ...core.text import printable
from ...errors import ModelctlError, UsageError
from ...inspection.architectures.index import Shape
from ...inspection.matching.match import Fit, Match, fold
from ...inspection.matching.pairing import Unclear
from ..output import Column, Output, count, shape

# How many people want to read; JSON has all. And how wide their lines are.
_MOST, _MOST_ROWS, _MOST_MAPS, _WIDTH = 5, 30, 20, 80


def print_match(
    out: Output, src: str, target: str, found: Match, written: Path | None = None
) -> None:
    if out.is_json:
        out.json("match", _match(src, target, found))
        return
    before = found.before
    rows = _rows(before)
    columns = [Column("what"), Column("name", style="cyan"), Column("tensors", True), Column("")]
    if not out.is_table:
        out.table([*columns[:3], Column("shapes")], rows)
        return
    if rows:
        out.table(columns, rows[:_MOST_ROWS])
        _rest(out, len(rows) - _MOST_ROWS)
        out.line()
    out.line(_verdict(before), "bold")
    if found.maps:
        _print_maps(out, found)
        them = "it" if len(found.maps) == 1 else "them"
        out.line(f"with {them}: {_verdict(found.after)}", "bold")
        left = _rows(found.after)
        for what, name, n, shapes in left[:_MOST]:
            out.line(f"  {what} {name}  {shapes or count(int(n), 'tensor')}")
        _rest(out, len(left) - _MOST)
    for one in found.unclear[:_MOST]:
        out.line(f"not clear, not renamed: {unclear_text(one)}")
    _rest(out, len(found.unclear) - _MOST)
    if found.more:
        out.line(f"not clear: it would take {count(found.more, 'more map')}")
    if found.options:
        options = " ".join(f"--arch-arg {option}" for option in found.options)
        out.note(f"hint: as the file has it: {options}")
    if found.maps and written is None:
        out.note("hint: --write-map FILE writes them for modelctl rename SRC --map-file FILE")


def _rows(fit: Fit) -> list[list[str]]:
    """What does not fit: what it is, the name, how many tensors, and shapes."""
    rows = [
        [what, name, str(n), ""]
        for what, names, among in (
            ("missing", fit.missing, fit.expected),
            ("unexpected", fit.unexpected, fit.found),
        )
        for name, n in fold(names, among)
    ]
    for one in fit.mismatched:
        rows.append(
            ["mismatched", one.name, "1", f"{_shape(one.found)}, not {_shape(one.expected)}"]
        )
    return rows


def _print_maps(out: Output, found: Match) -> None:
    out.line()
    out.line(f"{count(len(found.maps), 'map')} for rename:")
    for one in found.maps[:_MOST_MAPS]:
        old, _, new = one.map.rpartition("=")
        why = f"{count(one.tensors, 'tensor')}, by {' and '.join(one.why)}"
        line = f"  {old}={new}"
        if len(line) + len(why) + 4 <= _WIDTH:
            out.line(f"{line}  ({why})")
        elif len(line) <= _WIDTH:
            out.lines([line, f"    ({why})"])
        else:
            out.lines([f"  {old}", f"    ={new}", f"    ({why})"])
    _rest(out, len(found.maps) - _MOST_MAPS, "; --write-map FILE writes all")


def _rest(out: Output, n: int, where: str = ": --format json has all") -> None:
    if n > 0:
        out.line(f"… and {n:,} more{where}")


def _verdict(fit: Fit) -> str:
    if fit.fits:
        return f"fits: load_state_dict takes all {count(fit.matched, 'tensor')}"
    counts = [
        f"{len(names):,} {what}"
        for names, what in (
            (fit.missing, "missing"),
            (fit.unexpected, "unexpected"),
            (fit.mismatched, "mismatched"),
        )
        if names
    ]
    return f"does not fit: {', '.join(counts)}; {fit.matched:,} fit"


def _shape(dims: Shape | None) -> str:
    return "no tensor" if dims is None else shape(dims)


def unclear_text(one: Unclear) -> str:
    """Which could be which, in a line."""
    if one.found == ("",):
        return f"all names may get the prefix {_some(one.expected, ' or ')}"
    if one.expected == ("",):
        return f"the prefix may be {_some(one.found, ' or ')}"
    each = " each" if len(one.found) > 1 else ""
    return f"{_some(one.found)} could{each} be {_some(one.expected, ' or ')}"


def _some(names: Sequence[str], last: str = ", ") -> str:
    if len(names) > _MOST:
        return ", ".join(names[:_MOST]) + f" … ({len(names)})"
    return last.join(names)


def _match(src: str, target: str, found: Match) -> dict[str, Any]:
    return {
        "source": src,
        "like": target,
        **_fit(found.before),
        "maps": [
            {"map": one.map, "tensors": one.tensors, "why": list(one.why)} for one in found.maps
        ],
        "after": _fit(found.after),
        "unclear": [
            {"found": list(one.found), "expected": list(one.expected)} for one in found.unclear
        ],
        "more_maps": found.more,
        "arch_args": found.options,
    }


def _fit(fit: Fit) -> dict[str, Any]:
    def dims(shape: Shape | None) -> list[int] | None:
        return None if shape is None else list(shape)

    return {
        "fits": fit.fits,
        "matched": fit.matched,
        "missing": [{"name": name, "shape": dims(s)} for name, s in fit.missing.items()],
        "unexpected": [{"name": name, "shape": dims(s)} for name, s in fit.unexpected.items()],
        "mismatched": [
            {"name": name, "found": dims(a), "expected": dims(b)} for name, a, b in fit.mismatched
        ],
    }


def write_maps(out: Output, path: Path, what: str, found: Match) -> None:
    """Write the maps for ``rename --map-file``; what is not clear as comments."""
    if not found.maps:
        out.note(f"{path} is not written: " + ("all fits" if found.before.fits else "no map helps"))
        return
    maps = [one.map for one in found.maps]
    if any(not one.isprintable() or one != one.strip() or one[0] == "#" for one in maps):
        raise UsageError(
            f"{path} is not written: a line of text can't hold every map",
            hint="--format json has them",
        )
    notes = [f"not clear: {unclear_text(one)}" for one in found.unclear]
    lines = [f"{what}, by modelctl match", *notes]
    lines = [*(f"# {printable(line)}" for line in lines), *maps]
    try:
        with open(path, "x", encoding="utf-8") as file:
            file.write("".join(f"{line}\n" for line in lines))
    except FileExistsError:
        raise ModelctlError(
            f"{path} exists", hint="name another file, or remove it first"
        ) from None
    out.note(f"{path}: {count(len(found.maps), 'map')} written")
