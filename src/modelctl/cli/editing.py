"""What every editing command does around its edit: sources, outputs, dry runs, the report."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .. import files
from ..core.checkpoint import Checkpoint
from ..core.notes import Note, info, warning
from ..errors import ModelctlError, UsageError
from ..formats.destination import destination
from ..inspection.changes import Plan, fold_trains, plan
from ..surgery.freeze import by_hand
from ..surgery.recipe import history_line, parse_recipe, run
from .output import Column, Output, size

_SUFFIX = {"torch": ".pt", "safetensors": ".safetensors"}
_EXAMPLES = 3


@dataclass(frozen=True)
class Job:
    """One run of an editing command: where its outputs go, and how it reports."""

    command: str
    output: str | None = None
    in_place: bool = False
    to: str | None = None
    max_shard_size: str | None = None
    overwrite: bool = False
    dry_run: bool = False
    history: bool = True
    key: str | None = None
    follow_symlinks: bool = False
    format: str = "table"
    color: str = "auto"
    quiet: bool = False

    def run(self, paths: Sequence[Path], options: dict[str, Any]) -> None:
        """Edit each source. With ``edits`` among the options, they are a recipe."""
        edits = options.get("edits") or [(self.command, options)]
        lines = [history_line(name, values) for name, values in edits]
        sources = [str(path) for path in paths]
        self.check(sources)
        if len(sources) > 1 and not self.dry_run:  # look at all before the first is written
            for source in sources:
                with self.edited(source, edits) as (before, after):
                    self.check_target(after, self.target(source, len(sources), before))
        reports = []
        for source in sources:
            with self.edited(source, edits) as (before, after):
                target = self.target(source, len(sources), before)
                reports.append(self.finish(before, after, target, lines))
        self.print_json(reports)

    @contextmanager
    def edited(
        self, source: str, edits: list[tuple[str, dict[str, Any]]]
    ) -> Iterator[tuple[Checkpoint, Checkpoint]]:
        """A source, opened, and what the edits make of it."""
        with files.open(source, key=self.key, follow_symlinks=self.follow_symlinks) as before:
            yield before, run(before, edits)

    def print_json(self, reports: list[dict[str, Any]]) -> None:
        """One document, however many files."""
        out = Output(self.format, self.color, self.quiet)
        if out.is_json:
            out.json(self.command, reports[0] if len(reports) == 1 else {"files": reports})

    def check(self, sources: list[str]) -> None:
        """Raises UsageError unless exactly one place for the output is named."""
        if self.output is not None and self.in_place:
            raise UsageError("-o and --in-place: one of them")
        if self.output is None and not self.in_place and not self.dry_run:
            raise UsageError(
                "where does the result go?", hint="-o FILE, --in-place, or --dry-run to look first"
            )
        if len(sources) > 1 and self.max_shard_size is not None:
            raise UsageError(
                "shards of several sources: edit them one by one, each with its own -o"
            )
        if len(sources) > 1 and self.output is not None and not os.path.isdir(self.output):
            raise UsageError(
                f"{len(sources)} sources need a folder to go to, {self.output} is none",
                hint=f"mkdir -p {self.output}",
            )
        if len(sources) > 1 and self.output is not None:
            names = [self.named(source) for source in sources]
            twice = next((name for name in names if names.count(name) > 1), None)
            if twice is not None:
                raise UsageError(
                    f"{names.count(twice)} sources would go to {os.path.join(self.output, twice)}",
                    hint="edit them one by one, each with its own -o",
                )

    def target(self, source: str, of: int, ckpt: Checkpoint) -> tuple[str, str | None]:
        """The output for a source, and its format where the suffix does not say it."""
        sharded = ckpt.origin is not None and ckpt.origin.format == "sharded"
        if self.in_place and sharded:
            return ckpt.origin.path if ckpt.origin else source, self.to
        if self.in_place or self.output is None:
            format = ckpt.origin.format if ckpt.origin else "torch"
            says = next((f for f, suffix in _SUFFIX.items() if source.endswith(suffix)), None)
            if self.in_place and self.to is not None and says not in (None, self.to):
                raise UsageError(
                    f"in place the file keeps its name, which would lie about {self.to}",
                    hint=f"-o {Path(source).with_suffix(_SUFFIX.get(self.to, '')).name}",
                )
            return source, self.to or (format if format in _SUFFIX else "torch")
        if of == 1:
            return self.output, self.to
        return os.path.join(self.output, self.named(source)), self.to

    def shard_size(self, before: Checkpoint) -> str | None:
        """In place, shards stay about as big as they are."""
        if not self.in_place or before.origin is None or before.origin.format != "sharded":
            return None
        sizes: dict[object, dict[object, int]] = {}
        for ref in before.state_dict().values():
            for piece in ref.storage.runs() or ():
                sizes.setdefault(piece.source, {})[piece.offset] = piece.nbytes
        return str(max((sum(of.values()) for of in sizes.values()), default=1) or 1)

    def named(self, source: str) -> str:
        """The name of a source's output in a folder."""
        name = Path(source).name
        if self.to is not None:
            return Path(name).stem + _SUFFIX.get(self.to, "")
        if not name.endswith((".pt", ".pth", ".bin", ".ckpt", ".safetensors")):
            return name + ".pt"
        return name

    def check_target(self, after: Checkpoint, target: tuple[str, str | None]) -> None:
        """Raises what saving would raise, as far as that can be known before."""
        path, to = target
        files.check_losses(after, path, to, self.max_shard_size)
        folder = os.path.dirname(os.path.abspath(path))
        if not os.path.isdir(folder):
            raise ModelctlError(
                f"{path}: there is no directory {folder}", hint=f"mkdir -p {folder}"
            )

    def finish(
        self,
        before: Checkpoint,
        after: Checkpoint,
        target: tuple[str, str | None],
        lines: list[str],
    ) -> dict[str, Any]:
        """Save (or only check that it could be), and report."""
        path, to = target
        out = Output(self.format, self.color, self.quiet)
        unchanged = after.root is before.root and self.command != "convert"
        saved: files.Saved | None = None
        if self.dry_run:
            if self.output is not None or self.in_place:
                self.check_target(after, target)
                if os.path.exists(path) and not (self.overwrite or self.in_place):
                    out.note(f"warning: {path} exists already: without --overwrite it is kept")
        elif not (unchanged and self.in_place):
            with out.progress(os.path.basename(path)) as progress:
                saved = files.save(
                    after,
                    path,
                    to=to,
                    overwrite=self.overwrite or self.in_place,
                    max_shard_size=self.max_shard_size or self.shard_size(before),
                    history=lines if self.history and not unchanged else [],
                    progress=progress,
                )
        shown = None if self.dry_run and self.output is None and not self.in_place else path
        if saved is not None and saved.path != Path(path):  # into a folder
            shown = str(saved.path)
        found = plan(before, after)
        report = _data(before, shown, found, saved, self.dry_run)
        notes = found.notes
        if saved is not None:
            notes += _about_output(after, saved, self.in_place)
        report["notes"] = [str(note) for note in notes]
        if not out.is_json:
            _print(out, before, report, notes)
            _print_trains(out, found)
        recorded = self.command == "freeze" and not after.sections.model().is_module
        if recorded and saved is not None and out.is_table:
            place = destination(path, to, self.max_shard_size)
            if place.shards is None:
                out.note("plain torch ignores the record; by hand it is applied so:")
                for line in by_hand(after, path, safe=place.format.string_metadata):
                    out.note("    " + line)
        return report


