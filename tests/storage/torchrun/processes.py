"""Processes that are the ranks of one another, without torch: each tells all the others."""

from __future__ import annotations

import os
import pickle
import socket
import struct
from collections.abc import Callable
from typing import Any

from modelctl.storage.torchrun.ranks import Ranks

from ..faults import ended, forked


class Line:
    """What a rank has to each of the others."""

    def __init__(self, rank: int, ends: dict[int, socket.socket]) -> None:
        self.rank, self.ends = rank, ends

    def gather(self, value: object) -> list[Any]:
        """As torch's: fails where one of the others is gone."""
        data = pickle.dumps(value)
        try:
            for end in self.ends.values():
                end.sendall(struct.pack("<q", len(data)) + data)
            found = {rank: pickle.loads(self._message(end)) for rank, end in self.ends.items()}
        except OSError as e:
            raise RuntimeError("Connection closed by peer") from e
        return [value if rank == self.rank else found[rank] for rank in range(len(found) + 1)]

    @staticmethod
    def _message(end: socket.socket) -> bytes:
        def exactly(size: int) -> bytes:
            data = b""
            while len(data) < size:
                more = end.recv(size - len(data))
                if not more:
                    raise OSError("the other end is closed")
                data += more
            return data

        return exactly(struct.unpack("<q", exactly(8))[0])


def together(size: int, action: Callable[[Ranks], object]) -> list[int]:
    """Do it on so many ranks; their exit codes."""
    ends: list[dict[int, socket.socket]] = [{} for _ in range(size)]
    for one in range(size):
        for other in range(one):
            ends[one][other], ends[other][one] = socket.socketpair()

    def on(rank: int) -> Callable[[], object]:
        def run() -> object:
            for other, mine in enumerate(ends):
                for end in mine.values() if other != rank else ():
                    end.close()
            return action(Ranks(rank, size, Line(rank, ends[rank]).gather))

        return run

    children = [forked(on(rank)) for rank in range(size)]
    for mine in ends:
        for end in mine.values():
            end.close()
    return [ended(child) for child in children]


def quiet() -> None:
    """What a process of a test says when it fails, as it is to."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), 2)
