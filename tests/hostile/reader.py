"""Reads each file as a user would, in a process with little memory, and prints a line of JSON each.

``python reader.py OUT`` takes ``{"warm": [paths], "files": [paths]}`` on stdin. An audit hook notes
what would be imported, run, started, or changed outside of OUT, where copies are written. An error
that is not ours (a MemoryError, a RecursionError) is told by its name; a file that takes more CPU
than any needs ends the process.
"""

from __future__ import annotations

import contextlib
import importlib
import json
import os
import resource
import sys
from typing import Any

import modelctl as mc
from modelctl.formats.guests import third_party

HEADROOM = 512 << 20  # of address space, beyond what the warm process has
CPU_SECONDS = 60

heard: list[str] = []
out = os.path.abspath(sys.argv[1])
_RUNS = ("exec", "marshal.loads", "pickle.find_class", "code.__new__", "function.__new__")
_READS = ("os.listdir", "os.scandir", "os.walk", "os.fwalk", "os.getxattr", "os.listxattr")
_WRITING = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND


def hook(event: str, args: tuple[Any, ...]) -> None:
    room = event.partition(".")[0]
    if event == "open":
        path, _, flags = args
        # a folder is "opened" for a temporary file in it that has no name (O_TMPFILE)
        if flags & _WRITING and not _ours(path) and not os.path.isdir(path):
            heard.append(f"open {path!r}")
    elif event == "import":
        heard.append(f"import {args[0]}")
    elif event == "compile":
        # a list of names in TorchScript is parsed, which is not to run it: that is an "exec"
        if args[1] != "<unknown>":
            heard.append(f"compile {args[1]}")
    elif event in _RUNS or room in ("subprocess", "socket", "ctypes", "pty", "urllib", "shutil"):
        heard.append(event)
    elif room == "os" and event not in _READS and not _ours(args[0] if args else None):
        heard.append(f"{event} {args}")


def _ours(path: Any) -> bool:
    if isinstance(path, int):  # a file that was opened already
        return True
    return isinstance(path, str | os.PathLike) and os.path.abspath(path).startswith(out + os.sep)


def read(path: str, folder: str) -> dict[str, Any]:
    """What opening a file gives, reading all its tensors, and writing it again into a folder."""
    seen: dict[str, Any] = {}
    with mc.open(path) as ckpt:
        seen["findings"] = [[one.level, one.id, one.name] for one in ckpt.findings]
        seen["warnings"] = [note.text for note in ckpt.warnings]
        mc.summarize(ckpt, None)
        mc.list_tensors(ckpt, section="all")
        seen["bytes"] = sum(len(part) for ref in ckpt.tensors().values() for part in ref.chunks())
        for name in ("whole.pt", "weights.safetensors"):
            with contextlib.suppress(mc.ModelctlError):
                os.makedirs(folder, exist_ok=True)
                kept = ckpt if name == "whole.pt" else mc.convert(ckpt, weights_only=True)
                mc.save(kept, os.path.join(folder, name))
    return seen


def outcome(path: str, folder: str) -> dict[str, Any]:
    seen: dict[str, Any] = {"error": None, "text": "", "path": None, "member": None, "offset": None}
    seen |= {"findings": [], "warnings": [], "bytes": 0}
    try:
        seen |= read(path, folder)
    except mc.ModelctlError as e:
        place = {name: getattr(e, name, None) for name in ("path", "member", "offset")}
        place["path"] = None if place["path"] is None else str(place["path"])
        seen |= {"error": type(e).__name__, "text": str(e), **place}
    except BaseException as e:
        seen |= {"error": f"{type(e).__name__}, which is not ours", "text": str(e)[:500]}
    return seen


def main() -> None:
    job = json.load(sys.stdin)
    # what is loaded when it is first used, before the hook is there
    for name in ("difflib", "encodings.cp437", "encodings.raw_unicode_escape", "numpy"):
        importlib.import_module(name)
    third_party()  # what other packages bring is asked for where a file is none of ours
    for i, path in enumerate(job["warm"]):
        outcome(path, os.path.join(out, f"warm{i}"))
    with open("/proc/self/statm") as statm:
        size = int(statm.read().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (size + HEADROOM, size + HEADROOM))
    sys.addaudithook(hook)
    for i, path in enumerate(job["files"]):
        heard.clear()
        used = resource.getrusage(resource.RUSAGE_SELF)
        limit = int(used.ru_utime + used.ru_stime) + CPU_SECONDS
        resource.setrlimit(resource.RLIMIT_CPU, (limit, resource.RLIM_INFINITY))
        seen = outcome(path, os.path.join(out, str(i)))
        seen["heard"] = list(heard)
        print(json.dumps(seen), flush=True)


if __name__ == "__main__":
    main()
