"""How far long work is: one bar on stderr, in a terminal, where it takes a while."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from .core.text import printable

# Seconds before a bar appears.
PATIENCE = 1.0


class Display:
    """The bar on the screen."""

    def __init__(self, name: str, total: int, done: int) -> None:
        from rich.console import Console
        from rich.progress import (
            BarColumn,
            DownloadColumn,
            Progress,
            TextColumn,
            TransferSpeedColumn,
        )

        columns = (
            TextColumn("{task.description}", markup=False),
            BarColumn(),
            DownloadColumn(),
            TransferSpeedColumn(),
        )
        self._bar = Progress(*columns, console=Console(stderr=True), transient=True)
        self._bar.start()
        self._task = self._bar.add_task(printable(name), total=total, completed=done)

    def update(self, done: int, total: int) -> None:
        self._bar.update(self._task, completed=done, total=total)

    def stop(self) -> None:
        self._bar.stop()


class Bar:
    """What is called with a name, the bytes done since the last call, and how many there are in
    all; it shows itself once it was called for a while."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock, self._started = clock, clock()
        self._display: Display | None = None
        self._name, self._done = "", 0

    def __call__(self, name: str, more: int, total: int) -> None:
        if name != self._name:
            self.end()
            self._name, self._done = name, 0
        self._done += more
        if self._display is not None:
            self._display.update(self._done, max(self._done, total))
        elif self._clock() - self._started > PATIENCE:
            self._display = Display(name, max(self._done, total), self._done)

    def end(self) -> None:
        """It is gone before anything else is printed."""
        if self._display is not None:
            self._display.stop()
            self._display = None


@contextmanager
def on_terminal(wanted: bool = True) -> Iterator[Bar | None]:
    """A bar for the block, where it is ``wanted`` and stderr is a terminal; of several processes
    that torchrun started, for the first alone."""
    if not wanted or not sys.stderr.isatty() or os.environ.get("RANK", "0") != "0":
        yield None
        return
    bar = Bar()
    try:
        yield bar
    finally:
        bar.end()
