"""Edit checkpoints on disk: open, edit, save, report."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from typing import Any, overload

from ..core.pages import Progress
from ..errors import ModelctlError
from ..files import PathLike
from ..inspection.edits import EditReport, EditReports
from ..storage.far.urls import said
from ..surgery.recipe import parse_recipe
from .job import Job

# An operation by its name, or with its options as in a recipe: {"do": "keep", "pattern": "fc"}.
Edit = str | Mapping[str, Any]


@overload
def edit(  # type: ignore[overload-overlap]  # a text is a sequence of texts
    sources: PathLike,
    edits: Edit | Sequence[Edit],
    *,
    output: PathLike | None = None,
    in_place: bool = False,
    to: str | None = None,
    max_shard_size: int | str | None = None,
    overwrite: bool = False,
    dry_run: bool = False,
    history: bool = True,
    key: str | None = None,
    follow_symlinks: bool = False,
    progress: Progress | None = None,
    report: Callable[[EditReport], object] | None = None,
) -> EditReport: ...


@overload
def edit(
    sources: Sequence[PathLike],
    edits: Edit | Sequence[Edit],
    *,
    output: PathLike | None = None,
    in_place: bool = False,
    to: str | None = None,
    max_shard_size: int | str | None = None,
    overwrite: bool = False,
    dry_run: bool = False,
    history: bool = True,
    key: str | None = None,
    follow_symlinks: bool = False,
    progress: Progress | None = None,
    report: Callable[[EditReport], object] | None = None,
) -> EditReports: ...


def edit(
    sources: PathLike | Sequence[PathLike],
    edits: Edit | Sequence[Edit],
    *,
    output: PathLike | None = None,
    in_place: bool = False,
    to: str | None = None,
    max_shard_size: int | str | None = None,
    overwrite: bool = False,
    dry_run: bool = False,
    history: bool = True,
    key: str | None = None,
    follow_symlinks: bool = False,
    progress: Progress | None = None,
    report: Callable[[EditReport], object] | None = None,
) -> EditReport | EditReports:
    """Edit checkpoints on disk: open, edit, save, each whole or not at all.

    ``edit("ddp.pt", "strip-prefix", output="clean.pt")``; with options, or several edits in one
    pass and one write, as in a recipe: ``edit(paths, [{"do": "strip-head"}, {"do": "freeze",
    "pattern": "*", "bn-eval": True}], in_place=True)``. Of several sources all are opened, edited
    and checked before the first is written.

    Args:
        sources: a file or a folder, or several; ``"-"`` is stdin.
        edits: an operation's name, an operation with options, or a list of them.
        output: the file to write, or a folder: one that is there, or is written with a trailing
            slash and made with its parents. A file takes the source's name there, shards stay
            shards. ``"-"`` is stdout, for one file, of the source's format where ``to`` names none;
            a URL (``s3://``, ``gs://``, ``az://``) a file or a folder of a store.
        in_place: replace each source by its result instead. A file that the edits leave as it is
            is not written.
        to: the format, where the output's suffix is not to say it.
        max_shard_size: write shards of at most this (``"5GB"``) into a folder. In place, shards
            stay about as big as they are.
        overwrite: replace an output that is there.
        dry_run: write nothing, report what would be. Where an output is named, what saving
            would refuse is refused.
        history: record in the output what was done to it.
        key, follow_symlinks: as :func:`modelctl.open` takes them.
        progress: called with an output's name, the bytes written since the last call, and how
            many there will be in all.
        report: called with each report as soon as its file stands.

    Returns:
        The report of the one source, or a list of those of several.

    Raises:
        UsageError: no such edit or option; not exactly one place for the output; sources that
            would go to one file.
        ModelctlError: what :func:`modelctl.open`, the edits and :func:`modelctl.save` raise; its
            ``written`` are the outputs that stood by then.
    """
    paths = [sources] if isinstance(sources, str | os.PathLike) else list(sources)
    several = [edits] if isinstance(edits, str | Mapping) else list(edits)
    parsed = parse_recipe([{"do": one} if isinstance(one, str) else one for one in several])
    job = Job(
        edits=parsed,
        output=None if output is None else said(output),
        in_place=in_place,
        to=to,
        max_shard_size=max_shard_size,
        overwrite=overwrite,
        dry_run=dry_run,
        history=history,
        key=key,
        follow_symlinks=follow_symlinks,
        progress=progress,
    )
    reports = EditReports()
    try:
        for one in job.run([said(path) for path in paths]):
            reports.append(one)
            if report is not None:
                report(one)
    except ModelctlError as e:
        e.written = [str(one.output) for one in reports if one.files_written]
        raise
    return reports[0] if isinstance(sources, str | os.PathLike) else reports
