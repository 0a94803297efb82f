"""The commands that look, as functions of the same names: of a path, or of an opened checkpoint.

What they give prints as the command does, and is data: rows, totals, ``as_dict()``.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Literal

from .core.checkpoint import Checkpoint
from .core.names import Patterns
from .errors import UsageError
from .files import PathLike
from .files import open as open_checkpoint
from .inspection.diffing.diff import diff as compare
from .inspection.diffing.report import By, Diff
from .inspection.ls import TensorList, list_tensors
from .inspection.show import Shown
from .inspection.show import show as look_up
from .inspection.summary.report import Summary
from .inspection.summary.summarize import summarize
from .integrity.hashing import Hashed, hash_tensors

Source = PathLike | Checkpoint


@contextmanager
def opened(source: Source, key: str | None = None) -> Iterator[Checkpoint]:
    """A checkpoint: the one that is given, or that of a path, closed afterwards.

    Raises:
        UsageError: something else; ``key`` with a checkpoint, which was opened with or without.
        ModelctlError: what :func:`modelctl.open` raises.
    """
    if isinstance(source, Checkpoint):
        if key is not None:
            raise UsageError("key= goes with a path", hint="mc.open(path, key=...)")
        yield source
    elif isinstance(source, str | os.PathLike):
        with open_checkpoint(source, key=key) as ckpt:
            yield ckpt
    else:
        raise UsageError(
            f"a path or an opened checkpoint is wanted, not a {type(source).__name__}",
            hint="mc.open(path) opens one; of a live model, modelctl.nn.summary(model)",
        )


def summary(
    source: Source,
    depth: int | Literal["auto"] | None = "auto",
    fold: bool | None = None,
    sort: Literal["file", "name", "params", "size"] = "file",
    stats: bool = False,
    key: str | None = None,
) -> Summary:
    """What is in a checkpoint, at a glance: see :func:`modelctl.summarize`.

    Raises:
        ModelctlError: what :func:`modelctl.open` and :func:`modelctl.summarize` raise.
    """
    with opened(source, key) as ckpt:
        return summarize(ckpt, depth=depth, fold=fold, sort=sort, stats=stats)


def ls(
    source: Source,
    pattern: Patterns = (),
    section: str = "model",
    regex: bool = False,
    key: str | None = None,
) -> TensorList:
    """A row a tensor: see :func:`modelctl.list_tensors`.

    Raises:
        ModelctlError: what :func:`modelctl.open` and :func:`modelctl.list_tensors` raise.
    """
    with opened(source, key) as ckpt:
        return list_tensors(ckpt, pattern, section=section, regex=regex)


def show(source: Source, path: str | None = None) -> Shown:
    """Every value that is no tensor, or what is at a dotted path.

    Raises:
        NoMatchError: nothing is there.
        ModelctlError: what :func:`modelctl.open` raises.
    """
    with opened(source) as ckpt:
        return look_up(ckpt, path)


def diff(
    a: Source,
    b: Source,
    pattern: Patterns = (),
    regex: bool = False,
    rtol: float = 0.0,
    atol: float = 0.0,
    ignore_prefix: bool = False,
    by: By | None = None,
    stats: bool = False,
) -> Diff:
    """What differs between two checkpoints, whatever their formats.

    The model's tensors are compared by the names that ``load_state_dict`` would see, all else by
    its path. With ``pattern`` only the tensors that it matches in either, and no other values.
    Values are compared bit for bit, or with ``rtol``/``atol`` as ``torch.allclose`` does
    (\\|a - b\\| <= atol + rtol * \\|b\\|); two NaNs at one place are the same. Of each tensor that
    changed there is how many elements did, the largest and the mean absolute difference, the
    largest and the mean relative one, and the cosine. The relative difference of two elements is
    \\|a - b\\| / max(\\|a\\|, \\|b\\|). Means, relative differences and the cosine are of the
    elements that are finite in both; NaNs on one side only are counted. Integers of one kind are
    subtracted exactly, all else in float64. Where dtypes differ, values are compared all the same.

    Args:
        ignore_prefix: compare names without what DataParallel, torch.compile and other wrappers
            put before them, and without the prefix that names have on one side alone.
        by: whether a row of the printed report is a ``tensor`` or a ``module``; by default
            modules where there would be many rows.
        stats: print all figures, in a table.

    Raises:
        NoMatchError: ``pattern`` matches nothing in either.
        DamagedError: bytes that were read are not what was saved.
        ModelctlError: what :func:`modelctl.open` raises.
    """
    with opened(a) as left, opened(b) as right:
        found = compare(left, right, pattern, regex, rtol, atol, ignore_prefix, by, stats)
    names = [None if isinstance(one, Checkpoint) else os.fspath(one) for one in (a, b)]
    return replace(found, a=names[0] or found.a, b=names[1] or found.b)


def hash(source: Source, section: str = "all", key: str | None = None) -> Hashed:
    """The content hash of a checkpoint: equal for equal tensors under equal names, in whatever
    format, shards and order. See :func:`modelctl.integrity.hashing.hash_tensors`.

    Raises:
        ModelctlError: what :func:`modelctl.open` raises.
        NoMatchError: there is no such section.
        DamagedError: the bytes are not what was saved.
    """
    with opened(source, key) as ckpt:
        return hash_tensors(ckpt, section)
