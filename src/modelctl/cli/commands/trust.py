"""The commands that say whether a file is to be trusted: scan."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

from ..output import Output, write_json
from ..signature import Argument, Command, Option


def scan(
    out: Output,
    src: Annotated[
        list[Path], Argument("PATH…", "What to look at: files, folders with all in them, URLs.")
    ],
    strict: Annotated[
        bool, Option("Somebody's own classes, and other oddities, are findings, too: exit code 1.")
    ] = False,
) -> int:
    """What the pickles in files would run, wherever they lie; nothing of them is run.

    In torch's files of all times, zips, tars and what is compressed, one in another, numpy arrays,
    joblib's and plain pickles, folders of torch.distributed.checkpoint. Content decides, never
    a suffix. Each finding says in which member, at which byte, by which name.

    Exit code 0: no finding, or but suspicious ones. 1: something would run. 2: something is
    malformed or could not be scanned.

    Example: modelctl scan downloads/ --strict

    Example: modelctl scan model.pt --format sarif
    """
    from ...scanning.scan import scan as look

    found = look(src)
    if out.format == "sarif":
        from ... import __version__

        write_json(None, found.as_sarif(__version__))
    else:
        out.show(found)
    return found.exit_code(strict=strict)


COMMANDS = (Command(scan, "Look", scan, sarif=True),)
