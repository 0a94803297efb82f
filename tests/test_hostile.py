# ruff: noqa: E501 - the reader is one string
"""Hostile, broken and odd files: refused with a word of ours, or read; nothing of them is run."""

from __future__ import annotations

import contextlib
import io
import json
import random
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import modelctl
from modelctl.errors import ModelctlError

# Reads every file in a process of its own with little memory, and reports each by a line of
# JSON. An audit hook notes what would be imported, compiled, started or opened for writing.
_READER = """
import json, resource, sys, time
import numpy, numpy.lib.stride_tricks  # what reading a view uses, loaded before the hook
b"a".decode("raw_unicode_escape")  # codecs are modules, loaded when they are first used
import modelctl
from modelctl.errors import ModelctlError
import modelctl.files, modelctl.pickles.writer, modelctl.formats.programs.export
import modelctl.formats.programs.torchscript, ast, mmap, tarfile, zlib, json, re, struct
from modelctl.formats.single import third_party
third_party()  # what other packages bring is looked for once, where no format of ours knows a file

heard = []
def hook(event, args):
    if event == "import":
        heard.append(f"import {args[0]}")
    elif event == "open":
        if isinstance(args[1], str) and set(args[1]) & set("wax+"):
            heard.append(f"open {args[0]} {args[1]}")
    elif event.split(".")[0] in ("subprocess", "socket", "ctypes", "pty", "ftplib", "urllib", "os") or event in ("exec", "compile", "marshal.loads", "pickle.find_class", "code.__new__"):
        heard.append(event)
resource.setrlimit(resource.RLIMIT_AS, (2 << 30, 2 << 30))
folder, names = sys.argv[1], json.load(sys.stdin)
sys.addaudithook(hook)
for name in names:
    heard.clear()
    levels, raised, size = [], None, 0
    started = time.perf_counter()
    try:
        with modelctl.open(f"{folder}/{name}") as ckpt:
            levels = sorted({one.level for one in ckpt.findings})
            for ref in ckpt.tensors().values():
                for piece in ref.chunks():
                    size += len(piece)
    except ModelctlError as e:
        raised = "ModelctlError"
        str(e)
    except BaseException as e:
        raised = repr(e)
    took = time.perf_counter() - started
    with open("/proc/self/status") as status:  # ru_maxrss would count the parent's, before exec
        peak = next(int(line.split()[1]) for line in status if line.startswith("VmHWM"))
    print(json.dumps([name, levels, raised, size, list(heard), took, peak]), flush=True)
"""

# Sharded checkpoints have tests of their own.
_INDEX = "index.json"


