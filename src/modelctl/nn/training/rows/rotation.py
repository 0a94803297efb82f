"""A row of checkpoints in one folder: ``epoch-{epoch:03d}.pt``, the last few kept, the newest one
under a name of its own."""

from __future__ import annotations

import os
import re
import shutil
import stat
import string
import warnings
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from ....core.text import some
from ....errors import ModelctlError, UsageError, WriteError
from ....files import open as open_checkpoint
from ....formats.distributed.metadata import NAME as METADATA
from ....storage.far.urls import is_far, shown
from ....storage.links import point
from ....storage.places import named
from .best import BEST, Best

# What says which of two is older.
_PROGRESS = ("epoch", "step")
LATEST = "latest"
_SUFFIXES = (".pt", ".pth", ".ckpt", ".bin")
_NUMBER = r"[-+]?(?:\d[\d_,]*\.?\d*(?:[eE][-+]?\d+)?|inf|nan)%?"


class Row:
    """The checkpoints that one path with fields stands for, of which the last few and the best few
    are kept: files, or ``folders`` of torch.distributed.checkpoint.

    Raises:
        UsageError: no path; fields that can't be filled in or, to keep the last few, read back; no
            number to tell the best by.
    """

    def __init__(
        self,
        path: str | os.PathLike[str],
        values: Mapping[str, Any],
        keep_last: int | None = None,
        *,
        keep_best: object = None,
        folders: bool = False,
    ) -> None:
        named(path)
        if is_far(path):
            raise UsageError(
                f"{shown(path)}: a training saves to this machine",
                hint="save here, then modelctl convert FILE -o URL",
            )
        folder, self.pattern = os.path.split(os.fspath(path))
        self.folder = Path(folder)
        self._values = values
        try:
            self._parts = list(string.Formatter().parse(self.pattern))
        except ValueError as e:
            raise UsageError(f"{self.pattern!r}: {e}", hint="'{{' stands for a brace") from None
        self.fields = {field for _, field, _, _ in self._parts if field is not None}
        if any("{" in (spec or "") for _, _, spec, _ in self._parts):
            raise UsageError(f"{self.pattern!r}: a field in a field")
        for field in sorted(self.fields):
            if not isinstance(values.get(field), str | int | float):
                known = [
                    str(key)
                    for key, value in values.items()
                    if isinstance(value, str | int | float)
                ]
                raise UsageError(
                    f"'{{{field}}}' in the path: there is no such number or text; "
                    f"given are {some(known) or 'none'}",
                    hint=f"save_checkpoint(..., {field}=…)" if field.isidentifier() else None,
                )
        try:
            self.name = self.pattern.format_map(values)
        except ValueError as e:
            raise UsageError(f"{self.pattern!r}: {e}") from None
        if os.path.basename(self.name) != self.name:
            raise UsageError(f"{self.name!r} is not the name of a file")
        self.folders = folders
        if folders and self.path.suffix in _SUFFIXES:
            raise UsageError(
                f"{self.path}: the model is sharded over ranks, and is saved as a folder",
                hint=f"name it without {self.path.suffix}: {self.folder / 'epoch-{epoch:03d}'}",
            )
        if self.fields and self.latest == self.path:
            raise UsageError(f"{self.latest}: that is what the newest of the row is known by")
        self.keep_last = keep_last
        if keep_last is not None:
            self._check_order("keep_last")
            if keep_last < 1:
                raise UsageError(f"keep_last={keep_last}: the new one is kept, so it is 1 or more")
        self.keep_best = None if keep_best is None else Best(keep_best, values)
        if self.keep_best is not None:
            self._check_order("keep_best")
            if self.path in (self.best, self.latest):
                raise UsageError(f"{self.path}: that is what the best of the row is known by")

    @property
    def path(self) -> Path:
        return self.folder / self.name

    @property
    def latest(self) -> Path:
        """Where the newest one is known by, in a row."""
        return self._known_by(LATEST)

    @property
    def best(self) -> Path:
        """Where the best one is known by, in a row."""
        return self._known_by(BEST)

    def _known_by(self, name: str) -> Path:
        end, field, _, _ = self._parts[-1]
        return self.folder / (name + ("" if field else Path(f"_{end}").suffix))

    def _check_order(self, what: str) -> None:
        if not self.fields & {*_PROGRESS}:
            raise UsageError(
                f"{what}: which file is older than '{self.name}' its name must say",
                hint="put a field into the path: 'run/epoch-{epoch:03d}.pt'",
            )
        if self._progress(self.name) is None:
            raise UsageError(f"{what}: '{self.pattern}' gives no plain numbers to read back")

    def check(self, overwrite: bool) -> None:
        """Raises WriteError where the latest can't be one, before anything is written."""
        there = os.path.lexists(self.latest) and not self.latest.is_symlink()
        if self.fields and there and (self.latest.is_dir() or not overwrite):
            raise WriteError(f"{self.latest}: exists already, and is no link to a checkpoint")
        if self.folders and os.path.lexists(self.path) and not of_ranks(self.path):
            raise WriteError(f"{self.path}: exists already, and is no folder that ranks wrote")
        if self.keep_best is not None:
            self.keep_best.check(self.best)

    def finish(self) -> None:
        """The new one stands: let it be the latest, and the best where it is; then remove those
        that are too old and not good enough."""
        if not self.fields:
            return
        point(self.latest, self.name)
        if self.keep_last is None and self.keep_best is None:
            return
        now = self._progress(self.name)
        row = self._row()
        # of the same moment with another loss in its name: it was there before
        older = [name for at, name in row if now is not None and at <= now and name != self.name]
        keep = {*older[len(older) + 1 - (self.keep_last or 1) :]}
        if self.keep_best is not None:
            later = [name for at, name in row if now is not None and at > now]
            ranked = self.keep_best.ranked(self.folder, [*older, self.name, *later])
            own = [name for _, name in ranked if name not in later]
            keep.update(own[: self.keep_best.count])
            if ranked and self.keep_best.beats(ranked[0][0], self.best):
                point(self.best, ranked[0][1], hard=not self.folders)
            if self.best.is_symlink():  # what it leads to is the best
                keep.add(os.readlink(self.best))
        for name in older:
            if name in keep:
                continue
            try:
                (shutil.rmtree if self.folders else os.unlink)(self.folder / name)
            except FileNotFoundError:
                pass
            except OSError as e:
                warnings.warn(f"{self.folder / name} is old and stays: {e.strerror}", stacklevel=3)

    def _row(self) -> list[tuple[tuple[int, ...], str]]:
        """How far each of this row has come, and its name, the oldest first."""
        found = []
        for name in os.listdir(self.folder or "."):
            at = self._progress(name)
            if at is not None:
                with suppress(OSError):
                    status = os.lstat(self.folder / name)
                    own = of_ranks(self.folder / name) if self.folders else False
                    if own or (stat.S_ISREG(status.st_mode) and not self.folders):
                        found.append((at, status.st_mtime_ns, name))
        return [(at, name) for at, _, name in sorted(found)]

    def _progress(self, name: str) -> tuple[int, ...] | None:
        """Epoch and step of a file of this row, as far as the pattern has them; None for others.

        Other numbers may be any, texts are those of this row: ``vit-003.pt`` is another's.
        """
        pattern, specs = "", []
        for literal, field, spec, conversion in self._parts:
            pattern += re.escape(literal)
            if field is None:
                continue
            value = self._values[field]
            if field in _PROGRESS:
                pattern += r"([\d,_]+)"
                specs.append((field, spec or ""))
            elif isinstance(value, int | float) and conversion is None:
                pattern += _NUMBER
            else:
                pattern += re.escape(
                    f"{{{'!' + conversion if conversion else ''}:{spec}}}".format(value)
                )
        found = re.fullmatch(pattern, name)
        if found is None:
            return None
        numbers: dict[str, int] = {}
        for (field, spec), text in zip(specs, found.groups(), strict=True):
            digits = re.sub(r"\D", "", text)
            # epoch-3.pt is not what {epoch:03d} gives
            if not digits or format(int(digits), spec) != text:
                return None
            if numbers.setdefault(field, int(digits)) != int(digits):
                return None
        return tuple(numbers[field] for field in _PROGRESS if field in numbers)


