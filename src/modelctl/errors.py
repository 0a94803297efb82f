"""Every error that modelctl raises on purpose: what is wrong, where, and the way out."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any


class ModelctlError(Exception):
    """Base of all errors raised on purpose.

    ``message`` says what is wrong and where, in one line; ``hint``, where there is a way
    out, names it. ``written`` are the outputs, of several, that stood before it was raised.
    """

    def __init__(self, message: str, *, hint: str | None = None) -> None:
        super().__init__(message)
        self.message = message
        self.hint = hint
        self.written: list[str] = []

    @property
    def hint(self) -> str | None:
        """The way out. A traceback shows it, too (Python 3.11 and later)."""
        return self._hint

    @hint.setter
    def hint(self, text: str | None) -> None:
        self._hint = text
        self.__notes__ = [] if text is None else [f"hint: {text}"]

    @property
    def kind(self) -> str:
        """The kind of error, for programs: ``no_match``, ``unreadable``, ``usage``."""
        name = type(self).__name__.removesuffix("Error")
        words = "".join(f"_{c.lower()}" if c.isupper() else c for c in name).lstrip("_")
        return words if type(self) is not ModelctlError else "error"

    def as_dict(self) -> dict[str, Any]:
        error = {"kind": self.kind, "message": self.message, "hint": self.hint}
        return {**error, "written": self.written} if self.written else error


class UnreadableError(ModelctlError):
    """A file that can't be read consistently. Names the file, the member and the byte offset."""

    def __init__(
        self,
        message: str,
        *,
        path: str | Path | None = None,
        member: str | None = None,
        offset: int | None = None,
        hint: str | None = None,
    ) -> None:
        self.reason, self.path, self.member, self.offset = message, path, member, offset
        where = [str(path)] if path is not None else []
        if member is not None:
            where.append(member)
        if offset is not None:
            where.append(f"at byte {offset:,}")
        super().__init__(f"{', '.join(where)}: {message}" if where else message, hint=hint)

    def located(self, path: str | Path, member: str | None = None) -> UnreadableError:
        """The same error, with the place that was not known where it was raised."""
        return UnreadableError(
            self.reason,
            path=self.path or path,
            member=self.member or member,
            offset=self.offset,
            hint=self.hint,
        )

    def as_dict(self) -> dict[str, Any]:
        """With the file, the member and the offset, as far as they are known."""
        path = None if self.path is None else str(self.path)
        return {**super().as_dict(), "path": path, "member": self.member, "offset": self.offset}


class SeveralError(UnreadableError):
    """A folder that is no checkpoint itself and holds several: ``found`` are their paths, the
    newest last."""

    def __init__(self, path: str | Path, found: Sequence[str], hint: str) -> None:
        self.found = list(found)
        names = [Path(one).name for one in found]
        shown = ", ".join(names[-6:])
        more = f"{len(names) - 6} more, " if len(names) > 6 else ""
        super().__init__(f"a folder with several checkpoints: {more}{shown}", path=path, hint=hint)


class DamagedError(UnreadableError):
    """Bytes of a storage that are not those that were saved: their checksum says so.

    ``storage`` is the one that is damaged; whoever knows its tensors names one by :meth:`of`.
    """

    def __init__(
        self, storage: Any, path: str | Path | None, offset: int | None, tensor: str | None = None
    ) -> None:
        self.storage, self.tensor = storage, tensor
        what = "a storage" if tensor is None else f"the tensor {tensor!r:.200}"
        rest = "" if tensor is None else "; 'modelctl drop' of it keeps the rest"
        super().__init__(
            f"{what} is damaged: its bytes don't have the CRC-32 that the file records",
            path=path,
            offset=offset,
            hint=f"get the file again{rest}",
        )

    def of(self, tensor: str) -> DamagedError:
        """The same error, with the name of the tensor."""
        return DamagedError(self.storage, self.path, self.offset, tensor)


class UnsupportedError(ModelctlError):
    """Something that is sound but that modelctl does not handle (yet)."""


class NoMatchError(ModelctlError):
    """A pattern, a prefix or a path that names nothing; the message shows the nearest names."""


class AmbiguousError(ModelctlError):
    """More than one answer fits, and modelctl does not guess."""


class CollisionError(ModelctlError):
    """Two tensors would get the same name."""


class LossError(ModelctlError):
    """The target format can't hold something, and its loss was not accepted."""


class RefusedError(ModelctlError):
    """An edit that would give a broken or misleading checkpoint."""


class UsageError(ModelctlError):
    """Arguments that don't go together."""


class WriteError(ModelctlError):
    """The output could not be written; what stood there before is intact."""


class DurabilityError(ModelctlError):
    """The output stands whole under its name, but the disk did not confirm that it will stay."""


class MissingExtraError(ModelctlError, ImportError):
    """A part of modelctl whose optional dependency is not installed."""
