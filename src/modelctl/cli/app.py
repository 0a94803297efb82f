"""The commands, gathered into one program."""

from __future__ import annotations

from typing import Annotated

import typer

from .commands import compare, edit, look, parts

COMMANDS = {
    command.__name__.replace("_", "-"): (command, panel)
    for panel, commands in (
        ("Look", (*look.COMMANDS, *compare.COMMANDS)),
        ("Edit", (*edit.COMMANDS, *parts.COMMANDS)),
    )
    for command in commands
}


def make_app(only: str | None = None) -> typer.Typer:
    """The program; with ``only`` one command of it, which takes a fraction of the time."""
    app = typer.Typer(
        name="modelctl",
        help="Look into PyTorch checkpoints, edit and write them, without running them.",
        epilog="Every command: modelctl COMMAND --help. "
        "Exit codes: 0 done, 1 a finding, 2 an error.",
        no_args_is_help=True,
        pretty_exceptions_enable=False,
        context_settings={"help_option_names": ["-h", "--help"]},
    )
    app.callback()(_main)
    for name in [only] if only in COMMANDS else COMMANDS:
        command, panel = COMMANDS[str(name)]
        app.command(name, help=_flowing(command.__doc__ or ""), rich_help_panel=panel)(command)
    return app


def _version(wanted: bool) -> None:
    if wanted:
        from .. import __version__

        typer.echo(f"modelctl {__version__}")
        raise typer.Exit


def _main(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    pass


def _flowing(text: str) -> str:
    """A docstring with each paragraph on one line: the terminal's width breaks it."""
    flowing = "\n\n".join(" ".join(part.split()) for part in text.split("\n\n"))
    return flowing.replace("[", "\\[")  # typer reads it as rich's markup
