"""What an operation or a format has to say: data, never a text to be searched."""

from __future__ import annotations

from typing import Any, Literal, NamedTuple

# From what only belongs beside a report to what nobody should miss.
Level = Literal["info", "hint", "advice", "warning"]


class Note(NamedTuple):
    """A remark for the report: how much it matters, what it says, and the way out where there is
    one (a command, an option)."""

    level: Level
    text: str
    way_out: str | None = None

    def __str__(self) -> str:
        return self.text if self.level == "info" else f"{self.level}: {self.text}"

    def as_dict(self) -> dict[str, Any]:
        return self._asdict()


def info(text: str, way_out: str | None = None) -> Note:
    """What is worth knowing."""
    return Note("info", text, way_out)


def warning(text: str, way_out: str | None = None) -> Note:
    """What is odd, or is likely not what was meant."""
    return Note("warning", text, way_out)


class Loss(NamedTuple):
    """A part of a checkpoint that a format can't hold, and the way out."""

    text: str
    way_out: str = "write it as .pt, or drop what does not fit"
