"""The commands that put a checkpoint together, and take it apart."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

from ...errors import UsageError
from .. import options as o
from ..output import Output
from ..signature import Command, Option


def merge(
    out: Output,
    model: Annotated[Path | None, Option("A state_dict, or a checkpoint to update.", "F")] = None,
    optimizer: Annotated[Path | None, Option("The file that holds the optimizer.", "F")] = None,
    scheduler: Annotated[Path | None, Option("The file that holds the scheduler.", "F")] = None,
    ema: Annotated[Path | None, Option("The file that holds the EMA copy.", "F")] = None,
    epoch: Annotated[int | None, Option("Finished epochs.", "N", least=0)] = None,
    step: Annotated[int | None, Option("Finished steps.", "N", least=0)] = None,
    lr: Annotated[float | None, Option("Goes to every place that holds it.", "X")] = None,
    set: Annotated[list[str] | None, Option("Any other value. Repeatable.", "KEY=VALUE")] = None,
    like: Annotated[Path | None, Option("Use this checkpoint's keys.", "REF")] = None,
    rest: Annotated[
        Path | None, Option("What split left: the other values, and what goes where.", "F")
    ] = None,
    output: o.Destination = None,
    overwrite: o.Overwrite = False,
    dry_run: o.DryRun = False,
    history: o.History = True,
) -> None:
    """Put separately saved parts together into one checkpoint that resumes.

    Keys: model, optimizer, scheduler, ema, epoch, step, lr, or those of the checkpoint that is
    updated, or of --like. Refuses an optimizer that does not belong to the model.

    Example: modelctl merge --model m.pt --optimizer o.pt --epoch 12 --lr 1e-3 -o resume.pt
    """
    from ...rewrite.parts import merge_files

    values = dict(_pair(one) for one in set or [])
    with out.progress() as progress:
        done = merge_files(
            model,
            optimizer=optimizer,
            scheduler=scheduler,
            ema=ema,
            epoch=epoch,
            step=step,
            lr=lr,
            set=values,
            like=like,
            rest=rest,
            output=output,
            overwrite=overwrite,
            dry_run=dry_run,
            history=history,
            progress=progress,
        )
    out.done(done)


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
    out: Output,
    src: o.Src,
    output: o.Folder = None,
    to: o.To = None,
    overwrite: o.Overwrite = False,
    dry_run: o.DryRun = False,
    history: o.History = True,
    key: o.Key = None,
    follow_symlinks: o.FollowSymlinks = False,
) -> None:
    """Take a training checkpoint apart: model, optimizer, scheduler, EMA copy, and the rest.

    The inverse of merge: the rest keeps the other values, and where each part was.

    Example: modelctl split last.ckpt -o parts/
    """
    from ...rewrite.parts import split_file

    with out.progress() as progress:
        done = split_file(
            src,
            output=output,
            to=to,
            overwrite=overwrite,
            dry_run=dry_run,
            history=history,
            key=key,
            follow_symlinks=follow_symlinks,
            progress=progress,
        )
    out.done(done)


COMMANDS = (Command(merge, "Edit", merge), Command(split, "Edit", split))
