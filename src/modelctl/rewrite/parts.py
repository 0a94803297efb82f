"""Several files into one checkpoint, and one into several."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from typing import Any

from .. import files
from ..core.notes import Note
from ..core.pages import Progress, told
from ..core.records import add_history
from ..errors import UsageError
from ..files import PathLike
from ..formats.destination import out_place
from ..inspection.edits import EditReport, Part, SplitReport
from ..storage.far.urls import said, shown
from ..storage.outputs import OutPlace
from ..surgery.merge import merge
from ..surgery.recipe import history_line
from ..surgery.split import split
from .job import Job, Target
from .naming import filename, same_format


def merge_files(
    model: PathLike | None = None,
    *,
    optimizer: PathLike | None = None,
    scheduler: PathLike | None = None,
    ema: PathLike | None = None,
    like: PathLike | None = None,
    rest: PathLike | None = None,
    epoch: int | None = None,
    step: int | None = None,
    lr: float | None = None,
    set: Mapping[str, Any] | None = None,
    output: PathLike | None = None,
    overwrite: bool = False,
    dry_run: bool = False,
    history: bool = True,
    progress: Progress | None = None,
) -> EditReport:
    """Open separately saved parts, :func:`modelctl.merge` them, save.

    Raises:
        UsageError: no model, or no output.
        ModelctlError: what :func:`modelctl.open`, :func:`modelctl.merge` and
            :func:`modelctl.save` raise.
    """
    paths = {
        name: said(path)
        for name, path in (
            *(("model", model), ("optimizer", optimizer), ("scheduler", scheduler)),
            *(("ema", ema), ("like", like), ("rest", rest)),
        )
        if path is not None
    }
    if "model" not in paths:
        raise UsageError(
            "there is no model to merge into", hint="--model takes a state_dict or a checkpoint"
        )
    numbers: dict[str, Any] = {"epoch": epoch, "step": step, "lr": lr}
    given: dict[str, Any] = {name: filename(path) for name, path in paths.items()}
    given.update(numbers)
    given["set"] = [f"{key}={value}" for key, value in (set or {}).items()]
    job = Job(
        output=None if output is None else said(output),
        overwrite=overwrite,
        dry_run=dry_run,
        history=history,
        progress=progress,
    )
    job.check([paths["model"]])
    with ExitStack() as stack:
        opened: dict[str, Any] = {
            name: stack.enter_context(files.open(path)) for name, path in paths.items()
        }
        merged = merge(**opened, **numbers, set=set)
        target = Target(OutPlace(paths["model"]), same_format(opened["model"]))
        if job.output is not None:
            target = job.target(paths["model"], 1, opened["model"])
        return job.finish(opened["model"], merged, target, [history_line("merge", given)])


def split_file(
    source: PathLike,
    *,
    output: PathLike | None = None,
    to: str | None = None,
    overwrite: bool = False,
    dry_run: bool = False,
    history: bool = True,
    key: str | None = None,
    follow_symlinks: bool = False,
    progress: Progress | None = None,
) -> SplitReport:
    """Open a checkpoint, :func:`modelctl.split` it, save the parts as files of a folder.

    Raises:
        UsageError: no folder to write to.
        ModelctlError: what :func:`modelctl.open`, :func:`modelctl.split` and
            :func:`modelctl.save_parts` raise.
    """
    source = said(source)
    if output is None and not dry_run:
        raise UsageError("where do the parts go?", hint="-o DIR, or --dry-run to look first")
    place = None if output is None else out_place(output)
    saved: dict[str, files.Saved] = {}
    notes: Sequence[Note] = ()
    with files.open(source, key=key, follow_symlinks=follow_symlinks) as before:
        parts = split(before)
        if history:
            models = ["model"] if "model" in parts else [*parts]
            parts.update({name: add_history(parts[name], ["split"]) for name in models})
        if dry_run:
            folder = None if place is None or place.is_missing else place
            notes = files.check_parts(parts, folder, to=to or "torch", overwrite=overwrite)
        elif place is not None:
            with place.folder.made():
                saved = files.save_parts(
                    parts,
                    place,
                    to=to or "torch",
                    overwrite=overwrite,
                    progress=told(progress, filename(source)),
                )
            notes = [note for one in saved.values() for note in one.notes]
        tensors = {name: len(part.tensors()) for name, part in parts.items()}
    rows = [
        Part(name, shown(saved[name].path), n, saved[name].bytes_written)
        if name in saved
        else Part(name, None, n, None)
        for name, n in tensors.items()
    ]
    where = None if place is None else place.name
    return SplitReport(shown(source), where, dry_run, rows, [*parts["rest"].notes, *notes])
