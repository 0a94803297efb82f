"""Indices that lie, and shards that are something else than files."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

from ..build.containers import BIAS, described, safetensors
from ..case import Case, Fifo, File, Folder, Link, Odd, Refused
from .clean import SHARDED

INDEX = "model.safetensors.index.json"
MAP = {"a": "one.safetensors", "b": "two.safetensors"}


def sharded(what: str, expect: Any, index: Any = None, **files: File) -> Case:
    """The clean shards with another index, or other files (``one``, ``two``)."""
    others = {f"{name}.safetensors": content for name, content in files.items()}
    raw = index if isinstance(index, bytes) else json.dumps(index).encode()
    changed = {INDEX: SHARDED[INDEX] if index is None else raw}
    return Case(what, {**SHARDED, **changed, **others}, expect, INDEX)


def cases() -> Iterator[Case]:
    yield from _indices()
    yield from _files()
    yield from _folders()


def _indices() -> Iterator[Case]:
    def mapped(**shards: Any) -> Any:
        return {"metadata": {"total_size": 32}, "weight_map": {**MAP, **shards}}

    for shard in (
        "../../../etc/hostname",
        "/etc/hostname",
        "sub/two.safetensors",
        "a\\b",
        "",
        ".",
        "..",
        "x\0y",
        "\ud800.safetensors",
        INDEX,
        7,
        None,
        ["one.safetensors"],
    ):
        yield sharded(
            f"a shard called {shard!r}", Refused("not a plain file name"), mapped(b=shard)
        )
    yield sharded(
        "a shard that is missing",
        Refused("no such file", error="ModelctlError"),
        mapped(b="nine.safetensors"),
    )
    yield sharded(
        "a tensor in the other shard",
        Refused("does not hold it"),
        mapped(a="two.safetensors", b="one.safetensors"),
    )
    yield sharded("a tensor in no shard", Refused("does not hold it"), mapped(c="one.safetensors"))
    yield sharded(
        "a tensor that is not listed",
        Odd("does not put there"),
        {"weight_map": {"a": "one.safetensors", "b": "two.safetensors"}},
        two=safetensors({"b": described(), "c": described(begin=16, end=32)}, BIAS * 2),
    )
    yield sharded(
        "a tensor in both shards",
        Odd("does not put there"),
        None,
        two=safetensors({"b": described(), "a": described(begin=16, end=32)}, BIAS * 2),
    )
    yield sharded(
        "another size in all",
        Odd("says 99 bytes"),
        {"metadata": {"total_size": 99}, "weight_map": MAP},
    )
    yield sharded("a map that is a list", Refused("no weight_map"), {"weight_map": ["a"]})
    yield sharded("no map", Refused("no weight_map"), {"metadata": {}})
    yield sharded(
        "metadata that are a list", Refused("metadata"), {"metadata": [], "weight_map": MAP}
    )
    yield sharded(
        "a key twice",
        Refused("a key twice"),
        b'{"weight_map":{"a":"one.safetensors","a":"two.safetensors"}}',
    )
    yield sharded("no end", Refused("no JSON"), SHARDED[INDEX][:-1])
    yield sharded(
        "100,000 levels", Refused("no JSON"), b'{"weight_map":' + b"[" * 10**5 + b"]" * 10**5 + b"}"
    )
    yield sharded(
        "text that is not UTF-8", Refused("no JSON"), b'{"weight_map":{"\xff":"one.safetensors"}}'
    )


def _files() -> Iterator[Case]:
    nothing = "not a regular file"
    yield sharded(
        "a shard that is a named pipe", Refused(nothing, error="ModelctlError"), two=Fifo()
    )
    yield sharded("a shard that is a folder", Refused("no checkpoint"), two=Folder())
    yield sharded(
        "a shard that is a link",
        Refused("symbolic link", error="ModelctlError"),
        two=Link("one.safetensors"),
    )
    yield sharded(
        "a shard that is a link to a device",
        Refused("symbolic link", error="ModelctlError"),
        two=Link("/dev/zero"),
    )
    yield sharded("a shard that is an index", Refused("no checkpoint"), two=SHARDED[INDEX])
    yield sharded("an empty shard", Refused("an empty file"), two=b"")
    yield sharded(
        "a shard that is cut off",
        Refused("the file at", "header"),
        two=SHARDED["two.safetensors"][:-1],
    )
    cache: dict[str, File] = {
        f"models--a--b/blobs/{i}": data for i, data in enumerate(SHARDED.values())
    }
    here = "models--a--b/snapshots/x"
    links: dict[str, File] = {
        f"{here}/{file}": Link(f"../../blobs/{i}") for i, file in enumerate(SHARDED)
    }
    out = {
        **cache,
        **links,
        f"{here}/two.safetensors": Link("../../../secret"),
        "secret": SHARDED["two.safetensors"],
    }
    yield Case(
        "a link out of a cache of the hub",
        out,
        Refused("symbolic link", error="ModelctlError"),
        f"{here}/{INDEX}",
    )
    other = {
        **cache,
        **links,
        f"{here}/two.safetensors": Link("../../../models--c--d/blobs/2"),
        "models--c--d/blobs/2": SHARDED["two.safetensors"],
    }
    yield Case(
        "a link into another cache",
        other,
        Refused("symbolic link", error="ModelctlError"),
        f"{here}/{INDEX}",
    )


def _folders() -> Iterator[Case]:
    yield Case(
        "a folder without a checkpoint",
        {"notes.txt": b"hello"},
        Refused("without a checkpoint"),
        ".",
    )
    yield Case("an empty folder", {"sub": Folder()}, Refused("without a checkpoint"), "sub")
    several: dict[str, File] = {
        "a.safetensors": SHARDED["one.safetensors"],
        "b.safetensors": SHARDED["two.safetensors"],
    }
    yield Case(
        "a folder with two checkpoints",
        several,
        Refused("several checkpoints", error="SeveralError"),
        ".",
    )
    lonely = {"model-00001-of-00002.safetensors": SHARDED["one.safetensors"]}
    yield Case("a folder with a shard and no index", lonely, Refused("without their index"), ".")
    nowhere = "no such file"
    yield Case(
        "a link that leads nowhere",
        {"x.pt": Link("gone")},
        Refused(nowhere, error="ModelctlError"),
        "x.pt",
    )
    yield Case(
        "a link to itself", {"x.pt": Link("x.pt")}, Refused("", error="ModelctlError"), "x.pt"
    )
    yield Case(
        "a named pipe",
        {"x.pt": Fifo()},
        Refused("not a regular file", error="ModelctlError"),
        "x.pt",
    )
    yield Case(
        "a device",
        {"x.pt": Link("/dev/zero")},
        Refused("not a regular file", error="ModelctlError"),
        "x.pt",
    )
