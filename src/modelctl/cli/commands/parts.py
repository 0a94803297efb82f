"""The commands that put a checkpoint together, and take it apart."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from ...errors import UsageError
from .. import options as o
from .edit import make_job, text


def merge(
    model: Annotated[
        Path | None, typer.Option(metavar="F", help="A state_dict, or a checkpoint to update.")
    ] = None,
    optimizer: Annotated[
        Path | None, typer.Option(metavar="F", help="The file that holds the optimizer.")
    ] = None,
    scheduler: Annotated[
        Path | None, typer.Option(metavar="F", help="The file that holds the scheduler.")
    ] = None,
    ema: Annotated[
        Path | None, typer.Option(metavar="F", help="The file that holds the EMA copy.")
    ] = None,
    epoch: Annotated[int | None, typer.Option(min=0, metavar="N", help="Finished epochs.")] = None,
    step: Annotated[int | None, typer.Option(min=0, metavar="N", help="Finished steps.")] = None,
    lr: Annotated[
        float | None, typer.Option(metavar="X", help="Goes to every place that holds it.")
    ] = None,
    set: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="KEY=VALUE", help="Any other value. Repeatable."),
    ] = None,
    like: Annotated[
        Path | None, typer.Option(metavar="REF", help="Use this checkpoint's keys.")
    ] = None,
    rest: Annotated[
        Path | None,
        typer.Option(metavar="F", help="What split left: the other values, and what goes where."),
    ] = None,
    output: o.Destination = None,
    overwrite: o.Overwrite = False,
    dry_run: o.DryRun = False,
    history: o.History = True,
    format: o.Format = "table",
    color: o.Color = "auto",
    quiet: o.Quiet = False,
) -> None:
    """Put separately saved parts together into one checkpoint that resumes.

    Keys: model, optimizer, scheduler, ema, epoch, step, lr, or those of the checkpoint that is
    updated, or of --like. Refuses an optimizer that does not belong to the model.

    Example: modelctl merge --model m.pt --optimizer o.pt --epoch 12 --lr 1e-3 -o resume.pt
    """
    from ..joining import merge_files

    values = dict(_pair(one) for one in set or [])
    parts = {
        "model": model,
        "optimizer": optimizer,
        "scheduler": scheduler,
        "ema": ema,
        "like": like,
        "rest": rest,
    }
    numbers = {"epoch": epoch, "step": step, "lr": lr}
    names = ("output", "overwrite", "dry_run", "history", "format", "color", "quiet")
    given = locals()
    job = make_job("merge", {name: given[name] for name in names})
    merge_files(job, {name: text(part) for name, part in parts.items()}, numbers, values)


def _pair(text: str) -> tuple[str, Any]:
    import json

    key, equals, value = text.partition("=")
    if not equals or not key:
        raise UsageError(f"--set takes KEY=VALUE, not '{text}'")
    try:
        return key, json.loads(value)
    except RecursionError:
        raise UsageError(f"--set {key}: its value is nested too deep") from None
    except ValueError:
        return key, value


def split(
    src: o.Src,
    output: o.Folder = None,
    to: o.To = None,
    overwrite: o.Overwrite = False,
    dry_run: o.DryRun = False,
    history: o.History = True,
    key: o.Key = None,
    follow_symlinks: o.FollowSymlinks = False,
    format: o.Format = "table",
    color: o.Color = "auto",
    quiet: o.Quiet = False,
) -> None:
    """Take a training checkpoint apart: model, optimizer, scheduler, EMA copy, and the rest.

    The inverse of merge: the rest keeps the other values, and where each part was.

    Example: modelctl split last.ckpt -o parts/
    """
    names = ("output", "to", "overwrite", "dry_run", "history", "key", "follow_symlinks")
    given = locals()
    display = {"format": format, "color": color, "quiet": quiet}
    job = make_job("split", {name: given[name] for name in names} | display)
    from ..joining import split_file

    split_file(job, str(src))


COMMANDS = (merge, split)
