"""A part of a training (model, optimizers, …) on its way back: checked first, then restored, and
what it has to say."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from ...core.checkpoint import Checkpoint
from ...core.nodes import mapping
from ...core.sections import Sections
from ...core.text import some

_MOST_NOTES = 3
Differences = dict[str, tuple[Any, Any]]


@dataclass(frozen=True)
class Saved:
    """The checkpoint that a training goes on from; with ``skip`` what doesn't fit is left aside."""

    ckpt: Checkpoint
    path: str | Path
    skip: bool

    @property
    def sections(self) -> Sections:
        return self.ckpt.sections

    @cached_property
    def top(self) -> dict[Any, Any]:
        """The entries of the file."""
        return mapping(self.ckpt.root) or {}


class Part:
    """A part of a training. First all are fitted to what was saved, then all read what has a place
    of its own before it is in use, then all are run.

    Attributes:
        name: what a report calls it.
        restored: whether it was there and comes back.
        missing: what of it was asked for and is not in the file.
        unused: what of it is in the file and was not asked for.
        notes: what there is to warn of, once everything is restored.
    """

    name = ""

    def __init__(self, saved: Saved) -> None:
        self.saved = saved
        self.restored = False
        self.missing: list[str] = []
        self.unused: list[str] = []
        self.notes = Notes()

    def fit(self) -> None:
        """Raises where what was saved doesn't fit; nothing is changed."""

    def read(self) -> None:
        """Read what takes no memory in use; nothing is changed."""

    def run(self) -> None:
        """Restore what was found to fit."""

    def _wanted(self, asked: object, saved: object) -> bool:
        """Whether it is both asked for and there."""
        if asked and not saved:
            self.missing.append(self.name)
        elif saved and not asked:
            self.unused.append(self.name)
        return bool(asked and saved)


class Notes(list[str]):
    """Lines for people, each a warning in the end."""

    def differ(self, what: str, differ: Differences) -> None:
        """The settings in which something was built otherwise: (own, saved) by name."""
        if differ:
            built, saved = (
                ", ".join(f"{key} {shown(pair[which])}" for key, pair in differ.items())
                for which in (0, 1)
            )
            self.append(f"{what}: built with {built}; used is {saved}, from the checkpoint")

    def overruled_lr(
        self,
        what: str,
        built: Sequence[tuple[float, float | None]],
        groups: Sequence[Any],
        new: bool,
    ) -> bool:
        """A note where the checkpoint's lr won't last: a scheduler was built over the optimizer
        (it left its ``initial_lr`` there), and its state was not restored.

        Args:
            built: lr and ``initial_lr`` of the groups before the checkpoint's came.
            new: whether the checkpoint's groups come without ``initial_lr``, so that a scheduler
                that is built over them starts from their lr.
        """
        tail = "; build it after resume() to start from the checkpoint's" if new else ""
        for (lr, first), group in zip(built, groups, strict=False):
            if (
                first is None
                or lr is None
                or group["lr"] is None
                or float(lr) == float(group["lr"])
            ):
                continue
            self.append(
                f"{what}: the checkpoint's lr {shown(float(group['lr']))} holds until the "
                "scheduler's next step(): its state was not restored, and it was built over lr "
                f"{shown(float(first))}{tail}"
            )
            return True
        return False

    def groups_differ(
        self, what: str, changed: dict[int, Differences], without: str | None = None
    ) -> None:
        """A note for all groups that differ in the same, and no more than a few."""
        changed = {i: {k: v for k, v in one.items() if k != without} for i, one in changed.items()}
        alike: dict[str, list[int]] = {}
        for i, differ in changed.items():
            alike.setdefault(repr(differ), []).append(i)
        for groups in [*alike.values()][:_MOST_NOTES]:
            numbers = f"group{'s' * (len(groups) > 1)} {some([str(i) for i in groups])}"
            self.differ(f"{what}, {numbers}", changed[groups[0]])
        if len(alike) > _MOST_NOTES:
            rest = sum(map(len, [*alike.values()][_MOST_NOTES:]))
            self.append(
                f"{what}: {rest} more of its groups were built with other settings; used are the "
                "checkpoint's"
            )


def shown(value: Any) -> str:
    """A setting as people read it."""
    return f"{value:g}" if isinstance(value, float) else str(value)
