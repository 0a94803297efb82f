"""The commands that edit: each opens, calls one function of the library, saves and reports."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from functools import wraps
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from ..errors import UsageError
from . import options as o

if TYPE_CHECKING:
    from .editing import Job

Options = dict[str, Any]


def _shared(
    output: o.Destination = None,
    in_place: o.InPlace = False,
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
    """What every editing command takes after its own options."""


def edits(function: Callable[..., Options]) -> Callable[..., None]:
    """A command that runs the edit of its name: ``function`` gives the edit's options, the shared
    ones are added."""
    shared = inspect.signature(_shared, eval_str=True).parameters
    own = inspect.signature(function, eval_str=True).parameters

    @wraps(function)
    def command(src: list[Path], **options: Any) -> None:
        job = {name: options.pop(name) for name in shared}
        _job(function.__name__.replace("_", "-"), job).run(src, function(src=src, **options))

    # typer reads what a command takes from these two
    parameters = {**own, **shared}
    command.__signature__ = inspect.Signature([*parameters.values()])  # type: ignore[attr-defined]
    command.__annotations__ = {name: one.annotation for name, one in parameters.items()}
    return command


@edits
def strip_prefix(
    src: o.Srcs,
    prefix: Annotated[
        str | None,
        typer.Option(metavar="P", help="Exactly this one, once, instead of the wrappers'."),
    ] = None,
) -> Options:
    """Strip what DataParallel and torch.compile put before names.

    By default module. and _orig_mod., at segment borders, until none is left; in the model, its
    EMA copies and the optimizer.

    Example: modelctl strip-prefix ddp.pt -o clean.pt
    """
    return {"prefix": prefix}


@edits
def strip_head(
    src: o.Srcs,
    head: Annotated[
        str | None, typer.Option(metavar="PATTERN", help="The head, where it isn't the found one.")
    ] = None,
    rename_head: Annotated[
        str | None,
        typer.Option(metavar="NEW", help="Keep the head, under this module name, instead."),
    ] = None,
    optimizer: o.Optimizer = "keep",
) -> Options:
    """Find the head (the layer that makes classes of features) and remove it, for transfer.

    Says what it takes for the head and why; refuses where that isn't sure. The optimizer loses
    the head's state, and the file records what was removed.

    Example: modelctl strip-head resnet50.pt -o backbone.safetensors
    """
    return {"head": head, "rename_head": rename_head, "optimizer": optimizer}


@edits
def freeze(
    src: o.Srcs,
    pattern: o.Pattern,
    exclude: o.Exclude = [],  # noqa: B006 - typer copies it
    regex: o.Regex = False,
    bn_eval: Annotated[
        bool, typer.Option("--bn-eval", help="Frozen BatchNorm stays in eval: its statistics too.")
    ] = False,
    optimizer: Annotated[
        Literal["keep", "drop"],
        typer.Option("--optimizer", help="drop: take the frozen parameters' state out."),
    ] = "keep",
) -> Options:
    """Write into the file which parameters don't train.

    The freeze record travels in the state_dict; modelctl.nn applies it, plain torch ignores it.

    Example: modelctl freeze backbone.pt --pattern '*' --exclude layer4 --in-place
    """
    return {
        "pattern": pattern,
        "exclude": exclude,
        "regex": regex,
        "bn_eval": bn_eval,
        "optimizer": optimizer,
    }


@edits
def unfreeze(
    src: o.Srcs,
    pattern: o.Pattern,
    exclude: o.Exclude = [],  # noqa: B006 - typer copies it
    regex: o.Regex = False,
) -> Options:
    """Take parameters out of the file's freeze record.

    Example: modelctl unfreeze backbone.pt --pattern layer3 --in-place
    """
    return {"pattern": pattern, "exclude": exclude, "regex": regex}


@edits
def convert(
    src: o.Srcs,
    weights_only: Annotated[
        bool,
        typer.Option("--weights-only", help="Only the model's tensors; leave the rest behind."),
    ] = False,
) -> Options:
    """Write a checkpoint in another format.

    What the format can't hold is refused: an optimizer is only lost with --weights-only.

    Example: modelctl convert old.th -o model.safetensors --weights-only
    """
    return {"weights_only": weights_only}


@edits
def apply(
    recipe: Annotated[Path, typer.Argument(metavar="RECIPE.toml", help="The edits, in order.")],
    src: o.Srcs,
) -> Options:
    """Several edits in one pass and one write, from a recipe.

    A recipe is TOML: a table [[edit]] for each, do = "strip-prefix", then its options by their
    names here (bn-eval = true).

    Example: modelctl apply transfer.toml ddp.pt -o backbone.pt
    """
    from .editing import read_recipe

    return {"edits": read_recipe(recipe)}


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
    from .editing import merge_files

    values = dict(_pair(text) for text in set or [])
    parts = {
        "model": model,
        "optimizer": optimizer,
        "scheduler": scheduler,
        "ema": ema,
        "like": like,
    }
    numbers = {"epoch": epoch, "step": step, "lr": lr}
    names = ("output", "overwrite", "dry_run", "history", "format", "color", "quiet")
    given = locals()
    job = _job("merge", {name: given[name] for name in names})
    merge_files(job, {name: _text(part) for name, part in parts.items()}, numbers, values)


def _job(command: str, options: Options) -> Job:
    from .editing import Job  # the library behind it is not needed to parse a command line

    return Job(command, **{name: _text(value) for name, value in options.items()})


def _text(value: Any) -> Any:
    """Paths as text: they are paths for the sake of the shell's completion."""
    return str(value) if isinstance(value, Path) else value


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


COMMANDS = (strip_prefix, strip_head, freeze, unfreeze, convert, merge, apply)
