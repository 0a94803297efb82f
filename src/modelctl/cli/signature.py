"""What a command takes, said once: help, errors, the quick way and the docs all read it here."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from functools import cached_property
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple

from ..errors import UsageError
from ..storage.far.urls import is_far
from ..storage.streams import is_stream
from .output import Output, report_beside

# What the shell may offer: names of tensors and modules, or files and folders.
Complete = Literal["names", "paths"]


class Argument(NamedTuple):
    """What is told by its place."""

    metavar: str
    help: str
    complete: Complete | None = None


class Option(NamedTuple):
    """What is told by its name.

    Attributes:
        flags: how it is called; by default as the parameter (``--dry-run``). The opposite of a
            switch stands behind a slash: ``--fold/--no-fold``.
        panel: the heading under which help lists it.
        least: the smallest number that it takes.
    """

    help: str
    metavar: str | None = None
    flags: tuple[str, ...] = ()
    panel: str | None = None
    complete: Complete | None = None
    least: int | None = None

    def names(self, parameter: str) -> tuple[str, ...]:
        """The flags of the option of a parameter."""
        return self.flags or ("--" + parameter.replace("_", "-"),)


_DISPLAY = "Display"
Format = Annotated[
    Literal["table", "json", "csv", "markdown"], Option("How to print the report.", panel=_DISPLAY)
]
FormatOrSarif = Annotated[
    Literal["table", "json", "csv", "markdown", "sarif"],
    Option("How to print the report; sarif is for code hosts.", panel=_DISPLAY),
]
Json = Annotated[
    bool, Option("Short for --format json. Errors are JSON then, too.", panel=_DISPLAY)
]
Color = Annotated[
    Literal["auto", "always", "never"], Option("Colour; auto: in a terminal.", panel=_DISPLAY)
]
Quiet = Annotated[
    bool,
    Option(
        "Only errors: no remarks, and of an edit no report (but in another --format).",
        flags=("--quiet", "-q"),
        panel=_DISPLAY,
    ),
]


def display(
    format: Format = "table", json: Json = False, color: Color = "auto", quiet: Quiet = False
) -> None:
    """What every command takes."""


def as_path(text: str) -> Path | str:
    """A path as it was said; pathlib takes ``./-``, which is a file, for ``-``, which is none, and
    of a URL's two slashes it makes one."""
    if is_far(text):
        return text
    path = Path(text)
    return path.absolute() if is_stream(path) and not is_stream(text) else path


class Command:
    """A command: ``run`` gets an :class:`Output` and what the user said, and gives the exit code.

    It takes the parameters of the functions ``taken``, and how to show the report, which one that
    has findings for code hosts can give as ``sarif``, too. They are looked
    at when somebody asks for them: a program start knows twenty commands, and runs one.
    """

    def __init__(
        self,
        run: Callable[..., int | None],
        panel: str,
        *taken: Callable[..., Any],
        sarif: bool = False,
    ) -> None:
        self.run, self.panel, self.taken = run, panel, taken
        self.sarif = sarif
        self.name = taken[0].__name__.replace("_", "-")
        self.__doc__ = taken[0].__doc__

    @cached_property
    def __signature__(self) -> inspect.Signature:
        parameters = [
            parameter
            for function in (*self.taken, display)
            for parameter in inspect.signature(function, eval_str=True).parameters.values()
            if parameter.name != "out"
        ]
        if self.sarif:
            parameters = [
                one.replace(annotation=FormatOrSarif) if one.name == "format" else one
                for one in parameters
            ]
        return inspect.Signature(parameters)

    def __call__(
        self,
        *,
        format: str = "table",
        json: bool = False,
        color: str = "auto",
        quiet: bool = False,
        **said: Any,
    ) -> int:
        if json and format not in ("table", "json"):
            raise UsageError(f"--json and --format {format}: one of them")
        if is_stream(said.get("output")):
            report_beside()
        out = Output(self.name, "json" if json else format, color, quiet)
        return self.run(out, **said) or 0


def looks(run: Callable[..., int | None]) -> Command:
    """A command that looks: ``run`` takes an Output first."""
    return Command(run, "Look", run)
