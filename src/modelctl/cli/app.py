"""The commands, gathered into one program of typer's: for help, errors and completion."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any, get_args

import typer

from ..storage.places import named
from .commands import COMMANDS
from .completion import complete_names, complete_paths
from .signature import Argument, Command, Option, as_path

_COMPLETE: dict[str, Callable[..., list[str]]] = {
    "names": complete_names,
    "paths": complete_paths,
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
        command = COMMANDS[str(name)]
        app.command(name, help=_flowing(command.__doc__ or ""), rich_help_panel=command.panel)(
            _for_typer(command)
        )
    return app


def _for_typer(command: Command) -> Callable[..., int]:
    """A function that takes what the command takes, as typer wants to be told."""

    def function(**said: Any) -> int:
        return command(**said)

    parameters = [
        parameter.replace(annotation=_annotation(parameter))
        for parameter in inspect.signature(command).parameters.values()
    ]
    function.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    function.__annotations__ = {one.name: one.annotation for one in parameters}
    return function


def _annotation(parameter: inspect.Parameter) -> Any:
    kind, info = get_args(parameter.annotation)[:2]
    is_path = Path in (kind, *get_args(kind))
    return Annotated[kind, _info(parameter.name, info, is_path)]


def _info(name: str, info: Argument | Option, is_path: bool) -> Any:
    complete = _COMPLETE[info.complete] if info.complete else None
    parser = _path if is_path else None
    if isinstance(info, Argument):
        return typer.Argument(
            metavar=info.metavar, help=info.help, autocompletion=complete, parser=parser
        )
    return typer.Option(
        *info.names(name),
        metavar=info.metavar,
        help=info.help,
        rich_help_panel=info.panel,
        autocompletion=complete,
        min=info.least,
        parser=parser,
    )


def _path(text: str) -> Path | str:
    """A path as it was said; pathlib takes an empty one for the current folder."""
    named(text)
    return as_path(text)


def _version(wanted: bool) -> None:
    if wanted:
        from .. import __version__

        typer.echo(f"modelctl {__version__}")
        raise typer.Exit


def _main(
    version: Annotated[
        bool,
        typer.Option(
            "--version", "-V", callback=_version, is_eager=True, help="Print the version."
        ),
    ] = False,
) -> None:
    pass


def _flowing(text: str) -> str:
    """A docstring with each paragraph on one line: the terminal's width breaks it."""
    flowing = "\n\n".join(" ".join(part.split()) for part in text.split("\n\n"))
    return flowing.replace("[", "\\[")  # typer reads it as rich's markup
