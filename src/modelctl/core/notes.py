"""What an operation or a format has to say: data, never a text to be searched."""

from __future__ import annotations

from typing import Literal, NamedTuple

Level = Literal["info", "warning"]


class Note(NamedTuple):
    """A remark for the report: how much it matters, what it says, and the way out where there is
    one (a command, an option)."""

    level: Level
    text: str
    way_out: str | None = None

    def __str__(self) -> str:
        return f"warning: {self.text}" if self.level == "warning" else self.text


class Loss(NamedTuple):
    """A part of a checkpoint that a format can't hold, and the way out."""

    text: str
    way_out: str = "write it as .pt, or drop what does not fit"
