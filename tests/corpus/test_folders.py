"""Folders that torch's ranks, DeepSpeed, transformers, accelerate and peft wrote: every tensor, and
what they become."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import modelctl as mc
from modelctl.surgery.convert import convert
from tests.conftest import SHARED

FOLDERS = SHARED / "corpus" / "folders"
NAMES = (
    *("dcp-one-rank", "dcp-fsdp2", "dcp-zstd", "dcp-hf-shards", "fsdp2-ranks", "fsdp1-sharded"),
    *("zero-s1_bf16", "zero-s3_fp32", "hf-trainer", "accelerate", "peft-adapter"),
)


@pytest.fixture(params=NAMES)
def folder(request: pytest.FixtureRequest) -> Path:
    path = FOLDERS / request.param
    if not path.is_dir():
        pytest.skip(f"there is no {path}")
    if request.param == "dcp-zstd":
        pytest.importorskip("zstandard")
    return path


@pytest.fixture
def facts(folder: Path) -> dict[str, Any]:
    found = json.loads((FOLDERS / "facts.json").read_text())
    if folder.name not in found:
        pytest.skip("nothing but the tensors that are converted is known of it")
    return found[folder.name]["tensors"]


def flat(ckpt: mc.Checkpoint) -> dict[str, Any]:
    return {text.replace("[", ".").replace("]", ""): r for text, r in of_paths(ckpt)}


def of_paths(ckpt: mc.Checkpoint) -> Iterator[tuple[str, Any]]:
    for path, ref in ckpt.tensors().items():
        yield ".".join(map(str, path)) if isinstance(path, tuple) else str(path), ref


def test_every_tensor_is_what_its_framework_reads(folder, facts):
    with mc.open(folder) as ckpt:
        found = flat(ckpt)
        names = {name: name for name in found}
        for name in found:  # without the key of the section
            names.setdefault(name.partition(".")[2], name)
        for name, (dtype, shape, sha256) in facts.items():
            ref = found[names[name]]
            assert (ref.dtype.name, list(ref.shape)) == (dtype, shape), name
            assert hashlib.sha256(ref.tobytes()).hexdigest() == sha256, name


@pytest.mark.parametrize("to", ["pt", "dcp", "safetensors"])
def test_it_is_converted_and_back(folder, tmp_path, to):
    with mc.open(folder) as ckpt:
        part = convert(ckpt, weights_only=True) if to == "safetensors" else ckpt
        first = tmp_path / f"out.{to}"
        mc.save(part, first, to=to if to == "dcp" else None)
        before = {name: (ref.spec, ref.tobytes()) for name, ref in flat(part).items()}
    with mc.open(first) as ckpt:
        assert {name: (ref.spec, ref.tobytes()) for name, ref in flat(ckpt).items()} == before
        back = tmp_path / ("back.pt" if to != "pt" else "back")
        mc.save(ckpt, back, to="dcp" if to == "pt" else None)
    with mc.open(back) as ckpt:
        assert {name: (ref.spec, ref.tobytes()) for name, ref in flat(ckpt).items()} == before
