"""Formats that other installed packages bring. What goes wrong in their code is said to be theirs,
and stands in the way of no other format."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cache
from typing import Any, TypeVar

from ..core.checkpoint import Checkpoint
from ..core.notes import Loss, Note
from ..core.tree import Path
from ..errors import ModelctlError
from ..storage.layout import FileLayout
from ..storage.places import Place
from .base import Format, WritableFormat

T = TypeVar("T")


@cache
def third_party() -> tuple[Format, ...]:
    """The formats of the entry points ``modelctl.formats``: each a subclass of
    :class:`~modelctl.formats.base.Format`, or an instance of one. One that can't be loaded is
    there, too, and says so as soon as it is asked for something."""
    from importlib.metadata import entry_points

    found: list[Format] = []
    for point in sorted(entry_points(group="modelctl.formats"), key=lambda one: one.name):
        package = point.dist.name if point.dist is not None else "another package"
        try:
            found.append(_loaded(point, package))
        except ModelctlError as e:
            found.append(Broken(point.name, e))
    return tuple(found)


def _loaded(point: Any, package: str) -> Format:
    who = f"the format '{point.name}' of {package}"
    hint = f"upgrade or uninstall {package}"
    try:
        loaded: Any = point.load()
        made = loaded() if isinstance(loaded, type) else loaded
    except (Exception, SystemExit) as e:  # whatever somebody else's code raises
        raise ModelctlError(f"{who} can't be loaded: {_said(e)}", hint=hint) from e
    if not isinstance(made, Format):
        raise ModelctlError(f"{who} is no modelctl.formats.base.Format", hint=hint)
    wrong = _wrong_attribute(made)
    if wrong is not None:
        raise ModelctlError(f"{who}: {wrong}", hint=hint)
    if isinstance(made, WritableFormat):
        return WritableGuest(made, package)
    return Guest(made, package)


def _wrong_attribute(one: Format) -> str | None:
    """What a format says of itself that is not what :class:`Format` wants."""
    for name in ("name", "label"):
        if not isinstance(getattr(one, name, None), str):
            return f"its {name} is no text"
    if isinstance(one, WritableFormat):
        suffixes = getattr(one, "suffixes", None)
        if not isinstance(suffixes, tuple) or not suffixes or not _are(str, suffixes):
            return "its suffixes are no tuple of texts"
        names = one.shard_names
        if names is not None and not (
            isinstance(names, tuple) and len(names) == 2 and _are(str, names)
        ):
            return "its shard_names are no pair of texts"
    return None


class Broken(Format):
    """A format that can't be loaded."""

    def __init__(self, name: str, error: ModelctlError) -> None:
        self.name, self.label, self.error = name, name, error

    def sniff(self, place: Place) -> bool:
        raise self.error

    def read(self, place: Place) -> Checkpoint:
        raise self.error


class Guest(Format):
    """A format of another package: whatever its code raises, or gives back that is not what
    :class:`Format` promises, is an error that names the format and its package."""

    def __init__(self, inner: Format, package: str) -> None:
        self.inner, self.package = inner, package
        self.name, self.label, self.in_shards = inner.name, inner.label, bool(inner.in_shards)

    def sniff(self, place: Place) -> bool:
        return self._call("sniff", bool, lambda: self.inner.sniff(place))

    def read(self, place: Place) -> Checkpoint:
        return self._call("read", Checkpoint, lambda: self.inner.read(place))

    def explain(self, place: Place) -> ModelctlError | None:
        return self._call("explain", (ModelctlError, type(None)), lambda: self.inner.explain(place))

    def _call(
        self,
        what: str,
        kind: type[Any] | tuple[type[Any], ...],
        call: Callable[[], T],
        of: type[Any] | None = None,
    ) -> T:
        """What a call gives: of a kind, or a sequence ``of`` one."""
        try:
            given = call()
        except ModelctlError:
            raise
        except (Exception, SystemExit) as e:
            raise self._failed(what, f"raises {_said(e)}") from e
        if not isinstance(given, kind) or (of is not None and not _are(of, given)):
            wanted = " or ".join(
                one.__name__ for one in (kind if isinstance(kind, tuple) else [kind])
            )
            wanted = f"a list of {of.__name__}" if of is not None else f"a {wanted}"
            raise self._failed(what, f"gives a {type(given).__name__}, not {wanted}")
        return given

    def _failed(self, what: str, why: str) -> ModelctlError:
        return ModelctlError(
            f"the format '{self.name}' of {self.package}: its {what}() {why}",
            hint=f"tell its authors, or uninstall {self.package}",
        )


class WritableGuest(Guest, WritableFormat):
    """One that can be written, too."""

    inner: WritableFormat

    def __init__(self, inner: WritableFormat, package: str) -> None:
        super().__init__(inner, package)
        self.suffixes, self.shard_names = inner.suffixes, inner.shard_names
        self.whole_storages = bool(inner.whole_storages)
        self.string_metadata = bool(inner.string_metadata)
        self.keeps_records = bool(inner.keeps_records)
        self.keeps_devices = bool(inner.keeps_devices)

    def losses(self, ckpt: Checkpoint) -> list[Loss]:
        return list(self._call("losses", Sequence, lambda: self.inner.losses(ckpt), of=Loss))

    def layout(self, ckpt: Checkpoint, name: str) -> FileLayout:
        made = self._call("layout", FileLayout, lambda: self.inner.layout(ckpt, name))
        if made.name != name:
            raise self._failed("layout", f"is of a file {made.name!r:.80}, not of {name!r}")
        return made

    def remarks(self, ckpt: Checkpoint) -> list[Note]:
        return list(self._call("remarks", Sequence, lambda: self.inner.remarks(ckpt), of=Note))

    def record_by_hand(self, ckpt: Checkpoint, path: str, section: Path, record: str) -> str | None:
        return self._call(
            "record_by_hand",
            (str, type(None)),
            lambda: self.inner.record_by_hand(ckpt, path, section, record),
        )


def _are(kind: type[Any], values: Any) -> bool:
    return all(isinstance(one, kind) for one in values)


def _said(e: BaseException) -> str:
    """An exception in a line; what ends a program would end ours without a word."""
    text = " ".join(str(e).split())
    if isinstance(e, SystemExit):
        return f"SystemExit({text})"
    return f"{type(e).__name__}: {text}" if text else type(e).__name__
