"""Files of another kind under a checkpoint's name, and archives that hold something else."""

from __future__ import annotations

import gzip
import json
from collections.abc import Iterator
from typing import Any

from ..build.containers import BIAS, Entry, legacy, tar, torch_zip, zipped
from ..case import Case, Refused, one_file
from .clean import META, WEIGHTS


def cases() -> Iterator[Case]:
    for what, (data, why) in {
        "nothing": (b"", "an empty file"),
        "one byte": (b"P", "not a checkpoint"),
        "zeros": (bytes(4096), "not a checkpoint"),
        "a pointer of Git LFS": (
            b"version https://git-lfs.github.com/spec/v1\n",
            "Git LFS pointer",
        ),
        "a web page": (b"<!DOCTYPE html><html></html>", "a web page"),
        "a web page in capitals": (b"\n<HTML></HTML>", "a web page"),
        "a 7z archive": (b"7z\xbc\xaf'\x1c" + bytes(64), "a 7z archive"),
        "GGUF": (b"GGUF\3\0\0\0" + bytes(64), "a GGUF file"),
        "HDF5": (b"\x89HDF\r\n\x1a\n" + bytes(64), "an HDF5 file"),
        "a picture": (b"\x89PNG\r\n\x1a\n" + bytes(64), "not a checkpoint"),
        "text": (b"hello\n", "not a checkpoint"),
    }.items():
        yield one_file(what, data, Refused(why))
    yield from _gzipped()
    yield from _exports()
    yield from _cut_off()


def _gzipped() -> Iterator[Case]:
    yield one_file("gzip of no tar", gzip.compress(b"hello" * 200), Refused("one file, gzipped"))
    yield one_file(
        "gzip that is cut off",
        tar({"a.th": torch_zip()}, "w:gz")[:-20],
        Refused("not a gzipped tar"),
    )
    yield one_file(
        "gzip of a tar without a checkpoint",
        tar({"notes.txt": b"hello"}, "w:gz"),
        Refused("without a checkpoint"),
    )
    yield one_file(
        "gzip of a tar with a broken checkpoint",
        tar({"a.th": torch_zip()[:99]}, "w:gz"),
        Refused("end record is missing", None, -1),
    )
    config = {"config.json": b"{", "a.th": torch_zip()}
    yield one_file(
        "gzip of a tar with a broken config", tar(config, "w:gz"), Refused("no JSON", "config.json")
    )
    deep = {"config.json": b"[" * 10**5 + b"]" * 10**5, "a.th": torch_zip()}
    yield one_file(
        "gzip of a tar with a deep config", tar(deep, "w:gz"), Refused("no JSON", "config.json")
    )


def _exports() -> Iterator[Case]:
    member = "a/data/weights/m_weights_config.json"

    def export(what: str, why: str, config: Any, **fields: Any) -> Case:
        raw = config if isinstance(config, bytes) else json.dumps(config).encode()
        payload = Entry("a/data/weights/weight_0", BIAS, **fields)
        data = zipped(Entry("a/archive_format", b"pt2"), Entry(member, raw), payload)
        return one_file(f"an export with {what}", data, Refused(why, member))

    def weight(**changes: Any) -> Any:
        one = WEIGHTS["config"]["w"]
        meta = {"dtype": 7, **META, **changes.pop("meta", {})}
        return {"config": {"w": {**one, **changes, "tensor_meta": meta}}}

    strange = "not described as torch does"
    yield export("a config that is no JSON", "not the JSON", b"{")
    yield export("a config that is a list", "not the JSON", [])
    yield export("a payload that is missing", strange, weight(path_name="weight_9"))
    yield export("a payload elsewhere", strange, weight(path_name="../../archive_format"))
    yield export("a dtype that nobody knows", strange, weight(meta={"dtype": 99}))
    yield export("no sizes", strange, weight(meta={"sizes": [{}]}))
    yield export(
        "a tensor past its payload", "outside its storage", weight(meta={"sizes": [{"as_int": 5}]})
    )
    yield export("a negative stride", "of such strides", weight(meta={"strides": [{"as_int": -1}]}))
    yield export("a compressed payload", "is compressed", weight(), deflated=True)


def _cut_off() -> Iterator[Case]:
    whole = torch_zip()
    ends = {
        "in the first header": 20,
        "in data.pkl": 60,
        "in the middle": len(whole) // 2,
        "before the directory": whole.index(b"PK\1\2"),
        "in the directory": whole.index(b"PK\1\2") + 60,
        "before the end record": whole.index(b"PK\5\6"),
        "by a byte": len(whole) - 1,
    }
    for where, end in ends.items():
        yield one_file(
            f"a zip cut off {where}", whole[:end], Refused("end record is missing", None, -1)
        )
    old = legacy()
    plain = Refused("a plain pickle", error="UnsupportedError")
    yield one_file("a legacy file cut off in the magic number", old[:13], plain)
    yield one_file(
        "a legacy file cut off in the object", old[:200], Refused("cut off", "object", -1)
    )
    for where, end in {"in a storage": len(old) - 9, "by a byte": len(old) - 1}.items():
        expect = Refused("cut off", None, len(old) - len(BIAS) - 8)
        yield one_file(f"a legacy file cut off {where}", old[:end], expect)
