"""The commands that compare a checkpoint with an architecture: identify, match."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from ...core.notes import Note, info
from ...core.text import count
from ...errors import UsageError
from .. import options as o
from ..output import Output
from ..signature import Option, looks

if TYPE_CHECKING:
    from ...inspection.matching.report import Match


@looks
def identify(
    out: Output, src: o.Src, key: o.Key = None, follow_symlinks: o.FollowSymlinks = False
) -> None:
    """Which known architecture the tensors are: all of torchvision's, by names and shapes.

    Under any prefix, with any number of classes, with or without a head. The score is the share
    of tensors that agree; below 0.7 nothing is claimed. Neither torch nor torchvision is needed.

    Example: modelctl identify model.pt
    """
    from ... import files
    from ...inspection.architectures.identify import identify as find

    with files.open(src, key=key, follow_symlinks=follow_symlinks) as ckpt:
        out.warn(ckpt)
        out.show(find(ckpt))


@looks
def match(
    out: Output,
    src: o.Src,
    like: Annotated[Path | None, Option("A checkpoint of the model to load into.", "OTHER")] = None,
    arch: Annotated[
        str | None,
        Option(
            "Or an architecture: torchvision:resnet50 (known, nothing is run); timm:NAME, "
            "package.module:factory or file.py:factory (built, with torch).",
            "NAME",
        ),
    ] = None,
    arch_arg: Annotated[
        list[str] | None,
        Option("How it is built: num_classes=10, aux_loss=true. Repeatable.", "NAME=VALUE"),
    ] = None,
    write_map: Annotated[Path | None, Option("Write the maps for rename --map-file.", "F")] = None,
    key: o.Key = None,
    like_key: Annotated[
        str | None, Option("The state_dict that is meant in OTHER.", "PATH")
    ] = None,
    follow_symlinks: o.FollowSymlinks = False,
) -> int:
    """What load_state_dict would say, before it says it, and the maps for rename that mend it.

    Missing, unexpected and mismatched tensors by module. The maps are found by prefixes, shapes
    and order; what these leave unclear is said and not renamed.

    Exit code 0: all fits as it is. 1: it does not, whether maps mend it or not.

    Example: modelctl match old.pt --like new.pt --write-map old-to-new.map
    """
    from contextlib import ExitStack

    from ... import files
    from ...inspection.matching.match import match as compare

    args = arch_arg or ()
    with ExitStack() as stack:
        ckpt = stack.enter_context(files.open(src, key=key, follow_symlinks=follow_symlinks))
        other = None
        if like is not None:
            opened = files.open(like, key=like_key, follow_symlinks=follow_symlinks)
            other = stack.enter_context(opened)
        out.warn(ckpt, *([other] if other is not None else []))
        if arch is not None and ":" in arch and not arch.startswith("torchvision:"):
            from ...nn.view.from_file import names_and_shapes

            if other is not None:
                raise UsageError("--like and --arch: one of them")
            found = compare(ckpt, names_and_shapes(arch, args))
        else:
            found = compare(ckpt, other, arch, args)
    found = found._replace(source=str(src), target=str(like) if like is not None else arch)
    if write_map is not None:
        out.note(_write(write_map, found))
    out.show(found, lambda: found.page(written=write_map is not None))
    return int(not found.before.fits)


def _write(path: Path, found: Match) -> Note:
    from ...rewrite.recipe_files import write_maps

    if not found.maps:
        why = "all fits" if found.before.fits else "no map helps"
        return info(f"{path} is not written: {why}")
    write_maps(path, found)
    return info(f"{path}: {count(len(found.maps), 'map')} written")


COMMANDS = (identify, match)
