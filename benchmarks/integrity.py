"""Measure hash and verify against the speed of what they compute: python benchmarks/integrity.py

A checkpoint of 4 GB (--gb), torch zip and safetensors, warm; ours and its peers in turn as whole
processes, medians. The peers do the sum alone, on all cores: over the file as it is read in pieces
of 512 KiB, and over one piece in memory again and again, which is the sum's own speed. What each
takes of a file of a few bytes is its start-up; the second ratio is without it.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import tempfile
from pathlib import Path

from run import MODELCTL, Run, named_layers, python, run

SUM = """
import os, sys, threading
kind, path, where = sys.argv[1:]
size = os.path.getsize(path)
cores = len(os.sched_getaffinity(0))
fd = os.open(path, os.O_RDONLY)
if kind == "crc":
    from isal.isal_zlib import crc32
else:
    import hashlib
def part(start, stop):
    room = memoryview(bytearray(512 << 10))
    add = hashlib.sha256().update if kind == "sha256" else crc32
    for at in range(start, stop, len(room)):
        some = room[: min(len(room), stop - at)]
        if where == "read":
            os.preadv(fd, [some], at)
        add(some)
ends = [size * i // cores for i in range(cores + 1)]
threads = [threading.Thread(target=part, args=ends[i : i + 2]) for i in range(cores)]
for one in threads: one.start()
for one in threads: one.join()
"""


def make(path: Path, gigabytes: float) -> Path:
    if not path.exists():
        script = f"import sys; sys.path.insert(0, {str(Path(__file__).parent)!r})\n"
        script += "from pathlib import Path; import integrity\n"
        script += f"integrity.write(Path({str(path)!r}), {gigabytes})"
        run([sys.executable, "-c", script])
    return path


def write(path: Path, gigabytes: float) -> None:
    state = named_layers(int(gigabytes * 1e9))
    if path.suffix == ".pt":
        import torch

        torch.save(state, path)
    else:
        from safetensors.torch import save_file

        save_file(state, path)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--gb", type=float, default=4)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--folder", type=Path)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        folder = options.folder or Path(temporary)
        print("| what | ours | the sum over the file | speeds | its own speed | speeds |")
        print("| --- | --- | --- | --- | --- | --- |")
        for name, command, kind in (
            ("big.pt", "verify", "crc"),
            ("big.pt", "hash", "sha256"),
            ("big.safetensors", "hash", "sha256"),
        ):
            path, small = make(folder / name, options.gb), make(folder / f"small-{name}", 1e-3)
            rounds = [timed(command, kind, one, options.rounds) for one in (path, small)]
            print(row(f"{command} {path.suffix}", *rounds), flush=True)


def timed(command: str, kind: str, path: Path, rounds: int) -> list[dict[str, Run]]:
    ways = {
        "ours": [*MODELCTL, command, str(path)],
        "read": python(SUM, kind, path, "read"),
        "own": python(SUM, kind, path, "memory"),
    }
    for way in ways.values():  # warm
        run(way)
    return [{way: run(ways[way]) for way in ways} for _ in range(rounds)]


def row(title: str, rounds: list[dict[str, Run]], small: list[dict[str, Run]]) -> str:
    """Wall times, and how fast ours is beside each of the others: all of it, and its work."""
    wall = {way: statistics.median(one[way].wall for one in rounds) for way in rounds[0]}
    start = {way: statistics.median(one[way].wall for one in small) for way in small[0]}
    peak = max(one["ours"].peak_mb for one in rounds)
    cells = [title, f"{wall['ours']:.2f} s, {peak:.0f} MB"]
    for way in ("read", "own"):
        whole = statistics.median(one[way].wall / one["ours"].wall for one in rounds)
        work = statistics.median(
            (one[way].wall - start[way]) / (one["ours"].wall - start["ours"]) for one in rounds
        )
        cells += [f"{wall[way]:.2f} s", f"{whole:.2f}, {work:.2f}"]
    return f"| {' | '.join(cells)} |"


if __name__ == "__main__":
    main()
