"""Write docs/cli.md from the commands themselves: python docs/make_cli.py"""

from __future__ import annotations

import inspect
from pathlib import Path
from typing import Any, Literal, get_args, get_origin

HEAD = """\
# Commands

Made by `python docs/make_cli.py` from the commands' signatures and docstrings; a test keeps it so.

## Exit codes

0 done, or nothing found; 1 a finding (`diff`: they differ); 2 an error, in one line
`error: …`, with a line `hint: …` where there is a way out. With `--json` (or `--format json`) an
error is a document on stdout instead:
`{"schema": "modelctl.error/1", "error": {"kind", "message", "hint"}}`.
Of several sources, `written` names the outputs that stood by then. JSON has `null` for what is
not known, and neither NaN nor infinities.

`--dry-run` refuses what the run would refuse.

## Outputs

`-o FILE`, or `-o FOLDER`: one that is there, or is written with a trailing slash, and is made then,
with its parents. What goes into a folder takes the source's name, one source or many; `--to` gives
it the suffix of that format. Shards stay shards there; `--max-shard-size` makes shards of a file.

## Pipes

`-` is stdin where a checkpoint is read, and stdout with `-o`:
`modelctl strip-prefix ddp.pt -o - -q | ssh host 'modelctl summary -'`. A file that is redirected
(`< FILE`) is read where it lies; what a pipe brings is kept in a file without a name under `TMPDIR`
until the command ends. To stdout goes one file, of the format that `--to` names or else the
source's own; the report is on stderr then (`-q`: nowhere), and so are errors. It takes no shards
and no folders, and must be no terminal. Where reading fails on the way, what went out is cut off,
which any reader sees; the exit code is 2. A file that is called `-` is `./-`.

## Formats

`--format csv` has exact numbers, for programs; `markdown` is what people read, for documents. What
an operation has to say is under `remarks` in JSON: `level` (`info`, `advice`, `warning`), `text`,
`way_out`.

## Patterns

Globs over dotted names: `*` crosses dots, `?` is one character, `[ab]` a set; a name
without wildcards that is a module means all in it.
"""


def page() -> str:
    """The reference of all commands, as Markdown."""
    from modelctl.cli.commands import COMMANDS

    return "\n".join([HEAD, *map(_command, COMMANDS.values())])


def _command(command: Any) -> str:
    arguments, rows = [], []
    for parameter in inspect.signature(command).parameters.values():
        kind, info = get_args(parameter.annotation)[:2]
        if not hasattr(info, "names"):
            arguments.append(info.metavar)
            continue
        silent = (None, False, True, [], parameter.empty)
        default = "" if parameter.default in silent else f" Default: `{parameter.default}`."
        needed = " (needed)" if parameter.default is parameter.empty else ""
        value = (_choices(kind) or info.metavar or "").replace("|", " or ")
        flags = ", ".join(f"`{flag}`" for flag in info.names(parameter.name))
        flags += f" `{value}`" if value else ""
        rows.append(f"| {flags}{needed} | {info.help}{default} |")
    text = inspect.cleandoc(command.__doc__ or "")
    body, _, example = text.partition("Example: ")
    parts = [f"## modelctl {command.name} {' '.join(arguments)}".rstrip(), "", body.strip(), ""]
    if example:
        parts += ["```sh", example.strip(), "```", ""]
    return "\n".join([*parts, "| option | |", "| --- | --- |", *rows, ""])


def _choices(kind: Any) -> str:
    if get_origin(kind) is Literal:
        return " or ".join(get_args(kind))
    return ""


if __name__ == "__main__":
    Path(__file__).with_name("cli.md").write_text(page(), "utf-8")
