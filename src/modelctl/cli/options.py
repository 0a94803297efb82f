"""The options that commands share."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated, Literal

import typer

_DISPLAY = "Display"
_OUTPUT = "Output"
_LIVE = "Live view: output shapes and MACs"


def complete_names(ctx: typer.Context, incomplete: str) -> list[str]:
    """The tensors and modules of SRC that begin so, for the shell's completion."""
    source = ctx.params.get("src")
    sources = source if isinstance(source, list | tuple) else [source]
    # a half-typed line leaves what was not parsed in ctx.args
    known_sources = [one for one in (*sources, *ctx.args) if one and os.path.exists(one)]
    if not known_sources:
        return []
    from .. import files
    from ..inspection.ls import list_names

    try:
        with files.open(known_sources[0]) as ckpt:
            names = list_names(ckpt)
    except Exception:  # a shell that completes is no place for errors
        return []
    known: dict[str, None] = {}
    for name in names:
        # up to the next dot: modules first, then what is in them
        end = name.find(".", len(incomplete))
        if name.startswith(incomplete):
            known[name if end < 0 else name[:end]] = None
    return list(known)


def complete_paths(incomplete: str) -> list[str]:
    """The files and folders that begin so: the output is text, since a slash at its end counts."""
    folder, name = os.path.split(incomplete)
    try:
        with os.scandir(folder or ".") as found:
            return sorted(
                os.path.join(folder, entry.name) + ("/" if entry.is_dir() else "")
                for entry in found
                if entry.name.startswith(name)
            )
    except OSError:
        return []


Src = Annotated[Path, typer.Argument(metavar="SRC", help="The checkpoint to read.")]
Srcs = Annotated[
    list[Path], typer.Argument(metavar="SRC…", help="The checkpoints to edit, each by itself.")
]
Key = Annotated[
    str | None,
    typer.Option(
        metavar="PATH",
        help="The state_dict inside that is meant (ema.model), if not the found one.",
    ),
]
Format = Annotated[
    Literal["table", "json", "csv", "markdown"],
    typer.Option("--format", help="How to print the report.", rich_help_panel=_DISPLAY),
]
Color = Annotated[
    Literal["auto", "always", "never"],
    typer.Option("--color", help="Colour; auto: in a terminal.", rich_help_panel=_DISPLAY),
]
Quiet = Annotated[
    bool,
    typer.Option("--quiet", "-q", help="No notes, only errors.", rich_help_panel=_DISPLAY),
]
Destination = Annotated[
    str | None,
    typer.Option(
        "--output",
        "-o",
        metavar="DST",
        autocompletion=complete_paths,
        help="The file to write; a folder/ or an .index.json takes shards.",
        rich_help_panel=_OUTPUT,
    ),
]
Folder = Annotated[
    str | None,
    typer.Option(
        "--output",
        "-o",
        metavar="DIR",
        autocompletion=complete_paths,
        help="The folder to write the parts to.",
        rich_help_panel=_OUTPUT,
    ),
]
InPlace = Annotated[
    bool,
    typer.Option(
        "--in-place",
        help="Replace SRC by the result, whole or not at all.",
        rich_help_panel=_OUTPUT,
    ),
]
To = Annotated[
    str | None,
    typer.Option(
        metavar="FORMAT",
        help="torch or safetensors; else DST's suffix says.",
        rich_help_panel=_OUTPUT,
    ),
]
MaxShardSize = Annotated[
    str | None,
    typer.Option(
        metavar="SIZE",
        help="Write shards of at most this, into a folder (5GB where DST is one).",
        rich_help_panel=_OUTPUT,
    ),
]
Overwrite = Annotated[
    bool, typer.Option("--overwrite", help="Replace DST if it is there.", rich_help_panel=_OUTPUT)
]
DryRun = Annotated[
    bool,
    typer.Option("--dry-run", help="Print the plan, write nothing.", rich_help_panel=_OUTPUT),
]
History = Annotated[
    bool,
    typer.Option(
        "--history/--no-history",
        help="Record in the output what was done to it.",
        rich_help_panel=_OUTPUT,
    ),
]
FollowSymlinks = Annotated[
    bool,
    typer.Option(
        "--follow-symlinks", help="Follow links among shards, also outside a Hugging Face cache."
    ),
]
Arch = Annotated[
    str | None,
    typer.Option(
        metavar="NAME",
        help="The model to run: torchvision:resnet50, timm:NAME, package.module:factory or "
        "file.py:factory. By default what the tensors certainly are.",
        rich_help_panel=_LIVE,
    ),
]
ArchArg = Annotated[
    list[str] | None,
    typer.Option(
        "--arch-arg",
        metavar="NAME=VALUE",
        help="How it is built: num_classes=10. Repeatable.",
        rich_help_panel=_LIVE,
    ),
]
InputSize = Annotated[
    list[str] | None,
    typer.Option(
        "--input-size",
        metavar="1,3,224,224",
        help="The shape of an input, batch and all; ids=1,8 by keyword. Repeatable.",
        rich_help_panel=_LIVE,
    ),
]
InputDtype = Annotated[
    list[str] | None,
    typer.Option(
        "--input-dtype",
        metavar="DTYPE",
        help="int64, for token ids: one for all inputs, or one each.",
        rich_help_panel=_LIVE,
    ),
]
Device = Annotated[
    str,
    typer.Option(
        metavar="DEVICE",
        help="meta: shapes alone, no weights. cpu or cuda: for real, on random weights.",
        rich_help_panel=_LIVE,
    ),
]
Trust = Annotated[
    bool,
    typer.Option(
        "--trust",
        help="Run what a whole module or a TorchScript file holds, as torch.load would.",
        rich_help_panel=_LIVE,
    ),
]
Pattern = Annotated[
    list[str],
    typer.Option(
        "--pattern",
        metavar="PATTERN",
        autocompletion=complete_names,
        help="A glob over dotted names (* crosses dots), or a module for all in it. Repeatable.",
    ),
]
Exclude = Annotated[
    list[str],
    typer.Option(
        "--exclude",
        metavar="PATTERN",
        autocompletion=complete_names,
        help="Take these away again. Repeatable.",
    ),
]
Regex = Annotated[bool, typer.Option("--regex", help="Patterns are regular expressions.")]
Optimizer = Annotated[
    Literal["keep", "drop"],
    typer.Option("--optimizer", help="keep: in step with the model. drop: leave it out."),
]
