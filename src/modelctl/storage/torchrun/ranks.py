"""The ranks of a ``torchrun``: all run one command, and tell each other how it goes.

Every rank runs the same command and so comes to the same points, at which all exchange a value. A
rank that failed takes part in the next exchange with its error, which then is everybody's; one
that died is noticed there by the others.
"""

from __future__ import annotations

import os
import signal
from collections.abc import Callable
from contextlib import suppress
from typing import Any, TypeVar

from ...errors import ModelctlError, WriteError

T = TypeVar("T")

# What torchrun says to those that it starts, and they hand on to what they start.
_SAID = ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT", "TORCHELASTIC_RUN_ID")
# Until all have come, and then, since one may copy for long while the others wait; who dies is
# noticed at once.
_MINUTES, _DAYS = 10, 7


class LostRankError(WriteError):
    """Another rank has gone without a word."""


class RankError(ModelctlError):
    """What another rank raised."""


class Ranks:
    """The ranks of one ``torchrun``, seen from one of them.

    Attributes:
        rank: this one, from 0.
        size: how many there are.
    """

    def __init__(self, rank: int, size: int, gather: Callable[[object], list[Any]]) -> None:
        """``gather`` gives what each rank gave, in their order, once all have called it."""
        self.rank, self.size, self._gather = rank, size, gather

    @property
    def is_first(self) -> bool:
        return self.rank == 0

    def exchange(self, value: object = None) -> list[Any]:
        """What each rank gives, in their order; comes back when all have come here.

        Raises:
            RankError: one failed: says which, and why.
            LostRankError: one has gone.
        """
        found = self._exchange((None, value))
        for rank, (error, _) in enumerate(found):
            if error is not None:
                raise RankError(f"rank {rank}: {error['message']}", hint=error["hint"])
        return [value for _, value in found]

    def run(self, command: Callable[[], T]) -> T:
        """Run a command that all ranks run: over when it is over for all.

        Raises:
            ModelctlError: what the command raised here, or else what it raised elsewhere.
        """
        try:
            result = command()
        except (RankError, LostRankError):  # all know
            raise
        except Exception as e:
            with suppress(LostRankError):
                self._exchange((_as_dict(e), None))
            raise
        self.exchange()
        return result

    def _exchange(self, value: object) -> list[Any]:
        try:
            return self._gather(value)
        except RuntimeError as e:
            with suppress(ValueError):  # it ends already: torchrun's asking is not to stop that
                signal.signal(signal.SIGTERM, signal.SIG_IGN)
            raise LostRankError(
                f"another of the {self.size} ranks has gone before all was done",
                hint="what stood there is as it was; run it again",
            ) from e


def _as_dict(e: Exception) -> dict[str, Any]:
    if isinstance(e, ModelctlError):
        return e.as_dict()
    return {"message": str(e) or type(e).__name__, "hint": None}


# ---------------------------------------------------------------------- those that there are

_joined: Ranks | None = None


def joined() -> Ranks | None:
    """The ranks that this process is one of; None where it works alone."""
    return _joined


def was_started() -> bool:
    """Whether torchrun started this process as one of several: itself, and not a process that it
    started, whose children have the same environment."""
    said = [os.environ.get(name, "") for name in _SAID]
    if not all(said) or not said[1].isdecimal() or int(said[1]) < 2:
        return False
    with suppress(OSError):
        with open(f"/proc/{os.getppid()}/environ", "rb") as file:
            above = file.read().split(b"\0")
        return os.fsencode(f"RANK={said[0]}") not in above
    return True


def join() -> Ranks:
    """Take part, with all the others that torchrun started.

    Raises:
        ModelctlError: torch is not there, or they don't find each other.
    """
    global _joined
    from datetime import timedelta

    try:
        import torch.distributed as dist

        dist.init_process_group("gloo", timeout=timedelta(minutes=_MINUTES))
        group: Any = dist.new_group(timeout=timedelta(days=_DAYS))
    except (ImportError, RuntimeError, ValueError, AttributeError) as e:
        said = (str(e).splitlines() or [type(e).__name__])[0]
        raise ModelctlError(
            f"torchrun's ranks don't find each other: {said:.200}",
            hint="without torchrun it is done by one process; GLOO_SOCKET_IFNAME names a network",
        ) from e
    size = dist.get_world_size()

    def gather(value: object) -> list[Any]:
        found: list[Any] = [None] * size
        dist.all_gather_object(found, value, group)
        return found

    _joined = Ranks(dist.get_rank(), size, gather)
    return _joined


def leave() -> None:
    """No rank any more."""
    global _joined
    import torch.distributed as dist

    _joined = None
    with suppress(RuntimeError):
        dist.destroy_process_group()
