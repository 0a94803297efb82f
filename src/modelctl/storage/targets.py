"""Where an output goes: its real place, whether there is room, and that it stays there."""

from __future__ import annotations

import errno
import os
import stat
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from shlex import quote
from typing import NamedTuple

from ..errors import DurabilityError, UsageError, WriteError
from .places import named
from .streams import is_stream

PathLike = str | os.PathLike[str]
_ACL = "system.posix_acl_access"


def resolve_target(path: PathLike, *, is_folder: bool = False) -> Path:
    """Where an output for ``path`` really goes: through the links to its folder. A link in its
    own place is replaced by a file, and followed to a folder.

    Raises:
        UsageError: an empty path, or stdout.
        WriteError: not a place that can be written to.
    """
    named(path)
    if is_stream(path):
        raise UsageError("stdout takes one file, no folder of them", hint="-o FOLDER/")
    try:
        os.fsencode(path)  # no half characters
        if "\0" in os.fspath(path):
            raise ValueError("a NUL in its name")
        target = Path(path)
        if is_folder or target.name in ("", ".."):
            return target.resolve()
        return target.parent.resolve() / target.name
    except (OSError, RuntimeError, ValueError) as e:  # also a loop of links
        raise WriteError(f"{str(path)!r}: not a place to write to: {e}") from None


def check_parent(target: Path, shown: PathLike) -> None:
    """Raises WriteError where there is no folder to write to."""
    folder = target.parent
    if folder.is_dir():
        return
    if os.path.lexists(folder):
        raise WriteError(f"{shown}: its parent is not a directory")
    raise WriteError(
        f"{shown}: there is no directory {folder}", hint=f"mkdir -p {quote(str(folder))}"
    )


@contextmanager
def made_folder(folder: PathLike) -> Iterator[None]:
    """A folder that is there for the block, its parents too; what was made of them goes again
    where the block raises an error.

    Raises:
        WriteError: a file is in the way, or it can't be made.
    """
    missing = check_makeable(folder)
    try:
        for one in reversed(missing):
            one.mkdir(exist_ok=True)
            sync(one.parent)
        yield
    except BaseException as e:
        for one in missing:
            with suppress(OSError):  # somebody else has put something into it
                one.rmdir()
        if isinstance(e, OSError):
            raise WriteError(f"{os.fspath(folder)}: {e.strerror or e}") from e
        raise


def check_makeable(folder: PathLike) -> list[Path]:
    """The folders that are missing on the way to ``folder``, it first.

    Raises:
        WriteError: a file is in the way.
    """
    missing = []
    one = resolve_target(folder, is_folder=True)
    while not os.path.lexists(one):
        missing.append(one)
        one = one.parent
    if not one.is_dir():
        raise WriteError(f"{os.fspath(folder)}: {one} is no directory")
    return missing


def check_space(folder: Path, expected: int, shown: PathLike) -> None:
    """Raises WriteError where the disk is too small."""
    import shutil

    with suppress(OSError):
        free = shutil.disk_usage(folder).free
        if expected > free:
            raise WriteError(
                f"{shown}: needs {expected:,} bytes, {free:,} are free there",
                hint="choose another disk with -o",
            )


def plain_name(name: str) -> str:
    """The name of a file of a folder; raises WriteError for what leads elsewhere."""
    if name in ("", ".", "..") or any(sign in name for sign in "/\\\0"):
        raise WriteError(f"{name!r}: not a plain file name")
    return name


def confirm(folder: Path, shown: PathLike) -> None:
    """What stands in a folder is to stay, also when the power fails.

    Raises:
        DurabilityError: the disk did not confirm it.
    """
    try:
        sync(folder)
    except OSError as e:
        raise DurabilityError(
            f"{shown}: written whole, but the disk did not confirm it: {e.strerror}"
        ) from e


def sync(folder: Path) -> None:
    """What a folder holds is on the disk."""
    if not hasattr(os, "O_DIRECTORY"):
        return
    try:
        fd = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
        try:
            os.fsync(fd)
        finally:
            os.close(fd)
    except OSError as e:
        # some file systems can't sync their directories
        if e.errno not in (errno.EINVAL, errno.ENOTSUP, errno.EACCES):
            raise


class Attributes(NamedTuple):
    """Who a file belongs to, and who may do what with it.

    Attributes:
        mode: its permission bits.
        owner: user and group, by their numbers.
        extended: its extended attributes; a POSIX ACL is one.
    """

    mode: int
    owner: tuple[int, int]
    extended: Mapping[str, bytes]


def attributes(path: Path) -> Attributes | None:
    """Those of the file at a path; None where there is nothing, or a link that leads nowhere."""
    try:
        status = os.stat(path)
    except OSError:
        return None
    found: dict[str, bytes] = {}
    if hasattr(os, "listxattr"):
        with suppress(OSError):  # a file system that has none
            for name in os.listxattr(path):
                with suppress(OSError):
                    found[name] = os.getxattr(path, name)
    return Attributes(stat.S_IMODE(status.st_mode), (status.st_uid, status.st_gid), found)


def give(fd: int, wanted: Attributes) -> None:
    """Have an open file be as another was, as far as the system lets this process; its mode surely.

    Raises:
        OSError: it can't be given its mode.
    """
    status = os.fstat(fd)
    uid, gid = wanted.owner
    if hasattr(os, "fchown") and (status.st_uid, status.st_gid) != wanted.owner:
        try:
            os.fchown(fd, uid, gid)
        except OSError:  # not root: the group perhaps
            with suppress(OSError):
                os.fchown(fd, -1, gid)
    if hasattr(os, "fchmod"):  # before the ACL, whose mask it would change
        os.fchmod(fd, wanted.mode)
    if hasattr(os, "setxattr"):
        if _ACL not in wanted.extended:
            with suppress(OSError):  # what the folder gives to new files
                os.removexattr(fd, _ACL)
        for name, value in wanted.extended.items():
            with suppress(OSError):
                os.setxattr(fd, name, value)
