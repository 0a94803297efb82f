"""The commands that edit: each opens, calls one function of the library, saves and reports."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from functools import wraps
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from .. import options as o

if TYPE_CHECKING:
    from ..editing import Job

Options = dict[str, Any]


def _shared(
    output: o.Destination = None,
    in_place: o.InPlace = False,
    to: o.To = None,
    max_shard_size: o.MaxShardSize = None,
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
        make_job(function.__name__.replace("_", "-"), job).run(src, function(src=src, **options))

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
def add_prefix(
    src: o.Srcs,
    prefix: Annotated[str, typer.Option(metavar="P", help="What goes before every name.")],
) -> Options:
    """Put a prefix before every name, as a module around the model would.

    The inverse of strip-prefix --prefix.

    Example: modelctl add-prefix resnet50.pt --prefix backbone -o part.pt
    """
    return {"prefix": prefix}


@edits
def rename(
    src: o.Srcs,
    map: Annotated[
        list[str] | None,
        typer.Option(
            "--map",
            metavar="OLD=NEW",
            autocompletion=o.complete_names,
            help="The n-th * of NEW is what the n-th * of OLD stands for. Repeatable, in order.",
        ),
    ] = None,
    map_file: Annotated[
        Path | None,
        typer.Option(metavar="F", help="A file with a map a line (# begins a comment)."),
    ] = None,
    regex: Annotated[
        bool, typer.Option("--regex", help="OLD is searched for and replaced; NEW may hold \\1.")
    ] = False,
) -> Options:
    """Rename tensors, in the model, its EMA copies, the optimizer and the records.

    OLD is a glob over dotted names (* crosses dots and takes as little as it can), or a module,
    for all in it. Each map works on what the one before made; two tensors with one name are
    refused.

    Example: modelctl rename vit.pt --map 'blocks.*.attn.*=layers.*.attention.*' -o renamed.pt
    """
    from ..editing import read_maps

    return {"map": [*(map or []), *(read_maps(map_file) if map_file else [])], "regex": regex}


@edits
def keep(
    src: o.Srcs,
    pattern: o.Pattern,
    exclude: o.Exclude = [],  # noqa: B006 - typer copies it
    regex: o.Regex = False,
    optimizer: o.Optimizer = "keep",
) -> Options:
    """Keep the tensors that match, and their optimizer state; drop the model's others.

    Example: modelctl keep clip.pt --pattern 'visual.*' -o visual.safetensors
    """
    return {"pattern": pattern, "exclude": exclude, "regex": regex, "optimizer": optimizer}


@edits
def drop(
    src: o.Srcs,
    pattern: o.Pattern,
    exclude: o.Exclude = [],  # noqa: B006 - typer copies it
    regex: o.Regex = False,
    optimizer: o.Optimizer = "keep",
) -> Options:
    """Drop the tensors that match, and their optimizer state.

    In a whole module a dropped layer becomes an Identity.

    Example: modelctl drop googlenet.pt --pattern 'aux*' -o main.pt
    """
    return {"pattern": pattern, "exclude": exclude, "regex": regex, "optimizer": optimizer}


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

    Shards become one file, and one file shards where the output is a folder. A whole module
    becomes its state_dict, without its class. What the format can't hold is refused: an
    optimizer is only lost with --weights-only.

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
    from ..editing import read_recipe

    return {"edits": read_recipe(recipe)}


def make_job(command: str, options: Options) -> Job:
    from ..editing import Job  # the library behind it is not needed to parse a command line

    return Job(command, **{name: text(value) for name, value in options.items()})


def text(value: Any) -> Any:
    """Paths as text: they are paths for the sake of the shell's completion."""
    return str(value) if isinstance(value, Path) else value


COMMANDS = (
    *(strip_prefix, add_prefix, rename, keep, drop),
    *(strip_head, freeze, unfreeze, convert, apply),
)
