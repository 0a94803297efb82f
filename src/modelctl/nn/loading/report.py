"""What loading found and did."""

from __future__ import annotations

from dataclasses import dataclass

from ...core.names import nearest
from ...core.text import some
from ..freezing.freeze import Frozen

Mismatch = tuple[str, tuple[int, ...], tuple[int, ...]]


@dataclass(frozen=True)
class LoadReport:
    """What :func:`load_into` did; ``str()`` is for people.

    Attributes:
        loaded: the model's names that got values.
        missing: the model's names that the file lacks: they keep their values.
        unexpected: the file's names that the model lacks: they are left aside.
        mismatched: (name, shape in the file, shape in the model): left as they are.
        removed: those of ``missing`` whose removal the file itself records (``strip-head``).
        base: those of ``missing`` that the file left out as frozen (``only="trainable"``).
        frozen: what the file's freeze record did, or None.
        prefix: what was taken off the file's names, wrappers aside (Lightning's ``model.``).
        added: what was put before the file's names, which has a part of the model (the ``bert.`` of
            a model with a head).
        mapped: those of ``loaded`` that lie in the pages of the file (``assign=True``).
    """

    loaded: tuple[str, ...]
    missing: tuple[str, ...] = ()
    unexpected: tuple[str, ...] = ()
    mismatched: tuple[Mismatch, ...] = ()
    removed: tuple[str, ...] = ()
    frozen: Frozen | None = None
    prefix: str = ""
    added: str = ""
    mapped: tuple[str, ...] = ()
    base: tuple[str, ...] = ()

    @property
    def skipped(self) -> tuple[str, ...]:
        """The file's tensors that were left aside: unexpected ones and those of other shapes."""
        return (*self.unexpected, *(name for name, _, _ in self.mismatched))

    def kept(self) -> list[str]:
        """A line for what was left as it is because it belongs to the base."""
        count = len(self.base)
        return [f"kept {count} of the base: only what trains was saved"] if count else []

    def problems(self) -> list[str]:
        """A line for each kind of thing that does not fit, with the nearest names."""
        lines = []
        known = {*self.removed, *self.base}
        plain = [name for name in self.missing if name not in known]
        if plain:
            lines.append(f"missing in the file: {_with_nearest(plain, self.unexpected)}")
        if self.removed:
            lines.append(f"removed from the file earlier: {some(self.removed)}")
        if self.unexpected:
            lines.append(f"not in the model: {some(self.unexpected)}")
        if self.mismatched:
            shapes = [f"{n} {list(theirs)} -> {list(own)}" for n, theirs, own in self.mismatched]
            lines.append(f"other shapes (file -> model): {some(shapes)}")
        return lines

    def __str__(self) -> str:
        lines = [f"loaded {len(self.loaded)} tensors", *self.kept(), *self.problems()]
        if self.prefix:
            lines[0] += f", by the file's names without '{self.prefix}'"
        if self.added:
            lines[0] += f", by the file's names with '{self.added}' before them"
        if self.mapped:
            lines[0] += f", {len(self.mapped)} of them mapped"
        if self.frozen is not None:
            lines.append(f"freeze record applied: {self.frozen}")
        return "\n".join(lines)


def _with_nearest(names: list[str], others: tuple[str, ...]) -> str:
    near = nearest(names[0], others, 1) if others else []
    return some(names) + (f" (nearest to the first: {near[0]})" if near else "")
