"""The options that commands share."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

from .signature import Argument, Option

_OUTPUT = "Output"
_LIVE = "Live view: output shapes and MACs"

Src = Annotated[
    Path, Argument("SRC", "The checkpoint to read: a file, a folder or a URL; - is stdin.")
]
Srcs = Annotated[
    list[Path],
    Argument(
        "SRC…", "The checkpoints to edit, each by itself: files, folders or URLs; - is stdin."
    ),
]
Key = Annotated[
    str | None,
    Option("The state_dict inside that is meant (ema.model), if not the found one.", "PATH"),
]
FollowSymlinks = Annotated[
    bool, Option("Follow links: in place, and among shards outside a Hugging Face cache.")
]
Pattern = Annotated[
    list[str],
    Option(
        "A glob over dotted names (* crosses dots), or a module for all in it. Repeatable.",
        "PATTERN",
        complete="names",
    ),
]
Exclude = Annotated[
    list[str], Option("Take these away again. Repeatable.", "PATTERN", complete="names")
]
Regex = Annotated[bool, Option("Patterns are regular expressions.")]
Optimizer = Annotated[
    Literal["keep", "drop"], Option("keep: in step with the model. drop: leave it out.")
]

# ---------------------------------------------------------------------- where an output goes

Destination = Annotated[
    str | None,
    Option(
        "The file to write, or a folder/ (made where there is none) that takes it by SRC's name. "
        "Shards stay shards there; an .index.json takes them, too. - is stdout, for one file; "
        "s3://, gs://, az:// a store.",
        "DST",
        flags=("--output", "-o"),
        panel=_OUTPUT,
        complete="paths",
    ),
]
Folder = Annotated[
    str | None,
    Option(
        "The folder to write the parts to.",
        "DIR",
        flags=("--output", "-o"),
        panel=_OUTPUT,
        complete="paths",
    ),
]
InPlace = Annotated[bool, Option("Replace SRC by the result, whole or not at all.", panel=_OUTPUT)]
To = Annotated[
    str | None,
    Option(
        "torch or safetensors; else DST's suffix says, or for - what SRC is.",
        "FORMAT",
        panel=_OUTPUT,
    ),
]
MaxShardSize = Annotated[
    str | None,
    Option(
        "Write shards of at most this, into a folder (5GB where there is no saying).",
        "SIZE",
        panel=_OUTPUT,
    ),
]
Overwrite = Annotated[bool, Option("Replace DST if it is there.", panel=_OUTPUT)]
DryRun = Annotated[bool, Option("Print the plan, write nothing.", panel=_OUTPUT)]
History = Annotated[
    bool,
    Option(
        "Record in the output what was done to it.",
        flags=("--history/--no-history",),
        panel=_OUTPUT,
    ),
]


def saving(
    output: Destination = None,
    in_place: InPlace = False,
    to: To = None,
    max_shard_size: MaxShardSize = None,
    overwrite: Overwrite = False,
    dry_run: DryRun = False,
    history: History = True,
    key: Key = None,
    follow_symlinks: FollowSymlinks = False,
) -> None:
    """What every command takes that edits files one by one."""


# ---------------------------------------------------------------------- the live view

Arch = Annotated[
    str | None,
    Option(
        "The model to run: torchvision:resnet50, timm:NAME, package.module:factory or "
        "file.py:factory. By default what the tensors certainly are.",
        "NAME",
        panel=_LIVE,
    ),
]
ArchArg = Annotated[
    list[str] | None,
    Option("How it is built: num_classes=10. Repeatable.", "NAME=VALUE", panel=_LIVE),
]
InputSize = Annotated[
    list[str] | None,
    Option(
        "The shape of an input, batch and all; ids=1,8 by keyword. Repeatable.",
        "1,3,224,224",
        panel=_LIVE,
    ),
]
InputDtype = Annotated[
    list[str] | None,
    Option("int64, for token ids: one for all inputs, or one each.", "DTYPE", panel=_LIVE),
]
Device = Annotated[
    str,
    Option(
        "meta: shapes alone, no weights. cpu or cuda: for real, on random weights.",
        "DEVICE",
        panel=_LIVE,
    ),
]
Trust = Annotated[
    bool,
    Option(
        "Run what a whole module or a TorchScript file holds, as torch.load would.", panel=_LIVE
    ),
]
