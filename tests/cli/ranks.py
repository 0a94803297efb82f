"""What torchrun starts in the tests: the command lines of a file, one after the other, each as
``modelctl`` runs it: ``python -m tests.cli.ranks LINES [DYING NTH]``; with DYING, that rank is
killed when it is to exchange something for the NTH time.
"""

from __future__ import annotations

import os
import signal
import sys
from pathlib import Path
from typing import Any

from modelctl.cli import main as modelctl
from modelctl.storage.torchrun import ranks
from modelctl.storage.torchrun.ranks import Ranks


def kill_at(nth: int) -> None:
    real, left = Ranks.exchange, nth

    def exchange(self: Ranks, value: object = None) -> list[Any]:
        nonlocal left
        left -= 1
        if left == 0:
            os.kill(os.getpid(), signal.SIGKILL)
        return real(self, value)

    Ranks.exchange = exchange  # type: ignore[method-assign]


def main() -> None:
    lines, *dying = sys.argv[1:]
    if dying and os.environ["RANK"] == dying[0]:
        kill_at(int(dying[1]))
    if not dying:  # one meeting for all lines: torch has but one in a process
        together = ranks.join()
        ranks.join, ranks.leave = lambda: together, lambda: None
    codes = []
    for line in Path(lines).read_text().splitlines():
        sys.argv[1:] = line.split()
        try:
            modelctl()
        except SystemExit as e:
            codes.append(e.code)
        sys.stdout, sys.stderr = sys.__stdout__, sys.__stderr__
    Path(f"{lines}.codes-{os.environ['RANK']}").write_text(" ".join(map(str, codes)))


if __name__ == "__main__":
    main()