def read_recipe(path: Path) -> list[tuple[str, dict[str, Any]]]:
    """The edits of a recipe file, checked.

    Raises:
        UsageError: not TOML, or not a recipe.
    """
    import sys

    if sys.version_info >= (3, 11):
        import tomllib
    else:
        import tomli as tomllib

    try:
        document = tomllib.loads(path.read_text("utf-8"))
    except OSError as e:
        raise ModelctlError(f"{path}: {e.strerror}") from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as e:
        raise UsageError(f"{path}: not TOML: {e}") from None
    edits = document.pop("edit", None)
    if document or not isinstance(edits, list) or not edits:
        extra = f", not {', '.join(map(repr, document))}" if document else ""
        raise UsageError(
            f"{path}: a recipe is a list of [[edit]] tables{extra}",
            hint='[[edit]]\\ndo = "strip-prefix"'.replace("\\n", "  "),
        )
    for edit in edits:
        if isinstance(edit, dict) and isinstance(edit.get("map-file"), str) and "map" not in edit:
            edit["map"] = read_maps(path.parent / edit.pop("map-file"))
    try:
        return parse_recipe(edits)
    except UsageError as e:
        raise UsageError(f"{path}: {e.message}", hint=e.hint) from None


def read_maps(path: Path) -> list[str]:
    """The maps of a file, a line each; empty lines and comments left out."""
    try:
        lines = [line.strip() for line in path.read_text("utf-8").splitlines()]
    except OSError as e:
        raise ModelctlError(f"{path}: {e.strerror}") from None
    except UnicodeDecodeError:
        raise UsageError(f"{path}: not text, a map a line is (OLD=NEW)") from None
    found = [line for line in lines if line and not line.startswith("#")]
    if not found:
        raise UsageError(f"{path}: no map in it, OLD=NEW a line")
    return found


