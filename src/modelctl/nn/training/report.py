"""What resuming found and did."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ...core.text import some
from ..freezing.freeze import Frozen
from ..loading.report import LoadReport


@dataclass(frozen=True)
class Resumed:
    """Where the training stands; ``str()`` is for people. What the file lacks is None.

    Attributes:
        path: the file; of a folder the one that was found.
        epoch: finished epochs: go on with ``range(state.epoch, epochs)``.
        step: finished optimizer steps.
        lr: the first group's, as restored, or what the file says without an optimizer.
        extra: your own values by name, and whatever else stands beside the parts in a file that
            other scripts wrote.
        restored: the sections that were restored.
        missing: those that were asked for and are not in the file.
        unused: those that are in the file and were not asked for.
        model: what was loaded into the model.
        frozen: what the freeze record did, or None.
        joined: parameters that joined an optimizer, because they had when this was saved.
        fresh: parameters of an optimizer without a state: the saved one has none that fits.
        dropped: parameters of a saved optimizer whose state was left aside.
        swapped: where the weights came from, and where their average is, in a file that keeps the
            average in the model's place (mmengine, Lightning's weight averaging); else None.
    """

    path: str | Path
    epoch: int | None
    step: int | None
    lr: float | None
    extra: Any
    restored: tuple[str, ...]
    missing: tuple[str, ...]
    unused: tuple[str, ...]
    model: LoadReport
    frozen: Frozen | None
    joined: tuple[str, ...] = field(default=())
    fresh: tuple[str, ...] = field(default=())
    dropped: tuple[str, ...] = field(default=())
    swapped: tuple[str, str] | None = None

    @property
    def thawed(self) -> tuple[str, ...]:
        """Parameters that did not train as built, and do again: they did when this was saved."""
        changed, frozen = (self.frozen.changed, self.frozen.names) if self.frozen else ((), ())
        return tuple(name for name in changed if name not in frozen)

    def __str__(self) -> str:
        known = {"epoch": self.epoch, "step": self.step, "lr": self.lr}
        at = ", ".join(f"{key} {value}" for key, value in known.items() if value is not None)
        lines = [
            f"resumed at {at or 'an unknown point'} from {self.path}: {some(self.restored, 9)}"
        ]
        if self.swapped is not None:
            raw, average = self.swapped
            lines.append(f"weights from '{raw}', which were trained; '{average}' is their average")
        lines += [*self.model.kept(), *self.model.problems()]
        for what, names in (
            ("was frozen, trains as when this was saved", self.thawed),
            ("not in the file", self.missing),
            ("in the file, not asked for", self.unused),
            ("joined the optimizer", self.joined),
            ("without optimizer state", self.fresh),
            ("optimizer state left aside", self.dropped),
        ):
            if names:
                lines.append(f"{what}: {some(names)}")
        return "\n".join(lines)
