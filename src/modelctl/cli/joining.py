"""What merge and split do: several files into one checkpoint, and one into several."""

from __future__ import annotations

import os
from contextlib import ExitStack
from typing import Any

from .. import files
from ..core.records import add_history
from ..errors import UsageError
from ..surgery.recipe import history_line
from .editing import Job
from .output import Column, Output, size


def merge_files(
    job: Job, parts: dict[str, str | None], numbers: dict[str, Any], values: dict[str, Any]
) -> None:
    """Open the parts, merge them, save."""
    from ..surgery.merge import merge

    if parts["model"] is None:
        raise UsageError(
            "there is no model to merge into", hint="--model takes a state_dict or a checkpoint"
        )
    job.check([parts["model"]])
    with ExitStack() as stack:
        opened: dict[str, Any] = {
            name: stack.enter_context(files.open(path))
            for name, path in parts.items()
            if path is not None
        }
        merged = merge(**opened, **numbers, set=values)
        given: dict[str, Any] = {n: os.path.basename(path) for n, path in parts.items() if path}
        given.update(numbers)
        given["set"] = [f"{key}={value}" for key, value in values.items()]
        line = history_line("merge", given)
        target = (job.output or parts["model"], job.to)
        job.print_json([job.finish(opened["model"], merged, target, [line])])


def split_file(job: Job, source: str) -> None:
    """Open a checkpoint, take it apart, save the parts."""
    from ..surgery.split import split

    out = Output(job.format, job.color, job.quiet)
    if job.output is None and not job.dry_run:
        raise UsageError("where do the parts go?", hint="-o DIR, or --dry-run to look first")
    with files.open(source, key=job.key, follow_symlinks=job.follow_symlinks) as before:
        parts = split(before)
        if job.history:
            parts["model"] = add_history(parts["model"], ["split"])
        saved: dict[str, files.Saved] = {}
        if not job.dry_run:
            with out.progress(os.path.basename(source)) as progress:
                saved = files.save_parts(
                    parts,
                    str(job.output),
                    to=job.to or "torch",
                    overwrite=job.overwrite,
                    progress=progress,
                )
        notes = parts["rest"].notes
        tensors = {name: len(part.tensors()) for name, part in parts.items()}
    outputs = {name: str(one.path) for name, one in saved.items()}
    sizes = {name: one.bytes_written for name, one in saved.items()}
    if out.is_json:
        rows = [
            {
                "part": name,
                "output": outputs.get(name),
                "tensors": count,
                "bytes_written": sizes.get(name),
            }
            for name, count in tensors.items()
        ]
        document: dict[str, Any] = {"source": source, "output": job.output}
        document["dry_run"] = job.dry_run
        document["notes"] = [str(note) for note in notes]
        out.json(job.command, {**document, "parts": rows})
        return
    for note in notes:
        out.note(str(note), note.way_out)
    out.table(
        [Column("part"), Column("tensors", right=True), Column("size", right=True), Column("file")],
        [
            [name, f"{count:,}", size(sizes[name]) if saved else "", outputs.get(name, "(dry run)")]
            for name, count in tensors.items()
        ],
    )
    if saved and out.is_table:
        options = " ".join(f"--{name} {output}" for name, output in outputs.items())
        out.note(f"together again: modelctl merge {options} -o whole.pt")