def _data(
    before: Checkpoint, path: str | None, found: Plan, saved: files.Saved | None, dry_run: bool
) -> dict[str, Any]:
    nothing = None if dry_run else 0
    return {
        "source": before.origin.path if before.origin else None,
        "output": path,
        "dry_run": dry_run,
        "kept": found.kept,
        "renamed": [list(pair) for pair in found.renamed],
        "removed": found.removed,
        "dropped": found.dropped,
        "added": found.added,
        "trains": [{"name": r.name, "before": r.before, "after": r.after} for r in found.trains],
        "notes": [],
        "files_written": saved.files if saved else nothing,
        "bytes_written": saved.bytes_written if saved else nothing,
    }


def _print(out: Output, before: Checkpoint, report: dict[str, Any], notes: list[Note]) -> None:
    source, written = report["source"], report["bytes_written"]
    for note in notes:
        if note.level == "warning":
            out.note(str(note), note.way_out)
    dangerous = [finding for finding in before.findings if finding.level == "dangerous"]
    if dangerous:
        names = ", ".join(dict.fromkeys(finding.name for finding in dangerous))
        out.note(f"warning: unpickling {source} would run code: {names}. modelctl did not.")
    end = f"{size(written)} written" if written else "nothing to write"
    if (report["files_written"] or 0) > 1:
        end = f"{report['files_written']} files, {end}"
    if report["dry_run"]:
        end = "dry run, nothing written"
    renamed, removed = report["renamed"], report["removed"]
    counts = f"{report['kept']} kept, {len(renamed)} renamed, {len(removed)} removed"
    out.line(f"{source} -> {report['output'] or '(no output named)'}   {counts}; {end}", "bold")
    for note in notes:
        if note.level != "warning":
            out.line(f"  {note}")
    for i, (old, new) in enumerate(renamed[:_EXAMPLES]):
        out.line(f"  {'renamed:' if i == 0 else '        '} {old} -> {new}")
    if len(renamed) > _EXAMPLES:
        out.line(f"           … and {len(renamed) - _EXAMPLES} more")
    for what, names in (
        ("removed", _first(removed)),
        ("left out", _first(report["dropped"])),
        ("added", _first(report["added"])),
    ):
        if names:
            out.line(f"  {what}: {names}")


def _about_output(after: Checkpoint, saved: files.Saved, in_place: bool) -> list[Note]:
    """What other readers make of the output, where that may surprise."""
    notes = []
    if saved.format == "safetensors" and after.sections.models:
        refs = after.sections.models[0].tensors()
        tied = len(refs) - len({ref.identity for ref in refs.values()})
        if tied:
            notes.append(
                info(
                    f"tied names: {tied}, kept as __metadata__ (safetensors' load_model and "
                    "modelctl know them, load_file does not)"
                )
            )
    rival = saved.path.parent / "model.safetensors"
    if saved.path.name.startswith("pytorch_model.bin") and (
        rival.exists() or Path(f"{rival}.index.json").exists()
    ):
        notes.append(warning(f"{rival.name} beside it is what most readers take first"))
    if in_place and saved.files > 1:
        notes.append(info(f"{saved.files - 1} new shards; the old ones are gone"))
    return notes


_GRAD = {True: "yes", False: "no", None: "?"}


def _print_trains(out: Output, found: Plan) -> None:
    rows = fold_trains(found.trains)
    if rows:
        out.line()
        out.table(
            [
                Column("parameter"),
                Column("tensors", right=True),
                Column("grad before"),
                Column("after"),
            ],
            [[row.name, f"{row.tensors:,}", _GRAD[row.before], _GRAD[row.after]] for row in rows],
        )


def _first(names: list[str]) -> str:
    most = 2 * _EXAMPLES
    return ", ".join(names[:most]) + (", …" if len(names) > most else "")
