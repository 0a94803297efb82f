"""The commands: thin, a few lines each."""

from __future__ import annotations

from ..signature import Command
from . import compare, edit, look, parts

COMMANDS: dict[str, Command] = {
    command.name: command
    for command in (*look.COMMANDS, *compare.COMMANDS, *edit.COMMANDS, *parts.COMMANDS)
}
