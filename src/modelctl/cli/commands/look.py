"""The commands that look: summary, ls, show, diff."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Annotated, Literal

import typer

from ...errors import UsageError
from .. import options as o
from ..output import Output


def summary(
    src: o.Src,
    depth: Annotated[
        str | None,
        typer.Option(
            metavar="N|all",
            help="Levels of modules that get a row: 1, or in the live view as many as fit.",
        ),
    ] = None,
    fold: Annotated[
        bool | None,
        typer.Option(
            "--fold/--no-fold", help="Repeated blocks in one row; by default when there are many."
        ),
    ] = None,
    sort: Annotated[
        Literal["file", "name", "params", "size"], typer.Option(help="The order of the rows.")
    ] = "file",
    stats: Annotated[
        bool,
        typer.Option(
            "--stats", help="Read the values, too: range, mean, NaN and Inf (exit code 1)."
        ),
    ] = False,
    arch: o.Arch = None,
    arch_arg: o.ArchArg = None,
    input_size: o.InputSize = None,
    input_dtype: o.InputDtype = None,
    device: o.Device = "meta",
    trust: o.Trust = False,
    key: o.Key = None,
    follow_symlinks: o.FollowSymlinks = False,
    format: o.Format = "table",
    color: o.Color = "auto",
    quiet: o.Quiet = False,
) -> None:
    """What is in a checkpoint, at a glance.

    One row a module, exact totals, ties, the training state, and warnings with the next step.
    Without --stats no tensor is read; nothing in the file is run, unless you --trust it.

    With --input-size, and --arch where the tensors don't tell the architecture: the live view,
    with output shapes, multiply-accumulates (MACs) and memory. It needs torch.

    Example: modelctl summary model.pt --depth 2

    Example: modelctl summary model.pt --arch torchvision:resnet50 --input-size 1,3,224,224
    """
    if depth is not None and depth != "all" and not (depth.isdecimal() and 0 < int(depth) < 100):
        raise UsageError(f"--depth takes a number from 1, or 'all', not '{depth}'")
    if arch is not None or input_size:
        from ..show import live

        if stats:
            raise UsageError("--stats reads values, the live view none: leave one out")
        ask = live.parse(arch, arch_arg, input_size, input_dtype, device, trust, depth, fold)
        live.show(ask, src, key, follow_symlinks, sort, Output(format, color, quiet))
        return
    if arch_arg or input_dtype or trust or device != "meta":
        raise UsageError(
            "--arch-arg, --input-dtype, --device and --trust are for the live view",
            hint="--input-size 1,3,224,224 asks for it",
        )
    depth = depth or "1"
    from ... import files
    from ...inspection.summary.summarize import summarize
    from ..show.summary import print_summary

    start = time.perf_counter()
    levels = None if depth == "all" or format == "json" else int(depth)
    with files.open(src, key=key, follow_symlinks=follow_symlinks) as ckpt:
        found = summarize(ckpt, levels, False if format == "json" else fold, sort, stats)
        seconds = time.perf_counter() - start
        print_summary(Output(format, color, quiet), ckpt, found, seconds)
    if any(one.nan or one.inf for one in found.stats.values()):
        raise typer.Exit(1)


def ls(
    src: o.Src,
    pattern: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="[PATTERN…]",
            autocompletion=o.complete_names,
            help="Only what these globs match.",
        ),
    ] = None,
    long: Annotated[
        bool, typer.Option("--long", "-l", help="Bytes, role and grad (yes, no, ?) too.")
    ] = False,
    params: Annotated[bool, typer.Option("--params", help="Parameters only.")] = False,
    buffers: Annotated[bool, typer.Option("--buffers", help="Buffers only.")] = False,
    section: Annotated[
        Literal["model", "optimizer", "ema", "constants", "all"],
        typer.Option(help="Whose tensors."),
    ] = "model",
    regex: o.Regex = False,
    key: o.Key = None,
    follow_symlinks: o.FollowSymlinks = False,
    format: o.Format = "table",
    color: o.Color = "auto",
    quiet: o.Quiet = False,
) -> None:
    """A line a tensor: name, dtype, shape; plain names when piped.

    Example: modelctl ls model.pt 'layer4.*' --long
    """
    if params and buffers:
        raise UsageError("--params and --buffers take each other away: leave both out")
    from ... import files
    from ...inspection.ls import list_names, list_tensors
    from ..show.reports import print_tensors

    role = "parameter" if params else "buffer" if buffers else None
    out = Output(format, color, quiet)
    with files.open(src, key=key, follow_symlinks=follow_symlinks) as ckpt:
        if out.is_table and not (out.fancy or long or role):
            out.lines(list_names(ckpt, pattern or (), regex=regex, section=section))
            return
        rows = list_tensors(ckpt, pattern or (), regex=regex, section=section, role=role)
        print_tensors(out, ckpt, rows, long)


def show(
    src: o.Src,
    path: Annotated[
        str | None, typer.Argument(metavar="[PATH]", help="Just this value, bare: epoch.")
    ] = None,
    follow_symlinks: o.FollowSymlinks = False,
    format: Annotated[
        Literal["table", "json"], typer.Option("--format", help="How to print it.")
    ] = "table",
    color: o.Color = "auto",
    quiet: o.Quiet = False,
) -> None:
    """Every value that is no tensor: epoch, lr, hyperparameters, metadata.

    With PATH just that value, for scripts: epoch=$(modelctl show last.pt epoch)
    """
    from ... import files
    from ..show.reports import print_tree, print_value

    out = Output(format, color, quiet)
    with files.open(src, follow_symlinks=follow_symlinks) as ckpt:
        if path is None:
            print_tree(out, ckpt)
        else:
            print_value(out, ckpt, path)


def diff(
    a: Annotated[Path, typer.Argument(metavar="A", help="A checkpoint.")],
    b: Annotated[Path, typer.Argument(metavar="B", help="Another, of any format.")],
    pattern: Annotated[
        list[str] | None,
        typer.Option("--pattern", metavar="PATTERN", help="Only these tensors. Repeatable."),
    ] = None,
    regex: o.Regex = False,
    rtol: Annotated[float, typer.Option(min=0, help="Relative tolerance of values.")] = 0.0,
    atol: Annotated[float, typer.Option(min=0, help="Absolute tolerance of values.")] = 0.0,
    key: o.Key = None,
    follow_symlinks: o.FollowSymlinks = False,
    format: o.Format = "table",
    color: o.Color = "auto",
    quiet: o.Quiet = False,
) -> None:
    """What differs: names, shapes, dtypes, values bit for bit, and everything else.

    Exit code 0: the same. 1: they differ.

    Example: modelctl diff before.pt after.pt --pattern 'layer1.*'
    """
    from ... import files
    from ...inspection.diff import diff as compare
    from ..show.reports import print_diff

    with (
        files.open(a, key=key, follow_symlinks=follow_symlinks) as left,
        files.open(b, key=key, follow_symlinks=follow_symlinks) as right,
    ):
        found = compare(left, right, pattern or (), regex=regex, rtol=rtol, atol=atol)
        print_diff(Output(format, color, quiet), str(a), str(b), found)
    if found.differs:
        raise typer.Exit(1)


COMMANDS = (summary, ls, show, diff)
