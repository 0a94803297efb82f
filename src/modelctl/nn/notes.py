"""What resuming warns of, once everything is restored."""

from __future__ import annotations

from typing import Any

from .text import some

_MOST_NOTES = 3
Differences = dict[str, tuple[Any, Any]]


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

    def groups_differ(self, what: str, changed: dict[int, Differences]) -> None:
        """A note for all groups that differ in the same, and no more than a few."""
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
