"""Fuzz the readers: python -m tests.fuzz.run [TARGET …] --executions 100000

Each target in a process of its own, on as many cores as there are. A finding is an error that is
not ours, more than 2 s or more than 512 MB; its input is kept in --keep, to become a test of
tests/fuzz/corpus/. Prints what was executed. ``--differential`` also loads what torch's
weights_only takes with torch, and compares the tensors.
"""

from __future__ import annotations

import argparse
import hashlib
import multiprocessing
import os
import resource
import signal
import sys
import time
import traceback
from collections import Counter
from pathlib import Path
from random import Random
from types import FrameType
from typing import Any, NamedTuple

from modelctl.errors import ModelctlError

from .targets import TARGETS, inputs

SECONDS, MEGABYTES = 2, 512


class TooLongError(BaseException):
    """It took more than it may."""


class Finding(NamedTuple):
    """An input that is not handled as it should be."""

    target: str
    what: str
    data: bytes


def _alarm(number: int, frame: FrameType | None) -> None:
    raise TooLongError(f"more than {SECONDS} s")


def one(target: str, data: bytes, level: int) -> str:
    """What comes of an input: ``fine``, ``refused``.

    Raises:
        Exception: whatever should not come out.
    """
    try:
        TARGETS[target].run(data, level)
    except ModelctlError:
        return "refused"
    return "fine"


def fuzz(
    target: str, seed: int, executions: int, seconds: float = float("inf"), compare: bool = False
) -> tuple[Counter[str], list[Finding]]:
    """So many inputs of a target: what came of them, and what should not have."""
    signal.signal(signal.SIGALRM, _alarm)
    counts: Counter[str] = Counter()
    found: list[Finding] = []
    seen: set[str] = set()
    begin = time.monotonic()
    for level, data in enumerate(inputs(target, Random(f"{target} {seed}"))):
        if level >= executions or time.monotonic() - begin > seconds:
            break
        signal.setitimer(signal.ITIMER_REAL, SECONDS)
        try:
            what = one(target, data, level)
            if compare and what == "fine":
                from .differential import differs

                what = differs(data) or what
                assert what in ("fine", "refused"), what
            counts[what] += 1
        except (Exception, TooLongError) as e:
            signal.setitimer(signal.ITIMER_REAL, 0)
            counts["FOUND"] += 1
            where = traceback.extract_tb(e.__traceback__)[-1]
            kind = f"{type(e).__name__} at {Path(where.filename).name}:{where.lineno}"
            if kind not in seen:
                seen.add(kind)
                found.append(Finding(target, f"{kind}: {str(e)[:200]}", data))
        finally:
            signal.setitimer(signal.ITIMER_REAL, 0)
    return counts, found


def _job(job: tuple[str, int, int, float, bool]) -> tuple[str, Counter[str], list[Finding]]:
    target, seed, executions, seconds, compare = job
    if not compare:  # torch takes more by itself
        _, hard = resource.getrlimit(resource.RLIMIT_AS)
        from .targets import TARGETS

        TARGETS[target].seeds()
        with open("/proc/self/statm") as opened:
            now = int(opened.read().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (now + (MEGABYTES << 20), hard))
    return target, *fuzz(target, seed, executions, seconds, compare)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("targets", nargs="*", metavar="TARGET", help=", ".join(TARGETS))
    parser.add_argument("--executions", type=int, default=10_000, help="of each target")
    parser.add_argument("--seconds", type=float, default=float("inf"), help="for each job")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--jobs", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--each", type=int, default=20_000, help="executions of one process")
    parser.add_argument("--keep", type=Path, default=Path("fuzz-findings"))
    parser.add_argument("--differential", action="store_true", help="compare with torch.load")
    options = parser.parse_args()
    jobs = [
        (
            target,
            options.seed + at,
            min(options.each, options.executions - at),
            options.seconds,
            options.differential,
        )
        for at in range(0, options.executions, options.each)
        for target in options.targets or TARGETS
    ]
    counts: dict[str, Counter[str]] = {}
    kinds: set[str] = set()
    begin = time.monotonic()
    with multiprocessing.Pool(options.jobs, maxtasksperchild=1) as pool:
        for target, more, found in pool.imap_unordered(_job, jobs):
            counts.setdefault(target, Counter()).update(more)
            for finding in found:
                kind = finding.what.partition(": ")[0]
                if (target, kind) in kinds:
                    continue
                kinds.add((target, kind))  # type: ignore[arg-type]
                keep(finding, options.keep)
    total = sum(sum(one.values()) for one in counts.values())
    for target, one_ in counts.items():
        print(f"{target}: {sum(one_.values()):,} executions, {dict(one_)}")
    seconds = time.monotonic() - begin
    print(f"{total:,} executions in {seconds:,.0f} s, {len(kinds)} kinds of findings")
    return int(bool(kinds))


def keep(finding: Finding, folder: Path) -> None:
    folder.mkdir(exist_ok=True, parents=True)
    digest = hashlib.sha256(finding.data).hexdigest()[:12]
    path = folder / f"{finding.target}-{digest}"
    path.write_bytes(finding.data)
    print(f"{path}: {finding.what}", file=sys.stderr, flush=True)


def again(path: Path) -> Any:
    """A kept input, once more: for a debugger."""
    target = path.name.rpartition("-")[0]
    return [one(target, path.read_bytes(), level) for level in range(20)]


if __name__ == "__main__":
    sys.exit(main())