@pytest.fixture(scope="session")
def hostile(shared: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """The hostile set, generated once, and what reading each file gave."""
    folder = tmp_path_factory.mktemp("hostile")
    markers = tmp_path_factory.mktemp("markers")
    out = folder / "files"
    maker = [sys.executable, str(shared / "hostile" / "make_hostile.py"), "--out", str(out)]
    subprocess.run(
        [*maker, "--marker-dir", str(markers), "--no-torch"], check=True, capture_output=True
    )
    manifest = json.loads((out / "manifest.json").read_text())
    names = json.dumps([one["path"] for one in manifest])
    done = subprocess.run(
        [sys.executable, "-c", _READER, str(out)], input=names, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr[-2000:]
    lines = [json.loads(line) for line in done.stdout.splitlines()]
    assert [line[0] for line in lines] == [one["path"] for one in manifest]
    return {
        "manifest": [
            {**one, "levels": levels, "raised": raised, "size": size, "heard": heard, "took": took, "peak": peak}
            for one, (_, levels, raised, size, heard, took, peak) in zip(manifest, lines, strict=True)
        ],
        "markers": markers,
    }  # fmt: skip


def pick(hostile: dict[str, Any], which: Callable[[dict[str, Any]], bool]) -> list[dict[str, Any]]:
    found = [one for one in hostile["manifest"] if which(one)]
    assert found
    return found


def test_no_error_but_ours(hostile: dict[str, Any]) -> None:
    odd = pick(hostile, lambda one: True)
    assert [
        (one["id"], one["raised"]) for one in odd if one["raised"] not in (None, "ModelctlError")
    ] == []


def test_nothing_is_imported_or_run(hostile: dict[str, Any]) -> None:
    assert [(one["id"], one["heard"]) for one in hostile["manifest"] if one["heard"]] == []
    assert list(hostile["markers"].iterdir()) == []


def test_the_hook_hears(tmp_path: Path) -> None:
    """The same reader, with a library that does import what a file names, is caught."""
    spy = _READER.replace(
        "with modelctl.open", "__import__('this_is_no_module')\n        with modelctl.open"
    )
    (tmp_path / "x").write_bytes(b"x")
    done = subprocess.run(
        [sys.executable, "-c", spy, str(tmp_path)], input='["x"]', capture_output=True, text=True
    )
    assert json.loads(done.stdout)[4] == ["import this_is_no_module"]


def test_refused(hostile: dict[str, Any]) -> None:
    wanted = pick(hostile, lambda one: one["expect"] == "refuse")
    assert [one["id"] for one in wanted if one["raised"] != "ModelctlError"] == []


def test_clean_files_open(hostile: dict[str, Any]) -> None:
    clean = pick(hostile, lambda one: one["expect"] == "ok" and not one["path"].endswith(_INDEX))
    assert [(one["id"], one["raised"]) for one in clean if one["raised"]] == []
    assert [one["id"] for one in clean if "dangerous" in one["levels"]] == []


def test_dangerous_files_are_refused_or_found(hostile: dict[str, Any]) -> None:
    # one hides its pickle beside a clean one: only a look at every member finds it
    wanted = pick(
        hostile, lambda one: one["expect"] == "dangerous" and one["id"] != "z10-side-pickle"
    )
    silent = [one["id"] for one in wanted if not one["raised"] and "dangerous" not in one["levels"]]
    assert silent == []


def test_reading_is_bounded(hostile: dict[str, Any]) -> None:
    assert max(one["peak"] for one in hostile["manifest"]) < 512 << 10  # kB
    assert max(one["size"] for one in hostile["manifest"]) < 1 << 20


def test_a_huge_view_is_no_read(hostile: dict[str, Any]) -> None:
    bomb = pick(hostile, lambda one: one["id"] == "d09-stride0-bomb")
    assert [one["raised"] for one in bomb] == ["ModelctlError"]


# ------------------------------------------------------------------ damaged files


def read_all(path: Path) -> None:
    with modelctl.open(path) as ckpt:
        for ref in ckpt.tensors().values():
            ref.tobytes()


def small_files() -> dict[str, bytes]:
    import safetensors.torch
    import torch

    state = {"a.weight": torch.arange(6.0).reshape(2, 3).t(), "b": torch.tensor([True])}
    made = {}
    for name, new in (("zip", True), ("legacy", False)):
        buffer = io.BytesIO()
        torch.save({"model": state, "epoch": 3}, buffer, _use_new_zipfile_serialization=new)
        made[name] = buffer.getvalue()
    flat = {name: tensor.contiguous() for name, tensor in state.items()}
    made["safetensors"] = safetensors.torch.save(flat, {"format": "pt"})
    return made


@pytest.fixture(scope="module")
def small() -> dict[str, bytes]:
    return small_files()


KINDS = ("zip", "legacy", "safetensors")


@pytest.mark.parametrize("kind", KINDS)
def test_every_prefix_is_refused(kind: str, small: dict[str, bytes], tmp_path: Path) -> None:
    data, path = small[kind], tmp_path / "f"
    path.write_bytes(data)
    read_all(path)
    for end in range(len(data)):
        path.write_bytes(data[:end])
        with pytest.raises(ModelctlError):
            read_all(path)


@pytest.mark.parametrize("kind", KINDS)
def test_damaged_bytes(kind: str, small: dict[str, bytes], tmp_path: Path) -> None:
    """Never another exception than ours, whichever byte is wrong."""
    data, path = small[kind], tmp_path / "f"
    rng = random.Random(kind)
    for _ in range(1500):
        wrong = bytearray(data)
        for _ in range(rng.choice((1, 1, 1, 2, 5))):
            wrong[rng.randrange(len(data))] = rng.choice(
                (0, 1, 0x7F, 0x80, 0xFF, rng.randrange(256))
            )
        path.write_bytes(wrong)
        with contextlib.suppress(ModelctlError):
            read_all(path)


@pytest.mark.parametrize("kind", ["legacy", "safetensors"])
def test_every_bit_of_the_head(kind: str, small: dict[str, bytes], tmp_path: Path) -> None:
    data, path = small[kind], tmp_path / "f"
    for at in range(min(len(data), 900)):
        for bit in (0, 3, 6, 7):
            wrong = bytearray(data)
            wrong[at] ^= 1 << bit
            path.write_bytes(wrong)
            with contextlib.suppress(ModelctlError):
                read_all(path)
