"""What unpickling a file would run, in a word for every report."""

from __future__ import annotations

from ..core.checkpoint import Checkpoint
from ..core.notes import Note, warning
from ..core.text import some


def would_run(*checkpoints: Checkpoint) -> list[Note]:
    """A warning for each checkpoint whose unpickling would run code: which names it calls."""
    found = []
    for ckpt in checkpoints:
        dangerous = [finding.name for finding in ckpt.findings if finding.level == "dangerous"]
        if dangerous:
            path = ckpt.origin.path if ckpt.origin and len(checkpoints) > 1 else "this file"
            names = some(list(dict.fromkeys(dangerous)))
            found.append(
                warning(f"unpickling {path} would run code: {names}. modelctl did not.", _INSTEAD)
            )
    return found


_INSTEAD = "don't load it with torch.load(weights_only=False)"
