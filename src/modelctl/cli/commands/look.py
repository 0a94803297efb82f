"""The commands that look: summary, ls, show, diff."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

from ...core.notes import info
from ...errors import ModelctlError, SeveralError, UsageError
from ...storage.far.urls import shown
from ...storage.torchrun.ranks import joined
from .. import options as o
from ..live_options import inputs
from ..output import Output
from ..signature import Argument, Option, as_path, looks

if TYPE_CHECKING:
    from ...inspection.summary.report import Summary
    from ...nn.view.report import View


@looks
def summary(
    out: Output,
    src: Annotated[
        list[Path],
        Argument(
            "SRC…",
            "The checkpoint to read: a file, a folder or a URL; of several a row each. - is stdin.",
        ),
    ],
    depth: Annotated[
        str | None,
        Option("Levels of modules that get a row; by default as many as fit on a screen.", "N|all"),
    ] = None,
    fold: Annotated[
        bool | None,
        Option(
            "Repeated blocks in one row; by default when there are many.",
            flags=("--fold/--no-fold",),
        ),
    ] = None,
    sort: Annotated[
        Literal["file", "name", "params", "size"], Option("The order of the rows.")
    ] = "file",
    stats: Annotated[
        bool, Option("Read the values, too: range, mean, NaN and Inf (exit code 1).")
    ] = False,
    arch: o.Arch = None,
    arch_arg: o.ArchArg = None,
    input_size: o.InputSize = None,
    input_dtype: o.InputDtype = None,
    device: o.Device = "meta",
    trust: o.Trust = False,
    key: o.Key = None,
    follow_symlinks: o.FollowSymlinks = False,
) -> int:
    """What is in a checkpoint, at a glance.

    One row a module, exact totals, ties, the training state, and warnings with the next step. Of
    several files a row each: epoch, step, lr, size, findings (! where unpickling would run
    something); one that can't be read has its error there, and the exit code is 2. So is a
    folder of several checkpoints shown, the run of a training.

    Without --stats no tensor is read; nothing in the file is run, unless you --trust it.

    With --input-size, and --arch where the tensors don't tell the architecture: the live view,
    with output shapes, multiply-accumulates (MACs) and memory. It needs torch.

    Example: modelctl summary model.pt --depth 2

    Example: modelctl summary model.pt --arch torchvision:resnet50 --input-size 1,3,224,224
    """
    from ... import files

    start = time.perf_counter()
    levels = _levels(depth)
    if out.is_json:  # full rows, whatever is displayed
        levels, fold = "all", False
    is_live = arch is not None or bool(input_size)
    if is_live and stats:
        raise UsageError("--stats reads values, the live view none: leave one out")
    if not is_live and (arch_arg or input_dtype or trust or device != "meta"):
        raise UsageError(
            "--arch-arg, --input-dtype, --device and --trust are for the live view",
            hint="--input-size 1,3,224,224 asks for it",
        )
    if len(src) > 1:
        if is_live:
            raise UsageError("the live view shows one file", hint="name one SRC")
        return _overview(out, src, stats, key, follow_symlinks)
    sizes, dtypes = inputs(input_size or (), input_dtype or ())
    found: Summary | View
    try:
        opened = files.open(src[0], key=key, follow_symlinks=follow_symlinks)
    except SeveralError as e:
        if is_live:
            raise
        return _overview(out, [as_path(one) for one in e.found], stats, key, follow_symlinks)
    with opened as ckpt:
        if is_live:
            from ...nn.view.from_file import view

            found = view(
                ckpt,
                sizes,
                arch=arch,
                arch_args=tuple(arch_arg or ()),
                dtypes=dtypes,
                trust=trust,
                device=device,
                depth=levels or "auto",
                fold=fold,
                sort=sort,
            )
        else:
            from ...inspection.summary.summarize import summarize

            with out.progress() as progress:
                found = summarize(
                    ckpt,
                    None if levels == "all" else levels or "auto",
                    fold,
                    sort,
                    stats,
                    progress,
                )
        if joined() is None:  # a rank of a torchrun has loaded torch, and waited for it
            found = replace(found, seconds=time.perf_counter() - start)
        out.show(found)
    return int(found.finding)


def _overview(
    out: Output, sources: Sequence[Path | str], stats: bool, key: str | None, follow_symlinks: bool
) -> int:
    """A row for each of several files; those that can't be read don't hide the others."""
    from ... import files
    from ...inspection.overview import Overview, Seen
    from ...inspection.summary.summarize import summarize

    seen = Overview()
    with out.progress() as progress:
        for source in sources:
            path = shown(source)
            try:
                with files.open(source, key=key, follow_symlinks=follow_symlinks) as ckpt:
                    found = summarize(ckpt, None, False, stats=stats, progress=progress)
                seen.append(Seen(path, found))
            except ModelctlError as e:
                seen.append(Seen(path, error=e))
    out.show(seen)
    return 2 if seen.failed else int(seen.finding)


def _levels(depth: str | None) -> int | Literal["all"] | None:
    """How many levels of modules get a row."""
    if depth is None or depth == "all":
        return None if depth is None else "all"
    if depth.isdecimal() and 0 < int(depth) < 100:
        return int(depth)
    raise UsageError(f"--depth takes a number from 1, or 'all', not '{depth}'")


@looks
def ls(
    out: Output,
    src: o.Src,
    pattern: Annotated[
        list[str] | None,
        Argument("[PATTERN…]", "Only what these globs match.", complete="names"),
    ] = None,
    long: Annotated[
        bool, Option("Bytes, role and grad (yes, no, ?) too.", flags=("--long", "-l"))
    ] = False,
    params: Annotated[bool, Option("Parameters only.")] = False,
    buffers: Annotated[bool, Option("Buffers only.")] = False,
    section: Annotated[
        Literal["model", "optimizer", "ema", "constants", "all"], Option("Whose tensors.")
    ] = "model",
    regex: o.Regex = False,
    key: o.Key = None,
    follow_symlinks: o.FollowSymlinks = False,
) -> None:
    """A line a tensor: name, dtype, shape; plain names when piped.

    Example: modelctl ls model.pt 'layer4.*' --long
    """
    from ... import files
    from ...inspection.ls import list_names, list_tensors

    if params and buffers:
        raise UsageError("--params and --buffers take each other away: leave both out")
    role = "parameter" if params else "buffer" if buffers else None
    bare = out.is_table and not (out.fancy or long)  # a pipe gets names
    patterns = pattern or ()
    with files.open(src, key=key, follow_symlinks=follow_symlinks) as ckpt:
        out.warn(ckpt)
        if bare and role is None:
            out.lines(list_names(ckpt, patterns, regex=regex, section=section))
            return
        rows = list_tensors(ckpt, patterns, regex=regex, section=section, role=role)
    if role is not None and not rows:
        out.note(info(f"there are no {role}s in {src}"))
    if bare:
        out.lines([row.name for row in rows])
    else:
        out.show(rows, lambda: rows.page(long))


@looks
def show(
    out: Output,
    src: o.Src,
    path: Annotated[str | None, Argument("[PATH]", "Just this value, bare: epoch.")] = None,
    follow_symlinks: o.FollowSymlinks = False,
) -> None:
    """Every value that is no tensor: epoch, lr, hyperparameters, metadata.

    With PATH just that value, for scripts: epoch=$(modelctl show last.pt epoch)
    """
    from ... import files
    from ...inspection.show import show as look_up

    with files.open(src, follow_symlinks=follow_symlinks) as ckpt:
        out.warn(ckpt)
        out.show(look_up(ckpt, path))


@looks
def diff(
    out: Output,
    a: Annotated[Path, Argument("A", "A checkpoint.")],
    b: Annotated[Path, Argument("B", "Another, of any format.")],
    pattern: Annotated[
        list[str] | None, Option("Only these tensors. Repeatable.", "PATTERN")
    ] = None,
    regex: o.Regex = False,
    rtol: Annotated[float, Option("Relative tolerance of values.", least=0)] = 0.0,
    atol: Annotated[float, Option("Absolute tolerance of values.", least=0)] = 0.0,
    ignore_prefix: Annotated[
        bool,
        Option("Names without module. and the like, and without a prefix that one side has."),
    ] = False,
    by: Annotated[
        Literal["tensor", "module"] | None,
        Option("What has a row; by default tensors, or modules where these are many."),
    ] = None,
    stats: Annotated[bool, Option("All figures, in a table.")] = False,
    key: o.Key = None,
    follow_symlinks: o.FollowSymlinks = False,
) -> int:
    """What differs: names, shapes, dtypes, values bit for bit, and everything else.

    Of values: how many differ, the largest and the mean absolute and relative difference,
    |a - b| / max(|a|, |b|), and the cosine; the largest first. Two NaNs at one place are the same.

    Exit code 0: the same. 1: they differ.

    Example: modelctl diff before.pt after.pt --pattern 'layer1.*'

    Example: modelctl diff ddp.pt plain.safetensors --ignore-prefix --stats
    """
    from ... import files
    from ...inspection.diffing.diff import diff as compare

    with (
        files.open(a, key=key, follow_symlinks=follow_symlinks) as left,
        files.open(b, key=key, follow_symlinks=follow_symlinks) as right,
    ):
        out.warn(left, right)
        patterns = pattern or ()
        with out.progress() as progress:
            found = compare(
                left, right, patterns, regex, rtol, atol, ignore_prefix, by, stats, progress
            )
    out.show(replace(found, a=str(a), b=str(b)))
    return int(found.differs)


COMMANDS = (summary, ls, show, diff)
