"""The commands that compare a checkpoint with an architecture: identify, match."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from ...errors import UsageError
from .. import options as o
from ..output import Output


def identify(
    src: o.Src,
    key: o.Key = None,
    follow_symlinks: o.FollowSymlinks = False,
    format: o.Format = "table",
    color: o.Color = "auto",
    quiet: o.Quiet = False,
) -> None:
    """Which known architecture the tensors are: all of torchvision's, by names and shapes.

    Under any prefix, with any number of classes, with or without a head. The score is the share
    of tensors that agree; below 0.7 nothing is claimed. Neither torch nor torchvision is needed.

    Example: modelctl identify model.pt
    """
    from ... import files
    from ...inspection.architectures.identify import identify as find
    from ..show.identify import print_candidates

    with files.open(src, key=key, follow_symlinks=follow_symlinks) as ckpt:
        print_candidates(Output(format, color, quiet), ckpt, find(ckpt))


def match(
    src: o.Src,
    like: Annotated[
        Path | None, typer.Option(metavar="OTHER", help="A checkpoint of the model to load into.")
    ] = None,
    arch: Annotated[
        str | None,
        typer.Option(
            metavar="NAME",
            help="Or an architecture: torchvision:resnet50 (known, nothing is run); timm:NAME, "
            "package.module:factory or file.py:factory (built, with torch).",
        ),
    ] = None,
    arch_arg: Annotated[
        list[str] | None,
        typer.Option(
            "--arch-arg",
            metavar="NAME=VALUE",
            help="How it is built: num_classes=10, aux_loss=true. Repeatable.",
        ),
    ] = None,
    write_map: Annotated[
        Path | None,
        typer.Option(metavar="F", help="Write the maps for rename --map-file."),
    ] = None,
    key: o.Key = None,
    like_key: Annotated[
        str | None, typer.Option(metavar="PATH", help="The state_dict that is meant in OTHER.")
    ] = None,
    follow_symlinks: o.FollowSymlinks = False,
    format: o.Format = "table",
    color: o.Color = "auto",
    quiet: o.Quiet = False,
) -> None:
    """What load_state_dict would say, before it says it, and the maps for rename that mend it.

    Missing, unexpected and mismatched tensors by module. The maps are found by prefixes, shapes
    and order; what these leave unclear is said and not renamed.

    Exit code 0: all fits as it is. 1: it does not, whether maps mend it or not.

    Example: modelctl match old.pt --like new.pt --write-map old-to-new.map
    """
    from contextlib import ExitStack

    from ... import files
    from ...inspection.matching.match import match as compare
    from ..show.match import print_match, write_maps

    out = Output(format, color, quiet)
    with ExitStack() as stack:
        ckpt = stack.enter_context(files.open(src, key=key, follow_symlinks=follow_symlinks))
        other = None
        if like is not None:
            opened = files.open(like, key=like_key, follow_symlinks=follow_symlinks)
            other = stack.enter_context(opened)
        if arch is not None and ":" in arch and not arch.startswith("torchvision:"):
            from ...nn.view.from_file import names_and_shapes

            if other is not None:
                raise UsageError("--like and --arch: one of them")
            found = compare(ckpt, names_and_shapes(arch, arch_arg or ()))
        else:
            found = compare(ckpt, other, arch, arch_arg or ())
    target = str(like) if like is not None else str(arch)
    if write_map is not None:
        write_maps(out, write_map, f"{src} -> {target}", found)
    print_match(out, str(src), target, found, write_map)
    if not found.before.fits:
        raise typer.Exit(1)


COMMANDS = (identify, match)
