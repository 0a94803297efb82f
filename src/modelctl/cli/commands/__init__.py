"""The commands: thin, a few lines each."""

from __future__ import annotations

from ..signature import Command
from . import compare, edit, look, parts, trust

COMMANDS: dict[str, Command] = {
    command.name: command
    for group in (look, compare, trust, edit, parts)
    for command in group.COMMANDS
}
