"""The best of a row of checkpoints by a number in each, read from the files every time."""

from __future__ import annotations

import math
import os
import warnings
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from ....core.nodes import mapping
from ....core.text import some
from ....errors import ModelctlError, UsageError, WriteError
from ....files import open as open_checkpoint

BEST = "best"


class Best:
    """The ``count`` best by a ``metric``: the largest (``"max"``) or the smallest (``"min"``).

    Raises:
        UsageError: not of this form; or the new one has no such number.
    """

    def __init__(self, keep_best: object, values: Mapping[str, Any]) -> None:
        form = "keep_best is (metric, 'min' or 'max', how many)"
        if not isinstance(keep_best, tuple | list) or len(keep_best) != 3:
            raise UsageError(f"{form}, not {keep_best!r:.60}", hint="('val_acc', 'max', 3)")
        self.metric, self.direction, self.count = keep_best
        if not isinstance(self.metric, str):
            raise UsageError(f"{form}: {self.metric!r:.40} is no name")
        if self.direction not in ("min", "max"):
            raise UsageError(
                f"{form}, not {self.direction!r:.40}",
                hint="'min' for a loss, 'max' for an accuracy",
            )
        if type(self.count) is not int or self.count < 1:
            raise UsageError(f"{form}: {self.count!r:.40} is not 1 or more")
        given = values.get(self.metric)
        if isinstance(given, bool) or hasattr(given, "item"):  # a tensor: the usual mistake
            raise UsageError(
                f"keep_best: '{self.metric}' is a {type(given).__name__}, not a number",
                hint=f"save_checkpoint(..., {self.metric}=float(…))",
            )
        if _number(given) is None:
            known = [str(key) for key, value in values.items() if _number(value) is not None]
            raise UsageError(
                f"keep_best: there is no number {self.metric!r:.60}; "
                f"given are {some(known) or 'none'}",
                hint=f"save_checkpoint(..., {self.metric}=float(…))"
                if self.metric.isidentifier()
                else None,
            )

    def value(self, path: Path) -> float | None:
        """The number in a checkpoint, the larger the better; None where it has none, or NaN.

        Raises:
            ModelctlError: it is no checkpoint, or can't be read.
        """
        with open_checkpoint(path) as ckpt:
            top = mapping(ckpt.root) or {}
            extra = mapping(top.get("extra")) or {}
        # as the path's fields are filled in: what the checkpoint says of itself counts first
        found = _number(top.get(self.metric, extra.get(self.metric)))
        if found is None or math.isnan(found):
            return None
        return found if self.direction == "max" else -found

    def check(self, best: Path) -> None:
        """Raises WriteError where what stands there is the best of something else."""
        if best.is_symlink() or not os.path.lexists(best):
            return
        try:
            known = self.value(best)
        except ModelctlError as e:
            if best.is_dir():  # nothing takes the place of a folder
                raise WriteError(f"{best}: exists already, and is no checkpoint") from e
            warnings.warn(f"{best} is replaced: {e.message}", stacklevel=5)
            return
        if known is None:
            raise WriteError(
                f"{best}: exists already, and has no number '{self.metric}'",
                hint="it is the best by something else, or another file: rename it",
            )

    def ranked(self, folder: Path, names: Iterable[str]) -> list[tuple[float, str]]:
        """Those that have the number, the best first; of equal ones that which comes first."""
        found = []
        for name in names:
            try:
                value = self.value(folder / name)
            except (ModelctlError, OSError):
                continue  # what can't be read is nothing to keep
            if value is not None:
                found.append((value, name))
        return sorted(found, key=lambda one: -one[0])

    def beats(self, value: float, best: Path) -> bool:
        """Whether it is better than what stands there."""
        try:
            known = self.value(best)
        except (ModelctlError, OSError):
            return True
        return known is None or value > known


def _number(value: Any) -> float | None:
    return float(value) if type(value) in (int, float) else None
