"""The commands that edit: each says what its options mean to the operation of its name."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any, Literal

from ...storage.places import is_there
from .. import options as o
from ..output import Output
from ..signature import Argument, Command, Option

Edits = list[dict[str, Any]]


def edits(function: Callable[..., dict[str, Any] | Edits]) -> Command:
    """A command that edits files. ``function`` gives the options of the operation of its name, or
    the edits of a recipe."""
    name = function.__name__.replace("_", "-")

    def run(out: Output, src: list[Path], **said: Any) -> None:
        from ...rewrite.edit import edit

        for path in src:
            if not is_there(path) and Path(path).name:
                from ..mistakes import no_source

                no_source(command, path)
        where = {option: said.pop(option) for option in _SAVING if option in said}
        meant = function(src=src, **said)
        each = meant if isinstance(meant, list) else [_edit(name, meant)]
        with out.progress() as progress:
            show = out.done if out.is_table else None  # as soon as a file stands
            done = edit(src, each, **where, progress=progress, report=show)
        if show is None:
            out.done(done)

    command = Command(run, "Edit", function, o.saving)
    return command


_SAVING = tuple(o.saving.__annotations__)


def _edit(name: str, options: dict[str, Any]) -> dict[str, Any]:
    """An edit as in a recipe."""
    given = {key.replace("_", "-"): value for key, value in options.items() if value is not None}
    return {"do": name, **given}


@edits
def strip_prefix(
    src: o.Srcs,
    prefix: Annotated[
        str | None, Option("Exactly this one, once, instead of the wrappers'.", "P")
    ] = None,
) -> dict[str, Any]:
    """Strip what DataParallel and torch.compile put before names.

    By default module., _orig_mod. and FSDP's, at segment borders, until none is left; in the
    model, its EMA copies and the optimizer.

    Example: modelctl strip-prefix ddp.pt -o clean.pt
    """
    return {"prefix": prefix}


@edits
def add_prefix(
    src: o.Srcs, prefix: Annotated[str, Option("What goes before every name.", "P")]
) -> dict[str, Any]:
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
        Option(
            "The n-th * of NEW is what the n-th * of OLD stands for. Repeatable, in order.",
            "OLD=NEW",
            complete="names",
        ),
    ] = None,
    map_file: Annotated[
        Path | None, Option("A file with a map a line (# begins a comment).", "F")
    ] = None,
    regex: Annotated[bool, Option("OLD is searched for and replaced; NEW may hold \\1.")] = False,
) -> dict[str, Any]:
    """Rename tensors, in the model, its EMA copies, the optimizer and the records.

    OLD is a glob over dotted names (* crosses dots and takes as little as it can), or a module,
    for all in it. Each map works on what the one before made; two tensors with one name are
    refused.

    Example: modelctl rename vit.pt --map 'blocks.*.attn.*=layers.*.attention.*' -o renamed.pt
    """
    from ...rewrite.recipe_files import read_maps

    return {"map": [*(map or []), *(read_maps(map_file) if map_file else [])], "regex": regex}


@edits
def keep(
    src: o.Srcs,
    pattern: o.Pattern,
    exclude: o.Exclude = [],  # noqa: B006 - nobody changes it
    regex: o.Regex = False,
    optimizer: o.Optimizer = "keep",
) -> dict[str, Any]:
    """Keep the tensors that match, and their optimizer state; drop the model's others.

    Example: modelctl keep clip.pt --pattern 'visual.*' -o visual.safetensors
    """
    return {"pattern": pattern, "exclude": exclude, "regex": regex, "optimizer": optimizer}


@edits
def drop(
    src: o.Srcs,
    pattern: o.Pattern,
    exclude: o.Exclude = [],  # noqa: B006 - nobody changes it
    regex: o.Regex = False,
    optimizer: o.Optimizer = "keep",
) -> dict[str, Any]:
    """Drop the tensors that match, and their optimizer state.

    In a whole module a dropped layer becomes an Identity.

    Example: modelctl drop googlenet.pt --pattern 'aux*' -o main.pt
    """
    return {"pattern": pattern, "exclude": exclude, "regex": regex, "optimizer": optimizer}


@edits
def strip_head(
    src: o.Srcs,
    head: Annotated[
        str | None, Option("The head, where it isn't the found one.", "PATTERN")
    ] = None,
    rename_head: Annotated[
        str | None, Option("Keep the head, under this module name, instead.", "NEW")
    ] = None,
    optimizer: o.Optimizer = "keep",
) -> dict[str, Any]:
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
    exclude: o.Exclude = [],  # noqa: B006 - nobody changes it
    regex: o.Regex = False,
    bn_eval: Annotated[bool, Option("Frozen BatchNorm stays in eval: its statistics too.")] = False,
    optimizer: Annotated[
        Literal["keep", "drop"], Option("drop: take the frozen parameters' state out.")
    ] = "keep",
) -> dict[str, Any]:
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
    exclude: o.Exclude = [],  # noqa: B006 - nobody changes it
    regex: o.Regex = False,
) -> dict[str, Any]:
    """Take parameters out of the file's freeze record.

    Example: modelctl unfreeze backbone.pt --pattern layer3 --in-place
    """
    return {"pattern": pattern, "exclude": exclude, "regex": regex}


@edits
def convert(
    src: o.Srcs,
    weights_only: Annotated[
        bool, Option("Only the model's tensors; leave the rest behind.")
    ] = False,
    device: Annotated[
        str | None,
        Option(
            "Where the output says that its storages were, for torch.load without map_location: "
            "cpu, cuda:0.",
            "DEVICE",
        ),
    ] = None,
) -> dict[str, Any]:
    """Write a checkpoint in another format.

    Shards become one file, and one file shards with --max-shard-size. A whole module becomes
    its state_dict, without its class. What the format can't hold is refused: an
    optimizer is only lost with --weights-only.

    Example: modelctl convert old.th -o model.safetensors --weights-only
    """
    return {"weights_only": weights_only, "device": device}


@edits
def apply(
    recipe: Annotated[Path, Argument("RECIPE.toml", "The edits, in order.")], src: o.Srcs
) -> Edits:
    """Several edits in one pass and one write, from a recipe.

    A recipe is TOML: a table [[edit]] for each, do = "strip-prefix", then its options by their
    names here (bn-eval = true).

    Example: modelctl apply transfer.toml ddp.pt -o backbone.pt
    """
    from ...rewrite.recipe_files import read_recipe
    from ..mistakes import check_recipe

    check_recipe(recipe, src)
    return read_recipe(recipe)


COMMANDS = (
    *(strip_prefix, add_prefix, rename, keep, drop),
    *(strip_head, freeze, unfreeze, convert, apply),
)