def of_ranks(path: Path) -> bool:
    """Whether it is a folder of torch.distributed.checkpoint, with nothing else in it."""
    if path.is_symlink() or not path.is_dir():
        return False
    names = os.listdir(path)
    return METADATA in names and all(n == METADATA or n.endswith(".distcp") for n in names)


# ------------------------------------------------------------------ the newest


def newest(path: str | os.PathLike[str]) -> str | Path:
    """The checkpoint that a path means: itself, or the newest whole one of a folder.

    In a folder that is ``latest.*``; where that is missing or damaged, the one that has come
    furthest by the epoch and the step in it. A link that leads nowhere means its folder; what is
    far means itself.

    Raises:
        UsageError: no path.
        UnreadableError: there is none, or which one is meant can't be told.
    """
    named(path)
    if is_far(path):
        return os.fspath(path)
    path = Path(path)
    if path.is_symlink() and not path.exists():
        warnings.warn(f"{path} leads nowhere: taking the newest beside it", stacklevel=3)
        path = path.parent
    if not path.is_dir():
        return path
    names = sorted(name for name in os.listdir(path) if not name.startswith("."))
    latest = [name for name in names if name.partition(".")[0] == LATEST]
    for group in (latest, [name for name in names if name not in latest]):
        found = [(at, name) for name in group if (at := _reached(path / name)) is not None]
        if group is not latest:  # weights alone are no training to go on with
            found = [(at, name) for at, name in found if at != _NOWHERE]
        if found:
            best = max(at for at, _ in found)
            return path / next(name for at, name in found if at == best)
    return path  # open() finds what else a folder may be, or says what is wrong


_NOWHERE = (-1, -1)


def _reached(path: Path) -> tuple[int, int] | None:
    """Epochs and steps that a checkpoint has behind it, -1 where it does not say; None for
    anything else than a whole checkpoint with a model."""
    if not path.is_file() and not of_ranks(path.resolve()):
        return None
    try:
        with open_checkpoint(path) as ckpt:
            sections = ckpt.sections
            if not sections.models:
                return None
            epoch, step = (found[1] if found else -1 for found in (sections.epoch, sections.step))
            return epoch, step
    except ModelctlError as e:
        if path.suffix in _SUFFIXES:
            warnings.warn(f"passed over: {e.message}", stacklevel=5)
    return None
