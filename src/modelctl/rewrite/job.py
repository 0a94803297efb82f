"""One run over some sources: where outputs go, what is checked before the first is written."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from shlex import quote
from typing import Any

from .. import files
from ..core.checkpoint import Checkpoint
from ..core.notes import Note, warning
from ..core.pages import Progress, told
from ..core.records import FREEZE
from ..errors import UsageError
from ..formats.destination import out_place
from ..formats.registry import for_writing
from ..formats.shards.writing import INDEX
from ..inspection.changes import plan
from ..inspection.edits import EditReport
from ..storage.far.urls import READ_ONLY, is_far, shown, url_of
from ..storage.outputs import OutPlace
from ..storage.streams import check_stdout, is_stream
from ..surgery.freeze import by_hand
from ..surgery.recipe import history_line, run
from .folders import about_files, about_optimizers
from .linked import about_names, replaced
from .naming import (
    filename,
    format_of_stream,
    has_known_suffix,
    is_sharded,
    is_written_folder,
    name_in_folder,
    same_format,
    suffix_lies,
    usual_suffix,
)
from .shards import about_shards, check_index, shard_size


@dataclass(frozen=True)
class Target:
    """An output, its format where the suffix does not say it, and the folder to be made for it."""

    place: OutPlace
    to: str | None = None
    folder: OutPlace | None = None

    @property
    def is_new(self) -> bool:
        """Whether its folder is still to be made.

        Raises:
            WriteError: a file is in the way.
        """
        return self.folder is not None and self.folder.is_missing


@dataclass(frozen=True)
class Job:
    """One run over some sources."""

    edits: Sequence[tuple[str, dict[str, Any]]] = ()
    output: str | None = None
    in_place: bool = False
    to: str | None = None
    max_shard_size: int | str | None = None
    overwrite: bool = False
    dry_run: bool = False
    history: bool = True
    key: str | None = None
    follow_symlinks: bool = False
    progress: Progress | None = None

    def run(self, sources: Sequence[str]) -> Iterator[EditReport]:
        lines = [history_line(name, options) for name, options in self.edits]
        self.check(sources)
        if len(sources) > 1 and self.placed:  # look at all before the first is written
            self.check_all(sources)
        for source in sources:
            with self.edited(source) as (before, after):
                target = self.target(source, len(sources), before)
                report = self.finish(before, after, target, lines)
            yield report

    @property
    def placed(self) -> bool:
        """Whether a place for the output is named."""
        return self.output is not None or self.in_place

    def check_all(self, sources: Sequence[str]) -> None:
        """Raises what writing any of them would raise, as far as that can be known before."""
        taken: dict[str, str] = {}
        for source in sources:
            with self.edited(source) as (before, after):
                target = self.target(source, len(sources), before)
                self.check_target(after, target, self.shard_size(before))
            place = target.place.key
            if place in taken:
                raise UsageError(
                    f"{taken[place]} and {source} are one file, {target.place.name}: it can't be "
                    "edited twice at once",
                    hint="name it once",
                )
            taken[place] = source

    @contextmanager
    def edited(self, source: str) -> Iterator[tuple[Checkpoint, Checkpoint]]:
        """A source, opened, and what the edits make of it."""
        with files.open(source, key=self.key, follow_symlinks=self.follow_symlinks) as before:
            yield before, run(before, self.edits)

    def check(self, sources: Sequence[str]) -> None:
        """Raises UsageError unless exactly one place for the output is named."""
        if self.output is not None and self.in_place:
            raise UsageError("-o and --in-place: one of them")
        if self.output is None and not self.in_place and not self.dry_run:
            raise UsageError(
                "where does the result go?", hint="-o FILE, --in-place, or --dry-run to look first"
            )
        far = next((url for source in sources if (url := url_of(source))), None)
        if self.in_place and far is not None:
            way_out = f"{quote(shown(far.text))} --overwrite puts a new one in its place, whole"
            if far.scheme in READ_ONLY:
                way_out = f"{quote(filename(far.text) or 'FILE')} writes the result here"
            raise UsageError(
                f"{shown(far.text)}: what is far can't be edited in place: it is never patched",
                hint=f"-o {way_out}",
            )
        if self.in_place and any(map(is_stream, sources)):
            raise UsageError("stdin can't be edited in place", hint="-o FILE, or -o -")
        if is_stream(self.output):
            if len(sources) > 1:
                raise UsageError(
                    f"stdout takes one file, not {len(sources)}", hint="-o FOLDER/ takes them"
                )
            if not self.dry_run:
                check_stdout()
        if len(sources) > 1 and self.max_shard_size is not None:
            raise UsageError(
                "shards of several sources: edit them one by one, each with its own -o"
            )
        place = self.place
        if len(sources) > 1 and place is not None:
            if not place.is_folder and (place.is_there or has_known_suffix(place.name)):
                raise UsageError(
                    f"{len(sources)} sources need a folder to go to, {place.name} is none",
                    hint="-o FOLDER/",
                )
            names = [name_in_folder(source, self.to) for source in sources]
            twice = next((name for name in names if names.count(name) > 1), None)
            if twice is not None:
                raise UsageError(
                    f"{names.count(twice)} sources would go to {place.member(twice).name}",
                    hint="edit them one by one, each with its own -o",
                )

    def target(self, source: str, of: int, ckpt: Checkpoint) -> Target:
        """The output for one of so many sources."""
        if self.in_place:
            source = replaced(source, ckpt, follow_links=self.follow_symlinks)
            return self.own_place(source, ckpt)
        if self.output is None:
            return Target(OutPlace(source), self.to or same_format(ckpt))
        where = self.place
        assert where is not None
        if is_stream(where):
            return Target(where, self.to or format_of_stream(ckpt))
        if ckpt.folder is not None and self.stays_folder:
            if of > 1:
                name = filename(source if is_far(source) else os.path.abspath(source))
                where = where.member(name)
            return Target(where, None, where.folder)
        own = same_format(ckpt)
        if is_written_folder(ckpt) and self.to in (None, own) and _is_place(source, where):
            return Target(where, own)  # not into itself
        if of == 1 and not where.is_folder:
            return Target(where, self.to)
        if self.max_shard_size is not None or (of == 1 and is_sharded(ckpt)):
            return Target(where, self.to, where.folder)
        if of == 1 and ckpt.origin is not None and (is_far(source) or os.path.isdir(source)):
            source = ckpt.origin.path  # the file that was found in it
        return Target(where.member(name_in_folder(source, self.to)), self.to, where)

    @cached_property
    def place(self) -> OutPlace | None:
        """Where the output goes, where it is named."""
        return None if self.output is None else out_place(self.output)

    @property
    def stays_folder(self) -> bool:
        """Whether what was read from a folder becomes one again."""
        out = self.place
        if out is None or self.to is not None or self.max_shard_size is not None:
            return False
        return out.is_folder or not (has_known_suffix(out.name) or out.name.endswith(".json"))

    def own_place(self, source: str, ckpt: Checkpoint) -> Target:
        """What is replaced in place: the file that was found, of shards their index."""
        found = ckpt.origin.path if ckpt.origin is not None and os.path.isdir(source) else source
        if os.path.isdir(found) and not is_written_folder(ckpt):
            label = ckpt.origin.label if ckpt.origin is not None else "this"
            raise UsageError(
                f"{found}: {label}: such a folder is read only, not edited in place",
                hint="-o FILE.pt takes all of it in one file, --to dcp -o FOLDER/ in several",
            )
        if is_sharded(ckpt):
            return Target(OutPlace(found), self.to)
        if self.to is not None and suffix_lies(found, self.to):
            raise UsageError(
                f"in place the file keeps its name, which would lie about {self.to}",
                hint=f"-o {quote(Path(found).with_suffix(usual_suffix(self.to)).name)}",
            )
        if found != source and self.max_shard_size is not None:  # shards in the folder instead
            return Target(OutPlace(found + INDEX), self.to)
        return Target(OutPlace(found), self.to or same_format(ckpt))

    def check_target(
        self, after: Checkpoint, target: Target, size: int | str | None, history: Sequence[str] = ()
    ) -> files.Saved:
        """What saving would write; raises what it would raise, as far as that can be known."""
        if self.in_place:
            check_index(after, target.place.path)
        return files.check_save(
            after,
            target.place,
            target.to,
            size,
            overwrite=self.overwrite or self.in_place,
            new_folder=target.is_new,
            history=history,
        )

    def shard_size(self, before: Checkpoint) -> int | str | None:
        """The most bytes in a shard: in place, shards stay about as big as they are."""
        if self.in_place and self.max_shard_size is None:
            return shard_size(before)
        return self.max_shard_size

    def finish(
        self, before: Checkpoint, after: Checkpoint, target: Target, lines: Sequence[str]
    ) -> EditReport:
        """Save (or only check that it could be), and report."""
        names = [name for name, _ in self.edits]
        same = after.root is before.root and after.device == before.device
        unchanged = same and names != ["convert"]
        history = lines if self.history and not unchanged else []
        place = target.place
        notes = [*_dangers(before), *after.notes]
        saved: files.Saved | None = None
        changes = plan(before, after)
        if changes.renamed or changes.removed:
            notes += about_optimizers(before)
        if self.placed and not (unchanged and self.in_place):
            notes += about_names(before, place.path, in_place=self.in_place)
        size = self.shard_size(before)
        would: files.Saved | None = None
        if self.dry_run and not self.placed:
            notes += files.left_out(after, str(target.to))
        elif self.dry_run:
            would = self.check_target(after, target, size, history)
        elif not (unchanged and self.in_place):
            if self.in_place:
                check_index(after, place.path)
            with target.folder.made() if target.folder is not None else nullcontext():
                saved = files.save(
                    after,
                    place,
                    to=target.to,
                    overwrite=self.overwrite or self.in_place,
                    max_shard_size=size,
                    history=history,
                    progress=told(self.progress, place.filename),
                )
            would = saved
        if would is not None and not (unchanged and self.in_place):
            notes += [*would.notes, *_about_output(after, would)]
            if saved is not None and self.in_place and is_sharded(before):
                notes += about_shards(before, Path(saved.path), saved.files)
            if not self.in_place:
                folder = would.path != place.result or would.files > 1
                notes += about_files(
                    before, would, chosen=target.to is not None, into_folder=folder
                )
        output = place.name if self.placed else None
        if would is not None and would.path != place.result:  # into a folder
            output = shown(would.path)
        nothing = None if self.dry_run else 0
        return EditReport(
            source=before.origin.path if before.origin else None,
            output=output,
            dry_run=self.dry_run,
            plan=changes,
            notes=notes,
            files_written=saved.files if saved else nothing,
            bytes_written=saved.bytes_written if saved else nothing,
            by_hand=_by_hand(after, place, saved) if names == ["freeze"] and saved else (),
        )


def _is_place(source: str, place: OutPlace) -> bool:
    """Whether a source is what lies at a place."""
    url = url_of(source)
    return (url is None or url.scheme not in READ_ONLY) and out_place(source).key == place.key


# ---------------------------------------------------------------------- what there is to say


def _dangers(before: Checkpoint) -> Iterator[Note]:
    dangerous = [finding for finding in before.findings if finding.level == "dangerous"]
    if dangerous:
        names = ", ".join(dict.fromkeys(finding.name for finding in dangerous))
        source = before.origin.path if before.origin else None
        yield warning(f"unpickling {source} would run code: {names}. modelctl did not.")


def _about_output(after: Checkpoint, saved: files.Saved) -> Iterator[Note]:
    """What other readers make of the output, where that may surprise."""
    yield from for_writing(saved.format, "").remarks(after)
    place = out_place(saved.path)
    if place.filename.startswith("pytorch_model.bin"):
        rival = "model.safetensors"
        if any(place.folder.member(name).is_there for name in (rival, rival + INDEX)):
            yield warning(f"{rival} beside it is what most readers take first")


def _by_hand(after: Checkpoint, place: OutPlace, saved: files.Saved) -> Sequence[str]:
    """How plain torch applies the freeze record of a file."""
    model = after.sections.model()
    is_file = isinstance(saved.path, Path) and saved.path == place.result and not is_stream(place)
    if model.is_module or saved.files > 1 or not is_file:
        return ()
    record = for_writing(saved.format, "").record_by_hand(after, place.path, model.path, FREEZE)
    return () if record is None else by_hand(after, record)
