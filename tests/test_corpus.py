"""Real checkpoints that others wrote: what torch sees in each is what modelctl lists and copies."""

from __future__ import annotations

import hashlib
import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open

import modelctl
from modelctl.errors import AmbiguousError, LossError, ModelctlError, NoMatchError
from modelctl.files import save
from modelctl.formats.safetensors import Safetensors
from tests.conftest import SHARED

FACTS = sorted((SHARED / "corpus" / "facts").glob("*.json"))
BROKEN = {"c144", "c152"}
READ = {"torch-zip", "torch-legacy-magic", "safetensors"}


def load(path: Path) -> tuple[dict[str, Any], Path]:
    facts = json.loads(path.read_text())
    return facts, SHARED / "corpus" / facts["category"] / facts["file"]


def check(facts: dict[str, Any], ckpt: modelctl.Checkpoint) -> None:
    refs = ckpt.tensors()
    if "n_tensors" in facts:
        assert len(refs) == facts["n_tensors"]
    for sample in facts.get("samples", ()):
        ref = refs[sample["name"]]
        assert list(ref.shape) == sample["shape"]
        assert ref.dtype.name == sample["dtype"]
    if facts.get("tensors_sha256"):
        digest = hashlib.sha256()
        for name in sorted(refs):
            for piece in refs[name].chunks():
                digest.update(piece)
        assert digest.hexdigest() == facts["tensors_sha256"]


def by_id(path: Path) -> str:
    return path.stem


@pytest.mark.skipif(not FACTS, reason=f"there is no {SHARED / 'corpus'}")
def test_there_is_a_corpus() -> None:
    assert len(FACTS) > 50


@pytest.mark.parametrize("path", FACTS, ids=by_id)
def test_read(path: Path) -> None:
    facts, file = load(path)
    if facts["id"] in BROKEN:
        with pytest.raises(ModelctlError):
            modelctl.open(file)
        return
    with modelctl.open(file) as ckpt:
        assert "dangerous" not in {one.level for one in ckpt.findings}
        check(facts, ckpt)


def same(a: Any, b: Any) -> None:
    assert type(a) is type(b)
    if isinstance(a, torch.Tensor):
        assert (a.dtype, a.shape, a.stride(), a.requires_grad) == (
            *(b.dtype, b.shape, b.stride(), b.requires_grad),
        )
        raw = [t.detach().contiguous().flatten().view(torch.uint8) for t in (a, b)]
        assert torch.equal(*raw)
    elif isinstance(a, dict):
        assert list(a) == list(b)
        assert getattr(a, "_metadata", None) == getattr(b, "_metadata", None)
        for key in a:
            same(a[key], b[key])
    elif isinstance(a, list | tuple):
        assert len(a) == len(b)
        for one, other in zip(a, b, strict=True):
            same(one, other)
    elif isinstance(a, float):
        assert a == b or (a != a and b != b)
    else:
        assert a == b


@pytest.mark.parametrize("path", FACTS, ids=by_id)
def test_copy(path: Path, tmp_path: Path) -> None:
    facts, file = load(path)
    if facts.get("weights_only") != "accepted" or facts["container"] not in READ:
        pytest.skip("weights_only does not accept it")
    with modelctl.open(file) as ckpt:
        save(ckpt, tmp_path / "copy.pt")
    original = torch.load(file, weights_only=True, map_location="cpu")
    for mmap in (False, True):
        same(
            original,
            torch.load(tmp_path / "copy.pt", weights_only=True, map_location="cpu", mmap=mmap),
        )
    with modelctl.open(tmp_path / "copy.pt") as ckpt:
        check(facts, ckpt)


@pytest.mark.parametrize("path", [p for p in FACTS if p.stem not in BROKEN], ids=by_id)
def test_convert_to_zip(path: Path, tmp_path: Path) -> None:
    facts, file = load(path)
    with modelctl.open(file) as ckpt:
        if ckpt.outside is not None:
            with pytest.raises(LossError, match="would be lost"):
                save(ckpt, tmp_path / "copy.pt")
            return
        save(ckpt, tmp_path / "copy.pt")
    with modelctl.open(tmp_path / "copy.pt") as copy:
        check(facts, copy)


@pytest.mark.parametrize("path", [p for p in FACTS if p.stem not in BROKEN], ids=by_id)
def test_convert_to_safetensors(path: Path, tmp_path: Path) -> None:
    """Every tensor of the model, by the official reader; or a reason why not."""
    _, file = load(path)
    with modelctl.open(file) as ckpt:
        try:
            model = modelctl.convert(ckpt, weights_only=True)
        except (NoMatchError, AmbiguousError):
            found = ckpt.sections
            assert not found.models or not found.certain or not found.models[0].entries
            return
        refs = model.state_dict()
        lost = Safetensors().losses(model)
        if lost:
            assert all(REASONS.search(one) for one in lost)
            with pytest.raises(LossError):
                save(model, tmp_path / "copy.safetensors")
            return
        save(model, tmp_path / "copy.safetensors")
        with safe_open(tmp_path / "copy.safetensors", "pt") as official:
            names = set(official.keys())
            metadata = official.metadata()
            assert metadata["format"] == "pt"
            for name, ref in refs.items():
                tensor = official.get_tensor(name if name in names else metadata[name])
                assert list(tensor.shape) == list(ref.shape)
                raw = tensor.contiguous().flatten().view(torch.uint8).numpy().tobytes()
                assert raw == ref.tobytes(), name
            assert names <= set(refs)


REASONS = re.compile(r"share memory|which safetensors does not know|is a \w+ tensor")


@pytest.mark.parametrize(
    "path",
    [path for path in FACTS if json.loads(path.read_text())["container"] == "safetensors"],
    ids=by_id,
)
def test_safetensors(path: Path) -> None:
    _, file = load(path)
    with modelctl.open(file) as ckpt, safe_open(file, "pt") as official:
        refs = ckpt.tensors()
        assert sorted(refs) == sorted(official.keys())
        for name, ref in refs.items():
            tensor = official.get_tensor(name)
            assert ref.tobytes() == tensor.flatten().view(torch.uint8).numpy().tobytes()
