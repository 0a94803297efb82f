"""Calls of the system that fail, and processes that are killed, at chosen moments."""

from __future__ import annotations

import os
import signal
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any
from unittest.mock import patch

with suppress(ImportError):
    import fcntl

# All that changes something; between two of them, a kill is one before the second.
CALLS = (
    *("os.open", "os.close", "os.write", "os.pwrite", "os.ftruncate", "os.copy_file_range"),
    *("os.fchmod", "os.fsync", "os.replace", "os.rename", "os.unlink", "os.mkdir", "os.rmdir"),
    "fcntl.flock",
)


@contextmanager
def watched(before: Callable[[str], None], calls: tuple[str, ...] = CALLS) -> Iterator[None]:
    """``before`` is called with a name before each of these calls, and may raise."""

    def wrapped(name: str, real: Any) -> Any:
        def call(*args: Any, **options: Any) -> Any:
            before(name)
            return real(*args, **options)

        return call

    patches = []
    for name in calls:
        module, _, function = name.partition(".")
        where = os if module == "os" else fcntl
        if hasattr(where, function):
            patches.append(patch.object(where, function, wrapped(name, getattr(where, function))))
    for one in patches:
        one.start()
    try:
        yield
    finally:
        for one in patches:
            one.stop()


class Counted:
    """Does something at the ``nth`` call."""

    def __init__(self, nth: int, action: Callable[[], None]) -> None:
        self.left, self.action = nth, action
        self.at: str | None = None

    def __call__(self, name: str) -> None:
        self.left -= 1
        if self.left == 0:
            self.at = name
            self.action()


def forked(action: Callable[[], object]) -> int:
    """The id of a new process that does ``action`` and ends with 0, or with 1 if it raised."""
    child = os.fork()
    if child:
        return child
    code = 1
    try:
        action()
        code = 0
    except BaseException:
        traceback.print_exc()
    finally:
        os._exit(code)


def ended(child: int) -> int:
    """The exit code of a process; that of a killed one is negative."""
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def kill_me() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def killed_before(nth: int, action: Callable[[], object], calls: tuple[str, ...] = CALLS) -> bool:
    """Do it in a process that is killed before its ``nth`` call; False if it never came to it."""

    def run() -> None:
        with watched(Counted(nth, kill_me), calls):
            action()

    code = ended(forked(run))
    assert code in (0, -signal.SIGKILL)
    return code != 0


def leftovers(folder: Path) -> list[str]:
    return [str(path) for path in folder.rglob("*") if ".modelctl" in path.name]
