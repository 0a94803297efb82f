"""What an output does to links: the rule is :mod:`modelctl.storage.link_rules`."""

from __future__ import annotations

import os
from collections.abc import Iterator

from ..core.checkpoint import Checkpoint
from ..core.notes import Note, info
from ..core.text import count
from ..storage.link_rules import check_members, edited_in_place, other_names
from .naming import is_sharded, opened


def replaced(source: str, ckpt: Checkpoint, *, follow_links: bool) -> str:
    """What an edit in place of a source replaces; where it follows a link, what that leads to.

    Raises:
        RefusedError: it is a link, or holds some; it is in a cache of the Hugging Face hub.
    """
    found = edited_in_place(source, follow_links=follow_links)
    if os.path.isdir(found) or is_sharded(ckpt):
        check_members(_opened(ckpt), os.path.dirname(_opened(ckpt)[0]))
    return found


def about_names(before: Checkpoint, path: str, *, in_place: bool) -> Iterator[Note]:
    """What becomes of the other names of what an output replaces."""
    if not in_place and os.path.islink(path) and not os.path.isdir(path):
        yield info(f"{path} was a link to {os.path.realpath(path)}, which is as it was")
    for name, others in other_names(_opened(before) if in_place else [path]).items():
        keep = "keeps" if others == 1 else "keep"
        yield info(f"{name} has {count(others, 'other name')} (hard links): {keep} the old file")


def _opened(ckpt: Checkpoint) -> list[str]:
    return [str(one.path) for one in opened(ckpt)]
