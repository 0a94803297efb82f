"""Run pickle scanners over the same files: python benchmarks/scanners.py FOLDER NAME=COMMAND …

FOLDER has files and a manifest.json: a list of {"path", "expect", "exec"}, with "dangerous" or "ok"
expected, and whether unpickling it really runs something. Each COMMAND takes a file in place of {};
exit code 0 is "nothing found", 1 "found something", anything else an error. With --own the
project's own hostile files are written to FOLDER first. Prints a table; modelctl is always in it.
"""

from __future__ import annotations

import argparse
import json
import shlex
import subprocess
import sys
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

ROOT = Path(__file__).parents[1]


def write_own(folder: Path) -> None:
    """The files of tests/hostile that run something, and those that nothing is wrong with."""
    sys.path.insert(0, str(ROOT))
    from tests.hostile.case import Fine, Found
    from tests.hostile.cases import CASES

    rows = []
    for i, case in enumerate(CASES):
        level = case.expect.level if isinstance(case.expect, Found) else None
        if level != "dangerous" and not isinstance(case.expect, Fine):
            continue
        path = case.write(folder / f"{i:03}")
        if path.is_file():
            runs = case.attack is not None
            expect = "dangerous" if level else "ok"
            rows.append({"path": str(path.relative_to(folder)), "expect": expect, "exec": runs})
    (folder / "manifest.json").write_text(json.dumps(rows))


def exit_code(command: str, path: Path) -> int:
    words = [word.replace("{}", str(path)) for word in shlex.split(command)]
    try:
        done = subprocess.run(words, capture_output=True, timeout=120, check=False)
    except subprocess.TimeoutExpired:
        return -1
    return done.returncode


def row(name: str, command: str, folder: Path, files: list[dict[str, str]]) -> str:
    with ThreadPoolExecutor(2) as pool:
        codes = list(pool.map(lambda one: exit_code(command, folder / one["path"]), files))
    counts: Counter[str] = Counter()
    for one, code in zip(files, codes, strict=True):
        kind = {0: "passed", 1: "flagged"}.get(code, "error")
        counts[f"{one['expect']} {kind}"] += 1
        if one["expect"] == "dangerous" and one.get("exec"):
            counts[f"runs {kind}"] += 1
    cells = [
        name,
        f"{counts['dangerous flagged']}",
        f"{counts['dangerous error']}",
        f"{counts['runs passed']}",
        f"{counts['ok flagged']}",
        f"{counts['ok error']}",
    ]
    return f"| {' | '.join(cells)} |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("tools", nargs="*", metavar="NAME=COMMAND")
    parser.add_argument("--own", action="store_true")
    options = parser.parse_intermixed_args()
    if options.own:
        options.folder.mkdir(parents=True, exist_ok=True)
        write_own(options.folder)
    files = json.loads((options.folder / "manifest.json").read_text())
    files = [one for one in files if one["expect"] in ("dangerous", "ok")]
    files = [one for one in files if (options.folder / one["path"]).is_file()]
    dangerous = sum(one["expect"] == "dangerous" for one in files)
    runs = sum(one["expect"] == "dangerous" and bool(one.get("exec")) for one in files)
    clean = len(files) - dangerous
    print(f"{dangerous} dangerous files, {runs} of which run something; {clean} clean")
    print("| scanner | flagged | errors | run something, and passed | clean flagged | errors |")
    print("| --- | --- | --- | --- | --- | --- |")
    ours = f"modelctl={shlex.quote(sys.executable)} -m modelctl scan {{}}"
    for tool in [ours, *options.tools]:
        name, _, command = tool.partition("=")
        print(row(name, command, options.folder, files), flush=True)


if __name__ == "__main__":
    main()
